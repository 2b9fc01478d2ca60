"""Which samples of shards belong together, such as the tiles of one scene: what tells one of them tells the others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shards.dataset.mixed_set import MixedShardSet
from shards.dataset.shard_set import ShardSet
from shards.splits.assignment import Hashes, Ids
from shards.splits.split_rules import group_names
from shards.splits.split_table import group_rules
from shards.storage.opening import open_place


@dataclass(frozen=True)
class SampleGroups:
    """The groups of a shard set's samples. names: hashes of the groups' names, (num_samples,); known: whether a sample has a group."""

    names: Hashes
    known: npt.NDArray[np.bool_]

    def numbers(self, ids: Ids) -> Ids:
        """Return numbers of some samples' groups, (N,) from 0 on, the same for samples of one group; one without is its own group."""
        keys = np.where(self.known[ids], self.names[ids], np.arange(len(ids), dtype=np.uint64))
        pairs = np.stack([self.known[ids].astype(np.uint64), keys])
        return np.unique(pairs, axis=1, return_inverse=True)[1].reshape(-1).astype(np.int64)

    def num_shared(self, ids: Ids, other: SampleGroups, others: Ids) -> int:
        """Return how many of the samples `ids` are of a group to which one of the samples `others` of `other` belongs, too."""
        mine, theirs = ids[self.known[ids]], others[other.known[others]]
        return int(np.isin(self.names[mine], other.names[theirs]).sum())


def sample_groups(shards: ShardSet) -> SampleGroups | None:
    """Return the groups of all samples: those of the column `group` or, where it is empty, of the rule by which the shards were split.

    None where the shards know of none. Groups of one name in several folders are one group.
    """
    parts = shards.parts if isinstance(shards, MixedShardSet) else (shards,)
    found = [_of_folder(part) for part in parts]
    names = np.concatenate([names for names, _ in found])
    known = np.concatenate([known for _, known in found])
    return SampleGroups(names, known) if known.any() else None


def _of_folder(shards: ShardSet) -> tuple[Hashes, npt.NDArray[np.bool_]]:
    place = open_place(shards.folder)
    names, known = group_names(place)
    if not known.any():
        for rule in group_rules(place, shards.manifest):
            return group_names(place, rule)
    return names, known
