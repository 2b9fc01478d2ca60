"""DINO's head, and what changes over a run: momentum, temperature, learning rate and weight decay."""

import math

import pytest
import torch
from torch import nn

from fastssl.core.optimizers import build_optimizer, set_schedules, trained_groups
from fastssl.core.schedules import Clock
from fastssl.methods.dino import DINO, DINOConfig, DINOHead, WeightNormLinear
from fastssl.models.backbones import build_backbone
from fastssl.models.model_config import ModelConfig
from fastssl.pretraining.run_config import load
from tests.fastssl.methods.test_dino import SMALL, Pooled
from tests.needs import module

# Head


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("unit_length", [True, False])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_lightly_s_head_with_our_weights_gives_the_same(unit_length: bool, batch_norm: bool) -> None:
    cfg = DINOConfig(
        out_dim=11, hidden_dim=7, bottleneck_dim=5, norm_last_layer=unit_length, batch_norm=batch_norm
    )
    ours = DINOHead(6, cfg)
    theirs = module("lightly.models.modules.heads").DINOProjectionHead(
        6, 7, 5, 11, batch_norm, norm_last_layer=unit_length
    )
    state = {
        name.replace("mlp.", "layers."): value for name, value in ours.mlp.state_dict(prefix="mlp.").items()
    }
    # Before a BatchNorm theirs has no bias, and ours starts at 0.
    state = {name: value for name, value in state.items() if name in theirs.state_dict()}
    state["last_layer.weight_v"] = ours.last_layer.weight
    length = torch.ones(11, 1) if ours.last_layer.length is None else 2 * torch.rand(11, 1)
    state["last_layer.weight_g"] = length
    if ours.last_layer.length is not None:
        ours.last_layer.length.data.copy_(length)
    theirs.load_state_dict(state)
    features = torch.randn(9, 6)
    torch.testing.assert_close(ours(features), theirs(features))
    assert (ours.last_layer.length is None) == unit_length
    trained = {name.split(".")[-1] for name, p in theirs.named_parameters() if p.requires_grad}
    assert ("weight_g" in trained) != unit_length


def test_the_published_head() -> None:
    with torch.device("meta"):
        head = DINOHead(384, DINOConfig())
    shapes = {name: tuple(p.shape) for name, p in head.named_parameters()}
    assert shapes == {
        "mlp.0.weight": (2048, 384),
        "mlp.0.bias": (2048,),
        "mlp.2.weight": (2048, 2048),
        "mlp.2.bias": (2048,),
        "mlp.4.weight": (256, 2048),
        "mlp.4.bias": (256,),
        "last_layer.weight": (65536, 256),
    }
    assert [type(layer) for layer in head.mlp] == [nn.Linear, nn.GELU, nn.Linear, nn.GELU, nn.Linear]


def test_initial_values_of_the_head() -> None:
    torch.manual_seed(0)
    head = DINOHead(384, DINOConfig(out_dim=512))
    for layer in head.mlp:
        if isinstance(layer, nn.Linear):
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.01)
            assert not layer.bias.any()
    # PyTorch's linear layer: uniform within 1 / sqrt(256).
    assert 0.99 / 16 < head.last_layer.weight.abs().max() <= 1 / 16
    assert head.last_layer.weight.std().item() == pytest.approx(1 / 16 / math.sqrt(3), rel=0.01)


def test_the_length_of_a_row_of_the_last_layer_does_not_count() -> None:
    layer, rows = WeightNormLinear(5, 3, unit_length=True), torch.randn(4, 5)
    before = layer(rows)
    with torch.no_grad():
        layer.weight.mul_(torch.tensor([[0.1], [3.0], [70.0]]))
    torch.testing.assert_close(layer(rows), before)
    cosines = nn.functional.cosine_similarity(rows[:, None], layer.weight[None], dim=2)
    torch.testing.assert_close(before, cosines * rows.norm(dim=1, keepdim=True))


# Schedules


def test_the_teacher_s_momentum_is_that_of_the_progress_before_the_step() -> None:
    method = DINO(Pooled(), SMALL)
    total = 50
    expected = [1 - 0.004 * (1 + math.cos(math.pi * step / total)) / 2 for step in range(total)]
    found = [method.teacher_momentum(Clock(step, total)) for step in range(total)]
    assert found == pytest.approx(expected, rel=1e-15)
    assert (found[0], found[25]) == pytest.approx((0.996, 0.998))
    assert found[-1] < 1


def test_the_teacher_s_temperature_rises_over_its_epochs() -> None:
    method = DINO(Pooled(), SMALL)
    for step, expected in ((0, 0.04), (10, 0.045), (30, 0.055), (59, 0.0695), (60, 0.07), (5000, 0.07)):
        method.clock = Clock(step, 6000, 2)
        assert method.teacher_temperature() == pytest.approx(expected)
    at_once = DINO(Pooled(), DINOConfig(out_dim=11, hidden_dim=7, bottleneck_dim=5, warmup_teacher_epochs=0))
    assert at_once.teacher_temperature() == 0.07


def test_the_published_optimizer_is_the_default_for_vits() -> None:
    cfg = load(None, ["--method", "dino", "--model.backbone", "vit_small_patch16_224"]).config
    assert (cfg.model.drop_path, cfg.model.stop_grad_conv1) == (0.1, False)
    assert (cfg.recipe.num_views, cfg.recipe.local_views, cfg.recipe.local_size) == (2, 8, 96)
    method = DINO(build_backbone(ModelConfig(backbone="test_vit", stop_grad_conv1=False), 32), SMALL)
    groups = trained_groups(method.param_groups())
    optimizer = build_optimizer(groups, cfg.optim)
    assert isinstance(optimizer, torch.optim.AdamW)
    names = {id(p): name for name, p in method.named_parameters()}
    decayed, plain = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    student = {name for name in names.values() if not name.startswith("teacher_")}
    assert decayed | plain == student
    assert not decayed & plain
    assert {name for name in student if name.endswith("bias") or "norm" in name} == plain
    assert {"backbone.pos_embed", "head.last_layer.weight"} <= decayed
    assert [group["clip"] for group in optimizer.param_groups] == [3.0, 3.0]
    # 100 epochs of 10 steps at batch 1024: 10 epochs of warm-up to 4 * 5e-4, and at the end 1e-6.
    for step, rate, decay in ((50, 1e-3, None), (100, 2e-3, None), (500, None, 0.22), (1000, 1e-6, 0.4)):
        set_schedules(optimizer, groups, Clock(step, 1000, 10), cfg.optim, 1024)
        first, second = optimizer.param_groups
        assert second["weight_decay"] == 0
        assert first["lr"] == second["lr"]
        assert rate is None or first["lr"] == pytest.approx(rate)
        assert decay is None or first["weight_decay"] == pytest.approx(decay)


def test_convolutional_networks_get_the_settings_of_the_published_resnet() -> None:
    cfg = load(None, ["--method", "dino", "--model.backbone", "resnet50"]).config
    assert (cfg.optim.name, cfg.optim.lr, cfg.optim.weight_decay) == ("sgd", 0.03, 1e-4)
    assert (cfg.optim.final_weight_decay, cfg.model.drop_path) == (-1, 0)
