"""Schedules: pure functions of the step, so there is no scheduler state to save or to resume."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from shards.errors import UserError


@dataclass(frozen=True)
class Clock:
    """The place of a step in its run: what every schedule is a function of."""

    step: int = 0
    """Steps completed before this one."""
    total: int = 1
    """Steps of the run."""
    steps_per_epoch: int = 1

    @property
    def before(self) -> float:
        """The share of the run done before this step, in [0, 1]."""
        return min(self.step / self.total, 1.0)

    @property
    def after(self) -> float:
        """The share of the run done after this step, in [0, 1]."""
        return min((self.step + 1) / self.total, 1.0)

    @property
    def epoch(self) -> float:
        """Epochs done before this step, with a fraction."""
        return self.step / self.steps_per_epoch


Schedule = Callable[[Clock], float]


def due(step: int, every: int) -> bool:
    """Return whether what happens every `every` steps (or epochs) is due after `step` of them; 0: never."""
    return every > 0 and step % every == 0


def lr_at(
    step: int,
    *,
    base_lr: float,
    steps_per_epoch: int,
    epochs: float,
    warmup_epochs: float,
    final_lr: float = 0.0,
) -> float:
    """Return the learning rate of `step`, counted from 0: linear warm-up, then half a cosine to `final_lr`.

    With the fractional epoch e = step / steps_per_epoch: base_lr * e / warmup_epochs while e < warmup_epochs
    (exactly 0 at step 0), then final_lr + (base_lr - final_lr) * (1 + cos(pi * (e - warmup_epochs) / (epochs -
    warmup_epochs))) / 2, which is exactly final_lr at e = epochs and stays there (MoCo v3, arXiv 2104.02057; the
    cosine is SGDR's, arXiv 1608.03983).

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
        return final_lr
    share = 0.5 * (1 + math.cos(math.pi * (epoch - warmup_epochs) / (epochs - warmup_epochs)))
    return final_lr + (base_lr - final_lr) * share


def cosine_between(start: float, end: float, progress: float) -> float:
    """Return the value at `progress` in [0, 1] of half a cosine from `start` to `end`."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * progress))


def cosine_momentum(progress: float, start: float) -> float:
    """Return the teacher's momentum, which rises by half a cosine from `start` at progress 0 to exactly 1 at progress 1.

    1 - (1 - start) * (1 + cos(pi * progress)) / 2 (BYOL, arXiv 2006.07733; used by MoCo v3).
    """
    return 1 - 0.5 * (1 + math.cos(math.pi * progress)) * (1 - start)
