"""The switches of speed that have no test of their own elsewhere: other code, the same results; and what cannot go together."""

import copy

import pytest
import torch
from timm.layers import LayerScale

from fastssl.core.optimizers import OptimConfig, build_optimizer
from fastssl.methods.moco_v3 import MoCoV3Config as Config
from fastssl.models.activation_checkpointing import checkpoint_blocks
from fastssl.models.backbones import build_backbone
from fastssl.models.model_config import ModelConfig
from fastssl.pretraining.build import has_compiler
from fastssl.pretraining.step import DDPWrapper, Step
from pipelines.augment.recipe import Recipe
from pipelines.loading.data_config import DataConfig
from pipelines.loading.loader import open_loader
from pipelines.streaming.batch_stream import work_stream
from shards.errors import UserError
from tests.fastssl.tiny import Plain, make_method, make_views


def trained(cfg: OptimConfig) -> list[torch.Tensor]:
    """The weights after three steps on a quadratic."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 4), (5,))]
    optimizer = build_optimizer(weights, cfg)
    for _ in range(3):
        sum(w.square().sum() for w in weights).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [weight.detach() for weight in weights]


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_implementations_of_optimisers_agree(name):
    expected = trained(OptimConfig(name=name, lr=0.1))
    for how in ("fused", "foreach", "loop"):
        found = trained(OptimConfig(name=name, lr=0.1, implementation=how))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)
        made = build_optimizer(
            [torch.nn.Parameter(torch.ones(2))], OptimConfig(name=name, implementation=how)
        )
        assert bool(made.defaults["fused"]) is (how == "fused")
        assert bool(made.defaults["foreach"]) is (how == "foreach")


def test_lars_has_one_implementation():
    for how in ("auto", "foreach"):
        OptimConfig(name="lars", implementation=how)
    with pytest.raises(UserError, match=r"optim\.implementation is fused, but lars"):
        OptimConfig(name="lars", implementation="fused")


@pytest.mark.parametrize("how", ["foreach", "loop"])
def test_averages_agree(how):
    cfg = Config(dim=5, hidden_dim=7, ema=how)
    method = make_method(Plain(), cfg)
    before = [p.clone() for p in method.teacher_backbone.parameters()]
    with torch.no_grad():
        for parameter in method.backbone.parameters():
            parameter += 1
    method.update_teacher(0.75)
    for old, new, student in zip(
        before, method.teacher_backbone.parameters(), method.backbone.parameters(), strict=True
    ):
        torch.testing.assert_close(new, 0.75 * old + 0.25 * student)


def tiny_vit(residual, **changes):
    torch.manual_seed(0)
    return build_backbone(ModelConfig(backbone="test_vit", residual=residual, **changes), 32)


def streams(vit, images, enabled=True):
    """What enters each block, and the features, under bf16 autocast where `enabled`."""
    seen = []
    for part in vit.blocks:
        part.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        return seen, vit(images)


@pytest.mark.parametrize("layer_scale", [False, True])
def test_the_residual_stream_keeps_the_precision_that_is_asked_for(layer_scale):
    """Also behind LayerScale, whose float32 factors would widen it again."""
    images = torch.randn(3, 3, 32, 32)
    found = {}
    for residual in ("fp32", "autocast"):
        vit = tiny_vit(residual)
        if layer_scale:
            for block in vit.blocks:
                block.ls1 = block.ls2 = LayerScale(vit.embed_dim, init_values=0.3)
        seen, found[residual] = streams(vit, images)
        assert {x.dtype for x in seen} == {torch.bfloat16 if residual == "autocast" else torch.float32}
        assert found[residual].dtype == torch.float32
    error = (found["autocast"] - found["fp32"]).norm() / found["fp32"].norm()
    assert 1e-4 < error < 0.02  # bf16 has 8 bits: 2^-9 = 0.002 a rounding


def test_the_residual_stream_is_left_alone_outside_of_autocast():
    images = torch.randn(2, 3, 32, 32)
    wide, narrow = tiny_vit("fp32"), tiny_vit("autocast")
    assert list(narrow.state_dict()) == list(wide.state_dict())
    seen, features = streams(narrow, images, enabled=False)
    assert {x.dtype for x in seen} == {torch.float32}
    torch.testing.assert_close(features, wide(images), rtol=0, atol=0)


def test_a_copy_of_the_backbone_has_the_narrow_stream_too():
    """The teacher is one."""
    seen, _ = streams(copy.deepcopy(tiny_vit("autocast")), torch.randn(2, 3, 32, 32))
    assert {x.dtype for x in seen} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["blocks", "selective"])
def test_the_narrow_stream_goes_with_checkpointing(kind):
    images, gradients = torch.randn(2, 3, 32, 32), []
    for checkpointing in ("none", kind):
        vit = tiny_vit("autocast")
        checkpoint_blocks(vit, checkpointing, "test_vit")
        with torch.autocast("cpu", torch.bfloat16):
            vit(images).square().sum().backward()
        gradients.append([p.grad for p in vit.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.skipif(not has_compiler(torch.device("cpu")), reason="no C++ compiler")
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # the compiler's own look
def test_a_compiled_block_with_the_narrow_stream_is_one_graph():
    vit, images = tiny_vit("autocast"), torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        expected = vit(images)
        for block in vit.blocks:
            block.compile(fullgraph=True)
        found = vit(images)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_the_narrow_stream_is_for_vits():
    with pytest.warns(UserWarning, match=r"model\.residual has no effect on resnet10_w32"):
        build_backbone(ModelConfig(backbone="resnet10_w32", residual="autocast"), 32)


def test_attention_written_out_agrees():
    torch.manual_seed(0)
    sdpa = build_backbone(ModelConfig(backbone="moco_vit_small", patch_size=16), 32).eval()
    explicit = build_backbone(
        ModelConfig(backbone="moco_vit_small", patch_size=16, attention="explicit"), 32
    ).eval()
    explicit.load_state_dict(sdpa.state_dict())
    flags = [{m.fused_attn for m in vit.modules() if hasattr(m, "fused_attn")} for vit in (sdpa, explicit)]
    assert flags == [{True}, {False}]
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(sdpa(images), explicit(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["foreach", "loop", "fused"])
def test_no_implementation_applies_an_unusable_step(how):
    """As on a GPU, where the fused one decides on the device and the others cannot."""
    method = make_method(Plain())
    optimizer = build_optimizer(method.parameters(), OptimConfig(lr=0.1, implementation=how))
    step = Step(method, DDPWrapper(method), optimizer, torch.device("cpu"))
    step.gradients(make_views())
    before = [p.detach().clone() for p in method.backbone.parameters()]
    step.device = torch.device("cuda")
    step._apply(torch.tensor(True))
    for old, new in zip(before, method.backbone.parameters(), strict=True):
        assert torch.equal(old, new)
    step._apply(torch.tensor(False))
    assert any(
        not torch.equal(old, new) for old, new in zip(before, method.backbone.parameters(), strict=True)
    )


def test_a_stream_beside_the_steps_or_the_steps_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "its own")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the step's")
    cuda = torch.device("cuda", 0)
    assert [work_stream(cuda, own) for own in (True, False)] == ["its own", "the step's"]
    assert work_stream(torch.device("cpu"), True) is None


def test_the_side_stream_is_a_setting_of_the_loader(shards, monkeypatch):
    asked = []
    monkeypatch.setattr("pipelines.loading.slots.work_stream", lambda device, own: asked.append(own))
    for own in (True, False):
        data = DataConfig(shards=str(shards), side_stream=own, threads=1)
        loader = open_loader(data.open(), Recipe(size=16), batch=4, seed=0, options=data.options())
        next(loader.epoch(0))
    assert asked == [True, False]
