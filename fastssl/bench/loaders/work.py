"""The images and recipe that every loader of a report works on, and the description of a loader."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from shards.dataset.order import epoch_order

if TYPE_CHECKING:
    import numpy as np

    from pipelines.augment.recipe import Recipe
    from shards.dataset.shard_set import ShardSet


class Order:
    """The batches of a report, and checks of what other libraries cannot do of its recipe; the base of `Work` and `Decoded`."""

    recipe: Recipe
    sample_ids: np.ndarray
    batch: int

    def batches(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (epoch, sample ids (batch,)) without end, each epoch in another order; the same for every loader."""
        for epoch in itertools.count():
            ids = self.sample_ids[epoch_order(len(self.sample_ids), 0, epoch)]
            for start in range(0, len(ids) - self.batch + 1, self.batch):
                yield epoch, ids[start : start + self.batch]

    def refuse_local_views_and_erasing(self, peer: str) -> None:
        """Raise NotImplementedError if the recipe has operations that the peers here do not use."""
        if self.recipe.local_views or self.recipe.erase_p or self.recipe.interpolation != "bilinear":
            raise NotImplementedError(
                f"the recipe has local views, erasing or bicubic crops, which {peer} does not use here"
            )

    def refuse_turns_and_noise(self, peer: str) -> None:
        """Raise NotImplementedError if the recipe has them, for a peer without operations of the same meaning."""
        if self.recipe.quarter_turns or self.recipe.noise_p:
            raise NotImplementedError(
                f"the recipe has quarter turns or noise, and {peer} has no operations of the same meaning"
            )


@dataclass(frozen=True)
class Work(Order):
    """The input of all loaders of a report."""

    shards: ShardSet
    recipe: Recipe
    sample_ids: np.ndarray
    """The images used, int64 (N,)."""
    batch: int
    threads: int
    """Threads, or worker processes of one thread each."""


@dataclass(frozen=True)
class MeasuredLoader:
    """A loader, ours or another's: one row of the report."""

    name: str
    fidelity: str
    """For our engines the measured class, see `pipelines.previews.engine_fidelity.classify`; for others exact for Pillow's own
    operations, drawn per image, else approximate; empty: part of the work only."""
    open: Callable[[Work], Generator[int]]
    """Yields the number of source images of each batch, without end; closing it stops its workers."""
    note: str = ""
    workers: bool = False
    """Batches come from worker processes in turn: rates are measured over whole rounds of one batch per worker."""

    def in_threads(self, threads: int) -> MeasuredLoader:
        """Return the same loader with another number of threads than its work says."""

        def opened(work: Work) -> Generator[int]:
            return self.open(replace(work, threads=threads))

        many = "s" if threads > 1 else ""
        note = (
            f"the same in {threads} thread{many}; see cores, as some engines read and decode in further ones"
        )
        return replace(self, name=f"{self.name} ({threads})", open=opened, note=note)
