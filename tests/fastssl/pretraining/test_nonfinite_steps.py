"""A step that is not finite: told, kept for a replay, skipped if asked for; and what the replay finds."""

import copy
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastssl.cli import main
from fastssl.core import checkpoint, optimizers
from fastssl.methods import MoCoV3
from fastssl.methods.ema import ema_update, relative_distance
from fastssl.pretraining.replay import MAX_FILES, Replay, Trace, replay, same_draws
from fastssl.pretraining.run import train
from fastssl.pretraining.step import DDPWrapper, Step, StepOptions
from pipelines.augment.draws import draw
from pipelines.augment.recipe import Recipe
from pipelines.loading.loader import Loader
from shards.errors import UserError
from tests.fastssl.runs import BATCH, STEPS, TOTAL, differences, newest, resolve, rows
from tests.fastssl.tiny import Normed, make_method, make_views

CPU = torch.device("cpu")


# ---------------------------------------------------------------- one step


def _step(method: MoCoV3, policy) -> Step:
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    return Step(method, DDPWrapper(method), optimizer, CPU, options=StepOptions(nonfinite=policy))


def _spoiled(num: int = 6) -> list[Tensor]:
    views = make_views(num, seed=9)
    views[0][2, 0, 1, 1] = float("inf")
    return views


def _states(step: Step) -> dict:
    return copy.deepcopy({"method": step.method.state_dict(), "optimizer": step.optimizer.state_dict()})


def test_a_skipped_step_leaves_everything_as_it_was_and_the_next_one_is_taken() -> None:
    step = _step(make_method(Normed()), "skip")
    without = _step(copy.deepcopy(step.method), "skip")
    for seed in (1, 2):
        for s in (step, without):
            s.gradients(make_views(seed=seed))
            assert not s.update(0.5)
        if seed == 1:
            before = _states(step)
            step.gradients(_spoiled())
            assert step.update(0.5)
            assert not step.applied
            assert differences(_states(step), before) == []  # statistics of BatchNorm too
    assert step.applied
    assert differences(_states(step), _states(without)) == []


def test_a_stop_holds_the_weights_of_the_moment() -> None:
    step = _step(make_method(Normed()), "stop")
    step.gradients(make_views())
    assert not step.update(0.5)
    before = {n: p.clone() for n, p in step.method.named_parameters()}
    for views in (_spoiled(), make_views(seed=2)):
        step.gradients(views)
        assert step.update(0.5)
    assert differences(dict(step.method.named_parameters()), before) == []


def test_the_gradient_norm_is_that_before_clipping() -> None:
    method = make_method(Normed())
    step = _step(method, "stop")
    step.clip_grad = 1e-3
    step.gradients(make_views())
    squares = sum(float(p.grad.double().square().sum()) for p in method.parameters() if p.grad is not None)
    step.update(0.5)
    assert float(step.grad_norm) == pytest.approx(math.sqrt(squares), rel=1e-5)


def test_a_momentum_on_the_device_gives_the_same_average() -> None:
    generator = torch.Generator().manual_seed(0)
    old = [torch.randn(3, 2, generator=generator) for _ in range(70)]
    new = [torch.randn(3, 2, generator=generator) for _ in range(70)]
    expected, found = copy.deepcopy(old), copy.deepcopy(old)
    ema_update(expected, new, 0.75)
    ema_update(found, new, torch.tensor(0.75))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    ema_update(found, new, torch.tensor(1.0))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_the_distance_of_teacher_and_student() -> None:
    student = [torch.tensor([[3.0, 0.0]]), torch.tensor([4.0])]
    teacher = [torch.tensor([[3.0, 1.0]]), torch.tensor([6.0])]
    assert float(relative_distance(teacher, student)) == pytest.approx(math.sqrt(5) / 5)
    assert float(relative_distance(student, student)) == 0
    method = make_method(Normed())
    assert float(method.teacher_distance()) == 0
    with torch.no_grad():
        for p in method.backbone.parameters():
            p.mul_(2)
    squares = [
        sum(float(p.detach().square().sum()) for p in part.parameters())
        for part in (method.backbone, method.projector)
    ]
    expected = math.sqrt(squares[0] / 4 / sum(squares))
    assert float(method.teacher_distance()) == pytest.approx(expected, rel=1e-5)


# ---------------------------------------------------------------- a run


