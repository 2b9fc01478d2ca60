"""The training loop: step, log, save, evaluate; readable from top to bottom, and the same for whatever is trained."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from fastssl.core import checkpoint, distributed
from fastssl.core.meters import ProgressDisplay
from fastssl.core.schedules import due
from fastssl.core.signals import StopRequest
from fastssl.training.evaluation import Evaluation
from fastssl.training.run_folder import RunFolder
from fastssl.training.trainer import Trainer
from pipelines.loading.loader import Loader


@dataclass(frozen=True)
class Summary:
    """The result of a finished or interrupted run."""

    steps: int
    seconds: float
    images_per_s: float
    checkpoint: Path
    interrupted: int = 0
    """Number of the signal that stopped the run, 0 where it ran to its end."""


def train(
    trainer: Trainer, loader: Loader, folder: RunFolder, evaluation: Evaluation | None = None
) -> Summary:
    """Step the trainer from the steps it has done to its total, and log, save and evaluate as the folder's settings say.

    Every rank calls it. SIGINT, SIGTERM and SIGUSR1 end the run after the current step, with a checkpoint.

    Args:
        trainer: new, or restored from the checkpoint that `folder.newest` found.
        loader: this rank's batches, of `trainer.steps_per_epoch` steps an epoch.
        folder: the run's folder, entered.
        evaluation: on every rank, or none.

    Raises:
        UserError: no steps are left to continue, the trainer's `check` refuses, the disk is full.
    """
    settings, ranks, meters = folder.settings, folder.ranks, trainer.meters
    start, total, steps_per_epoch = trainer.done, trainer.total, trainer.steps_per_epoch
    screen = ProgressDisplay(total, start, show=ranks.is_main, task=trainer.task)
    meters.start()
    _greet(screen, trainer, loader)
    if loader.options.cache == "ram" and start < total:
        with meters.paused(), screen.counting("filling the cache") as progress:
            loader.fill_cache(progress)
        if evaluation:
            with meters.paused(), screen.counting("filling the evaluation's cache") as progress:
                evaluation.fill_caches(progress)
    # What can refuse the run has had its say.
    folder.begin(start, total, evaluation and evaluation.best)
    began = time.perf_counter()
    saved = start
    stop_of_any = distributed.LargestOverRanks()
    stop = StopRequest(
        screen.say, f"within {2 * stop_of_any.every} steps" if ranks.world > 1 else "after this step"
    )
    # One stream for the whole run: the next epoch's first batches are made while this one's last are trained on.
    batches = loader.steps(start, total)

    def log(steps_timed: int) -> None:
        trainer.check(folder.path)
        values = trainer.row(steps_timed)
        screen.log(trainer.done, (trainer.done - 1) // steps_per_epoch, settings.epochs, values)
        folder.write({"step": trainer.done, "epoch": round(trainer.done / steps_per_epoch, 4), **values})

    def end_epoch(epoch: int) -> None:
        with meters.paused():
            values = trainer.end_epoch()
            if values:
                folder.write({"step": trainer.done, "epoch": epoch, **values})

    def save() -> None:
        with meters.paused():
            trainer.check(folder.path, to_save=True)
            folder.save(trainer.state(), steps_per_epoch)

    def evaluate(epoch: int) -> None:
        if not evaluation or not (due(epoch, evaluation.every) or epoch == settings.epochs):
            return
        with meters.paused():
            # What is not finite is neither measured nor kept as the best.
            trainer.check(folder.path, to_save=True)
            found = evaluation.evaluate(epoch)
            if not found:
                return
            if epoch:
                folder.save_best(trainer.weights(), found)
        screen.say(f"epoch {epoch}/{settings.epochs}  {evaluation.describe(found)}")
        folder.write({"step": trainer.done, "epoch": epoch, **found})

    def finish(signal: int = 0) -> Summary:
        # No rank leaves while another may still wait for it.
        stop_of_any.finish()
        distributed.barrier()
        seconds = time.perf_counter() - began
        rate = (trainer.done - start) * loader.batch / max(seconds, 1e-9)
        path = checkpoint.checkpoint_path(folder.path, trainer.done)
        return Summary(trainer.done, seconds, rate, path, signal)

    with screen, stop, closing(batches):
        # What the untrained network reaches: the line that later values are compared with.
        if not start:
            evaluate(0)
        # A run that was stopped right after the save at an epoch's end has not evaluated that epoch yet.
        elif due(start, steps_per_epoch) and not folder.ends_evaluated():
            evaluate(start // steps_per_epoch)
        logged = start
        for step in range(start + 1, total + 1):
            epoch, ends_epoch = -(-step // steps_per_epoch), due(step, steps_per_epoch)

            waiting = time.perf_counter()
            batch = next(batches)
            trainer.step(batch, time.perf_counter() - waiting)
            screen.step(step)

            if due(step, settings.log_every) or step == total:
                log(step - logged)
                logged = step
            if ends_epoch:
                end_epoch(epoch)

            signal = stop_of_any.poll(step, stop.signal)
            if signal or due(step, settings.save_every_steps):
                save()
                saved = step
            if signal:
                return finish(signal)

            if ends_epoch:
                evaluate(epoch)
                if saved != step and (
                    due(epoch, settings.save_every) or due(epoch, settings.keep_every) or step == total
                ):
                    save()
    return finish()


def _greet(screen: ProgressDisplay, trainer: Trainer, loader: Loader) -> None:
    screen.say(trainer.headline(loader))
    for line in filter(None, (loader.tell_left_out(), loader.note)):
        screen.say(line)
    if trainer.done:
        screen.say(f"resuming after step {trainer.done} of {trainer.total}")
    for remark in trainer.remarks():
        screen.say(remark)
