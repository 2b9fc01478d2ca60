"""The global order of samples: a pure function of (seed, epoch, number of samples), and each rank's part."""

import numpy as np
import numpy.typing as npt

from shards.errors import UserError
from shards.hashing import hash_key

# Separate streams of the same seed: what the training order draws says nothing about how shards were filled.
EPOCH_TAG = 0x65706F6368
PLAN_TAG = 0x706C616E


def epoch_order(num_samples: int, seed: int, epoch: int, tag: int = EPOCH_TAG) -> npt.NDArray[np.int64]:
    """The order in which an epoch visits samples: a permutation of 0..num_samples-1, (num_samples,) int64.

    Sorts by `hash_key(seed, epoch, tag, i)`; the sort is stable, so equal keys (about N^2 / 2^65) keep their
    order.
    """
    if num_samples < 0:
        raise UserError(f"the number of samples must not be negative, got {num_samples}.")
    keys = hash_key(seed, epoch, tag, np.arange(num_samples, dtype=np.uint64))
    return np.argsort(keys, kind="stable").astype(np.int64, copy=False)


def steps_per_epoch(num_samples: int, batch: int) -> int:
    """The number of whole global batches in an epoch; the rest (fewer than `batch` samples) is dropped."""
    if batch < 1:
        raise UserError(f"the global batch size must be at least 1, got {batch}.")
    return num_samples // batch


def rank_positions(step: int, batch: int, rank: int, world: int) -> slice:
    """The positions in the epoch's order that `rank` of `world` reads at `step`; `batch` is global.

    The ranks' slices laid end to end are the global batch, in the same order for every world size. Raises
    UserError when the batch does not divide among the ranks.
    """
    if not 0 <= rank < world:
        raise UserError(f"the rank must be in 0..{world - 1} for {world} ranks, got {rank}.")
    if batch < 1 or batch % world:
        below = batch // world * world
        choices = f"{below} or {below + world}" if below else str(world)
        raise UserError(
            f"the global batch size {batch} does not divide among {world} ranks; use a multiple, "
            f"such as {choices}."
        )
    start = step * batch
    return slice(start + rank * batch // world, start + (rank + 1) * batch // world)
