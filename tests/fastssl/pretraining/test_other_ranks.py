"""A run that goes on with another number of processes and in chunks sees the same samples with the same draws."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fastssl.core import checkpoint
from fastssl.core.distributed import Dist, cleanup
from fastssl.pretraining.run import train
from fastssl.pretraining.run_config import load
from pipelines.loading.loader import Loader, open_loader
from shards.dataset.shard_set import ShardSet
from tests.fastssl.runs import BATCH, NUM_IMAGES, SAVE_STEPS, STEPS, newest, resolve, rows
from tests.gloo import _free_port, run_ranks
from tests.needs import HANGS_S

TWO_EPOCHS = {"train": {"epochs": 2}, "knn": {"every": 2}}
FIRST, SECOND = SAVE_STEPS, 3 * SAVE_STEPS
# Of a sample in a step: its id and what its views hold, to the last bit.
Seen = dict[int, list[tuple[int, str]]]


class Crash(Exception):
    """A stop without a chance to save."""


def _seen(batch) -> list[tuple[int, str]]:
    return [
        (int(i), hashlib.sha256(b"".join(view[row].numpy().tobytes() for view in batch.views)).hexdigest())
        for row, i in enumerate(batch.sample_ids)
    ]


@contextmanager
def _watched(seen: Seen, crash_after: int = 0) -> Iterator[None]:
    """Note what each step is given, and stop after one."""
    steps_of = Loader.steps

    def steps(self: Loader, start: int, stop: int):
        for step, batch in enumerate(steps_of(self, start, stop), start=start + 1):
            if step == crash_after + 1 and crash_after:
                raise Crash
            seen[step] = _seen(batch)
            yield batch

    Loader.steps = steps
    try:
        yield
    except Crash:
        pass
    finally:
        Loader.steps = steps_of


def _go_on(here: Dist, port: int, run: str) -> Seen:
    cleanup()  # pretrain joins the group itself
    os.environ["MASTER_PORT"] = str(port)
    seen: Seen = {}
    with _watched(seen, crash_after=SECOND):
        train(load(run + ".yaml"), resume=True)
    return seen


def test_one_process_then_two_then_one_in_chunks(shards: Path, tmp_path: Path) -> None:
    assert NUM_IMAGES % BATCH  # an epoch's last batch would be uneven
    run = tmp_path / "run"
    found: Seen = {}
    with _watched(found, crash_after=FIRST):
        train(resolve(shards, run, TWO_EPOCHS))
    two = run_ranks(_go_on, _free_port(), str(run), timeout_s=HANGS_S)
    assert all(list(seen) == list(range(FIRST + 1, SECOND + 1)) for seen in two)
    found |= {step: [sample for seen in two for sample in seen[step]] for step in two[0]}
    assert newest(run)["step"] == SECOND
    last: Seen = {}
    with _watched(last), pytest.warns(UserWarning, match=r"train\.micro_batch was 0 so far"):
        train(resolve(shards, run, TWO_EPOCHS, {"train": {"micro_batch": 4}}), resume=True)
    assert list(last) == list(range(SECOND + 1, 2 * STEPS + 1))
    found |= last

    cfg = resolve(shards, tmp_path / "expected", TWO_EPOCHS).config
    loader = open_loader(ShardSet.open(shards), cfg.recipe, batch=BATCH, seed=cfg.train.seed)
    expected = {step: _seen(batch) for step, batch in enumerate(loader.steps(0, 2 * STEPS), start=1)}
    assert found == expected
    assert [row["step"] for row in rows(run) if "loss" in row] == list(range(2, 2 * STEPS + 1, 2))
    assert checkpoint.list_checkpoints(run)[-1].stem == f"step-{2 * STEPS:09d}"
