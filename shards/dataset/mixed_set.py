"""Several shard folders as one set of samples, with or without weights."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shards.dataset.order import mixed_order, mixed_shares
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError
from shards.format.layout import Manifest
from shards.images.channel_statistics import join_summaries
from shards.units import plural


class MixedShardSet(ShardSet):
    """The samples of several shard folders on this machine, one behind the other; used as a `ShardSet`.

    Ids count through the sets: those of the second begin at the number of samples of the first. Classes are joined by their names, in
    the order in which the sets name them. Without `weights` an epoch is that of the concatenation: each sample once. With them an
    epoch has as many samples, of which each set gives its share (`mixed_shares`, `mixed_order`).
    """

    def __init__(self, parts: Sequence[ShardSet], weights: Sequence[float] = ()):
        """Raise UserError for sets that do not go together: other channels, element types or value ranges, or remote ones."""
        self.parts, self.weights = tuple(parts), tuple(weights)
        _check(self.parts, self.weights)
        self.folder = " + ".join(str(part.folder) for part in parts)
        self.near = None
        self._starts = np.cumsum([0, *(part.num_samples for part in parts)]).tolist()
        self.num_samples = self._starts.pop()
        splits = dict.fromkeys(part.split or "all" for part in parts)
        self.split = " + ".join(splits) if any(part.split for part in parts) else ""
        starts = list(zip(parts, self._starts, strict=True))
        self._ids = np.concatenate([part.ids + start for part, start in starts]) if self.split else None
        self._shares = self._take_shares()

        self.classes = list(dict.fromkeys(name for part in parts for name in part.classes))
        self.labels = np.concatenate([labels_by_name(part, self.classes) for part in parts])
        self.widths, self.heights, self.sizes, self.channels = (
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("widths", "heights", "sizes", "channels")
        )
        masks = [part.mask_sizes for part in parts]
        self.mask_sizes = None
        if any(sizes is not None for sizes in masks):
            none = [np.zeros(part.num_samples, np.int64) for part in parts]
            self.mask_sizes = np.concatenate(
                [zeros if sizes is None else sizes for sizes, zeros in zip(masks, none, strict=True)]
            )
        self.manifest = self._joined()

    def _take_shares(self) -> list[int]:
        if not self.weights:
            return []
        sizes = [len(part) for part in self.parts]
        shares = mixed_shares(sizes, self.weights)
        for part, weight, share in zip(self.parts, self.weights, shares, strict=True):
            if not share:
                raise UserError(
                    f"data.weights: {weight:g} of {math.fsum(self.weights):g} is less than one of the {sum(sizes):,} samples of an "
                    f"epoch, so '{part.folder}' would give none: raise its weight, or leave it out."
                )
        return shares

    def _joined(self) -> Manifest:
        """The facts of all sets; its identity is that of the sets, their parts in use and their shares of an epoch."""
        found = [part.manifest for part in self.parts]
        used = [hashlib.sha256(part.ids.tobytes()).hexdigest() if part.split else "" for part in self.parts]
        own = [manifest.options_sha256 for manifest in found]
        identity = json.dumps({"sets": own, "ids": used, "shares": self._shares})
        return dataclasses.replace(
            found[0],
            source=" + ".join(manifest.source for manifest in found),
            kind="mixed",
            num_samples=self.num_samples,
            num_quarantined=sum(manifest.num_quarantined for manifest in found),
            num_duplicates=sum(manifest.num_duplicates for manifest in found),
            classes=self.classes,
            channels=sorted({number for manifest in found for number in manifest.channels}),
            num_masks=sum(manifest.num_masks for manifest in found),
            max_width=max(manifest.max_width for manifest in found),
            max_height=max(manifest.max_height for manifest in found),
            bytes=sum(manifest.bytes for manifest in found),
            statistics=join_summaries([(manifest.statistics, manifest.num_samples) for manifest in found]),
            shards=[shard for manifest in found for shard in manifest.shards],
            options_sha256=hashlib.sha256(identity.encode()).hexdigest(),
        )

    def __reduce__(self):
        return MixedShardSet, (self.parts, self.weights)

    def subset(self, ids: npt.NDArray[np.int64], split: str) -> ShardSet:
        """Not for a mix: its parts are."""
        raise UserError(f"'{self.folder}' is a mix: take the split of each of its sets.")

    def epoch_ids(self, seed: int, epoch: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """See `ShardSet.epoch_ids`; with weights a sample may come several times, each with draws of its own."""
        if not self._shares:
            return super().epoch_ids(seed, epoch)
        order = mixed_order([len(part) for part in self.parts], self._shares, seed, epoch)
        times, positions = np.divmod(order, len(self))
        ids = self.ids[positions]
        return ids, ids + times * self.num_samples

    def read(self, sample_id: int) -> memoryview:
        """See `ShardSet.read`."""
        part, own = self._find(sample_id)
        return part.read(own)

    def read_mask(self, sample_id: int) -> memoryview | None:
        """See `ShardSet.read_mask`."""
        part, own = self._find(sample_id)
        return part.read_mask(own)

    def shard_path(self, sample_id: int) -> Path | str:
        """See `ShardSet.shard_path`."""
        part, own = self._find(sample_id)
        return part.shard_path(own)

    def name(self, sample_id: int) -> str:
        """See `ShardSet.name`."""
        part, own = self._find(sample_id)
        return part.name(own)

    def prefetch(self, shards: Iterable[int]) -> None:
        """Nothing to do: all sets lie on this machine."""

    def mend(self, sample_id: int) -> bool:
        """False: there is no copy to be removed."""
        return False

    def _find(self, sample_id: int) -> tuple[ShardSet, int]:
        """The set that a sample is of, and its id there."""
        self._check_id(sample_id)
        k = bisect_right(self._starts, sample_id) - 1
        return self.parts[k], sample_id - self._starts[k]


def labels_by_name(shards: ShardSet, classes: Sequence[str]) -> npt.NDArray[np.int64]:
    """The labels of all samples as indices into `classes`, by the names: int64 (num_samples,), -1 where there is none."""
    number = {name: index for index, name in enumerate(classes)}
    table = np.array([*(number[name] for name in shards.classes), -1], np.int64)
    return table[shards.labels]


def _check(parts: Sequence[ShardSet], weights: Sequence[float]) -> None:
    if len(parts) < 2:
        raise UserError(
            f"data.weights are for several shard folders, and there is {len(parts)}: leave them out."
        )
    if weights and len(weights) != len(parts):
        raise UserError(
            f"data.weights has {plural(len(weights), 'number')} for {len(parts)} shard folders: give one for each."
        )
    for weight in weights:
        if not (math.isfinite(weight) and weight > 0):
            raise UserError(f"data.weights has {weight:g}, but a weight is a number above 0.")
    first = parts[0]
    for part in parts:
        if part.near is not None:
            raise UserError(
                f"'{part.folder}' is remote, and several shard folders are read together only from this machine: copy it here first, "
                "or train on it alone."
            )
        _check_pair(first, part)
    folders = [str(Path(part.folder).resolve()) for part in parts]
    twice = next((part for i, part in enumerate(parts) if folders[i] in folders[:i]), None)
    if twice:
        raise UserError(
            f"'{twice.folder}' is given twice: give each folder once, and data.weights for more of it."
        )


def _check_pair(one: ShardSet, other: ShardSet) -> None:
    """Raise UserError, with both values, unless views of two sets mean the same."""
    channels = [sorted(shards.manifest.channels) for shards in (one, other)]
    every = {*channels[0], *channels[1]}
    if len(every) > 1 and not every <= {1, 3}:
        found = [", ".join(map(str, numbers)) + " channels" for numbers in channels]
        raise _differ(one, other, found, "a batch must have one number of channels (1 goes with 3)")
    dtypes = [", ".join(sorted(shards.manifest.dtypes)) for shards in (one, other)]
    if dtypes[0] != dtypes[1]:
        raise _differ(one, other, dtypes, "what becomes 0 and 1 would differ between them")
    units, others = _float_range(one), _float_range(other)
    if units and others and _is_unit(units) != _is_unit(others):
        found = ["floats from {:g} to {:g} (98 % of them)".format(*ends) for ends in (units, others)]
        raise _differ(one, other, found, "those of one lie between 0 and 1 and those of the other do not")


def _differ(one: ShardSet, other: ShardSet, found: Sequence[str], why: str) -> UserError:
    return UserError(
        f"'{one.folder}' holds {found[0]} and '{other.folder}' holds {found[1]}: {why}. Convert one of them to match "
        "the other, or train on each alone."
    )


def _float_range(shards: ShardSet) -> tuple[float, float] | None:
    found = [facts for kind, facts in shards.manifest.statistics.items() if kind.startswith("float32/")]
    if not found:
        return None
    return min(min(facts["p1"]) for facts in found), max(max(facts["p99"]) for facts in found)


def _is_unit(found: tuple[float, float]) -> bool:
    return min(found) >= 0 and max(found) <= 1
