"""A run that was stopped, in whatever way, and continued ends with the same bits as one that never was."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastssl.core import checkpoint
from fastssl.core.meters import ProgressDisplay
from fastssl.pretraining.run import train
from fastssl.pretraining.run_config import Resolved
from tests.fastssl.runs import (
    SAVE_STEPS,
    STEPS,
    TINY_VIT,
    TOTAL,
    assert_same_end,
    newest,
    resolve,
    rows,
    timeless,
    tiny,
    write_yaml,
)
from tests.needs import HANGS_S

ROOT = Path(__file__).parents[3]
BF16 = {"train": {"precision": "bf16"}}
has_bf16 = pytest.mark.skipif(
    not torch.cpu._is_avx512_bf16_supported(), reason="this CPU does not multiply bf16"
)


# ---------------------------------------------------------------- killed processes


class Process:
    """`python -m fastssl pretrain CONFIG` and what its run folder holds by now."""

    def __init__(self, config: Path, run: Path, *flags: str):
        self.run = run
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fastssl", "pretrain", str(config), *flags],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def saved(self) -> int:
        """Steps in the newest checkpoint, 0 before the first."""
        found = checkpoint.list_checkpoints(self.run)
        return int(found[-1].stem.removeprefix("step-")) if found else 0

    def logged(self) -> int:
        """Steps of the newest whole row of metrics."""
        path = self.run / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return int(lines[-1].split('"step": ')[1].split(",")[0]) if lines else 0

    def saving(self) -> bool:
        """Whether a checkpoint is being written."""
        return any(self.run.glob("checkpoints/.*.fastssl-tmp"))

    def stop_when(self, moment: Callable[["Process"], bool], number: int) -> tuple[int, str]:
        """Send a signal as soon as `moment` has come; return the exit code and what was printed."""
        while not moment(self):
            assert self._process.poll() is None, self._process.communicate()
            time.sleep(0.0005)
        self._process.send_signal(number)
        return self.end()

    def end(self) -> tuple[int, str]:
        out, err = self._process.communicate(timeout=HANGS_S)
        return self._process.returncode, out + err


BETWEEN = ("between checkpoints", lambda p: p.logged() > p.saved() >= SAVE_STEPS * 2)
SAVING = ("while one is written", lambda p: p.saved() >= SAVE_STEPS * 3 and p.saving())
END_OF_EPOCH = ("at the end of an epoch", lambda p: p.saved() >= STEPS * 2)


@pytest.mark.slow
def test_sigkill_at_any_moment_costs_nothing(shards: Path, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = write_yaml(tmp_path / "tiny.yaml", tiny(shards, run))
    for what, moment in (SAVING, END_OF_EPOCH):  # test_soak kills at twenty others
        code, text = Process(config, run, "--resume").stop_when(moment, signal.SIGKILL)
        assert code == -signal.SIGKILL, f"{what}: {text}"
        assert newest(run)["step"] < TOTAL, what
    code, text = Process(config, run, "--resume").end()
    assert code == 0, text
    assert f"of {TOTAL}" in text
    assert_same_end(run, finished)
    assert not list(run.rglob(".*.fastssl-tmp"))


@pytest.mark.slow
@has_bf16
def test_sigkill_costs_nothing_in_bf16(shards: Path, tmp_path: Path) -> None:
    run, expected = tmp_path / "run", tmp_path / "expected"
    train(resolve(shards, expected, BF16))
    config = write_yaml(tmp_path / "tiny.yaml", tiny(shards, run, BF16))
    assert Process(config, run).stop_when(BETWEEN[1], signal.SIGKILL)[0] == -signal.SIGKILL
    code, text = Process(config, run, "--resume").end()
    assert code == 0, text
    assert_same_end(run, expected)


def test_sigterm_stops_after_the_step_and_says_how_to_continue(
    shards: Path, finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = write_yaml(tmp_path / "tiny.yaml", tiny(shards, run))
    code, text = Process(config, run).stop_when(lambda p: p.logged() >= 4, signal.SIGTERM)
    step = newest(run)["step"]
    assert code == 128 + signal.SIGTERM
    assert 4 <= step < TOTAL
    assert f"Stopped after step {step}, saved as {checkpoint.checkpoint_path(run, step)}." in text
    assert "To continue, add --resume to the same command." in text
    summary = train(resolve(shards, run), resume=True)
    assert (summary.steps, summary.interrupted) == (TOTAL, 0)
    assert_same_end(run, finished)


# ---------------------------------------------------------------- stopped within this process


class Crash(Exception):
    """A stop without a chance to save."""


def crash_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let training die after the optimiser's step number `step`, before its row and its checkpoint."""
    move = ProgressDisplay.step

    def move_or_die(self: ProgressDisplay, now: int) -> None:
        if now == step:
            raise Crash
        move(self, now)

    monkeypatch.setattr(ProgressDisplay, "step", move_or_die)


