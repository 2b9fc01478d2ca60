"""SimCLR fact by fact: head, loss, settings, mistakes."""

import contextlib
import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastssl.core.optimizers import OptimConfig, build_optimizer
from fastssl.methods import METHODS, StepOutput, ViewPlan, get_method
from fastssl.methods.simclr import SimCLR, build_projector, nt_xent
from fastssl.methods.simclr import SimCLRConfig as Config
from fastssl.pretraining import run_config
from pipelines.augment.recipe import RECIPES
from shards.errors import UserError
from tests import needs
from tests.fastssl.pretraining.test_step import (
    in_float64,
    make_step,
)
from tests.fastssl.tiny import Normed, Plain, make_views

SMALL = Config(dim=5, hidden_dim=7)


def make(backbone: nn.Module, cfg: Config = SMALL) -> SimCLR:
    """SimCLR around `backbone`, the same at each call."""
    torch.manual_seed(0)
    for module in backbone.modules():
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
    return SimCLR(backbone, cfg)


def projections(num: int, dim: int = 4, seed: int = 0) -> Tensor:
    """Projections of both views of `num` images, float64 (num, 2, dim), none of them of unit length."""
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(num, 2, dim, generator=generator, dtype=torch.float64)


# ---------------------------------------------------------------- the head


def test_the_head_is_the_authors() -> None:
    backbone = Plain()
    head = build_projector(backbone, Config())
    kinds = [type(layer) for layer in head]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.BatchNorm1d]
    first, _, _, second, last = head
    # As wide as the features, then 128; no biases but the shift of the first BatchNorm.
    assert (first.weight.shape, second.weight.shape) == ((6, 6), (128, 6))
    assert first.bias is second.bias is None
    trained = [name for name, p in head.named_parameters() if p.requires_grad]
    assert trained == ["0.weight", "1.weight", "1.bias", "3.weight", "4.weight"]
    assert last.bias.abs().sum() == 0
    assert build_projector(backbone, Config(hidden_dim=9, dim=3))[3].weight.shape == (3, 9)


def test_the_head_s_last_shift_stays_at_zero_through_updates() -> None:
    method = make(Normed())
    step = make_step(method)
    step.optimizer = build_optimizer(method.param_groups(), OptimConfig(name="adamw", lr=0.1))
    before = method.projector[4].weight.detach().clone()
    step.gradients(make_views())
    step.update(1.0)
    assert method.projector[4].bias.abs().sum() == 0
    assert not torch.equal(method.projector[4].weight, before)


