"""RankMe from its formula, and which step was bad."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fastssl.core.distributed import Dist
from fastssl.core.nonfinite import EPSILON, MAX_ROWS, NonFiniteMonitor, rank_me
from tests.fastssl.runs import BATCH, STEPS, TOTAL, rows
from tests.gloo import run_ranks

CPU = torch.device("cpu")


def test_rank_me_is_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(9, 3, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(5, 3, generator=generator))[0]
    values = torch.tensor([4.0, 3.0, 1.0])
    shares = [v / 8 + EPSILON for v in (4, 3, 1, 0, 0)]
    expected = math.exp(-sum(p * math.log(p) for p in shares))
    assert rank_me(left * values @ right.T) == pytest.approx(expected, rel=1e-5)
    assert expected == pytest.approx(2.6493, rel=1e-4)


def test_rank_me_between_collapse_and_all_directions() -> None:
    assert rank_me(torch.eye(6)) == pytest.approx(6, rel=1e-4)
    assert rank_me(torch.ones(8, 4)) == pytest.approx(1, rel=1e-4)
    assert rank_me(torch.zeros(8, 4)) == pytest.approx(1, rel=1e-4)
    assert math.isnan(rank_me(torch.tensor([[1.0, float("inf")]])))
    many = torch.randn(MAX_ROWS + 100, 3, generator=torch.Generator().manual_seed(1))
    assert rank_me(many) == rank_me(many[:MAX_ROWS])


def test_the_first_bad_step_is_found_with_its_samples() -> None:
    watch = NonFiniteMonitor(CPU)
    for step, (bad, loss) in enumerate([(False, 1.0), (True, math.nan), (True, 2.0), (False, 3.0)], start=1):
        watch.record(step, torch.tensor(bad), torch.tensor(loss), np.array([step, 10 * step]))
    found = watch.poll()
    assert found is not None
    assert (found.step, found.sample_ids.tolist(), found.skipped) == (2, [2, 20], 2)
    assert str(found) == "The loss was nan at step 2"
    assert watch.poll() is None
    watch.record(5, torch.tensor(True), torch.tensor(2.5), np.array([5]))
    found = watch.poll()
    assert found is not None
    assert str(found) == "The gradient was not finite at step 5"
    assert watch.count == 3
    again = NonFiniteMonitor(CPU)
    again.restore(watch.count)
    assert again.count == 3


def test_noting_a_step_waits_for_nothing() -> None:
    watch = NonFiniteMonitor(torch.device("meta"))  # reading a meta tensor on the host raises
    with torch.device("meta"):
        watch.record(1, torch.ones((), dtype=torch.bool), torch.ones(()), np.array([1]))


def _watch_on_ranks(here: Dist) -> tuple:
    watch = NonFiniteMonitor(CPU)
    for step in (1, 2):
        ids = np.arange(3) + 10 * here.rank + 100 * step
        watch.record(step, torch.tensor(step == 2), torch.tensor(math.nan if here.rank == 1 else 1.0), ids)
    found = watch.poll()
    assert found is not None
    return found.step, str(found), found.sample_ids.tolist()


def test_the_batch_of_a_bad_step_is_that_of_all_ranks() -> None:
    expected = (2, "The loss was nan at step 2", [200, 201, 202, 210, 211, 212])
    assert run_ranks(_watch_on_ranks) == [expected] * 2


def test_the_rank_of_the_features_stands_at_the_ends_of_epochs(finished: Path) -> None:
    found = [row for row in rows(finished) if "rank_me" in row]
    assert [(row["step"], row["epoch"]) for row in found] == [(STEPS, 1), (2 * STEPS, 2), (TOTAL, 3)]
    assert all(1 < row["rank_me"] <= BATCH for row in found)
