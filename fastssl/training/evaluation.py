"""Evaluation: what the loop asks of a measurement that it takes every few epochs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class BestBy:
    """The value by which checkpoints/best.pt is chosen: the highest; the first of equals."""

    metric: str
    """Its name among the values of an evaluation, such as accuracy or mean_iou."""
    settings: tuple[str, ...] = ()
    """Full names of the settings that decide what the value means, such as eval.split: where a resumed run has changed one, earlier
    values are not compared with new ones."""
    noun: str = "accuracy"
    """What a message calls it."""


class Evaluation(ABC):
    """Measures the model before the first step, every few epochs and after the last one.

    Every rank holds one: all call `evaluate` at the same steps, which may reduce over ranks, and the first rank's values are logged.
    Where only the first rank measures, those of the others return nothing and wait for it at their next step.
    """

    every: int
    """Epochs from one evaluation to the next; 0: after the last epoch only."""
    best: BestBy

    @abstractmethod
    def evaluate(self, epoch: int) -> dict[str, float]:
        """Return the values of the model as it is now, `best.metric` among them, for a row of metrics.jsonl; empty: none.

        The model's mode (train or eval) and the random generators must be as before afterwards: a run with an evaluation has the
        bits of one without.

        Args:
            epoch: number of epochs completed; 0: nothing is trained, and best.pt is not written.
        """

    @abstractmethod
    def describe(self, found: dict[str, float]) -> str:
        """Return the values of `evaluate` as a line to print."""

    def fill_caches(self, progress: Callable[[int, int], None]) -> None:  # noqa: B027 (optional)
        """Read what the evaluation keeps in memory (data.cache ram), before the first step. By default it keeps nothing.

        Args:
            progress: takes the images that are held and their number.
        """
