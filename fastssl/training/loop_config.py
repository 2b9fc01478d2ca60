"""The settings of the training loop and its run folder: part of the section `train` of every configuration."""

from __future__ import annotations

from dataclasses import dataclass

from shards.errors import UserError, check_least


@dataclass(frozen=True)
class LoopConfig:
    """Length, logging and checkpoints of a run. A kind of training adds its own settings in a subclass."""

    out: str = "runs/train"
    """Folder of the run: configuration, metrics.jsonl, checkpoints."""
    epochs: int = 100
    """Passes over the shards."""
    log_every: int = 10
    """Log metrics to metrics.jsonl every N steps."""
    save_every: int = 1
    """Save a checkpoint every N epochs; the last step is always saved."""
    save_every_steps: int = 0
    """Save a checkpoint every N steps too; 0: at ends of epochs only."""
    keep_last: int = 2
    """Number of newest checkpoints to keep; 0: all. With an evaluation the best weights so far are also in checkpoints/best.pt."""
    keep_every: int = 0
    """Save every N-th epoch's checkpoint and keep it permanently; 0: none."""

    def __post_init__(self) -> None:
        if not self.out.strip():
            raise UserError(
                "train.out is empty, such as from a variable that is not set: name the run's folder."
            )
        check_least(self, "train.", epochs=1, log_every=1, save_every=1)
        for name in ("save_every_steps", "keep_last", "keep_every"):
            if getattr(self, name) < 0:
                raise UserError(f"train.{name} is {getattr(self, name)}, but it must not be negative.")
