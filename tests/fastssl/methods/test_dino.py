"""DINO fact by fact: head, loss, centre, schedules, mistakes; against slow formulas in float64 and against lightly."""

import contextlib
import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastssl.core.schedules import Clock
from fastssl.methods import METHODS, ViewPlan, get_method
from fastssl.methods.dino import DINO, DINOConfig, DINOHead, cross_view_entropy
from fastssl.methods.trees import tensors_of
from fastssl.models.backbones import build_backbone
from fastssl.models.model_config import ModelConfig
from shards.errors import UserError
from tests.fastssl.pretraining.test_step import in_float64
from tests.needs import module

SMALL = DINOConfig(out_dim=11, hidden_dim=7, bottleneck_dim=5)
# Two global views of 8 pixels and three local ones of 5.
SIDES = (8, 8, 5, 5, 5)


class Pooled(nn.Module):
    """A backbone without batch statistics, for images of any size."""

    num_features = 6

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 6)
        )
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.shapes.append(tuple(images.shape))
        return self.body(images)


def make_dino(cfg: DINOConfig = SMALL, num_local: int = 3) -> DINO:
    """A method whose student and teacher differ, with a centre that is not 0."""
    torch.manual_seed(0)
    method = DINO(Pooled(), cfg)
    method.plan = method.plan_views(2, num_local)
    with torch.no_grad():
        for p in (*method.teacher_backbone.parameters(), *method.teacher_head.parameters()):
            p.add_(0.3 * torch.randn_like(p) * p.std())
        # With weights of 0.02 all outputs would be alike.
        for head in (method.head, method.teacher_head):
            for p in head.mlp.parameters():
                p.mul_(20)
        method.center.normal_(std=0.1)
    return method


def make_views(num: int = 6, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(num, 3, side, side, generator=generator) for side in SIDES]


# Slow formulas, for one image and one pair of views at a time


def slow_softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max())
    return powers / powers.sum()


def slow_loss(
    student: list[np.ndarray], teacher: list[np.ndarray], center: np.ndarray, hot: float, cold: float
) -> float:
    """Equation 3 of the paper, with the centre and the temperatures of algorithm 1."""
    terms = []
    for t, answers in enumerate(teacher):
        for s, guesses in enumerate(student):
            if s == t:
                continue
            for answer, guess in zip(answers, guesses, strict=True):
                p, q = slow_softmax((answer - center) / cold), slow_softmax(guess / hot)
                terms.append(-(p * np.log(q)).sum())
    return float(np.mean(terms))


def slow_head(features: np.ndarray, head: DINOHead) -> np.ndarray:
    weights = {name: value.detach().double().numpy() for name, value in head.state_dict().items()}
    rows = []
    for x in features:
        for number in (0, 2):
            x = weights[f"mlp.{number}.weight"] @ x + weights[f"mlp.{number}.bias"]
            x = np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x])
        x = weights["mlp.4.weight"] @ x + weights["mlp.4.bias"]
        x = x / np.sqrt((x**2).sum())
        rows.append([(row / np.sqrt((row**2).sum())) @ x for row in weights["last_layer.weight"]])
    return np.array(rows)


