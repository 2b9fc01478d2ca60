"""Whole models with BatchNorm in groups: compiled, recomputed, on several ranks, on a GPU."""

import copy
import shutil
import warnings

import pytest
import timm
import torch
from torch import Tensor, nn

from fastssl.core.distributed import Dist
from fastssl.models.activation_checkpointing import checkpoint_blocks, repeated_blocks
from fastssl.models.backbones import build_backbone
from fastssl.models.grouped_batch_norm import GroupedBatchNorm, commit_statistics, group_batch_norm
from fastssl.models.model_config import ModelConfig
from fastssl.pretraining.build import freeze_unused
from tests.fastssl.tiny import Normed, make_method
from tests.gloo import run_ranks

compiles = pytest.mark.filterwarnings("default")  # the compiler hides warnings of its own
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU needs g++")


def draw(num: int, size: int = 32, seed: int = 1) -> Tensor:
    return torch.rand(num, 3, size, size, generator=torch.Generator().manual_seed(seed))


def resnet18() -> nn.Module:
    torch.manual_seed(0)
    # A last BatchNorm of a block that starts at 0 would hide the block.
    return timm.create_model("resnet18", num_classes=0, zero_init_last=False)


def test_a_resnet18_equals_itself_on_each_group() -> None:
    plain = resnet18().double()
    model = copy.deepcopy(plain)
    group_batch_norm(model, 4)
    assert sum(isinstance(m, GroupedBatchNorm) for m in model.modules()) == 20
    images = draw(12).double()
    output = model(images)
    output.square().sum().backward()
    commit_statistics(model)
    running = []
    for part in images.split(4):
        alone = copy.deepcopy(plain)
        expected = alone(part)
        torch.testing.assert_close(output[: len(expected)], expected, rtol=1e-10, atol=1e-10)
        output = output[len(expected) :]
        expected.square().sum().backward()
        running.append({n: b.double() for n, b in alone.named_buffers()})
        for sum_, grad in zip(plain.parameters(), alone.parameters(), strict=True):
            sum_.grad = grad.grad if sum_.grad is None else sum_.grad + grad.grad
    for (name, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-8, atol=1e-10, msg=name)
    # The rule is linear: the average of what each group alone would have made of the statistics.
    for name, value in model.state_dict().items():
        if name in running[0]:
            mean = torch.stack([r[name] for r in running]).mean(0)
            torch.testing.assert_close(value.double(), mean, rtol=1e-10, atol=1e-12, msg=name)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 3, 1)
        )
        self.norm = nn.BatchNorm2d(3)

    def forward(self, images: Tensor) -> Tensor:
        return images + self.norm(self.body(images))


