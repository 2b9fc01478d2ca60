"""A batch in chunks against the batch at once: gradients, metrics, statistics, what is drawn, what is waited for."""

import contextlib
import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastssl.core.distributed import mean_over_ranks
from fastssl.core.schedules import Clock
from fastssl.methods import Method, MoCoV3, StepOutput
from fastssl.methods.moco_v3 import MoCoV3Config as Config
from fastssl.models.activation_checkpointing import checkpoint_blocks
from fastssl.models.backbones import build_backbone
from fastssl.models.model_config import ModelConfig
from fastssl.models.stochastic_depth import step_keys
from fastssl.pretraining.step import DDPWrapper, Step, StepOptions, chunks, steady_statistics, tell_chunks
from shards.counter_hash import UInt64
from tests.fastssl.tiny import Normed, Plain, make_method, make_views

CPU = torch.device("cpu")


def without_norms(method: MoCoV3) -> MoCoV3:
    """The same with heads that have no batch statistics."""
    torch.manual_seed(3)
    num_in = method.backbone.num_features
    assert isinstance(num_in, int)
    method.projector = nn.Sequential(nn.Linear(num_in, 5), nn.Tanh(), nn.Linear(5, 5))
    method.predictor = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
    method.teacher_projector = copy.deepcopy(method.projector).requires_grad_(False)
    return method


