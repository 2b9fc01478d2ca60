"""A run that continues in another folder, or with another number of epochs."""

import json
import math
import os
import re
import shutil
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest

from fastssl.cli import main
from fastssl.core import checkpoint
from fastssl.pretraining.run import pretrain, train
from pipelines.loading.loader import Loader
from shards.errors import UserError
from tests.fastssl.runs import (
    BATCH,
    SAVE_STEPS,
    STEPS,
    TOTAL,
    assert_same_end,
    differences,
    newest,
    resolve,
    rows,
    tiny,
    write_yaml,
)

DONE = 3 * SAVE_STEPS
PEAK = 0.06 * BATCH / 256


class Crash(Exception):
    """A stop without a chance to save."""


def crash_after(step: int, act, *args: Any, **options: Any) -> None:
    """Call `act` and let it die when the checkpoint of `step` has been written."""
    save = checkpoint.save

    def save_and_die(path: Path, state: dict[str, Any], *kept: int) -> None:
        save(path, state, *kept)
        if path.name == f"step-{step:09d}.pt":
            raise Crash

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", save_and_die)
        with pytest.raises(Crash):
            act(*args, **options)


@pytest.fixture(scope="module")
def stopped(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that died after its third checkpoint; it has those of steps 6, 7 and 9. Tests must not write to it."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    crash_after(DONE, train, resolve(shards, run, {"train": {"keep_last": 3}}))
    assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(run)] == [6, 7, 9]
    return run


