"""Random access to a finished shard folder, by sample id; remote shards come through a cache on this machine."""

from __future__ import annotations

import copy
import dataclasses
import mmap
import operator
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shards.dataset.order import epoch_order
from shards.errors import UserError
from shards.format.columns import integers, read_columns
from shards.format.label_table import LabelTable, read_labels
from shards.format.layout import TABLE, Manifest, check_size, shard_name
from shards.format.sample_table import rows_in_use
from shards.images.decoding import decode
from shards.storage.cache_settings import CacheSettings
from shards.storage.opening import Where, open_place

if TYPE_CHECKING:
    from shards.dataset.remote_shards import Near

# Python 3.13 can map a file without keeping it open.
_MAP_OPTIONS: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}
_COLUMNS = ["shard", "offset", "size", "width", "height", "channels", "label", "mask_offset", "mask_size"]


@dataclass(frozen=True)
class ShardSample:
    """One sample. data, mask: the encoded image and mask, read-only views of the shard; label: -1 where there is none."""

    sample_id: int
    data: memoryview
    mask: memoryview | None
    label: int

    def pixels(self) -> npt.NDArray:
        """The decoded image, (H, W, C): uint8, or for NumPy arrays uint16 or float32, too."""
        return decode(bytes(self.data))

    def mask_pixels(self) -> npt.NDArray | None:
        """The decoded mask of class indices, (H, W) uint8 or uint16; None where there is none."""
        return None if self.mask is None else decode(bytes(self.mask))[:, :, 0]


