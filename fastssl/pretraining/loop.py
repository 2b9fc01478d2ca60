"""The pretraining loop: set up, then step, log, test, save; readable from top to bottom."""

from __future__ import annotations

import time
import warnings
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastssl.core import checkpoint, distributed
from fastssl.core.meters import ProgressDisplay
from fastssl.core.signals import StopRequest
from fastssl.evaluation.online_evaluation import OnlineEvaluation
from fastssl.pretraining.build import follow_shards, view_form
from fastssl.pretraining.run_folder import RunFolder
from fastssl.pretraining.step import tell_chunks
from fastssl.pretraining.trainer import Training
from pipelines.loading.loader import Loader, open_loader
from shards.errors import UserError

if TYPE_CHECKING:
    from fastssl.pretraining.run_config import Resolved


@dataclass(frozen=True)
class Summary:
    """What a finished or interrupted run came to."""

    steps: int
    seconds: float
    images_per_s: float
    checkpoint: Path
    interrupted: int = 0
    """Number of the signal that stopped the run, 0 where it ran to its end."""


def pretrain(resolved: Resolved, *, resume: bool = False) -> Summary:
    """Run, or continue, the pretraining that a configuration describes.

    Order, draws, schedules and initial weights are functions of the configuration, and a checkpoint holds everything else, so a
    resumed run on a CPU ends with the same bits as one that was never stopped.

    Raises:
        UserError: shards missing or too few, a batch that does not divide by the ranks, a run folder in use without `resume` or by
            another trainer, a checkpoint of another architecture or data set, a non-finite loss, a full disk.
    """
    cfg, train = resolved.config, resolved.config.train
    ranks = distributed.setup(train.device, timeout_s=1800)
    if not cfg.data.shards:
        raise UserError(
            "No shards to train on: give --data.shards DIR, the folder that `fastssl shard` made."
        )
    if cfg.data.masks:
        raise UserError("data.masks is for segmentation, and pretraining uses no masks: leave it out.")
    shards = cfg.data.open()
    resolved = follow_shards(resolved, shards)
    cfg = resolved.config
    options = cfg.data.options(
        rank=ranks.rank,
        world=ranks.world,
        device=ranks.device,
        form=view_form(train, ranks.device),
        reuse_memory=True,
    )
    loader = open_loader(shards, cfg.recipe, batch=train.batch, seed=train.seed, options=options)
    with RunFolder(resolved, ranks, loader.steps_per_epoch) as folder:
        training = Training(resolved, shards, ranks, loader.steps_per_epoch, folder.newest(resume))
        if training.num_chunks > 1:  # the device never holds more than a chunk of it
            loader = loader.in_chunks()
        online = _online_evaluation(training)
        folder.begin(training.done)
        return _loop(training, loader, folder, online)


def _loop(training: Training, loader: Loader, folder: RunFolder, online: OnlineEvaluation | None) -> Summary:
    train, knn, ranks = training.resolved.config.train, training.resolved.config.knn, training.ranks
    start, steps, total = training.done, training.steps_per_epoch, training.total
    meters = training.meters
    screen = ProgressDisplay(total, start, show=ranks.is_main)
    _greet(screen, training, loader)

    def save() -> None:
        with meters.paused():
            training.check(folder, to_save=True)
            folder.save(training.state())

    def finish(signal: int = 0) -> Summary:
        distributed.barrier()  # no rank leaves while another may still wait for it
        seconds = time.perf_counter() - began
        rate = (training.done - start) * train.batch / max(seconds, 1e-9)
        return Summary(
            training.done, seconds, rate, checkpoint.checkpoint_path(folder.path, training.done), signal
        )

    began = time.perf_counter()
    saved, timed = start, 0
    first_epoch = start // steps
    if online and folder.log and start and start % steps == 0 and "knn_accuracy" not in folder.log.last:
        first_epoch -= 1  # it was saved and then stopped before its test: nothing is left of it but that
    stop, stop_of_any = StopRequest(), distributed.LargestOverRanks()
    # One stream for the whole run: the next epoch's first batches are made while this one's last are trained on.
    batches = loader.steps(start, total)
    with screen, stop, closing(batches):
        for epoch in range(first_epoch, train.epochs):
            while training.done < (epoch + 1) * steps:
                waiting = time.perf_counter()
                batch = next(batches)
                training.step(batch, time.perf_counter() - waiting)
                step, timed = training.done, timed + 1
                screen.step(step)
                if step % train.log_every == 0 or step == total:
                    training.check(folder)
                    values, timed = training.row(timed), 0
                    screen.log(step, epoch, train.epochs, values)
                    folder.write({"step": step, "epoch": round(step / steps, 4), **values})
                if step % steps == 0:
                    with meters.paused():
                        folder.write({"step": step, "epoch": epoch + 1, "rank_me": training.rank_me()})
                stopping = stop_of_any.poll(step, stop.signal)
                if stopping or (train.save_every_steps and step % train.save_every_steps == 0):
                    save()
                    saved = step
                if stopping:
                    return finish(stopping)
            last, step = epoch + 1 == train.epochs, training.done
            if online and (last or (epoch + 1) % knn.every == 0):
                with meters.paused():
                    found = online.evaluate(training.method.backbone)
                    folder.save_best(training.weights(), found["knn_accuracy"])
                screen.say(f"epoch {epoch + 1}/{train.epochs}  {online.describe(found)}")
                folder.write({"step": step, "epoch": epoch + 1, **found})
            due = any(every and (epoch + 1) % every == 0 for every in (train.save_every, train.keep_every))
            if saved != step and (last or due):
                save()
                saved = step
    return finish()


def _online_evaluation(training: Training) -> OnlineEvaluation | None:
    """What tests the student while it is trained, on the first rank, if asked for."""
    cfg, ranks = training.resolved.config, training.ranks
    if not cfg.knn.every or not ranks.is_main:
        return None
    if ranks.world > 1 and not cfg.knn.max_samples:
        warnings.warn(
            "knn.max_samples is 0 (all): every process waits while the first one tests.", stacklevel=2
        )
    return OnlineEvaluation(
        cfg.knn,
        cfg.recipe,
        training.shards,
        ranks.device,
        training.dtype == torch.bfloat16,
        cfg.data.threads,
    )


def _greet(screen: ProgressDisplay, training: Training, loader: Loader) -> None:
    cfg = training.resolved.config
    name = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[training.dtype]
    screen.say(
        f"{training.resolved.method_name} {cfg.model.backbone} on {len(loader.shards):,} images at {cfg.recipe.size} px: "
        f"batch {loader.batch} on {loader.options.world} x {loader.options.device}, {name}, {cfg.train.epochs} epochs of "
        f"{loader.steps_per_epoch} steps"
    )
    if loader.note:
        screen.say(loader.note)
    if training.done:
        screen.say(f"resuming after step {training.done} of {training.total}")
    if training.num_chunks > 1:
        share = cfg.train.batch // training.ranks.world
        screen.say(tell_chunks(training.method, share, training.num_chunks, cfg.train.exact_heads))