def make_step(method: Method, dtype: torch.dtype = torch.float32, **options) -> Step:
    trained = [p for p in method.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    return Step(method, DDPWrapper(method), optimizer, CPU, dtype, StepOptions(**options))


def gradients(method: Method, views: list[Tensor], **options) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Gradients and metrics of one batch, on a copy of the method."""
    method = copy.deepcopy(method)
    metrics = make_step(method, **options).gradients(views)
    grads = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    return grads, {name: value.item() for name, value in metrics.items()}


def chunks_alone(method: Method, views: list[Tensor]) -> dict[str, Tensor]:
    """Gradients of a batch of 10 taken as two batches of 5, each for itself: what plain accumulation gives."""
    plain = copy.deepcopy(method)
    for rows in (slice(0, 5), slice(5, 10)):
        (plain([view[rows] for view in views]).loss / 2).backward()
    return {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}


def take_steps(method: Method, step: Step, views_of: list[list[Tensor]]) -> dict[str, Any]:
    """One step an epoch: gradients and metrics (means over ranks) of each, and the state at the end."""
    grads, metrics = [], []
    for number, views in enumerate(views_of):
        found = step.gradients(views, Clock(number, len(views_of), 1))
        grads.append({n: p.grad.clone() for n, p in method.named_parameters() if p.grad is not None})
        metrics.append({name: value.item() for name, value in mean_over_ranks(found).items()})
        step.update(0.5)
    return {"grads": grads, "metrics": metrics, "state": method.state_dict()}


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of two gradients, relative to each tensor's largest value, or to a thousandth of the largest of all.

    Some gradients are zero but for rounding: that of a bias before BatchNorm, for one.
    """
    assert one.keys() == other.keys()
    floor = max(grad.abs().max().item() for grad in other.values()) / 1000
    return max(((one[n] - other[n]).abs().max() / other[n].abs().max().clamp(min=floor)).item() for n in one)


def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what the methods compute in float32 be computed in float64, so that a difference cannot hide behind rounding."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)


def vit() -> MoCoV3:
    torch.manual_seed(0)
    return MoCoV3(build_backbone(ModelConfig(backbone="test_vit"), 32), Config(dim=8, hidden_dim=16))


def large_views(num: int = 10, size: int = 32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.rand(num, 3, size, size, generator=generator) for _ in range(2)]


# ---------------------------------------------------------------- chunks


@pytest.mark.parametrize(
    ("count", "size", "sizes"),
    [(8, 0, [8]), (8, 8, [8]), (8, 100, [8]), (8, 4, [4, 4]), (10, 4, [3, 3, 4]), (7, 2, [1, 2, 2, 2])],
)
def test_chunks_are_few_and_alike(count: int, size: int, sizes: list[int]) -> None:
    parts = chunks(count, size)
    assert [p.stop - p.start for p in parts] == sizes
    assert [i for p in parts for i in range(p.start, p.stop)] == list(range(count))


# ---------------------------------------------------------------- exactness


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("queue", [0, 30])
def test_chunks_give_the_gradient_of_the_batch_without_batchnorm(
    size: int, queue: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_float64(monkeypatch)
    cfg = Config(dim=5, hidden_dim=7, queue=queue)
    method = without_norms(make_method(Plain(), cfg)).double()
    if method.queue is not None:
        method.queue.push(torch.randn(2, 10, 5, generator=torch.Generator().manual_seed(8)))
    views = [view.double() for view in make_views(10)]
    whole, told = gradients(method, views)
    parts, told_parts = gradients(method, views, micro_batch=size)
    assert largest_difference(parts, whole) < 1e-13
    assert told_parts == pytest.approx(told, rel=1e-12)


def test_a_chunk_s_own_keys_would_give_another_gradient() -> None:
    """What the whole matter is worth: plain accumulation differs by more than any rounding."""
    method = without_norms(make_method(Plain()))
    views = make_views(10)
    whole, _ = gradients(method, views)
    assert largest_difference(chunks_alone(method, views), whole) > 0.05


@pytest.mark.parametrize("size", [5, 4])
def test_exact_heads_give_a_vit_the_gradient_of_the_batch(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    method, views = vit(), large_views()
    by_chunk, _ = gradients(method, views, micro_batch=size)
    whole, _ = gradients(method, views)
    assert largest_difference(by_chunk, whole) > 1e-2  # BatchNorm in the heads
    in_float64(monkeypatch)
    method, views = method.double(), [view.double() for view in views]
    whole, told = gradients(method, views)
    exact, told_exact = gradients(method, views, micro_batch=size, exact_heads=True)
    assert largest_difference(exact, whole) < 1e-10
    assert told_exact == pytest.approx(told, rel=1e-10)


def test_exact_heads_in_float32_and_with_checkpointing() -> None:
    method, views = vit(), large_views()
    whole, _ = gradients(method, views)
    checkpoint_blocks(method.backbone, "selective", "test_vit")
    exact = make_step(method, micro_batch=4, exact_heads=True)
    exact.gradients(views)
    found = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    assert largest_difference(found, whole) < 1e-3


def test_both_forwards_of_exact_heads_skip_the_same_blocks() -> None:
    torch.manual_seed(0)
    backbone = build_backbone(ModelConfig(backbone="test_vit", drop_path=0.5), 32)
    method, views = MoCoV3(backbone, Config(dim=8, hidden_dim=16)), large_views(8)
    seen: list[Tensor] = []
    backbone.register_forward_hook(lambda _m, _i, out: seen.append(out.detach().clone()))
    make_step(method, micro_batch=4, exact_heads=True).gradients(views, keys=step_keys(0, 3, np.arange(8)))
    first, second, first_again, second_again = seen
    assert torch.equal(first, first_again)
    assert torch.equal(second, second_again)
    assert not torch.equal(first, second)


def test_the_host_may_hold_the_views_of_more_than_a_chunk() -> None:
    """Each forward gets copies of a chunk: nothing of the size of the batch goes to the device."""
    method = without_norms(make_method(Plain()))
    sizes: list[int] = []
    for backbone in method.backbones():
        backbone.register_forward_hook(lambda _m, args, _out: sizes.append(len(args[0])))
    make_step(method, micro_batch=3).gradients(make_views(8))
    assert sizes == [4, 6, 6] * 2  # two views of 2, 3 and 3 images, teacher and student


def test_the_teacher_s_heads_see_the_whole_batch_once() -> None:
    method = make_method(Plain())
    sizes: list[int] = []
    method.teacher_projector.register_forward_hook(lambda _m, args, _out: sizes.append(len(args[0])))
    whole = copy.deepcopy(method)
    make_step(method, micro_batch=4).gradients(make_views(8))
    assert sizes == [8, 8]
    make_step(whole).gradients(make_views(8))
    for name, buffer in whole.teacher_projector.named_buffers():
        torch.testing.assert_close(method.teacher_projector.get_buffer(name), buffer)


# ---------------------------------------------------------------- running statistics


def test_exact_heads_update_running_statistics_once() -> None:
    once, exact = make_method(Normed()), make_method(Normed())
    views = make_views(8)
    make_step(once, micro_batch=4).gradients(views)
    make_step(exact, micro_batch=4, exact_heads=True).gradients(views)
    for name, buffer in once.backbone.named_buffers():
        assert torch.equal(exact.backbone.get_buffer(name), buffer), name
    assert int(exact.backbone.get_buffer("body.1.num_batches_tracked")) == 4  # 2 views of 2 chunks


def test_running_statistics_follow_as_fast_as_in_whole_batches() -> None:
    whole, parts = make_method(Normed()), make_method(Normed())
    steady_statistics(parts, 4, cached=False)
    norm = parts.backbone.get_submodule("body.1")
    assert (1 - norm.momentum) ** 4 == pytest.approx(0.9)  # pyright: ignore[reportOperatorIssue]
    assert parts.teacher_projector[1].momentum == 0.1  # once a step in any case
    same = [view[:2].repeat(4, 1, 1, 1) for view in make_views(8)]  # each chunk like the whole
    make_step(whole).gradients(same)
    make_step(parts, micro_batch=2).gradients(same)
    for name in ("running_mean", "running_var"):
        one, other = (m.backbone.get_buffer(f"body.1.{name}") for m in (whole, parts))
        torch.testing.assert_close(one, other, rtol=0.02, atol=1e-3)


# ---------------------------------------------------------------- the rest of a step


def test_what_is_inexact_is_told() -> None:
    line = tell_chunks(make_method(Normed()), 10, 4, cached=False)
    assert line.startswith(
        "10 images a process in 4 chunks of at most 3, each against the whole batch; BatchNorm in the backbones and "
    )
    assert "the student's heads sees one chunk at a time, --train.exact-heads" in line
    assert "heads" not in tell_chunks(make_method(Normed()), 10, 4, cached=True)
    assert tell_chunks(vit(), 10, 4, cached=True).endswith(": the gradient of the undivided batch")


def test_a_step_waits_for_nothing_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    # Reading a meta tensor's value on the host raises; autocast knows no meta device.
    monkeypatch.setattr(torch, "autocast", lambda *_args, **_options: contextlib.nullcontext())
    for exact in (False, True):
        with torch.device("meta"):
            method = MoCoV3(Normed(), Config(dim=5, hidden_dim=7, queue=16))
            views = [torch.empty(8, 3, 4, 4), torch.empty(8, 3, 4, 4)]
        optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], foreach=True)
        options = StepOptions(micro_batch=4, exact_heads=exact)
        step = Step(method, DDPWrapper(method), optimizer, torch.device("meta"), options=options)
        for _ in range(2):
            assert step.gradients(views)["loss"].is_meta
            method.remember(step.remembered, torch.ones((), dtype=torch.bool, device="meta"))
            step.optimizer.zero_grad()
            method.update_teacher(0.9)
        assert method.queue is not None
        assert method.queue.count == 16


def test_fp16_scales_the_loss_and_skips_overflows() -> None:
    method = make_method(Plain())
    step = make_step(method, dtype=torch.float16, clip_grad=1.0, micro_batch=4)
    step.scaler.load_state_dict({**step.scaler.state_dict(), "scale": 64.0})
    scale = step.scaler.get_scale()
    start = copy.deepcopy(method.state_dict())
    step.gradients(make_views(8))
    step.update(1.0)
    assert not torch.equal(method.state_dict()["projector.0.weight"], start["projector.0.weight"])
    before = copy.deepcopy(method.state_dict())
    step.gradients(make_views(8))
    method.projector[0].weight.grad[0] = float("inf")  # pyright: ignore[reportOptionalSubscript]
    step.update(1.0)
    for name, p in method.named_parameters():
        assert torch.equal(p, before[name]), name
    assert step.scaler.get_scale() == scale / 2


@pytest.mark.parametrize("exact", [False, True])
def test_fp16_gradients_are_near_float32s(exact: bool) -> None:
    views = make_views(8)
    expected, _ = gradients(make_method(Plain()), views, micro_batch=4, exact_heads=exact)
    method = make_method(Plain())
    step = make_step(method, dtype=torch.float16, micro_batch=4, exact_heads=exact)
    step.scaler.load_state_dict({**step.scaler.state_dict(), "scale": 64.0})
    step.gradients(views)
    step.scaler.unscale_(step.optimizer)
    found = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    for name, grad in expected.items():
        assert nn.functional.cosine_similarity(found[name].flatten(), grad.flatten(), dim=0) > 0.98, name


def test_every_trained_weight_gets_a_gradient_in_every_mode() -> None:
    modes: list[dict] = [{}, {"micro_batch": 3}, {"micro_batch": 3, "exact_heads": True}]
    found: list[set[str]] = [
        set(gradients(make_method(Normed()), make_views(8), **mode)[0]) for mode in modes
    ]
    assert all(a == b for a, b in itertools.pairwise(found))
    assert {name for name, p in make_method(Normed()).named_parameters() if p.requires_grad} == found[0]


def test_chunks_do_not_change_which_blocks_an_image_skips() -> None:
    torch.manual_seed(0)
    backbone = build_backbone(ModelConfig(backbone="test_vit", drop_path=0.5), 32)
    method, views, keys = (
        MoCoV3(backbone, Config(dim=8, hidden_dim=16)),
        large_views(8),
        step_keys(0, 3, np.arange(8)),
    )
    for head in (method.projector, method.predictor, method.teacher_projector):
        head.eval()  # BatchNorm sees a chunk

    def found(clock: Clock, keys: UInt64, **options: Any) -> dict[str, Tensor]:
        step = make_step(copy.deepcopy(method), **options)
        step.gradients(views, clock, keys)
        return {name: p.grad for name, p in step.method.named_parameters() if p.grad is not None}

    whole = found(Clock(), keys)
    assert largest_difference(found(Clock(), keys, micro_batch=3), whole) < 1e-5
    assert largest_difference(found(Clock(), step_keys(0, 4, np.arange(8)), micro_batch=3), whole) > 1e-2


# ---------------------------------------------------------------- other methods


class Distance(Method):
    """A method of another kind, BYOL's: the distance to the teacher's projection, no negatives and no gathering."""

    def __init__(self) -> None:
        super().__init__(Plain(), None)
        self.projector, self.predictor = nn.Linear(6, 4), nn.Linear(4, 4)
        self.teacher = copy.deepcopy(nn.Sequential(self.backbone, self.projector)).requires_grad_(False)

    @torch.no_grad()
    def teacher_features(self, views):
        return [self.teacher[0](view) for view in views]

    @torch.no_grad()
    def targets(self, teacher, student=None):
        return [self.teacher[1](feature) for feature in teacher]

    def student_features(self, views):
        return [self.backbone(view) for view in views]

    def loss(self, features, targets, first=0) -> StepOutput:
        rows = slice(first, first + len(features[0]))
        guesses = [self.predictor(self.projector(feature)) for feature in features]
        pairs = zip(guesses, reversed(targets), strict=True)
        loss = sum((1 - nn.functional.cosine_similarity(g, t[rows])).mean() for g, t in pairs)
        assert isinstance(loss, Tensor)
        return StepOutput(loss, {"loss": loss.detach()}, features[0].detach())

    def backbones(self):
        return [self.backbone, self.teacher[0]]

    def heads(self):
        return [self.projector, self.predictor]


@pytest.mark.parametrize("exact", [False, True])
def test_any_method_of_the_contract_runs_in_chunks(exact: bool) -> None:
    torch.manual_seed(0)
    method, views = Distance().double(), [view.double() for view in make_views(10)]
    parts = copy.deepcopy(method)
    told = make_step(method).gradients(views)
    told_parts = make_step(parts, micro_batch=3, exact_heads=exact).gradients(views)
    torch.testing.assert_close(told_parts["loss"], told["loss"])
    for (name, p), q in zip(method.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
