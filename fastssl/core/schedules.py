"""Schedules: pure functions of the step, so there is no scheduler state to save or to resume."""

import math

from shards.errors import UserError


def due(step: int, every: int) -> bool:
    """Return whether what happens every `every` steps (or epochs) is due after `step` of them; 0: never."""
    return every > 0 and step % every == 0


def lr_at(step: int, *, base_lr: float, steps_per_epoch: int, epochs: float, warmup_epochs: float) -> float:
    """Return the learning rate of `step`, counted from 0: linear warm-up, then half a cosine to 0.

    With the fractional epoch e = step / steps_per_epoch: base_lr * e / warmup_epochs while e < warmup_epochs
    (exactly 0 at step 0), then base_lr * (1 + cos(pi * (e - warmup_epochs) / (epochs - warmup_epochs))) / 2,
    which is exactly 0 at e = epochs and stays 0 beyond (MoCo v3, arXiv 2104.02057; the cosine is SGDR's,
    arXiv 1608.03983).

    `base_lr` is the peak, already scaled for the batch (see `fastssl.core.optimizers.scaled_lr`).

    Raises:
        UserError: the warm-up is negative or longer than the run.
    """
    if not 0 <= warmup_epochs <= epochs:
        raise UserError(
            f"warmup_epochs is {warmup_epochs:g} but the run has {epochs:g} epochs: "
            "choose a warm-up between 0 and the number of epochs."
        )
    epoch = step / steps_per_epoch
    if epoch < warmup_epochs:
        return base_lr * epoch / warmup_epochs
    if epoch >= epochs:
        return 0.0
    return base_lr * 0.5 * (1 + math.cos(math.pi * (epoch - warmup_epochs) / (epochs - warmup_epochs)))


def progress_at(step: int, *, steps_per_epoch: int, epochs: float) -> float:
    """Return the share of the run done before `step`, in [0, 1]."""
    return min(step / (steps_per_epoch * epochs), 1.0)


def cosine_momentum(progress: float, start: float) -> float:
    """Return the teacher's momentum, which rises by half a cosine from `start` at progress 0 to exactly 1 at progress 1.

    1 - (1 - start) * (1 + cos(pi * progress)) / 2 (BYOL, arXiv 2006.07733; used by MoCo v3).
    """
    return 1 - 0.5 * (1 + math.cos(math.pi * progress)) * (1 - start)
