"""Samples that turned bad after conversion: others replace them, each is counted and named once, and too many stop the run."""

from __future__ import annotations

import re
import textwrap
import threading
import warnings
from collections.abc import Callable

import numpy as np

from pipelines.augment.draws import draw
from pipelines.augment.recipe import Recipe
from shards.counter_hash import hash_key
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError

# Bad samples that never stop a run whose share is above 0: one bad sample of a hundred is 1 %.
ALLOWED = 10
# Replacements that may be bad in a row.
TRIES = 20
_TAG = 0x626164


class BadSamples:
    """The bad samples of one rank's stream, and the samples that stand in for them.

    The stand-in is f(seed, epoch, sample id, try): the same for every batch size, rank count and point of resume, with draws of its
    own, so that it does not repeat the views of its regular place in the epoch. A bad sample is tried once in a run.

    The rule of stopping: more than `max(10, max_share x samples read so far)` different samples are bad, where samples read again in
    later epochs do not count twice; with a share of 0 the first one stops the run.

    `log` is called with one line about each bad sample, by the thread that takes the batches.
    """

    def __init__(
        self,
        shards: ShardSet,
        recipe: Recipe,
        seed: int,
        max_share: float,
        log: Callable[[str], None] | None = None,
    ):
        # Samples of batches that were replaced, repeats included.
        self.replaced = 0
        self.log = log or _warn
        self._shards, self._recipe, self._seed, self._max_share = shards, recipe, seed, max_share
        self._read = 0
        self._reasons: dict[int, str] = {}
        self._unsaid: list[str] = []
        self._lock = threading.Lock()

    @property
    def samples(self) -> int:
        """Return the number of different samples found bad so far."""
        return len(self._reasons)

    def __contains__(self, sample_id: int) -> bool:
        return sample_id in self._reasons

    def expect(self, count: int) -> None:
        """Take note that `count` more samples are going to be read."""
        self._read = min(self._read + count, len(self._shards))

    def note(self, sample_id: int, error: Exception) -> None:
        """Count a bad sample; UserError where that makes too many."""
        with self._lock:
            if sample_id in self._reasons:
                return
            self._reasons[sample_id] = str(error)
            self._unsaid.append(bad_sample(self._shards, sample_id, error))
            bad, allowed = len(self._reasons), self._max_share * self._read
        if bad > (max(ALLOWED, allowed) if self._max_share else 0):
            raise UserError(
                f"{bad} of the {self._read:,} samples read so far are bad, more than data.max_bad_share ({self._max_share:g}) "
                f"allows; the last: {bad_sample(self._shards, sample_id, error)}"
            ) from error

    def stand_in(self, epoch: int, sample_id: int, attempt: int) -> tuple[int, np.ndarray]:
        """Return the sample in place of a bad one at the given try, and its DRAW records (V,).

        Raises:
            UserError: `TRIES` stand-ins were bad.
        """
        if attempt == TRIES:
            raise UserError(
                f"{TRIES} samples in a row in place of sample {sample_id} of '{self._shards.folder}' are bad: make the "
                "shards anew, from their source into an empty folder."
            )
        key = int(hash_key(self._seed, epoch, _TAG, sample_id, attempt))
        other = self._shards.ids[[key % len(self._shards)]]
        widths, heights = self._shards.widths[other], self._shards.heights[other]
        return int(other[0]), draw(self._recipe, key, epoch, other, widths, heights)[:, 0]

    def count_replaced(self) -> None:
        """Count one sample of a batch that another stands in for."""
        with self._lock:
            self.replaced += 1

    def speak(self) -> None:
        """Log the samples that were found bad since the last call."""
        with self._lock:
            lines, self._unsaid = self._unsaid, []
        for line in lines:
            self.log(line)


def bad_sample(shards: ShardSet, sample_id: int, error: Exception | None = None) -> str:
    """Return the message about a sample that no longer decodes: which it is, where it lies, why, how to repair it."""
    why = f" ({_reason(error)})" if error is not None else ""
    return (
        f"sample {sample_id} of '{shards.folder}' (made from '{shards.name(sample_id)}') does not decode{why}, but did when it was "
        f"converted: delete '{shards.shard_path(sample_id)}' and run the same `fastssl shard` command again, which makes it again."
    )


def _reason(error: Exception) -> str:
    """Return the first words of an error, without the place in torch's sources that its operators begin with."""
    return textwrap.shorten(re.sub(r"^\w+, \S+\.cpp:\d+, ", "", str(error)), 100, placeholder=" ...").rstrip(
        "."
    )


def _warn(line: str) -> None:
    warnings.warn(f"Another sample stands in for a bad one: {line}", stacklevel=2)
