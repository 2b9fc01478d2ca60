"""The loop and its run folder under a supervised trainer, which this file defines: nothing of pretraining takes part."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastssl.core import checkpoint, distributed
from fastssl.core.config_tree import plain
from fastssl.core.distributed import Dist
from fastssl.training import BestBy, Evaluation, LoopConfig, RunFolder, Summary, Trainer, train
from fastssl.training.resume import (
    ResumeRules,
    check_data_set,
    check_length,
    check_settings,
    data_set_of,
    restore_optimizer,
)
from pipelines.augment.recipe import Recipe
from pipelines.loading.evaluation_views import eval_batches
from pipelines.loading.loader import Loader, open_loader
from pipelines.streaming.batch import Batch
from shards.dataset.order import epoch_order
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError
from shards.storage.atomic_files import lock_file
from tests.fastssl.runs import NUM_IMAGES, differences, newest, rows, timeless
from tests.gloo import run_ranks
from tests.needs import HANGS_S

ROOT = Path(__file__).parents[3]
SIZE, CLASSES = 8, 3
RECIPE = Recipe(
    size=SIZE, num_views=1, crop_scale=(0.6, 1.0), jitter_p=0.0, gray_p=0.0, blur_p=0.0, solarize_p=0.0
)
ALONE = Dist(rank=0, world=1, local_rank=0, device=torch.device("cpu"))


@dataclass(frozen=True)
class Settings(LoopConfig):
    """The section `train` of this kind of training."""

    epochs: int = 3
    log_every: int = 2
    save_every_steps: int = 3
    batch: int = 8
    seed: int = 0
    lr: float = 0.05


STEPS = NUM_IMAGES // Settings.batch
TOTAL = STEPS * Settings.epochs
RULES = ResumeRules(fixed=("train.batch", "train.seed"))


@dataclass(frozen=True)
class Job:
    """A run: its shards and settings, how many images are evaluated, and what happens to it."""

    shards: Path
    settings: Settings
    evaluated: int = 30
    evaluates: tuple[int, ...] = (0,)
    """Ranks that hold an evaluation."""
    signals: tuple[tuple[int, int, int], ...] = ()
    """(rank, step, number): signals that a process gets in this step."""

    def config(self) -> dict[str, Any]:
        return {"train": plain(asdict(self.settings)), "eval": {"number": self.evaluated, "every": 1}}


class Classifier(Trainer):
    """A linear classifier of pixels, trained on labels by SGD with momentum."""

    task = "classify"

    def __init__(
        self, job: Job, shards: ShardSet, ranks: Dist, loader: Loader, found: tuple[Path, dict] | None
    ) -> None:
        super().__init__(job.settings.epochs, loader.steps_per_epoch)
        self.job, self.shards, self.ranks = job, shards, ranks
        self.seen: list[list[int]] = []
        torch.manual_seed(job.settings.seed)
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE**2, CLASSES))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=job.settings.lr, momentum=0.9)
        if found is not None:
            path, state = found
            check_data_set(state["shards"], shards, str(path))
            check_settings(state["config"], job.config(), RULES, str(path))
            checkpoint.load_weights(self.model, state["model"], str(path))
            restore_optimizer(self.optimizer, state["optimizer"])
            self.meters.restore(state["meters"], ranks.device)
            self.done = state["step"]
            check_length(self, Settings(**state["config"]["train"]), job.settings, str(path))

    def headline(self, loader: Loader) -> str:
        return f"{CLASSES} classes of {len(loader.shards)} images"

    def remarks(self) -> Iterator[str]:
        yield f"{self.total - self.done} steps to go"

    def step(self, batch: Batch, wait_s: float) -> None:
        rate = self.job.settings.lr * (1 - self.done / self.total)
        self.optimizer.param_groups[0]["lr"] = rate
        labels = torch.from_numpy(batch.labels)
        scores = self.model(batch.views[0])
        loss = F.cross_entropy(scores, labels)
        self.optimizer.zero_grad()
        loss.backward()
        distributed.average_over_ranks([p.grad for p in self.model.parameters() if p.grad is not None])
        self.optimizer.step()
        self.done += 1
        self.seen.append(batch.sample_ids.tolist())
        right = (scores.argmax(dim=1) == labels).float().mean()
        self.meters.add({"loss": loss, "acc": right}, wait_s, replaced=batch.replaced)
        for rank, step, number in self.job.signals:
            if (rank, step) == (self.ranks.rank, self.done):
                os.kill(os.getpid(), number)

    def row(self, steps_timed: int) -> dict[str, float]:
        return {
            "lr": self.optimizer.param_groups[0]["lr"],
            **self.meters.read(self.job.settings.batch, steps_timed),
        }

    def end_epoch(self) -> dict[str, float]:
        return {"weight_norm": float(self.model[1].weight.detach().norm())}

    def check(self, folder: Path, *, to_save: bool = False) -> None:
        if to_save and not all(bool(p.isfinite().all()) for p in self.model.parameters()):
            (folder / "cause.txt").write_text("weights")
            raise UserError("The weights are not finite.")

    def weights(self) -> dict[str, Any]:
        return {
            "step": self.done,
            "config": self.job.config(),
            "shards": data_set_of(self.shards),
            "model": self.model.state_dict(),
        }

    def state(self) -> dict[str, Any]:
        return {
            **self.weights(),
            "optimizer": self.optimizer.state_dict(),
            "meters": self.meters.state(),
        }


class Accuracy(Evaluation):
    """Share of the first images that the classifier names; those ranks that hold one divide them among themselves."""

    every = 1
    best = BestBy("accuracy", ("eval.number",))

    def __init__(self, job: Job, trainer: Classifier, ranks: Dist) -> None:
        self._trainer, self._shared = trainer, len(job.evaluates) > 1
        place = (ranks.rank, ranks.world) if self._shared else (0, 1)
        self._ids = trainer.shards.ids[: job.evaluated][place[0] :: place[1]]

    def evaluate(self, epoch: int) -> dict[str, float]:
        right, number = torch.zeros(()), torch.tensor(float(len(self._ids)))
        for batch in eval_batches(self._trainer.shards, RECIPE, self._ids, threads=1):
            with torch.no_grad():
                named = self._trainer.model(batch.views[0]).argmax(dim=1)
            right += (named == torch.from_numpy(batch.labels)).sum()
        if self._shared:
            distributed.average_over_ranks([right, number])
        return {"accuracy": float(right / number)}

    def describe(self, found: dict[str, float]) -> str:
        return f"accuracy {found['accuracy']:.1%}"


def classify(job: Job, resume: bool | Path = False, ranks: Dist = ALONE) -> tuple[Summary, Classifier]:
    """Run, or continue, a job: what a command for this kind of training would do."""
    settings, shards = job.settings, ShardSet.open(job.shards)
    loader = open_loader(
        shards,
        RECIPE,
        batch=settings.batch,
        seed=settings.seed,
        rank=ranks.rank,
        world=ranks.world,
        threads=1,
    )
    with RunFolder(settings, job.config(), ranks) as folder:
        trainer = Classifier(job, shards, ranks, loader, folder.newest(resume))
        evaluation = Accuracy(job, trainer, ranks) if ranks.rank in job.evaluates else None
        return train(trainer, loader, folder, evaluation), trainer


def assert_equal_runs(run: Path, expected: Path) -> None:
    """Newest and best weights, the optimizer, the meters and each row have the same bits."""
    for name in (checkpoint.list_checkpoints(expected)[-1].name, "best.pt"):
        one, other = (checkpoint.load(folder / "checkpoints" / name) for folder in (run, expected))
        assert differences({**one, "config": None}, {**other, "config": None}) == []
    assert timeless(run) == timeless(expected)


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
    assert lines[:3] == [
        "3 classes of 60 images",
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


# ---------------------------------------------------------------- two processes

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