def outputs_of(method: DINO, views: list[Tensor]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Outputs of student and teacher by the slow head, of each view."""
    with torch.no_grad():
        student = [slow_head(method.backbone(view).numpy(), method.head) for view in views]
        teacher = [
            slow_head(method.teacher_backbone(view).numpy(), method.teacher_head) for view in views[:2]
        ]
    return student, teacher


# Loss


@pytest.mark.parametrize(("epoch", "cold"), [(0, 0.04), (12.5, 0.04 + 0.03 * 12.5 / 30), (99, 0.07)])
@pytest.mark.parametrize("num_local", [0, 1, 3])
def test_the_loss_is_that_of_the_formulas(
    epoch: float, cold: float, num_local: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_float64(monkeypatch)
    method = make_dino(num_local=num_local).double()
    method.clock = Clock(int(epoch * 4), 400, 4)
    views = [view.double() for view in make_views(4)[: 2 + num_local]]
    output = method(views)
    student, teacher = outputs_of(method, views)
    expected = slow_loss(student, teacher, method.center.numpy(), 0.1, cold)
    assert output.loss.item() == pytest.approx(expected, rel=1e-12)
    assert output.loss.dtype == torch.float64

    answers = [[slow_softmax((row - method.center.numpy()) / cold) for row in view] for view in teacher]
    entropy = np.mean([-(p * np.log(p)).sum() for view in answers for p in view])
    hits = [
        g.argmax() == p.argmax()
        for t, view in enumerate(answers)
        for s, guesses in enumerate(student)
        if s != t
        for p, g in zip(view, guesses, strict=True)
    ]
    told = {name: value.item() for name, value in output.metrics.items()}
    assert told["loss"] == told["ce"] == pytest.approx(expected, rel=1e-12)
    assert told["ce_norm"] == pytest.approx(expected / math.log(11), rel=1e-12)
    assert told["teacher_entropy"] == pytest.approx(entropy / math.log(11), rel=1e-12)
    assert told["kl"] == pytest.approx(expected - entropy, rel=1e-12)
    assert told["acc"] == pytest.approx(np.mean(hits))
    assert set(told) == {"loss", "ce", "ce_norm", "acc", "teacher_entropy", "kl", "feature_std"}
    assert not any(value.requires_grad or value.ndim for value in output.metrics.values())


def test_two_outputs_by_hand() -> None:
    # Student (1/4, 3/4) for both views, teacher (1/2, 1/2): -(ln 1/4 + ln 3/4) / 2.
    logits = 0.1 * torch.tensor([[0.0, math.log(3.0)]])
    loss = cross_view_entropy([logits, logits], [torch.full((1, 2), 0.5)] * 2, 0.1)
    assert loss.item() == pytest.approx(-(math.log(1 / 4) + math.log(3 / 4)) / 2)
    # A view is not compared with itself: the second view's answer is wrong for the first view alone.
    sure = [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])]
    guesses = [torch.tensor([[-9.0, 9.0]]), torch.tensor([[9.0, -9.0]])]
    assert cross_view_entropy(guesses, sure, 0.1).item() == pytest.approx(0)
    assert cross_view_entropy(guesses[::-1], sure, 0.1).item() == pytest.approx(180)


def test_chance_is_the_log_of_the_number_of_outputs() -> None:
    method = make_dino(DINOConfig(out_dim=64, hidden_dim=7, bottleneck_dim=5))
    with torch.no_grad():
        method.head.last_layer.weight.copy_(method.head.last_layer.weight[:1].expand(64, -1).clone())
    assert method(make_views()).metrics["ce_norm"].item() == pytest.approx(1)
    # A teacher whose outputs are uniform: the collapse that sharpening prevents.
    with torch.no_grad():
        method.teacher_head.last_layer.weight.copy_(method.head.last_layer.weight)
        method.center.zero_()
    metrics = method(make_views()).metrics
    assert metrics["teacher_entropy"].item() == pytest.approx(1)
    assert metrics["kl"].item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("num_local", [0, 6])
def test_lightly_computes_the_same_loss_and_centre(num_local: int) -> None:
    theirs = module("lightly.loss").DINOLoss(output_dim=11, teacher_temp=0.07, student_temp=0.1)
    method = make_dino(num_local=num_local)
    generator = torch.Generator().manual_seed(3)
    views = [torch.rand(5, 3, side, side, generator=generator) for side in [8, 8, *[5] * num_local]]
    theirs.center.copy_(method.center)
    for step, epoch in enumerate((0, 15, 40)):
        method.clock = Clock(epoch, 100, 1)
        output = method(views)
        with torch.no_grad():
            teacher = [method.teacher_head(method.teacher_backbone(view)) for view in views[:2]]
            student = [method.head(method.backbone(view)) for view in views]
        expected = theirs(teacher, student, teacher_temp=(0.04, 0.055, 0.07)[step])
        torch.testing.assert_close(output.loss.detach(), expected)
        method.remember(output.targets)
        torch.testing.assert_close(method.center, theirs.center.flatten())


# Teacher and centre


def test_the_mean_through_the_last_layer_is_the_mean_of_the_outputs() -> None:
    method, views = make_dino(), make_views()
    targets = method.targets(method.teacher_features(views))
    direct = torch.cat([method.teacher_head(method.teacher_backbone(view)) for view in views[:2]])
    torch.testing.assert_close(targets.mean_output, direct.mean(dim=0))
    before = method.center.clone()
    method.remember(targets)
    torch.testing.assert_close(method.center, 0.9 * before + 0.1 * direct.mean(dim=0))


def test_targets_are_small_and_without_gradient() -> None:
    cfg = DINOConfig(out_dim=1000, hidden_dim=7, bottleneck_dim=5)
    method = make_dino(cfg)
    targets = method.targets(method.teacher_features(make_views(50)))
    assert [tuple(view.shape) for view in targets.bottlenecks] == [(50, 5)] * 2
    assert sum(t.numel() for t in tensors_of(targets)) == 2 * 50 * 5 + 1000
    assert not any(t.requires_grad for t in tensors_of(targets))


def test_a_step_that_was_not_applied_leaves_the_centre() -> None:
    method = make_dino()
    targets = method.targets(method.teacher_features(make_views()))
    before = method.center.clone()
    nothing = targets._replace(mean_output=torch.full_like(targets.mean_output, math.nan))
    method.remember(nothing, torch.tensor(False))
    assert torch.equal(method.center, before)
    method.remember(targets, torch.tensor(True))
    assert not torch.equal(method.center, before)
    assert "center" in method.state_dict()


def test_the_student_learns_and_the_teacher_does_not() -> None:
    method = make_dino(DINOConfig(out_dim=11, hidden_dim=7, bottleneck_dim=5, norm_last_layer=False))
    method(make_views()).loss.backward()
    for name, p in method.named_parameters():
        assert (p.grad is None) == name.startswith("teacher"), name
        assert p.requires_grad != name.startswith("teacher"), name


def test_the_teacher_is_the_student_at_first_without_stochastic_depth_and_follows_it() -> None:
    backbone = build_backbone(ModelConfig(backbone="test_vit", drop_path=0.5), 32)
    method = DINO(backbone, SMALL)
    for part in ("backbone", "head"):
        student, teacher = getattr(method, part).state_dict(), getattr(method, f"teacher_{part}").state_dict()
        assert all(torch.equal(student[key], teacher[key]) for key in student)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(method.teacher_backbone(images), method.teacher_backbone(images))
    assert float(method.teacher_distance()) == 0
    old = copy.deepcopy(dict(method.named_parameters()))
    with torch.no_grad():
        for p in (*method.backbone.parameters(), *method.head.parameters()):
            p.add_(1.0)
    method.update_teacher(0.9)
    for name, p in method.named_parameters():
        if name.startswith("teacher_"):
            torch.testing.assert_close(p, 0.9 * old[name] + 0.1 * (old[name.removeprefix("teacher_")] + 1))
    assert DINO.evaluated == "teacher_backbone"
    assert method.get_submodule(DINO.evaluated) is method.teacher_backbone


def test_only_global_views_reach_the_teacher_and_sizes_go_together() -> None:
    method = make_dino()
    method(make_views(6))
    assert isinstance(method.backbone, Pooled)
    assert isinstance(method.teacher_backbone, Pooled)
    assert method.backbone.shapes == [(12, 3, 8, 8), (18, 3, 5, 5)]
    assert method.teacher_backbone.shapes == [(12, 3, 8, 8)]


# The rest


def test_the_forward_waits_for_nothing_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    # Reading a meta tensor's value on the host raises; autocast knows no meta device.
    monkeypatch.setattr(torch, "autocast", lambda *_args, **_options: contextlib.nullcontext())
    with torch.device("meta"):
        method = DINO(Pooled(), SMALL)
        method.plan = method.plan_views(2, 3)
        output = method([torch.empty(4, 3, side, side) for side in SIDES])
        method.remember(output.targets, torch.ones((), dtype=torch.bool))
    assert output.loss.shape == ()
    method.update_teacher(0.9)


def test_bf16_autocast_keeps_the_loss_and_the_teacher_s_outputs_in_float32() -> None:
    method = make_dino()
    expected = copy.deepcopy(method)(make_views()).loss
    seen: dict[str, set[torch.dtype]] = {"head": set(), "teacher_head": set()}
    for name, dtypes in seen.items():
        layer = method.get_submodule(f"{name}.last_layer")
        layer.register_forward_hook(lambda _m, _i, out, dtypes=dtypes: dtypes.add(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = method(make_views())
    output.loss.backward()
    assert seen == {"head": {torch.bfloat16}, "teacher_head": {torch.float32}}
    assert output.loss.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in output.metrics.values())
    assert all(t.dtype == torch.float32 for t in tensors_of(output.targets))
    assert output.loss.item() == pytest.approx(expected.item(), rel=0.03)


@pytest.mark.parametrize(("num_global", "num_local"), [(2, 0), (2, 6), (3, 1)])
def test_views(num_global: int, num_local: int) -> None:
    plan = DINO(Pooled(), SMALL).plan_views(num_global, num_local)
    assert plan == ViewPlan(tuple(range(num_global + num_local)), tuple(range(num_global)), together=True)


def test_a_recipe_with_one_global_view_is_refused() -> None:
    with pytest.raises(UserError, match=r"global views .* but the recipe makes 1: set --recipe.num-views 2"):
        DINO(Pooled(), SMALL).plan_views(1, 6)
    method = make_dino()
    with pytest.raises(UserError, match="uses 5 views of each image, but got 4"):
        method(make_views()[:4])


@pytest.mark.parametrize(
    "bad",
    [
        {"out_dim": 1},
        {"hidden_dim": 0},
        {"bottleneck_dim": 0},
        {"student_temperature": 0.0},
        {"teacher_temperature": -0.1},
        {"warmup_teacher_temperature": math.nan},
        {"warmup_teacher_epochs": -1},
        {"freeze_last_layer": -1},
        {"clip_grad": -1.0},
        {"momentum": 1.5},
        {"center_momentum": -0.1},
    ],
)
def test_impossible_settings_are_refused(bad: dict) -> None:
    with pytest.raises(UserError, match=next(iter(bad))):
        DINOConfig(**bad)


def test_dino_by_name() -> None:
    assert METHODS["dino"] is get_method("dino") is DINO
    assert DINO.Config is DINOConfig
