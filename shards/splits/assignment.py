"""Assign samples to the sides of a split: functions of hashed names, so that a seed and the names decide it, and nothing else.

Samples that must not be torn apart (tiles of one scene, images with the same pixels) are one group, and only groups are placed. Each
group has a key: the hash of the seed and of the least name hash among its members. In the order of these keys val takes groups from
the front and test from the back, so that a group never moves between these two, and few move at all when images are added.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from shards.counter_hash import hash_key, uniform

TRAIN, VAL, TEST, NONE = 0, 1, 2, -1
SIDES = ("train", "val", "test")
GROUP_TAG = 0x67726F7570
LABEL_TAG = 0x6C6162656C

Ids = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]


def join(names: Hashes, first_equal: Ids) -> tuple[Hashes, Ids]:
    """Groups of samples that hang together, directly or through others.

    Args:
        names: (N,), equal for samples of one group: the hash of the group's name, or of the sample's own.
        first_equal: (N,), the first sample with the same pixels, -1 where there is none before it.

    Returns:
        The least name hash of each group, (G,) ascending, and the group of each sample, (N,).
    """
    known, own = np.unique(names, return_inverse=True)
    again = np.flatnonzero(first_equal >= 0)
    one, other = own[again], own[first_equal[again]]
    root = np.arange(len(known))
    # Each round hangs the greater of two roots under the lesser, then flattens: about log(G) rounds (Shiloach and Vishkin 1982).
    while True:
        a, b = root[one], root[other]
        apart = a != b
        if not apart.any():
            break
        np.minimum.at(root, np.maximum(a, b)[apart], np.minimum(a, b)[apart])
        while not np.array_equal(flat := root[root], root):
            root = flat
    roots, group = np.unique(root[own], return_inverse=True)
    return known[roots], group


def strata_of_groups(groups: Ids, strata: Ids, num_groups: int) -> Ids:
    """The most frequent stratum among each group's samples (the least of several), (G,); `groups` and `strata` are (N,)."""
    width = int(strata.max(initial=0)) + 1
    pairs, counts = np.unique(groups * width + strata, return_counts=True)
    # of each group the last one written is the one with the highest count
    best = np.lexsort((pairs, -counts))[::-1]
    found = np.zeros(num_groups, np.int64)
    found[pairs[best] // width] = pairs[best] % width
    return found


def divide(
    names: Hashes, sizes: Ids, strata: Ids, *, seed: int, val: float, test: float, exact: bool
) -> npt.NDArray[np.int8]:
    """The side of each group: TRAIN, VAL or TEST, (G,) int8.

    Args:
        names, sizes, strata: (G,) each group's hash, its number of samples, its stratum.
        val, test: shares of the samples.
        exact: take from each end of the order until the number of samples is as near the share of the stratum as these groups allow,
            with what rounding owes (at most one sample) paid by the next stratum; one group of each stratum always stays in train.
            Otherwise a group's side hangs on its key alone, and the shares are met in the mean.
    """
    keys = np.asarray(hash_key(seed, GROUP_TAG, names))
    sides = np.full(len(keys), TRAIN, np.int8)
    if not exact:
        at = uniform(keys)
        sides[at < val] = VAL
        sides[at >= 1 - test] = TEST
        return sides
    owed = {VAL: 0.0, TEST: 0.0}
    for members in _by_stratum(keys, strata):
        total = int(sizes[members].sum())
        for side, share, direction in ((VAL, val, 1), (TEST, test, -1)):
            if not share:
                continue
            walk = members[sides[members] == TRAIN][::direction]
            want = share * total + owed[side]
            taken = _fill(sizes[walk], want)
            if taken.all():
                taken[-1:] = False
            sides[walk[taken]] = side
            owed[side] = min(1.0, max(-1.0, want - int(sizes[walk[taken]].sum())))
    return sides


def _by_stratum(keys: Hashes, strata: Ids) -> list[Ids]:
    """The indices of each stratum's members in the order of their keys."""
    order = np.lexsort((keys, strata))
    cuts = np.flatnonzero(np.diff(strata[order])) + 1
    return np.split(order, cuts) if len(order) else []


def _fill(sizes: Ids, want: float) -> npt.NDArray[np.bool_]:
    """Which to take, from the front on, so that their sum comes near `want`: each that brings it nearer is taken."""
    sums = np.cumsum(sizes)
    num = int(np.searchsorted(sums, want, side="right"))
    taken = np.arange(len(sizes)) < num
    left = want - (int(sums[num - 1]) if num else 0)
    least = int(sizes.min(initial=1))
    for i in range(num, len(sizes)):
        if 2 * left <= least:
            break
        if sizes[i] < 2 * left:
            taken[i] = True
            left -= int(sizes[i])
    return taken


def label_fractions(
    names: Hashes, labels: Ids, fractions: Sequence[float], seed: int
) -> npt.NDArray[np.float64]:
    """The least of the ascending `fractions` whose subset holds each sample, nan where none does: (n,).

    In each class the samples stand in the order of their keys, and a subset is the front part: its share of the class, rounded so that
    what one class owes (at most one sample) is paid by the next, but at least one sample, and at least what the smaller subset has.
    `names`, `labels`: (n,) of the labelled samples alone.
    """
    keys = np.asarray(hash_key(seed, LABEL_TAG, names))
    least = np.full(len(keys), np.nan)
    classes = _by_stratum(keys, labels)
    before = [0] * len(classes)
    for fraction in fractions:
        owed = 0.0
        for number, members in enumerate(classes):
            want = fraction * len(members) + owed
            num = min(len(members), max(1, before[number], int(np.ceil(want - 0.5))))
            least[members[before[number] : num]] = fraction
            owed = min(1.0, max(-1.0, want - num))
            before[number] = num
    return least
