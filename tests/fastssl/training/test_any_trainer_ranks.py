"""The same supervised trainer in two processes over gloo: one model, stopped by one rank's signal, resumed together."""

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastssl.core.distributed import Dist
from shards.dataset.order import epoch_order
from tests.fastssl.runs import NUM_IMAGES, differences, rows
from tests.fastssl.training.classifier import Job, Settings, assert_equal_runs, classify
from tests.gloo import run_ranks
from tests.needs import HANGS_S

# Four steps an epoch: a signal that one rank gets in the first steps stops both at the end of the second epoch, since they ask each
# other every four steps.
PAIR = {"batch": 14, "epochs": 5, "save_every_steps": 0}


def _train_rank(here: Dist, jobs: list[Job]) -> list[dict[str, Any]]:
    found = []
    for number, job in enumerate(jobs):
        summary, trainer = classify(job, resume=number > 0, ranks=here)
        found.append(
            {
                "steps": summary.steps,
                "interrupted": summary.interrupted,
                "seen": trainer.seen,
                "model": trainer.model.state_dict(),
            }
        )
    return found


@pytest.mark.slow
@pytest.mark.parametrize("evaluates", [(0,), (0, 1)], ids=["first", "each"])
def test_two_ranks_train_one_model_and_stop_and_resume_together(
    evaluates: tuple[int, ...], shards: Path, tmp_path: Path
) -> None:
    names = ("one", "whole", "run")
    one, whole, run = (
        Job(shards, Settings(out=str(tmp_path / name), **PAIR), evaluates=evaluates) for name in names
    )
    stopped = replace(run, signals=((1, 2, signal.SIGTERM),))
    first, second = (run_ranks(_train_rank, jobs, timeout_s=HANGS_S) for jobs in ([whole], [stopped, run]))
    steps = NUM_IMAGES // 14
    total = 5 * steps
    # Both ranks hold the same weights, also after the resume, and laid end to end what they saw is the order of one process.
    for ranks in (first, second):
        assert differences(ranks[0][-1]["model"], ranks[1][-1]["model"]) == []
    assert [[part["steps"] for part in rank] for rank in second] == 2 * [[2 * steps, total]]
    assert [[part["interrupted"] for part in rank] for rank in second] == 2 * [[signal.SIGTERM, 0]]
    seen = [[a + b for a, b in zip(*(rank[i]["seen"] for rank in second), strict=True)] for i in (0, 1)]
    order = [epoch_order(NUM_IMAGES, seed=0, epoch=e)[: steps * 14] for e in range(5)]
    assert seen[0] + seen[1] == np.concatenate(order).reshape(-1, 14).tolist()
    assert_equal_runs(tmp_path / "run", tmp_path / "whole")

    # One process computes the same up to rounding, and evaluates the same images.
    classify(replace(one, evaluates=(0,)))
    for name in ("loss", "accuracy", "weight_norm"):
        values = [[row[name] for row in rows(tmp_path / n) if name in row] for n in ("one", "whole")]
        assert len(values[0]) == {"loss": total // 2, "accuracy": 6, "weight_norm": 5}[name]
        assert values[0] == pytest.approx(values[1], rel=1e-4)
