"""Views of a batch that are made for some of its samples at a time, when they are asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import overload

from torch import Tensor


class LazyViews(Sequence[Tensor], ABC):
    """The views of a batch, made anew each time they are asked for: the same rows are the same bits each time.

    It takes the place of a list of views, one tensor (N, C, S, S) a view, but indexing makes the views of the whole batch. Work in
    chunks calls `rows_of`, which takes lists as well.
    """

    num_samples: int
    """Samples in the batch."""
    num_views: int
    """Views of each."""

    @abstractmethod
    def rows(self, part: slice) -> list[Tensor]:
        """Return the views of the samples in `part`, (len(part), C, S, S) each, made on the device's current stream."""

    def __len__(self) -> int:
        return self.num_views

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        return self.rows(slice(0, self.num_samples))[index]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.rows(slice(0, self.num_samples)))


def count_samples(views: Sequence[Tensor]) -> int:
    """Return the number of samples in a batch of views; makes none."""
    return views.num_samples if isinstance(views, LazyViews) else len(views[0])


def rows_of(views: Sequence[Tensor], part: slice) -> list[Tensor]:
    """Return the views of the samples in `part`: of lazy views made now, of others where they lie."""
    return views.rows(part) if isinstance(views, LazyViews) else [view[part] for view in views]