class Blocks(nn.Module):
    """A backbone that compiles soon."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, images: Tensor) -> Tensor:
        # Another size, as of local views: the compiler then treats height and width as variable.
        return self.blocks(images).mean((2, 3)) + self.blocks(images[..., :6, :6]).mean((2, 3))


def backward(name: str, kind: str, compiled: bool = False) -> dict[str, Tensor]:
    """Gradients and buffers, those before the commit included, of one training pass."""
    torch.manual_seed(0)
    backbone = Blocks() if name == "blocks" else build_backbone(ModelConfig(backbone=name), 32)
    backbone = backbone.double()
    group_batch_norm(backbone, 2)
    checkpoint_blocks(backbone, kind, name)  # pyright: ignore[reportArgumentType]
    if compiled:
        for block in repeated_blocks(backbone):
            block.compile()
    backbone(draw(6, 32 if name != "blocks" else 8).double()).square().sum().backward()
    found = {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}
    found |= {f"waiting {name}": buffer.clone() for name, buffer in backbone.named_buffers()}
    commit_statistics(backbone)
    return found | dict(backbone.named_buffers())


@pytest.mark.parametrize("name", ["resnet10_w32", "efficientnet_b0"])
def test_recomputing_counts_no_group_twice(name: str) -> None:
    expected = backward(name, "none")
    assert {int(value) for key, value in expected.items() if key.endswith("num_groups")} == {0, 3}
    for kind in ("blocks", "selective"):
        found = backward(name, kind)
        assert found.keys() == expected.keys()
        assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


@compiles
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_as_batch_norm(dtype: torch.dtype, compiled: bool) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    net = copy.deepcopy(plain)
    group_batch_norm(net, 4)
    run = torch.compile(net, backend="eager", fullgraph=True) if compiled else net
    images = draw(8, 6)
    with torch.autocast("cpu", dtype=dtype):
        output = run(images)
        expected = torch.cat([plain(part) for part in images.split(4)])
    assert output.dtype == expected.dtype == dtype
    torch.testing.assert_close(output, expected, rtol=1e-2, atol=1e-2)
    output.float().square().sum().backward()
    expected.float().square().sum().backward()
    commit_statistics(net)
    assert net[1].running_mean.dtype == torch.float32
    torch.testing.assert_close(net[1].weight.grad, plain[1].weight.grad, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(net[1].bias.grad, plain[1].bias.grad, rtol=1e-2, atol=1e-1)


@pytest.mark.slow
@compiles
@needs_compiler
@pytest.mark.parametrize("kind", ["none", "blocks", "selective"])
def test_compiled_blocks_count_alike(kind: str) -> None:
    torch.compiler.reset()
    expected = backward("blocks", "none")
    found = backward("blocks", kind, compiled=True)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert {
        int(value) for key, value in found.items() if key.startswith("waiting") and key.endswith("num_groups")
    } == {6}
    torch.compiler.reset()


@pytest.mark.slow
@compiles
@needs_compiler
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_inductor_on_a_small_net(memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)
    )
    net = net.double()
    group_batch_norm(net, 4)
    compiled = copy.deepcopy(net)
    run = torch.compile(compiled, fullgraph=True)
    images = draw(12, 9).double().to(memory_format=memory_format)
    output, expected = run(images), net(images)
    assert output.stride() == expected.stride()
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    for one, result in ((net, expected), (compiled, output)):
        result.pow(3).sum().backward()
        commit_statistics(one)
    for (name, one), other in zip(compiled.named_parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-9, msg=name)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], value, rtol=1e-9, atol=1e-9, msg=name)
    torch.compiler.reset()


def _freeze_unused(here: Dist) -> tuple[list[str], bool]:
    method = make_method(Normed())
    group_batch_norm(method, 4)
    start = copy.deepcopy(method.state_dict())
    waiting = [buffer for name, buffer in method.named_buffers() if name.endswith("num_groups")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        names = freeze_unused(method, [(3, 4, 4)] * 2, here)
    same = all(torch.equal(value, start[name]) for name, value in method.state_dict().items())
    return names, same and not any(waiting)


def test_the_search_for_unused_weights_fills_a_group() -> None:
    assert run_ranks(_freeze_unused) == [([], True), ([], True)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_on_a_gpu_without_waiting_for_it(memory_format: torch.memory_format, dtype: torch.dtype) -> None:
    plain = resnet18().cuda().to(memory_format=memory_format)
    model = copy.deepcopy(plain)
    group_batch_norm(model, 8)
    images = draw(24).cuda().to(memory_format=memory_format)
    applied = torch.ones((), dtype=torch.bool, device="cuda")
    for number in range(2):
        torch.cuda.set_sync_debug_mode("error" if number else "default")
        try:
            with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
                output = model(images)
            output.float().square().sum().backward()
            commit_statistics(model, applied)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
        expected = torch.cat([plain(part) for part in images.split(8)])
    # TF32 and bf16 round products of 512 channels and more.
    torch.testing.assert_close(output.float(), expected.float(), rtol=0.1, atol=0.1)
    assert {int(m.num_batches_tracked) for m in model.modules() if isinstance(m, GroupedBatchNorm)} == {2}  # pyright: ignore[reportArgumentType]
