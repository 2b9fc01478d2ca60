"""Trainer: what the loop asks of anything that it trains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastssl.core.meters import Meters
from pipelines.loading.loader import Loader
from pipelines.streaming.batch import Batch


class Trainer(ABC):
    """Model, optimizer and meters of a run on one rank: pretraining, fine-tuning and segmentation are subclasses.

    Every rank holds one and calls its methods at the same steps, `weights` excepted. What depends on the run's progress, such as a
    learning rate, is a function of `done`, and what is drawn at random of the seed and `done`, so `state` holds the rest and a resumed
    run ends with the same bits.
    """

    task: str = "train"
    """Name of the progress bar until the first metrics."""

    def __init__(self, epochs: int, steps_per_epoch: int) -> None:
        self.done = 0
        """Optimizer steps completed; `step` counts them, and restoring a checkpoint sets them."""
        self.steps_per_epoch = steps_per_epoch
        self.total = steps_per_epoch * epochs
        """Optimizer steps of the whole run."""
        self.meters = Meters()

    @abstractmethod
    def headline(self, loader: Loader) -> str:
        """Return the first line that a run prints: what is trained, on what, for how long."""

    def remarks(self) -> Iterable[str]:
        """Yield more lines to print before the first step; warnings may be issued between them."""
        return ()

    @abstractmethod
    def step(self, batch: Batch, wait_s: float) -> None:
        """Take one optimizer step, count it in `done`, and add its metrics to `meters`, without waiting for the device.

        Args:
            batch: this rank's share of the step: views, labels and, where the loader makes them, masks.
            wait_s: seconds for which the run has waited for it; `Meters.add` takes them.
        """

    @abstractmethod
    def row(self, steps_timed: int) -> dict[str, float]:
        """Return the metrics since the last call, from `Meters.read` and others; may wait for the device.

        Args:
            steps_timed: steps since the last call, or since the run began.
        """

    def end_epoch(self) -> dict[str, float]:
        """Finish an epoch after its last step. Return metrics for a row of their own; none by default."""
        return {}

    def check(self, folder: Path, *, to_save: bool = False) -> None:  # noqa: B027 (optional)
        """Raise on every rank or on none where training must not go on; before each row and each checkpoint. By default, never.

        Args:
            folder: the run's folder, for a file that helps to find the cause.
            to_save: a checkpoint follows, from which a run must be able to continue.

        Raises:
            UserError: such as for a loss that is not finite.
        """

    @abstractmethod
    def weights(self) -> dict[str, Any]:
        """Return the content of checkpoints/best.pt: what using the model needs. The first rank may call it alone.

        Plain values and tensors, with `step` (the steps completed) and `config` (the configuration as `RunFolder` takes it).
        """

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return the content of a checkpoint: `weights`, and what continuing needs, with the optimizer's state as `optimizer`."""
