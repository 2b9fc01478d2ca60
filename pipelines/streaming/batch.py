"""A batch of views, and the request for one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch

from pipelines.streaming.lazy_views import LazyViews


@dataclass(frozen=True, repr=False)
class Batch:
    """Some samples and their views.

    A batch is its holder's for as long as it is kept, unless the loader was opened with `reuse_memory`: then views and masks on a CPU
    are valid until the next batch is asked for. So are views that are taken chunk by chunk (`Loader.in_chunks`).
    """

    views: Sequence[torch.Tensor]
    """(N, C, S, S) each, normalised, the global views first; local ones have a smaller S. float32, or in the form that `open_loader`
    was asked for. `lazy_views.LazyViews` where a GPU makes them chunk by chunk."""
    sample_ids: np.ndarray
    """int64 (N,): the samples really used, where one stands in for a bad one."""
    labels: np.ndarray
    """int64 (N,), -1 where there is none."""
    replaced: int = 0
    """Samples that stand in for bad ones."""
    masks: list[torch.Tensor] = field(default_factory=list)
    """Where the loader makes them, one per view: int32 (N, S, S), the class of each of its pixels or the ignore value."""

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.sample_ids)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Return the batch with views and masks on a device, as trainers ask of a batch; views that a GPU makes lazily stay there."""
        masks = [tensor.to(device, non_blocking=non_blocking) for tensor in self.masks]
        views = self.views
        if not isinstance(views, LazyViews):
            views = [view.to(device, non_blocking=non_blocking) for view in views]
        return replace(self, views=views, masks=masks)

    def __repr__(self) -> str:
        views = f"{len(self.views)} lazy" if isinstance(self.views, LazyViews) else _tell(self.views)
        masks = f"; masks {_tell(self.masks)}" if self.masks else ""
        labelled = int((self.labels >= 0).sum())
        replaced = f"; {self.replaced} stand in for bad samples" if self.replaced else ""
        return f"Batch({len(self)} samples, {labelled} with label; views {views}{masks}{replaced})"


def _tell(tensors: Sequence[torch.Tensor]) -> str:
    """Tell how many tensors of which shape and type, such as '2 x (8, 3, 224, 224) float32 on cpu'."""
    shapes = [
        f"{len(list(group))} x {shape}" for shape, group in itertools.groupby(tuple(t.shape) for t in tensors)
    ]
    return f"{' + '.join(shapes)} {str(tensors[0].dtype).removeprefix('torch.')} on {tensors[0].device}"


class BatchRequest(NamedTuple):
    """A batch to make: sample ids (N,), DRAW records (V, N), and the epoch, which chooses the stand-ins for bad samples."""

    ids: np.ndarray
    draws: np.ndarray
    epoch: int = 0