class ShardSet:
    """The samples of one shard folder, memory-mapped; safe to use from threads, and cheap to pickle.

    Columns, each (num_samples,): `labels` int64, -1 where there is none; `widths` and `heights` int32, pixels; `sizes` int64, bytes;
    `channels` int16; `mask_sizes` int64, bytes, 0 where there is none (None where no sample has a mask). `classes` names the labels.
    `split`: the name of the subset in use, "" for all; the columns and ids are those of the whole folder all the same, and `len`
    counts the samples in use. `folder` is a Path, or the URL of remote shards.
    """

    def __init__(
        self,
        folder: Path | str,
        manifest: Manifest,
        table: pa.Table,
        near: Near | None = None,
        given: LabelTable | None = None,
    ):
        self.folder = folder
        self.manifest = dataclasses.replace(manifest, classes=given.classes) if given else manifest
        self.num_samples = manifest.num_samples
        self.split = ""
        self._ids: npt.NDArray[np.int64] | None = None
        self.classes = self.manifest.classes
        labels = integers(table["label"], -1).astype(np.int64)
        self.labels = given.over(labels) if given else labels
        self.widths = integers(table["width"])
        self.heights = integers(table["height"])
        self.sizes = integers(table["size"])
        self.channels = integers(table["channels"])
        self._mask_offset = integers(table["mask_offset"], -1) if manifest.num_masks else None
        self.mask_sizes = integers(table["mask_size"]) if manifest.num_masks else None
        self._shard = integers(table["shard"])
        self._offset = integers(table["offset"])
        self._maps: dict[int, memoryview] = {}
        self.near = near

    @classmethod
    def open(cls, folder: Where, cache: CacheSettings | None = None) -> ShardSet:
        """Open a shard folder or the URL of one; raise UserError when it is unfinished or a shard is missing or cut short.

        `cache`: where remote shards are kept; nothing for local ones.
        """
        place = open_place(folder)
        if place.local is None:
            from shards.dataset.remote_shards import open_near

            manifest, near = open_near(place, cache or CacheSettings())
            _allow_open_files(place.url, len(manifest.shards))
            with near.open_table() as file:
                table = rows_in_use(read_columns(file, _COLUMNS), place, manifest)
            return cls(place.url, manifest, table, near, read_labels(place, manifest))
        folder = place.local
        manifest = Manifest.load(place)
        _allow_open_files(place.url, len(manifest.shards))
        for shard in manifest.shards:
            check_size(str(folder / shard.name), place.size(shard.name), shard.bytes)
        if not (folder / TABLE).is_file():
            raise UserError(
                f"'{folder / TABLE}' is missing; run the same `fastssl shard` command again to mend it."
            )
        table = rows_in_use(read_columns(folder / TABLE, _COLUMNS), place, manifest)
        return cls(folder, manifest, table, None, read_labels(place, manifest))

    def __len__(self) -> int:
        return self.num_samples if self._ids is None else len(self._ids)

    def __getitem__(self, position: int) -> ShardSample:
        """The sample at a position among those in use, counted from the end where it is negative; IndexError outside."""
        position = operator.index(position)
        if not -len(self) <= position < len(self):
            raise IndexError(f"position {position} is outside the {len(self)} samples of {self!r}")
        position %= len(self)
        sample_id = position if self._ids is None else int(self._ids[position])
        label = int(self.labels[sample_id])
        return ShardSample(sample_id, self.read(sample_id), self.read_mask(sample_id), label)

    def __iter__(self) -> Iterator[ShardSample]:
        return (self[position] for position in range(len(self)))

    def __repr__(self) -> str:
        used = f"{len(self):,} of {self.num_samples:,}" if self.split else f"{self.num_samples:,}"
        split = f" split '{self.split}'," if self.split else ""
        classes = f"{len(self.classes):,} classes" if self.classes else "no labels"
        masks = f", {self.manifest.num_masks:,} masks" if self.manifest.num_masks else ""
        num_shards = len(self.manifest.shards)
        return f"<ShardSet '{self.folder}':{split} {used} samples, {classes}{masks}, {num_shards:,} shards>"

    def __reduce__(self):
        return _open_subset, (self.folder, self.near and self.near.settings, self._ids, self.split)

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        """The samples in use, ascending; (len(self),)."""
        return np.arange(self.num_samples) if self._ids is None else self._ids

    def subset(self, ids: npt.NDArray[np.int64], split: str) -> ShardSet:
        """The same folder with these samples in use: ascending ids without repeats."""
        part = copy.copy(self)  # shares the columns and the maps
        part._ids, part.split = ids, split
        return part

    def epoch_ids(self, seed: int, epoch: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The samples of an epoch in their order, and the numbers that key their draws; int64 (len(self),) each.

        The order is one of positions among the samples in use, so that of a split does not depend on what lies outside of it.
        """
        order = epoch_order(len(self), seed, epoch)
        ids = order if self._ids is None else self._ids[order]
        return ids, ids

    def read(self, sample_id: int) -> memoryview:
        """The encoded image, read-only and without a copy; IndexError outside 0..num_samples-1."""
        self._check_id(sample_id)
        shard = int(self._shard[sample_id])
        offset = int(self._offset[sample_id])
        return self._map(shard)[offset : offset + int(self.sizes[sample_id])]

    def read_mask(self, sample_id: int) -> memoryview | None:
        """The encoded mask (PNG of class indices), read-only and without a copy; None where the sample has none."""
        self._check_id(sample_id)
        if self._mask_offset is None or self.mask_sizes is None or self._mask_offset[sample_id] < 0:
            return None
        offset = int(self._mask_offset[sample_id])
        return self._map(int(self._shard[sample_id]))[offset : offset + int(self.mask_sizes[sample_id])]

    def shard_path(self, sample_id: int) -> Path | str:
        """The tar that holds the image: its path, or its URL."""
        self._check_id(sample_id)
        name = shard_name(int(self._shard[sample_id]))
        return self.folder / name if isinstance(self.folder, Path) else f"{self.folder.rstrip('/')}/{name}"

    def prefetch(self, shards: Iterable[int]) -> None:
        """Begin to bring remote shards, by their numbers, onto this machine, in this order; nothing to do for local ones.

        What was asked for before and not begun is forgotten.
        """
        if self.near is not None:
            self.near.prefetch(shards)

    def shard_numbers(self, sample_ids: npt.NDArray[np.integer]) -> npt.NDArray[np.int32]:
        """The number of the shard of each sample, (N,)."""
        return self._shard[sample_ids]

    def mend(self, sample_id: int) -> bool:
        """Whether the sample should be read again, because its shard's copy on this machine was damaged; it is removed then."""
        shard = int(self._shard[sample_id])
        if self.near is None or not self.near.is_damaged(shard):
            return False
        self._maps.pop(shard, None)
        return True

    def name(self, sample_id: int) -> str:
        """The image's path below the source folder, with forward slashes."""
        self._check_id(sample_id)
        return self._sources[sample_id].as_py()

    @cached_property
    def _sources(self) -> pa.ChunkedArray:
        # Names are wanted for messages and reports only; at 10 million samples they would be most of the
        # memory.
        if self.near is None:
            return read_columns(f"{self.folder}/{TABLE}", ["source"])["source"]
        with self.near.open_table() as file:
            return read_columns(file, ["source"])["source"]

    def _check_id(self, sample_id: int) -> None:
        if not 0 <= sample_id < self.num_samples:
            raise IndexError(f"sample {sample_id} is outside 0..{self.num_samples - 1} of '{self.folder}'")

    def _map(self, shard: int) -> memoryview:
        view = self._maps.get(shard)
        if view is None:
            with self._open(shard) as file:
                mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ, **_MAP_OPTIONS))
            # Two threads may both map it; the one that comes second uses the first one's.
            view = self._maps.setdefault(shard, mapped)
            if self.near is not None:
                self.near.forget(self._maps)
        elif self.near is not None:
            self.near.used(shard)
        return view

    def _open(self, shard: int) -> IO[bytes]:
        if self.near is not None:
            return self.near.open(shard)
        return open(Path(self.folder) / shard_name(shard), "rb")


def _open_subset(
    folder: str | Path, cache: CacheSettings | None, ids: npt.NDArray[np.int64] | None, split: str
) -> ShardSet:
    shards = ShardSet.open(folder, cache)
    return shards if ids is None else shards.subset(ids, split)


def _allow_open_files(folder: str, needed: int) -> None:
    """Raise this process's limit of open files where the shards need more: a map keeps its file open (before Python 3.13)."""
    if _MAP_OPTIONS or sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or needed <= soft // 2:
        return
    wanted = needed + soft
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if needed > allowed - 256:
        raise UserError(
            f"'{folder}' has {needed:,} shards and this system allows {hard:,} open files: raise the limit (ulimit -Hn), or "
            "convert with more --samples-per-shard."
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