def content(run: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of change of all files and folders below a folder."""
    return {
        str(path.relative_to(run)): (path.read_bytes() if path.is_file() else b"", path.stat().st_mtime_ns)
        for path in sorted(run.rglob("*"))
    }


@pytest.mark.parametrize("where", ["", "checkpoints", "checkpoints/step-000000006.pt"])
def test_it_ends_as_the_run_itself_and_leaves_the_old_folder_alone(
    where: str,
    stopped: Path,
    finished: Path,
    shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = content(stopped)
    path = write_yaml(tmp_path / "tiny.yaml", tiny(shards, tmp_path / "runs" / "new"))
    assert main(["pretrain", str(path), "--resume", str(stopped / where)]) == 0
    step = 6 if where.endswith(".pt") else DONE
    assert f"resuming after step {step} of {TOTAL}" in capsys.readouterr().out
    assert content(stopped) == before
    # All rows of metrics among them.
    assert_same_end(tmp_path / "runs" / "new", finished)
    best = [checkpoint.load(run / "checkpoints" / "best.pt") for run in (tmp_path / "runs" / "new", finished)]
    assert best[0]["step"] == best[1]["step"]
    assert differences(best[0]["method"], best[1]["method"]) == []


def test_the_same_command_again_continues_in_the_new_folder(
    stopped: Path, finished: Path, shards: Path, tmp_path: Path
) -> None:
    resolved = resolve(shards, tmp_path / "new")
    crash_after(DONE + SAVE_STEPS, train, resolved, resume=stopped)
    with pytest.warns(
        UserWarning, match=r"new' continues from its own 'step-000000012\.pt', not from '.*run' again"
    ):
        pretrain(resolved, resume=str(stopped))
    assert_same_end(tmp_path / "new", finished)


def test_best_weights_of_a_later_step_are_not_those_of_the_new_run(
    stopped: Path, shards: Path, tmp_path: Path
) -> None:
    """The log is cut back to the step, and best.pt with it; the next evaluation writes one."""
    assert checkpoint.load(stopped / "checkpoints" / "best.pt")["step"] == STEPS
    crash_after(
        STEPS,
        train,
        resolve(shards, tmp_path / "new", {"train": {"save_every_steps": 1}}),
        resume=stopped / "checkpoints" / "step-000000006.pt",
    )
    assert not (tmp_path / "new" / "checkpoints" / "best.pt").exists()
    assert [row["step"] for row in rows(tmp_path / "new")][:5] == [0, 2, 4, 6, 7]


def test_without_them_the_next_evaluation_writes_its_own(stopped: Path, shards: Path, tmp_path: Path) -> None:
    """Also where an earlier row, whose weights are gone, was better."""
    old = tmp_path / "old"
    shutil.copytree(stopped, old)
    with open(old / "metrics.jsonl", "a") as log:
        log.write(json.dumps({"step": 8, "knn_accuracy": 1.0}) + "\n")
    best = old / "checkpoints" / "best.pt"
    checkpoint.save(best, {**checkpoint.load(best), "step": 2 * STEPS})
    with pytest.warns(UserWarning, match=r"train\.epochs was 3"):
        train(resolve(shards, tmp_path / "new", {"train": {"epochs": 2}}), resume=old)
    assert any(row.get("knn_accuracy") == 1.0 for row in rows(tmp_path / "new"))
    assert checkpoint.load(tmp_path / "new" / "checkpoints" / "best.pt")["knn_accuracy"] < 1


def test_another_evaluation_has_a_best_of_its_own(stopped: Path, shards: Path, tmp_path: Path) -> None:
    """The old accuracy was higher; it is not compared with those of other neighbours."""
    old = tmp_path / "old"
    shutil.copytree(stopped, old)
    best = old / "checkpoints" / "best.pt"
    checkpoint.save(best, {**checkpoint.load(best), "knn_accuracy": 1.0})
    log = old / "metrics.jsonl"
    log.write_text(re.sub(r'"knn_accuracy": [0-9.]+', '"knn_accuracy": 1.0', log.read_text()))
    with pytest.warns(UserWarning, match=r"knn\.k changed: .* best\.pt is written anew"):
        train(resolve(shards, tmp_path / "new", {"knn": {"k": 3}}), resume=old)
    found = checkpoint.load(tmp_path / "new" / "checkpoints" / "best.pt")
    assert found["step"] > DONE
    assert found["knn_accuracy"] < 1
    kept = resolve(shards, tmp_path / "kept")
    train(kept, resume=old)
    assert checkpoint.load(tmp_path / "kept" / "checkpoints" / "best.pt")["knn_accuracy"] == 1.0


def test_a_run_of_its_own_is_not_taken_for_another(stopped: Path, shards: Path, tmp_path: Path) -> None:
    """Else the command would go on training a run that nobody named."""
    crash_after(SAVE_STEPS, train, resolve(shards, tmp_path / "own"))
    before = content(tmp_path / "own" / "checkpoints")
    with pytest.raises(
        UserError, match=r"own' holds a run of its own \(step-000000003\.pt\), which did not begin"
    ):
        train(resolve(shards, tmp_path / "own"), resume=stopped)
    assert content(tmp_path / "own" / "checkpoints") == before


def test_a_folder_with_best_weights_only_cannot_be_continued(
    stopped: Path, shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    for path in checkpoint.list_checkpoints(run):
        path.unlink()
    with pytest.raises(UserError, match=r"holds weights only, and '.*run' has no step-\*\.pt file"):
        train(resolve(shards, run), resume=run / "checkpoints" / "best.pt")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("nowhere", "There is no checkpoint at '.*nowhere': give a .pt file, or the folder of a run"),
        (
            "checkpoints/best.pt",
            r"best\.pt' holds weights only, and a run continues from the optimizer's state too",
        ),
    ],
)
def test_what_is_no_checkpoint_to_continue_from(
    given: str, words: str, stopped: Path, shards: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        train(resolve(shards, tmp_path / "new"), resume=stopped / given)


def test_an_older_checkpoint_of_the_same_folder_is_refused(stopped: Path, shards: Path) -> None:
    before = content(stopped)
    with pytest.raises(
        UserError,
        match=r"step-000000006\.pt' is not where its run ended, which is 'step-000000009\.pt': give another",
    ):
        train(resolve(shards, stopped), resume=stopped / "checkpoints" / "step-000000006.pt")
    assert {name: held for name, (held, _) in content(stopped).items()} == {
        name: held for name, (held, _) in before.items()
    }


def test_a_complete_run_needs_more_epochs(finished: Path, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=rf"is the end of its run \({TOTAL} of {TOTAL} steps\): raise --train.epochs"
    ):
        train(resolve(shards, tmp_path / "new"), resume=finished)


# ---------------------------------------------------------------- another number of epochs


def cosine(step: int, epochs: int) -> float:
    """The learning rate of a step, counted from 1, after the warm-up of one epoch."""
    return PEAK * 0.5 * (1 + math.cos(math.pi * ((step - 1) / STEPS - 1) / (epochs - 1)))


def momentum(step: int, epochs: int) -> float:
    return 1 - 0.01 * 0.5 * (1 + math.cos(math.pi * min(step / (STEPS * epochs), 1)))


@pytest.mark.parametrize(("start", "epochs"), [(DONE, 4), (DONE, 2), (TOTAL, 4)])
def test_the_cosine_is_that_of_the_new_length_from_there_on(
    start: int,
    epochs: int,
    stopped: Path,
    finished: Path,
    shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changes = {"train": {"epochs": epochs, "log_every": 1}, "knn": {"every": 0}}
    path = write_yaml(tmp_path / "tiny.yaml", tiny(shards, tmp_path / "new", changes))
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert main(["pretrain", str(path), "--resume", str(stopped if start == DONE else finished)]) == 0
    old = 0.0 if start == TOTAL else cosine(start + 1, 3)
    assert capsys.readouterr().err == (
        f"fastssl: note: train.epochs was 3 so far and is {epochs} from now on: step {start + 1} continues on the schedules of "
        f"{epochs} epochs, with learning rate {cosine(start + 1, epochs):.4g} (with 3 epochs: {old:.4g}) and teacher's momentum "
        f"{momentum(start + 1, epochs):.4g} ({momentum(start + 1, 3):.4g}).\n"
    )
    rates = {row["step"]: row["lr"] for row in rows(tmp_path / "new") if "lr" in row and row["step"] > start}
    total = epochs * STEPS
    assert list(rates) == list(range(start + 1, total + 1))
    assert rates == pytest.approx({step: cosine(step, epochs) for step in rates}, rel=1e-5)
    # A step after the last one would have a rate of 0, on this schedule alone.
    assert cosine(total + 1, epochs) == pytest.approx(0, abs=1e-12)
    assert newest(tmp_path / "new")["step"] == total
    before = {
        row["step"]: row["lr"]
        for row in rows(tmp_path / "new")
        if "lr" in row and STEPS < row["step"] <= start
    }
    assert before == pytest.approx({step: cosine(step, 3) for step in before}, rel=1e-5)


def test_fewer_epochs_than_are_done_are_refused(stopped: Path, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"is 9 steps into its run, and train.epochs = 1 ends after 7: set --train.epochs 2 or more \(it was 3\)",
    ):
        train(resolve(shards, tmp_path / "new", {"train": {"epochs": 1}}), resume=stopped)


# ---------------------------------------------------------------- a stop before the first step


def test_a_stop_while_the_loader_starts_is_answered_and_saves_after_the_first_step(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps_of = Loader.steps

    def steps(self: Loader, start: int, stop: int):
        os.kill(os.getpid(), signal.SIGINT)
        yield from steps_of(self, start, stop)

    monkeypatch.setattr(Loader, "steps", steps)
    summary = train(resolve(shards, tmp_path / "run"))
    assert (summary.steps, summary.interrupted) == (1, signal.SIGINT)
    assert newest(tmp_path / "run")["step"] == 1
    assert capsys.readouterr().out.count("Stopping after this step; again: at once, unsaved\n") == 1
