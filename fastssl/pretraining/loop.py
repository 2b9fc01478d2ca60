"""The pretraining loop: set up, then step, log, save, evaluate; readable from top to bottom."""

from __future__ import annotations

import os
import time
import warnings
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastssl.core import checkpoint, distributed
from fastssl.core.meters import ProgressDisplay
from fastssl.core.schedules import due
from fastssl.core.signals import StopRequest
from fastssl.evaluation.online_evaluation import OnlineEvaluation
from fastssl.pretraining.build import follow_shards, view_form
from fastssl.pretraining.idle_settings import tell_idle
from fastssl.pretraining.run_folder import RunFolder
from fastssl.pretraining.step import tell_chunks
from fastssl.pretraining.trainer import Training
from pipelines.loading.loader import Loader, open_loader
from pipelines.streaming.machine_memory import free_memory
from shards.errors import UserError
from shards.units import plural

if TYPE_CHECKING:
    from fastssl.pretraining.run_config import Resolved


@dataclass(frozen=True)
class Summary:
    """The result of a finished or interrupted run."""

    steps: int
    seconds: float
    images_per_s: float
    checkpoint: Path
    interrupted: int = 0
    """Number of the signal that stopped the run, 0 where it ran to its end."""


def train(resolved: Resolved, *, resume: bool | Path = False) -> Summary:
    """Run, or continue, the pretraining that a configuration describes; `fastssl.pretrain` is the way in.

    Order, draws, schedules and initial weights are functions of the configuration, and a checkpoint holds everything else, so a
    resumed run on a CPU ends with the same bits as one that was never stopped.

    Raises:
        UserError: shards missing or too few, a batch that does not divide by the ranks, a run folder in use without `resume` or by
            another trainer, a checkpoint of another architecture or data set, a non-finite loss, a full disk.
    """
    cfg, settings = resolved.config, resolved.config.train
    ranks = distributed.setup(settings.device, timeout_s=1800)
    if not cfg.data.shards:
        raise UserError(
            "No shards to train on: give --data.shards SHARDS, the folder that `fastssl shard` made."
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
        form=view_form(settings, ranks.device),
        reuse_memory=True,
    )
    loader = open_loader(shards, cfg.recipe, batch=settings.batch, seed=settings.seed, options=options)
    with RunFolder(resolved, ranks, loader.steps_per_epoch) as folder:
        found = folder.newest(resume)
        training = Training(resolved, shards, ranks, loader.steps_per_epoch, found)
        if training.num_chunks > 1:
            # The device never holds more than a chunk of the views.
            loader = loader.in_chunks()
        if resume and found is None:
            none = f"nothing to resume in '{folder.path}': the run starts at its first step"
            loader.note = "\n".join(filter(None, [loader.note, none]))
        online = _online_evaluation(training)
        if online and cfg.data.cache == "ram":
            notes = online.keep_in_memory(loader.samples, cfg.data.engine, cfg.data.cache_gb)
            loader.note = "\n".join([loader.note, *notes])
        return _loop(training, loader, folder, online)


