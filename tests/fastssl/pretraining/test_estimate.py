"""What a run is said to take before it begins."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from fastssl.core.distributed import Dist
from fastssl.core.optimizers import OptimConfig
from fastssl.methods import Method, StepOutput, ViewPlan
from fastssl.pretraining import estimate
from fastssl.pretraining.estimate import StepEstimate, estimate_run, estimate_step, saved_bytes
from fastssl.pretraining.micro_batch import TrialStep, trial_step
from fastssl.pretraining.step import StepOptions
from tests.fastssl.runs import TINY_VIT, resolve

CPU = torch.device("cpu")


class OneLayer(Method):
    """Keeps one tensor of 4 * 10 bytes an image for the backward pass, beside its input of 4 * 3 * 2 * 2 bytes a view."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(12, 10), None)
        self.plan = ViewPlan(teacher=())

    def student_features(self, views):
        return [self.backbone(view.flatten(1)) for view in views]

    def loss(self, features, targets, first=0):
        # sin keeps its input.
        loss = torch.stack([feature.sin().sum() for feature in features]).sum()
        return StepOutput(loss, {}, features[0].detach())


def trial(batch: int, micro_batch: int = 0) -> TrialStep:
    return TrialStep(
        OptimConfig(), CPU, torch.float32, ((3, 2, 2),) * 2, batch, options=StepOptions(micro_batch)
    )


def test_the_bytes_kept_for_the_backward_pass_are_counted_exactly() -> None:
    """Each of two views: the layer's input, which is the view itself, and its output; parameters are no activations."""
    assert saved_bytes(OneLayer(), trial(8)) == 2 * (4 * 12 + 4 * 10)


@pytest.mark.parametrize(("micro_batch", "held"), [(0, 64), (16, 16), (100, 64)])
def test_memory_is_weights_states_and_the_chunk(micro_batch: int, held: int) -> None:
    found = estimate_step(OneLayer(), trial(64, micro_batch))
    parameters = 12 * 10 + 10
    assert found.memory_bytes == held * 2 * 88 + 4 * parameters * 3, "a gradient and AdamW's two averages"


def test_trials_double_until_they_last_and_are_scaled_to_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, clock = [], [0.0]

    def run(self: TrialStep, method: Method, size: int) -> None:
        sizes.append(size)
        # Two steps of 0.03 s an image.
        clock[0] += 2 * 0.03 * size

    monkeypatch.setattr(TrialStep, "run", run)
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: clock[0])
    found = estimate_step(OneLayer(), trial(100))
    assert sizes == [2, 4, 8, 16], "16 images take 0.48 s, more than 0.4"
    assert found.step_s == pytest.approx(3.0)


def test_a_run_is_estimated_and_nothing_of_it_changes(shards: Path, tmp_path: Path) -> None:
    """Weights, statistics and the random state are those of a run that was not estimated."""
    resolved = resolve(shards, tmp_path / "run", TINY_VIT)
    found = estimate_run(resolved)
    assert found is not None
    assert found.step_s > 0
    assert found.memory_bytes > 10**5
    from fastssl.pretraining.build import build_method

    method, _ = build_method(resolved, CPU)
    before, state = copy.deepcopy(method.state_dict()), torch.get_rng_state()
    estimate_step(method, trial_step(resolved, Dist(0, 1, 0, CPU), torch.float32))
    assert torch.equal(torch.get_rng_state(), state)
    after = method.state_dict()
    assert all(
        torch.equal(before[name], after[name]) for name in before if isinstance(before[name], torch.Tensor)
    )
    assert all(parameter.grad is None for parameter in method.parameters())


def test_what_is_said() -> None:
    small, large = StepEstimate(0.21, 1_100_000_000), StepEstimate(85.0, 37_000_000_000)
    assert small.describe(570).startswith("About 2 min (0.21 s a step) and 1.1 GB more memory")
    assert small.doubts(570, 8 * 10**9, 128) == []
    memory, hours = large.doubts(10_000, 16 * 10**9, 256)
    assert "37.0 GB more memory but 16.0 GB are free" in memory
    assert "--train.micro-batch 55" in memory
    assert "10 days" in hours


def test_threads_that_wait_for_each_other_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine several threads may take many times as long as one."""
    threads, clock = [2], [0.0]

    def run(self: TrialStep, method: Method, size: int) -> None:
        clock[0] += 2 * size * (1.0 if threads[0] == 2 else 0.1)

    monkeypatch.setattr(TrialStep, "run", run)
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: threads.__setitem__(0, count))
    found = estimate_step(OneLayer(), trial(10))
    assert (found.step_s, found.one_thread_s, threads) == (pytest.approx(10), pytest.approx(1), [2])
    [doubt] = found.doubts(3, 10**12, 10)
    assert "a step takes 10 s with 2 compute threads, which wait for each other, and 1 s with one" in doubt
    assert "OMP_NUM_THREADS=1" in doubt
    assert not StepEstimate(1.4, 0, 1.0).crowded
