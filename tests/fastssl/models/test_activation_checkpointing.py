"""Recomputed activations: the same gradients, draws and running statistics, for less memory."""

import shutil

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastssl.models.activation_checkpointing import checkpoint_blocks, repeated_blocks
from fastssl.models.backbones import build_backbone
from fastssl.models.batch_norm import frozen_statistics
from fastssl.models.model_config import ModelConfig
from shards.errors import UserError


def backward(name: str, kind: str, drop_path: float = 0.0, bf16: bool = False, compiled: bool = False):
    """(gradients, buffers, floating-point operations) of one training pass."""
    torch.manual_seed(0)
    backbone = build_backbone(ModelConfig(backbone=name, drop_path=drop_path), 32)
    checkpoint_blocks(backbone, kind, name)  # pyright: ignore[reportArgumentType]
    if compiled:
        for block in repeated_blocks(backbone):
            block.compile()
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    with FlopCounterMode(display=False) if not compiled else torch.enable_grad() as counter:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            features = backbone(images)
        features.float().square().sum().backward()
    grads = {n: p.grad for n, p in backbone.named_parameters() if p.grad is not None}
    flops = counter.get_total_flops() if isinstance(counter, FlopCounterMode) else 0
    return grads, dict(backbone.named_buffers()), flops


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize(
    ("name", "drop_path", "bf16"),
    [
        ("test_vit", 0.0, False),
        ("test_vit", 0.3, True),
        ("moco_vit_conv_small", 0.0, False),
        ("resnet10_w32", 0.3, False),
        ("convnext_atto", 0.3, False),
        ("efficientnet_b0", 0.0, False),
    ],
)
def test_recomputing_changes_no_bit_of_gradients_and_statistics(
    name: str, drop_path: float, bf16: bool
) -> None:
    grads, buffers, _ = backward(name, "none", drop_path, bf16)
    for kind in ("blocks", "selective"):
        again, buffers_again, _ = backward(name, kind, drop_path, bf16)
        assert_same(again, grads)
        assert_same(buffers_again, buffers)


@pytest.mark.parametrize("name", ["test_vit", "resnet10_w32"])
def test_selective_repeats_no_matrix_product(name: str) -> None:
    kept, selective, blocks = (backward(name, kind)[2] for kind in ("none", "selective", "blocks"))
    assert selective == kept
    assert blocks > 1.2 * kept


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "default"
)  # the compiler hides warnings of its own, which as errors would stop it
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU needs g++")
@pytest.mark.parametrize("kind", ["blocks", "selective"])
@pytest.mark.parametrize("name", ["test_vit", "resnet10_w32"])
def test_compiled_blocks_recompute_alike(name: str, kind: str) -> None:
    expected, buffers, _ = backward(name, "none", compiled=True)
    torch.compiler.reset()
    found, buffers_again, _ = backward(name, kind, compiled=True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(buffers_again, buffers)


def test_blocks_of_each_family() -> None:
    def count(name: str) -> int:
        with torch.device("meta"):
            return len(repeated_blocks(build_backbone(ModelConfig(backbone=name), 224)))

    assert count("vit_tiny_patch16_224") == 12
    assert count("resnet50") == 3 + 4 + 6 + 3
    assert count("convnext_tiny") == 3 + 3 + 9 + 3
    assert count("vgg11") == 0


def test_a_backbone_without_blocks_is_refused() -> None:
    with torch.device("meta"):
        backbone = build_backbone(ModelConfig(backbone="vgg11"), 32)
    with pytest.raises(
        UserError, match=r"vgg11 has no blocks whose activations could be recomputed: set .* to none"
    ):
        checkpoint_blocks(backbone, "blocks", "vgg11")


@pytest.mark.parametrize("momentum", [0.1, None])
def test_frozen_statistics(momentum: float | None) -> None:
    norm = nn.BatchNorm1d(3, momentum=momentum)
    norm(torch.rand(4, 3))
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    images = torch.rand(4, 3)
    with frozen_statistics(norm):
        frozen = norm(images)
    assert_same(dict(norm.named_buffers()), before)
    assert norm.momentum == momentum
    assert torch.equal(norm(images), frozen)  # by the batch in both
    assert int(norm.num_batches_tracked) == 2  # pyright: ignore[reportArgumentType]