def resume_after_crashes(resolved: Resolved, steps: tuple[int, ...]) -> None:
    """Run to the end, crashing at each of these steps and resuming."""
    for step in steps:
        with pytest.MonkeyPatch.context() as patch:
            crash_at(patch, step)
            with pytest.raises(Crash):
                train(resolved, resume=True)
    train(resolved, resume=True)


def crash_after_saving(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let training die when the checkpoint of `step` has been written, before anything else is done."""
    save = checkpoint.save

    def save_and_die(path: Path, state: dict[str, Any], *kept: int) -> None:
        save(path, state, *kept)
        if state["step"] == step:
            raise Crash

    monkeypatch.setattr(checkpoint, "save", save_and_die)


@pytest.mark.parametrize(
    ("how", "step"),
    [
        (crash_at, 1),  # before the first checkpoint: --resume begins anew
        (crash_at, STEPS),  # the last step of an epoch is done, its test and checkpoint are not
        (crash_at, STEPS + 1),
        (crash_after_saving, STEPS),
        (crash_after_saving, 9),
        (crash_after_saving, TOTAL),
    ],
)
def test_a_crash_costs_nothing(how, step, shards: Path, finished: Path, tmp_path: Path) -> None:
    resolved = resolve(shards, tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        how(patch, step)
        with pytest.raises(Crash):
            train(resolved, resume=True)
    train(resolved, resume=True)
    assert_same_end(tmp_path / "run", finished)


@pytest.mark.parametrize("step", [STEPS, 2 * STEPS, TOTAL])
def test_a_stop_between_the_checkpoint_and_the_test_of_an_epoch(
    step: int, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints of single steps come before the epoch's kNN test, which a resumed run must not skip."""
    changes = {"train": {"save_every_steps": STEPS}}
    train(resolve(shards, tmp_path / "expected", changes))
    resolved = resolve(shards, tmp_path / "run", changes)
    with pytest.MonkeyPatch.context() as patch:
        crash_after_saving(patch, step)
        with pytest.raises(Crash):
            train(resolved)
    assert "knn_accuracy" not in rows(tmp_path / "run")[-1]
    train(resolved, resume=True)
    assert_same_end(tmp_path / "run", tmp_path / "expected")


@pytest.mark.parametrize("changes", [{}, pytest.param(BF16, marks=has_bf16)], ids=["fp32", "bf16"])
def test_a_vit_with_random_depths_resumes_with_the_same_bits(
    changes: dict, shards: Path, tmp_path: Path
) -> None:
    train(resolve(shards, tmp_path / "expected", TINY_VIT, changes))
    resolved = resolve(shards, tmp_path / "run", TINY_VIT, changes)
    resume_after_crashes(resolved, (4, STEPS + 3))
    assert_same_end(tmp_path / "run", tmp_path / "expected")


def test_another_seed_is_another_run(shards: Path, finished: Path, tmp_path: Path) -> None:
    """What the comparison of runs is worth: it sees a change."""
    train(resolve(shards, tmp_path / "run", {"train": {"seed": 1}}))
    with pytest.raises(AssertionError):
        assert_same_end(tmp_path / "run", finished)
    assert timeless(tmp_path / "run") != timeless(finished)


def test_resuming_a_finished_run_changes_nothing(shards: Path, tmp_path: Path) -> None:
    resolved = resolve(shards, tmp_path / "run", {"train": {"epochs": 1}})
    train(resolved)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    [*_, path] = checkpoint.list_checkpoints(tmp_path / "run")
    stamp = path.stat().st_mtime_ns
    assert train(resolved, resume=True).steps == STEPS
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert path.stat().st_mtime_ns == stamp


# ---------------------------------------------------------------- with other settings


def _short_run(shards: Path, run: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, SAVE_STEPS + 1)
        with pytest.raises(Crash):
            train(resolve(shards, run))


def test_a_changed_weight_decay_is_told_and_acts(shards: Path, finished: Path, tmp_path: Path) -> None:
    _short_run(shards, tmp_path / "run")
    changed = resolve(shards, tmp_path / "run", {"optim": {"weight_decay": 0.25}})
    with pytest.warns(UserWarning, match=r"optim.weight_decay was 0.0005 so far and is 0.25 from now on"):
        train(changed, resume=True)
    state = newest(tmp_path / "run")
    assert state["optimizer"]["param_groups"][0]["weight_decay"] == 0.25
    norms = [
        torch.stack([t.norm() for k, t in s["method"].items() if k.endswith("weight")]).norm()
        for s in (state, newest(finished))
    ]
    assert norms[0] < norms[1]


def test_settings_of_the_machine_may_change_in_silence(shards: Path, finished: Path, tmp_path: Path) -> None:
    _short_run(shards, tmp_path / "run")
    changed = {
        "data": {"threads": 2},
        "train": {"keep_last": 1, "save_every": 2},
        "knn": {"k": 5, "max_samples": 0},
    }
    train(resolve(shards, tmp_path / "run", changed), resume=True)
    assert_same_end(tmp_path / "run", finished)
    assert len(checkpoint.list_checkpoints(tmp_path / "run")) == 1
