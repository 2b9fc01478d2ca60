"""The loop and its run folder under a supervised trainer: nothing of pretraining takes part."""

import multiprocessing
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastssl.core import checkpoint
from pipelines.streaming.batch import Batch
from shards.dataset.order import epoch_order
from shards.errors import UserError
from shards.storage.atomic_files import lock_file
from tests.fastssl.runs import NUM_IMAGES, newest, rows
from tests.fastssl.training.classifier import (
    STEPS,
    TOTAL,
    Classifier,
    Job,
    Settings,
    assert_equal_runs,
    classify,
)
from tests.needs import HANGS_S

ROOT = Path(__file__).parents[3]


@pytest.fixture
def job(shards: Path, tmp_path: Path) -> Job:
    return Job(shards, Settings(out=str(tmp_path / "run")))


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was never stopped. Tests must not write to it."""
    run = tmp_path_factory.mktemp("whole") / "run"
    classify(Job(shards, Settings(out=str(run))))
    return run


def test_it_imports_nothing_of_pretraining() -> None:
    code = (
        "import sys, fastssl.training; print(*(name for name in sys.modules if name.startswith('fastssl.')))"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {name.split(".")[1] for name in found.stdout.split()} == {"core", "training"}


def test_a_run_trains_logs_saves_and_keeps_the_best(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    summary, trainer = classify(job)
    assert (summary.steps, summary.interrupted) == (TOTAL, 0)
    assert summary.checkpoint == checkpoint.checkpoint_path(run, TOTAL)
    order = np.concatenate([epoch_order(NUM_IMAGES, seed=0, epoch=e)[: STEPS * 8] for e in range(3)])
    assert trainer.seen == order.reshape(-1, 8).tolist()

    found = rows(run)
    assert [row["step"] for row in found if "loss" in row] == [*range(2, TOTAL, 2), TOTAL]
    assert {frozenset(row) for row in found if "loss" in row} == {
        frozenset(
            ("step", "epoch", "lr", "loss", "acc", "images_per_s", "data_wait", "stand_ins"),
        )
    }
    assert [(row["step"], row["epoch"]) for row in found if "weight_norm" in row] == [
        (STEPS * e, e) for e in (1, 2, 3)
    ]
    accuracies = {row["step"]: row["accuracy"] for row in found if "accuracy" in row}
    assert list(accuracies) == [0, STEPS, 2 * STEPS, TOTAL]
    # Each class has a shade of its own.
    assert accuracies[TOTAL] > 0.9 > 0.6 > accuracies[0]
    del accuracies[0]
    best = checkpoint.load(run / "checkpoints" / "best.pt")
    assert best["step"] == max(accuracies, key=lambda step: accuracies[step])
    assert best["accuracy"] == pytest.approx(accuracies[best["step"]], rel=1e-5)
    assert "optimizer" not in best
    assert [path.name for path in checkpoint.list_checkpoints(run)] == [
        f"step-{step:09d}.pt" for step in (18, 21)
    ]
    assert f"out: {run}" in (run / "config.yaml").read_text()

    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        "3 classes of 60 images",
        "4 of 60 images (6.7%), others in each epoch, are left out: they do not fill a batch of 8",
        "21 steps to go",
        f"epoch 0/3  accuracy {found[0]['accuracy']:.1%}",
    ]
    assert lines[-1] == f"epoch 3/3  accuracy {accuracies[TOTAL]:.1%}"


# ---------------------------------------------------------------- stopped and continued


def _killed(job: Job) -> None:
    classify(job, resume=True)


@pytest.mark.slow
def test_sigkill_costs_nothing(job: Job, whole: Path, tmp_path: Path) -> None:
    for step in (1, STEPS, 2 * STEPS + 1):
        killed = replace(job, signals=((0, step, signal.SIGKILL),))
        process = multiprocessing.get_context("spawn").Process(target=_killed, args=(killed,))
        process.start()
        process.join(HANGS_S)
        assert process.exitcode == -signal.SIGKILL
    assert newest(tmp_path / "run")["step"] < 2 * STEPS + 1
    assert classify(job, resume=True)[0].steps == TOTAL
    assert_equal_runs(tmp_path / "run", whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_stops_after_the_step_and_the_run_goes_on(
    number: int, job: Job, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # At the end of an epoch, which is not evaluated yet; and within one.
    for step in (STEPS, STEPS + 3):
        summary, _ = classify(replace(job, signals=((0, step, number),)), resume=True)
        assert (summary.steps, summary.interrupted) == (step, number)
        assert newest(tmp_path / "run")["step"] == step
        assert "Stopping after this step" in capsys.readouterr().out
    summary, trainer = classify(job, resume=True)
    assert f"resuming after step {STEPS + 3} of {TOTAL}\n" in capsys.readouterr().out
    assert len(trainer.seen) == TOTAL - STEPS - 3
    assert_equal_runs(tmp_path / "run", whole)


def test_it_continues_in_another_folder(job: Job, whole: Path, tmp_path: Path) -> None:
    classify(replace(job, signals=((0, STEPS + 1, signal.SIGINT),)))
    other = replace(job, settings=replace(job.settings, out=str(tmp_path / "other")))
    classify(other, resume=tmp_path / "run")
    assert newest(tmp_path / "run")["step"] == STEPS + 1
    assert_equal_runs(tmp_path / "other", whole)


def test_a_run_continues_only_as_itself(
    job: Job, unlabelled_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classify(replace(job, signals=((0, STEPS + 1, signal.SIGINT),)))
    own = job.settings
    for changed, resume, words in (
        (job, False, "already holds a run (step-000000008.pt): add --resume"),
        (replace(job, settings=replace(own, batch=10)), True, "train.batch = 8 and this run has 10"),
        (replace(job, settings=replace(own, epochs=1)), True, "train.epochs = 1 ends after 7"),
        (replace(job, shards=unlabelled_shards), True, "was trained on 60 samples of another conversion"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            classify(changed, resume=resume)
    with lock_file(tmp_path / "run" / ".lock"), pytest.raises(UserError, match="Another trainer uses"):
        classify(job, resume=True)
    with pytest.warns(UserWarning, match=r"^train.lr was 0.05 so far and is 0.01 from now on\.$"):
        classify(replace(job, settings=replace(own, lr=0.01, save_every=2, log_every=3)), resume=True)


def test_another_evaluation_has_a_best_of_its_own(job: Job, tmp_path: Path) -> None:
    classify(replace(job, signals=((0, STEPS + 1, signal.SIGINT),)))
    run = tmp_path / "run"
    log, best = run / "metrics.jsonl", run / "checkpoints" / "best.pt"
    log.write_text(re.sub(r'"accuracy": [0-9.]+', '"accuracy": 1.5', log.read_text()))
    classify(replace(job, signals=((0, 2 * STEPS + 1, signal.SIGINT),)), resume=True)
    assert checkpoint.load(best)["step"] == STEPS
    # The setting that decides what an accuracy means is the evaluation's own.
    with pytest.warns(UserWarning, match="eval") as told:
        classify(replace(job, evaluated=20), resume=True)
    assert [str(warning.message) for warning in told] == [
        "eval.number was 30 so far and is 20 from now on.",
        "eval.number changed: the next evaluation's accuracy is not compared with earlier ones, and best.pt is written anew.",
    ]
    assert checkpoint.load(best)["step"] == TOTAL


def test_without_an_evaluation_there_is_no_best(job: Job, tmp_path: Path) -> None:
    alone = replace(job, evaluates=())
    classify(replace(alone, signals=((0, STEPS, signal.SIGINT),)))
    classify(alone, resume=True)
    assert not (tmp_path / "run" / "checkpoints" / "best.pt").exists()
    assert not any("accuracy" in row for row in rows(tmp_path / "run"))


def test_what_the_trainer_refuses_is_not_saved(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Classifier.step

    def spoil(self: Classifier, batch: Batch, wait_s: float) -> None:
        step(self, batch, wait_s)
        if self.done == 6:
            self.model[1].weight.data[0, 0] = float("nan")

    monkeypatch.setattr(Classifier, "step", spoil)
    with pytest.raises(UserError, match="The weights are not finite"):
        classify(job)
    assert newest(tmp_path / "run")["step"] == 3
    assert (tmp_path / "run" / "cause.txt").exists()
