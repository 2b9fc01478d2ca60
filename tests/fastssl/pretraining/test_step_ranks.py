"""Several processes against one: gradients in chunks, queues, weights without use, signals."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastssl.core.distributed import (
    Dist,
    LargestOverRanks,
    alone,
    smallest_over_ranks,
    world,
)
from fastssl.methods import MoCoV3
from fastssl.methods.moco_v3 import MoCoV3Config as Config
from fastssl.pretraining.build import freeze_unused, spread
from fastssl.pretraining.step import DDPWrapper, Step, StepOptions
from tests.fastssl.pretraining.test_step import CPU, largest_difference, make_step, take_steps, without_norms
from tests.fastssl.tiny import Plain, make_method, make_views
from tests.gloo import run_ranks

SHARE = 5  # images of a rank: chunks of 3 make 2 and 3
NUM_STEPS = 2


def new_method(num: int) -> MoCoV3:
    return without_norms(make_method(Plain(), Config(dim=5, hidden_dim=7, queue=3 * num)))


def _rank_steps(here: Dist, exact_heads: bool) -> dict:
    num = SHARE * here.world
    method = new_method(num)
    mine = slice(here.rank * SHARE, (here.rank + 1) * SHARE)
    views_of = [[view[mine] for view in make_views(num, seed=step)] for step in range(NUM_STEPS)]
    model = spread(method, here)
    assert isinstance(model, DistributedDataParallel)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
    step = Step(method, model, optimizer, CPU, options=StepOptions(3, exact_heads))
    targets = method.targets(method.teacher_features(views_of[0]))
    return {"targets": (targets.first, targets.second), **take_steps(method, step, views_of)}


@pytest.mark.parametrize(("num_ranks", "exact_heads"), [(2, False), (2, True), (4, False)])
def test_chunks_on_several_ranks_equal_one_process_on_the_whole_batch(
    num_ranks: int, exact_heads: bool
) -> None:
    found = run_ranks(_rank_steps, exact_heads, world=num_ranks)
    num = SHARE * num_ranks
    alone = new_method(num)
    views_of = [make_views(num, seed=step) for step in range(NUM_STEPS)]
    expected_targets = alone.targets(alone.teacher_features(views_of[0]))
    expected = take_steps(alone, make_step(alone), views_of)
    for rank in found:
        for one, other in zip(rank["targets"], expected_targets[:2], strict=True):
            torch.testing.assert_close(one, other)  # in rank order
        for step in range(NUM_STEPS):
            assert largest_difference(rank["grads"][step], expected["grads"][step]) < 1e-4
            for name in ("loss", "ce", "ce_norm", "acc"):
                assert rank["metrics"][step][name] == pytest.approx(expected["metrics"][step][name], rel=1e-5)
        for name, value in expected["state"].items():
            torch.testing.assert_close(rank["state"][name], value, msg=name)
            assert torch.equal(rank["state"][name], found[0]["state"][name]), name  # the queue included
    assert int(expected["state"]["queue._extra_state"]) == NUM_STEPS * num


class WithSpare(Plain):
    """A backbone with a layer that nothing uses, as some of timm's have."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(2, 2)


def _train_with_spare(here: Dist) -> tuple[list[str], list[str], bool]:
    method = make_method(WithSpare())
    start = copy.deepcopy(method.state_dict())
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        names = freeze_unused(method, [(3, 4, 4)] * 2, here)
    same = all(torch.equal(value, start[name]) for name, value in method.state_dict().items())
    step = Step(method, DistributedDataParallel(DDPWrapper(method)), optimizer, CPU)
    for _ in range(3):  # DDP complains at the second step after one that left a parameter out
        step.gradients(make_views())
        step.update(0.9)
    return names, [str(w.message) for w in told], same


def test_weights_without_use_are_frozen_aloud() -> None:
    first, second = run_ranks(_train_with_spare)
    assert first[0] == second[0] == ["backbone.spare.weight", "backbone.spare.bias"]
    assert first[1] == [
        "These weights receive no gradient and stay as they are: backbone.spare.weight, backbone.spare.bias."
    ]
    assert second[1] == []
    assert first[2]
    assert second[2]


def _poll(here: Dist) -> list[int]:
    signals = LargestOverRanks()
    found = [signals.poll(step, 15 if here.rank == 1 and step >= 5 else 0) for step in range(1, 17)]
    # The reduction that step 16 began; none is left to break off when a process ends.
    return [*found, signals.finish()]


def test_a_signal_to_one_rank_reaches_all_at_the_same_step() -> None:
    first, *others = run_ranks(_poll, world=4)
    assert all(other == first for other in others)
    # Given at step 5, sent at 8, read at 12.
    assert [step for step, signal in enumerate(first, start=1) if signal] == [12, 16, 17]
    assert set(first) == {0, 15}


def test_a_single_process_sees_its_signal_at_once() -> None:
    assert [LargestOverRanks().poll(step, 2) for step in (1, 2)] == [2, 2]


def _alone_or_not(here: Dist) -> tuple[int, int, int]:
    with alone():
        apart = world()
    return apart, world(), smallest_over_ranks(10 - here.rank, CPU)


def test_a_rank_may_act_alone() -> None:
    assert run_ranks(_alone_or_not) == [(1, 2, 9), (1, 2, 9)]