def _spoil_batches(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> dict[int, list[int]]:
    """Let the batches of some steps, counted from 1, hold a pixel that is not finite; returns their samples."""
    steps_of, seen = Loader.steps, {}

    def spoiled(self: Loader, start: int, stop: int):
        for number, batch in enumerate(steps_of(self, start, stop), start=start + 1):
            if number in steps:
                batch.views[1][3, 1, 2, 2] = float("nan")
                seen[number] = batch.sample_ids.tolist()
            yield batch

    monkeypatch.setattr(Loader, "steps", spoiled)
    return seen


def test_skipping_goes_on_counts_and_keeps_the_batch(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = _spoil_batches(monkeypatch, {5, 6, 12})
    with pytest.warns(
        UserWarning, match=r"The loss was nan at step (5|12): skipped. Replay it with `fastssl replay"
    ) as told:
        train(resolve(shards, tmp_path / "run", {"train": {"nonfinite": "skip"}}))
    assert len(told) == 2
    state = newest(tmp_path / "run")
    assert state["step"] == TOTAL
    assert all(bool(t.isfinite().all()) for t in state["method"].values())
    found = {row["step"]: row for row in rows(tmp_path / "run") if "skipped" in row}
    assert {step: row["skipped"] for step, row in found.items()} == {
        **dict.fromkeys((2, 4), 0), 6: 2, **dict.fromkeys((8, 10), 2), **dict.fromkeys((12, 14, 16, 18, 20, 21), 3)
    }  # fmt: skip
    assert "loss" not in found[6]  # both steps of its window were skipped
    assert math.isfinite(found[12]["loss"])
    kept = sorted((tmp_path / "run").glob("nonfinite-*.pt"))
    assert [p.name for p in kept] == ["nonfinite-step-000000005.pt", "nonfinite-step-000000012.pt"]
    for path, step in zip(kept, (5, 12), strict=True):
        assert checkpoint.load(path)["sample_ids"].tolist() == seen[step]


def test_too_many_skipped_steps_stop_the_run(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _spoil_batches(monkeypatch, set(range(3, 99)))
    changes = {"train": {"nonfinite": "skip", "max_skipped": 4}}
    with (
        pytest.warns(UserWarning, match="skipped"),
        pytest.raises(
            UserError, match=r"5 steps of the run had to be skipped, more than train.max_skipped \(4\)"
        ),
    ):
        train(resolve(shards, tmp_path / "run", changes))
    assert len(list((tmp_path / "run").glob("nonfinite-*.pt"))) <= MAX_FILES


@pytest.fixture
def diverged(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a run whose first step made its weights enormous."""
    with monkeypatch.context() as patch:
        patch.setattr(optimizers, "scaled_lr", lambda cfg, batch: 1e30)
        with pytest.raises(UserError, match=r"(loss|gradient) was .* at step 2, replay it with"):
            train(resolve(shards, tmp_path / "run", {"optim": {"warmup_epochs": 0}}))
    return tmp_path / "run" / "nonfinite-step-000000002.pt"


def test_a_replay_names_the_place(diverged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["replay", str(diverged)]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["step"].startswith("2: the loss was nan; 8 images, weights of step 1")
    assert lines["weights"] == lines["views"] == "finite"
    assert lines["loss"] == "nan"
    # The teacher's keys come first, and its weights are as they began but for a hundredth of the student's.
    assert lines["forward"].startswith("first not finite in teacher_backbone.")
    assert "its input is finite" in lines["forward"]


def test_a_replay_makes_the_very_batch(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        seen = _spoil_batches(patch, {STEPS + 2})
        with pytest.raises(UserError, match=f"at step {STEPS + 2}, replay it"):
            train(resolve(shards, tmp_path / "run"))
    path = tmp_path / "run" / f"nonfinite-step-{STEPS + 2:09d}.pt"
    # The pixel was ours, not the data's: done again, all is finite.
    made = {}
    steps_of = Loader.steps

    def noted(self: Loader, start: int, stop: int):
        for batch in steps_of(self, start, stop):
            made[start + 1] = batch.sample_ids.tolist()
            yield batch

    monkeypatch.setattr(Loader, "steps", noted)
    lines = replay(Replay(str(path), device="cpu"))
    assert made == seen
    assert len(made[STEPS + 2]) == BATCH
    assert lines[-1].startswith("The step is finite when repeated")
    assert not any(line.startswith("note") for line in lines)


def test_draws_of_an_earlier_version_are_the_beginning_of_todays() -> None:
    """A file that was written before an operation existed has shorter records; they say the same where it is not drawn."""
    sizes = np.full(4, 50)
    ours = draw(Recipe(), 1, 2, np.arange(4), sizes, sizes)
    flat = np.frombuffer(ours.tobytes(), np.uint8)
    assert same_draws(flat, flat)
    old = ours.dtype.names[:-1]
    packed = np.zeros(ours.shape, [(name, ours.dtype[name]) for name in old])
    for name in old:
        packed[name] = ours[name]
    before = np.frombuffer(packed.tobytes(), np.uint8).copy()
    assert len(before) < len(flat)
    assert same_draws(before, flat)
    dropping = draw(Recipe(channel_drop_p=1.0), 1, 2, np.arange(4), sizes, sizes)
    assert not same_draws(before, np.frombuffer(dropping.tobytes(), np.uint8))
    before[3] ^= 1
    assert not same_draws(before, flat)
    assert not same_draws(flat[:-1], flat)
    assert not same_draws(flat[: ours.itemsize], flat)


def test_a_replay_of_what_is_none(finished: Path, told, diverged: Path, unlabelled_shards: Path) -> None:
    [*_, path] = checkpoint.list_checkpoints(finished)
    assert told("replay", path).endswith(
        "is a checkpoint, not a step that was not finite: give a nonfinite-step-*.pt of a run's folder."
    )
    assert "holds other samples than the run's" in told("replay", diverged, "--shards", unlabelled_shards)
    assert "There is no checkpoint" in told("replay", diverged.parent / "none.pt")


# ---------------------------------------------------------------- finding the place


class Root(nn.Module):
    """A function without a module, and a module that is at fault for one image only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(2, 2), nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x).log()))


def test_the_first_place_is_found_though_no_module_is_at_fault() -> None:
    model = Root()
    with torch.no_grad():
        model.first.weight.copy_(torch.eye(2))
        model.first.bias.zero_()
    trace = Trace(model)
    x = torch.ones(4, 2)
    x[2, 1] = -1.0
    model(x).sum()
    assert trace.forward is not None
    assert (trace.forward.name, trace.forward.count, trace.forward.rows.tolist()) == ("second", 1, [2])
    assert "its input is not: between first and it" in trace.forward.tell()


def test_a_gradient_that_is_not_finite_is_found_on_its_way_back() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU())
    with torch.no_grad():
        model[0].weight.zero_()
    trace = Trace(model)
    model(torch.ones(3, 2)).sqrt().sum().backward()  # the root's slope at 0
    assert trace.forward is None
    assert trace.backward is not None
    assert trace.backward.name == "1"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "first not finite in 1 (ReLU): 6 of 6 values of (3, 2)" in trace.backward.tell()
