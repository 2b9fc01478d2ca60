"""A run killed twenty times, anywhere, and continued each time, against one that was never stopped."""

import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest

from fastssl.core import checkpoint
from tests.fastssl.runs import STEPS, assert_same_end, newest, resolve
from tests.needs import HANGS_S

NUM_KILLS = 20
# A checkpoint after each step, so that a run which is killed all the time gets on.
OFTEN = {
    "train": {"save_every_steps": 1, "log_every": 1, "keep_last": 0, "epochs": 8},
    "knn": {"every": 2, "max_samples": 20},
}
# What has imported everything once is forked for each run: a start takes no time.
fork = multiprocessing.get_context("forkserver")


def _continue(shards: str, run: str) -> None:
    """The run in a process of its own; its exit code is what the command's would be."""
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (as long as the process)
    from fastssl.pretraining.run import train

    summary = train(resolve(shards, Path(run), OFTEN), resume=True)
    os._exit(128 + summary.interrupted if summary.interrupted else 0)


def _progress(run: Path) -> tuple[int, int, bool]:
    """What can be seen of a run from outside: changes with each row, each checkpoint and each file that is being written."""
    log = run / "metrics.jsonl"
    return (
        log.stat().st_size if log.exists() else 0,
        len(checkpoint.list_checkpoints(run)),
        any(run.glob("checkpoints/.*.fastssl-tmp")),
    )


def _kill_somewhere(process, run: Path, draw: random.Random, number: int) -> None:
    """Send a signal a few changes of the folder and up to 20 ms after the start, or not at all where the run ends before."""
    seen, changes = _progress(run), draw.randint(1, 5)
    while changes and process.is_alive():
        now = _progress(run)
        changes -= now != seen
        seen = now
        time.sleep(0.0005)
    time.sleep(draw.random() * 0.02)
    if process.is_alive():
        os.kill(process.pid, number)


@pytest.mark.slow
def test_twenty_kills_anywhere_cost_nothing(shards: Path, tmp_path: Path) -> None:
    fork.set_forkserver_preload(["tests.fastssl.warm", __name__])
    run, expected = tmp_path / "run", tmp_path / "expected"
    draw = random.Random(0)
    reference = fork.Process(target=_continue, args=(str(shards), str(expected)))
    reference.start()
    codes: list[int | None] = []
    ends = 0
    while len(codes) < NUM_KILLS:
        process = fork.Process(target=_continue, args=(str(shards), str(run)))
        process.start()
        number = draw.choice([signal.SIGKILL] * 8 + [signal.SIGTERM, signal.SIGUSR1])
        _kill_somewhere(process, run, draw, number)
        process.join(HANGS_S)
        if process.exitcode == 0:  # it was faster than we: some of it once more
            ends += 1
            assert ends < 5, "the run ends before it is killed"
            for path in checkpoint.list_checkpoints(run)[STEPS:]:
                path.unlink()
            continue
        assert process.exitcode in (-number, 128 + number)
        codes.append(process.exitcode)
    process = fork.Process(target=_continue, args=(str(shards), str(run)))
    process.start()
    for waited in (process, reference):
        waited.join(HANGS_S)
        assert waited.exitcode == 0
    assert codes.count(-signal.SIGKILL) >= NUM_KILLS // 2
    assert newest(run)["step"] == 8 * STEPS
    assert_same_end(run, expected)
    assert not list(run.rglob(".*.fastssl-tmp"))