def _loop(training: Training, loader: Loader, folder: RunFolder, online: OnlineEvaluation | None) -> Summary:
    train, knn, ranks = training.resolved.config.train, training.resolved.config.knn, training.ranks
    start, total, steps_per_epoch = training.done, training.total, training.steps_per_epoch
    meters = training.meters
    screen = ProgressDisplay(total, start, show=ranks.is_main)
    _greet(screen, training, loader)
    _expect(screen, training)
    if training.resolved.config.data.cache == "ram" and start < total:
        with meters.paused(), screen.counting("filling the cache") as progress:
            loader.fill_cache(progress)
        if online:
            with meters.paused(), screen.counting("filling the evaluation's cache") as progress:
                online.fill_caches(progress)
    # What can refuse the run has had its say.
    folder.begin(start, total)
    began = time.perf_counter()
    saved = start
    stop_of_any = distributed.LargestOverRanks()
    stop = StopRequest(
        screen.say, f"within {2 * stop_of_any.every} steps" if ranks.world > 1 else "after this step"
    )
    # One stream for the whole run: the next epoch's first batches are made while this one's last are trained on.
    batches = loader.steps(start, total)

    def log(steps_timed: int) -> None:
        training.check(folder)
        values = training.row(steps_timed)
        screen.log(training.done, (training.done - 1) // steps_per_epoch, train.epochs, values)
        folder.write({"step": training.done, "epoch": round(training.done / steps_per_epoch, 4), **values})

    def log_rank(epoch: int) -> None:
        with meters.paused():
            folder.write({"step": training.done, "epoch": epoch, "rank_me": training.rank_me()})

    def save() -> None:
        with meters.paused():
            training.check(folder, to_save=True)
            folder.save(training.state())

    def evaluate(epoch: int) -> None:
        if not knn.every or not (due(epoch, knn.every) or epoch == train.epochs):
            return
        with meters.paused():
            # On every rank: what is not finite is neither measured nor kept as the best.
            training.check(folder, to_save=True)
        if not online:
            return
        with meters.paused():
            found = online.evaluate(training.method.evaluated_backbone())
            if not found:
                return
            if epoch:
                folder.save_best(training.weights(), found["knn_accuracy"])
            else:
                found["knn_chance"] = online.chance
        screen.say(f"epoch {epoch}/{train.epochs}  {online.describe(found)}")
        folder.write({"step": training.done, "epoch": epoch, **found})

    def finish(signal: int = 0) -> Summary:
        # No rank leaves while another may still wait for it.
        stop_of_any.finish()
        distributed.barrier()
        seconds = time.perf_counter() - began
        rate = (training.done - start) * train.batch / max(seconds, 1e-9)
        path = checkpoint.checkpoint_path(folder.path, training.done)
        return Summary(training.done, seconds, rate, path, signal)

    with screen, stop, closing(batches):
        # What the untrained network reaches: the line that later accuracies are compared with.
        if not start:
            evaluate(0)
        # A run that was stopped right after the save at an epoch's end has not evaluated that epoch yet.
        if folder.log and start and due(start, steps_per_epoch) and "knn_accuracy" not in folder.log.last:
            evaluate(start // steps_per_epoch)
        logged = start
        for step in range(start + 1, total + 1):
            epoch, ends_epoch = -(-step // steps_per_epoch), due(step, steps_per_epoch)

            waiting = time.perf_counter()
            batch = next(batches)
            training.step(batch, time.perf_counter() - waiting)
            screen.step(step)

            if due(step, train.log_every) or step == total:
                log(step - logged)
                logged = step
            if ends_epoch:
                training.share_statistics()
                log_rank(epoch)

            signal = stop_of_any.poll(step, stop.signal)
            if signal or due(step, train.save_every_steps):
                save()
                saved = step
            if signal:
                return finish(signal)

            if ends_epoch:
                evaluate(epoch)
                if saved != step and (
                    due(epoch, train.save_every) or due(epoch, train.keep_every) or step == total
                ):
                    save()
    return finish()


def _online_evaluation(training: Training) -> OnlineEvaluation | None:
    """Return the evaluation during training, where it is asked for; on the first rank only."""
    cfg, ranks = training.resolved.config, training.ranks
    if not cfg.knn.every or not ranks.is_main:
        return None
    if ranks.world > 1 and not cfg.knn.max_samples:
        warnings.warn(
            "knn.max_samples is 0 (all): every process waits while the first one evaluates.", stacklevel=2
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
        f"{training.resolved.method_name} {cfg.model.backbone} on {plural(len(loader.shards), 'image')} at {cfg.recipe.size} px: "
        f"batch {loader.batch} on {loader.options.world} x {loader.options.device}, {name}, {plural(cfg.train.epochs, 'epoch')} of "
        f"{plural(loader.steps_per_epoch, 'step')}"
    )
    for line in (loader.tell_left_out(), loader.note, *tell_idle(cfg, training.shards)):
        if line:
            screen.say(line)
    if training.done:
        screen.say(f"resuming after step {training.done} of {training.total}")
    if training.num_chunks > 1:
        share = cfg.train.batch // training.ranks.world
        screen.say(tell_chunks(training.method, share, training.num_chunks, training.cached))


def _expect(screen: ProgressDisplay, training: Training) -> None:
    """Say what the rest of a run on a CPU takes, and warn where that is more than there is; a GPU's first steps tell it at once."""
    resolved, ranks, steps = training.resolved, training.ranks, training.total - training.done
    found = training.estimate
    if found is not None and steps and ranks.is_main:
        screen.say(found.describe(steps))
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        for doubt in found.doubts(
            steps, free_memory() // processes, resolved.config.train.batch // ranks.world
        ):
            warnings.warn(doubt, stacklevel=2)
