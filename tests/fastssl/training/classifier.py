"""A kind of training that is not fastssl's: a classifier of pixels trained on labels, and the runs that tests stop and continue."""

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError
from tests.fastssl.runs import NUM_IMAGES, differences, timeless

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
