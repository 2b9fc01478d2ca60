"""The global order of samples: a pure function of (seed, epoch, number of samples), and each rank's part."""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from shards.counter_hash import hash_key
from shards.errors import UserError

# Separate streams of the same seed: what the training order draws says nothing about how shards were filled.
EPOCH_TAG = 0x65706F6368
PLAN_TAG = 0x706C616E
SHARD_TAG = 0x7368617264
MIX_TAG = 0x6D6978  # of the first of several sets; the others count on from it
_BLOCK = 1 << 15  # keys hashed at a time: the passes over them then stay in a cache


def epoch_order(num_samples: int, seed: int, epoch: int, tag: int = EPOCH_TAG) -> npt.NDArray[np.int64]:
    """The order in which an epoch visits samples: a permutation of 0..num_samples-1, (num_samples,) int64.

    Sorts by `hash_key(seed, epoch, tag, i)`; the sort is stable, so equal keys (about N^2 / 2^65) keep their
    order.
    """
    if num_samples < 0:
        raise UserError(f"The number of samples must not be negative, got {num_samples}.")
    return _stable_argsort(_keys(num_samples, seed, epoch, tag))


def shard_blocks(num_shards: int, seed: int, epoch: int, window: int) -> list[npt.NDArray[np.int64]]:
    """The shards in the order of an epoch, `window` at a time; `block_order` shuffles the samples of each such block."""
    if window < 1:
        raise UserError(f"The number of shards in a block must be at least 1, got {window}.")
    shards = epoch_order(num_shards, seed, epoch, SHARD_TAG)
    return [shards[start : start + window] for start in range(0, num_shards, window)]


def block_order(
    shard_sizes: npt.NDArray[np.integer], seed: int, epoch: int, window: int
) -> npt.NDArray[np.int64]:
    """An order that needs few shards at a time, for cold remote storage: (sum of sizes,) int64, a permutation.

    The shards are permuted and taken `window` at a time; the samples of a window are shuffled among themselves, by the same
    keys as in `epoch_order`. `shard_sizes`: samples in each shard; sample ids count through the shards in turn.
    """
    sizes = np.asarray(shard_sizes, dtype=np.int64)
    ends = np.cumsum(sizes)
    total = int(ends[-1]) if len(ends) else 0
    keys = _keys(total, seed, epoch, EPOCH_TAG)
    order, done = np.empty(total, dtype=np.int64), 0
    for shards in shard_blocks(len(sizes), seed, epoch, window):
        block = np.sort(shards)  # equal keys then keep the order of their ids
        ids = np.concatenate([np.arange(int(ends[s] - sizes[s]), int(ends[s])) for s in block])
        order[done : done + len(ids)] = ids[_stable_argsort(keys[ids])]
        done += len(ids)
    return order


def mixed_shares(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """How many samples of each set an epoch takes: the sum of `sizes` by `weights`, rounded by largest remainder (ties: the first)."""
    # Exactly: rounded, equal rests would differ.
    parts = [Fraction(weight) for weight in weights]
    exact = [sum(sizes) * part / sum(parts) for part in parts]
    shares = [math.floor(share) for share in exact]
    by_rest = sorted(range(len(sizes)), key=lambda k: (shares[k] - exact[k], k))
    for k in by_rest[: sum(sizes) - sum(shares)]:
        shares[k] += 1
    return shares


def mixed_order(sizes: Sequence[int], shares: Sequence[int], seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The order of an epoch over several sets that are taken by `shares`: (sum of shares,) int64.

    A set's samples follow each other through all epochs in permutations of their own, one after the other, so none is taken again
    before all others were; an epoch takes the next `shares[k]` of set k, and shuffles what all sets gave. A value is a position in
    the concatenation of the sets, plus, for the r-th repetition of a sample within the epoch, r times the sum of `sizes`.
    """
    total, start, taken = sum(sizes), 0, []
    for k, (size, share) in enumerate(zip(sizes, shares, strict=True)):
        first, last = epoch * share // size, ((epoch + 1) * share - 1) // size
        passes = [epoch_order(size, seed, number, MIX_TAG + k) for number in range(first, last + 1)]
        following = np.concatenate(passes)[epoch * share - first * size :][:share]
        taken.append(start + following + total * _occurrence(following))
        start += size
    order = np.concatenate(taken)
    return order[epoch_order(len(order), seed, epoch)]


def steps_per_epoch(num_samples: int, batch: int) -> int:
    """The number of whole global batches in an epoch; the rest (fewer than `batch` samples) is dropped."""
    if batch < 1:
        raise UserError(f"The global batch size must be at least 1, got {batch}.")
    return num_samples // batch


def rank_positions(step: int, batch: int, rank: int, world: int) -> slice:
    """The positions in the epoch's order that `rank` of `world` reads at `step`; `batch` is global.

    The ranks' slices laid end to end are the global batch, in the same order for every world size. Raises
    UserError when the batch does not divide among the ranks.
    """
    if not 0 <= rank < world:
        raise UserError(f"The rank must be in 0..{world - 1} for {world} ranks, got {rank}.")
    if batch < 1 or batch % world:
        below = batch // world * world
        choices = f"{below} or {below + world}" if below else str(world)
        raise UserError(
            f"The global batch size {batch} does not divide among {world} ranks; use a multiple, "
            f"such as {choices}."
        )
    start = step * batch
    return slice(start + rank * batch // world, start + (rank + 1) * batch // world)


def _occurrence(values: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """How often each value stands before it already, (N,)."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    first = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    counts = np.empty_like(values)
    counts[order] = np.arange(len(values)) - np.repeat(first, np.diff(np.r_[first, len(values)]))
    return counts


def _keys(count: int, seed: int, epoch: int, tag: int) -> npt.NDArray[np.uint64]:
    """`hash_key(seed, epoch, tag, i)` of i = 0 .. count - 1."""
    keys = np.empty(count, dtype=np.uint64)
    for start in range(0, count, _BLOCK):
        stop = min(start + _BLOCK, count)
        keys[start:stop] = hash_key(seed, epoch, tag, np.arange(start, stop, dtype=np.uint64))
    return keys


def _stable_argsort(keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """`np.argsort(keys, kind="stable")`, several times faster for hashed keys.

    Numpy sorts 64-bit values with vector instructions but argsorts them without: so each index is packed into the low bits of
    its key. The few keys that differ in those bits only are put in order afterwards.
    """
    low = np.uint64((1 << max(1, (len(keys) - 1).bit_length())) - 1)
    packed = (keys & ~low) | np.arange(len(keys), dtype=np.uint64)
    packed.sort()
    order = (packed & low).view(np.int64)
    packed &= ~low
    tied = np.flatnonzero(packed[1:] == packed[:-1])
    if len(tied):
        rows = np.union1d(tied, tied + 1)
        among = np.sort(order[rows])
        # Tied runs lie in the order of their high bits, so one sort of all their members by whole key leaves each in its run.
        order[rows] = among[np.argsort(keys[among], kind="stable")]
    return order