def test_the_head_agrees_with_lightly_s() -> None:
    theirs = needs.module("lightly.models.modules.heads").SimCLRProjectionHead(6, 6, 5).double()
    ours = build_projector(Plain(), Config(dim=5)).double()
    # Theirs has a shift behind the last layer, too, which starts at 0.
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))
    features = torch.randn(8, 6, dtype=torch.float64)
    torch.testing.assert_close(ours(features), theirs(features), rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- the loss


def slow_nt_xent(pairs: np.ndarray, temperature: float) -> tuple[float, float]:
    """Algorithm 1 of the paper as it is written, with views 2k - 1 and 2k of image k: the loss L, and the share of views found."""
    z = pairs.reshape(-1, pairs.shape[-1])
    count = len(z)
    s = [[float(a @ b / np.sqrt(a @ a) / np.sqrt(b @ b)) for b in z] for a in z]

    def cost(i: int, j: int) -> float:
        candidates = [math.exp(s[i][k] / temperature) for k in range(count) if k != i]
        return -math.log(math.exp(s[i][j] / temperature) / math.fsum(candidates))

    def found(i: int, j: int) -> bool:
        return max((k for k in range(count) if k != i), key=lambda k: s[i][k]) == j

    both = [(i, i + 1) for i in range(0, count, 2)] + [(i + 1, i) for i in range(0, count, 2)]
    return math.fsum(cost(i, j) for i, j in both) / count, sum(found(i, j) for i, j in both) / count


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("num", [1, 2, 7])
def test_the_loss_against_the_paper_s_algorithm(
    num: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_float64(monkeypatch)
    pairs = projections(num)
    # Some pairs are near, so that neither none nor all are found.
    pairs[::2, 1] = pairs[::2, 0] + 0.1 * pairs[::2, 1]
    expected, accuracy = slow_nt_xent(pairs.numpy(), temperature)
    result = nt_xent(pairs, temperature)
    assert result.ce.item() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert result.accuracy.item() == pytest.approx(accuracy)


@pytest.mark.parametrize("num", [2, 8])
def test_the_ends_of_the_scale(num: int) -> None:
    same = torch.ones(num, 2, 3)
    assert nt_xent(same, 0.1).ce.item() == pytest.approx(math.log(2 * num - 1), rel=1e-6)
    alike = torch.eye(num)[:, None].expand(num, 2, num)
    best = math.log(1 + (2 * num - 2) * math.exp(-1 / 0.5))
    found = nt_xent(alike, 0.5)
    assert found.ce.item() == pytest.approx(best, rel=1e-5)
    assert found.accuracy == 1
    # The other view is the worst candidate: opposite, while all others coincide.
    opposite = torch.tensor([[1.0], [-1.0]]).expand(num, 2, 1)
    worst = math.log(math.exp(-2) + (num - 1) * (math.exp(2) + math.exp(-2))) + 2
    found = nt_xent(opposite, 0.5)
    assert found.ce.item() == pytest.approx(worst, rel=1e-5)
    assert found.accuracy == 0


def test_lengths_do_not_matter_and_half_precision_is_enough_to_give() -> None:
    pairs = projections(6)
    torch.testing.assert_close(nt_xent(7 * pairs, 0.2).ce, nt_xent(pairs, 0.2).ce)
    assert nt_xent(pairs.bfloat16(), 0.2).ce.dtype == torch.float32


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_the_loss_and_its_gradient_agree_with_lightly_s(
    temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    criterion = needs.module("lightly.loss").NTXentLoss(temperature)
    in_float64(monkeypatch)
    pairs = projections(9).requires_grad_()
    theirs = criterion(pairs[:, 0], pairs[:, 1])
    [expected] = torch.autograd.grad(theirs, pairs)
    ours = nt_xent(pairs, temperature).ce
    [found] = torch.autograd.grad(ours, pairs)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_shares_of_the_images_make_up_the_whole() -> None:
    pairs = projections(6)
    whole = nt_xent(pairs, 0.2)
    shares = [nt_xent(pairs, 0.2, first, 2) for first in (0, 2, 4)]
    torch.testing.assert_close(torch.stack([share.ce for share in shares]).mean(), whole.ce)
    torch.testing.assert_close(torch.stack([share.accuracy for share in shares]).mean(), whole.accuracy)
    assert len({share.ce.item() for share in shares}) == 3
    torch.testing.assert_close(nt_xent(pairs, 0.2, 4).ce, shares[2].ce)


@pytest.mark.parametrize("backbone", [Plain, Normed])
def test_a_step_s_metrics_against_their_formulas(backbone: type[Plain]) -> None:
    method = make(backbone(), Config(dim=5, hidden_dim=7, temperature=0.3))
    views = make_views()
    reference = copy.deepcopy(method)
    with torch.no_grad():
        features = reference.backbone(torch.cat(views))
        projected = reference.projector(features).double().numpy()
    pairs = np.stack([projected[:6], projected[6:]], axis=1)
    expected, accuracy = slow_nt_xent(pairs, 0.3)
    output = method(views)
    assert isinstance(output, StepOutput)
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)
    told = {name: value.item() for name, value in output.metrics.items()}
    assert set(told) == {"loss", "ce", "ce_norm", "acc", "feature_std"}
    assert told["loss"] == told["ce"] == output.loss.item()
    assert told["ce_norm"] == pytest.approx(expected / math.log(11), rel=1e-5)
    assert told["acc"] == pytest.approx(accuracy)
    assert not any(value.requires_grad or value.ndim for value in output.metrics.values())
    torch.testing.assert_close(output.features, features[:6])
    assert not output.features.requires_grad


def test_a_batch_of_one_image_has_nothing_to_tell_apart() -> None:
    output = make(Plain())(make_views(1))
    assert output.loss.item() == 0
    assert all(bool(value.isfinite()) for value in output.metrics.values())


def test_it_learns_to_find_every_view() -> None:
    method = make(Plain(), Config(dim=8, hidden_dim=16))
    step = make_step(method)
    step.optimizer = build_optimizer(method.param_groups(), OptimConfig(name="adamw", lr=0.01))
    views = make_views(8)
    start = step.gradients(views)
    assert start["ce_norm"] > 0.9
    assert start["acc"] < 0.5
    for _ in range(150):
        step.update(1.0)
        end = step.gradients(views)
    assert end["ce_norm"] < 0.1
    assert end["acc"] == 1


def test_every_trained_weight_gets_a_gradient() -> None:
    method = make(Normed())
    method(make_views()).loss.backward()
    for name, p in method.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name
    assert [name for name, p in method.named_parameters() if not p.requires_grad] == ["projector.4.bias"]


@pytest.mark.parametrize("backbone", [Plain, Normed])
def test_bf16_autocast_keeps_the_loss_in_float32(backbone: type[Plain]) -> None:
    method = make(backbone())
    expected = copy.deepcopy(method)(make_views()).loss
    seen: list[torch.dtype] = []
    method.projector[0].register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = method(make_views())
    output.loss.backward()
    assert seen == [torch.bfloat16]
    assert output.loss.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in output.metrics.values())
    assert output.loss.item() == pytest.approx(expected.item(), rel=0.15)


def test_a_step_waits_for_nothing_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    # Reading a meta tensor's value on the host raises; autocast knows no meta device.
    monkeypatch.setattr(torch, "autocast", lambda *_args, **_options: contextlib.nullcontext())
    with torch.device("meta"):
        method = SimCLR(Normed(), SMALL)
        views = [torch.empty(8, 3, 4, 4), torch.empty(8, 3, 4, 4)]
    step = make_step(method, micro_batch=3)
    step.device = torch.device("meta")
    assert step.gradients(views)["loss"].is_meta


# ---------------------------------------------------------------- settings


def test_the_defaults_are_the_paper_s() -> None:
    assert METHODS["simclr"] is get_method("simclr") is SimCLR
    assert SimCLR.Config is Config
    assert (Config().dim, Config().temperature) == (128, 0.1)
    cnn = run_config.load(None, ["--method", "simclr", "--model.backbone", "resnet50"]).config
    assert cnn.recipe == RECIPES["simclr"]
    optim = (
        cnn.optim.name,
        cnn.optim.lr,
        cnn.optim.weight_decay,
        cnn.optim.warmup_epochs,
        cnn.optim.momentum,
    )
    assert optim == ("lars", 0.3, 1e-6, 10, 0.9)
    vit = run_config.load(None, ["--method", "simclr", "--model.backbone", "moco_vit_small"]).config
    assert (vit.optim.name, vit.optim.lr, vit.optim.weight_decay, vit.optim.warmup_epochs) == (
        "adamw",
        2e-4,
        0.1,
        40,
    )
    assert cnn.model.stop_grad_conv1 is vit.model.stop_grad_conv1 is False


def test_the_published_run_is_as_published() -> None:
    """Section 2.3 of the paper, and the recipe of appendix A."""
    cfg = run_config.load("simclr_resnet50").config
    assert (cfg.model.backbone, cfg.train.epochs, cfg.train.batch) == ("resnet50", 100, 4096)
    assert cfg.optim.lr * cfg.train.batch / 256 == pytest.approx(4.8)
    assert cfg.optim == SimCLR.defaults("cnn").optim
    assert cfg.method == Config()
    recipe = cfg.recipe
    assert (recipe.size, recipe.crop_scale, recipe.blur_p) == (224, (0.08, 1.0), (0.5,))
    assert (recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue) == (0.8, 0.8, 0.8, 0.2)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"dim": 0}, "method.dim is 0 but must be greater than 0."),
        ({"temperature": 0.0}, "method.temperature is 0 but must be greater than 0."),
        ({"temperature": float("nan")}, "method.temperature is nan but must be greater than 0."),
        ({"hidden_dim": -1}, "method.hidden_dim is -1 but must be 0 (as wide as the features) or more."),
    ],
)
def test_impossible_settings_are_refused(bad: dict, words: str) -> None:
    with pytest.raises(UserError) as refused:
        Config(**bad)
    assert str(refused.value) == words


def test_other_than_two_global_views_is_refused() -> None:
    method = make(Plain())
    assert method.plan_views(2, 0) == method.plan == ViewPlan((0, 1), (), True)
    with pytest.raises(UserError, match="SimCLR compares 2 views of each image but the recipe makes 1"):
        method.plan_views(1, 0)
    with pytest.raises(UserError, match="SimCLR compares 2 global views but the recipe makes 6 local ones"):
        method.plan_views(2, 6)
    with pytest.raises(UserError, match="uses 2 views of each image, but got 3"):
        method([*make_views(), make_views()[0]])
