"""Which images have equal pixels.

A JPEG that is kept is decoded at an eighth of its size only (`jpeg.eighth`), so two of them whose small copies are equal may still
differ. They are found here, by their hashes, and then decoded whole; copies of one file need not be.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shards.conversion.shard_maker import SMALL_HASH, read_rows
from shards.cpus import available_cpus
from shards.format import layout
from shards.format.equal_hashes import first_of_equal, halves
from shards.images.jpeg import simple_header, simple_jpeg
from shards.images.pixels import pixels_hash
from shards.storage.place import Place

Ids = npt.NDArray[np.int64]


class PixelHashes:
    """Hashes of the pixels of all samples of the finished shards `made`, equal where the pixels are: 32 hexadecimal digits.

    They are those of the small copies, where there are any, but for images whose small copies are equal and whose files are not.
    `first_equals`: for each sample, in shard order, the first one with the same pixels, or -1 where it is itself the first; (N,).
    Memory: 24 bytes a sample, and as much again while sorting.
    """

    def __init__(self, dest: Place, made: list[int]):
        self._dest = dest
        # Ascending: the samples that the hash of all pixels is taken of.
        self._whole_ids: Ids = np.empty(0, np.int64)
        self._whole: list[str] = []
        self._num_rows = dict.fromkeys(made, 0)  # by shard
        self._any_small = False
        self.first_equals = self._search()
        if self._any_small and (self.first_equals >= 0).any():
            self._look_closely()
            if self._whole:
                self.first_equals = self._search()

    def of(self, start: int, rows: pa.Table) -> pa.Array:
        """The hashes of the rows of a shard (their columns `pixels_hash` and SMALL_HASH), of which the first is sample `start`."""
        small, whole = rows[SMALL_HASH].to_pylist(), rows["pixels_hash"].to_pylist()
        texts = [other if one is None else one for one, other in zip(small, whole, strict=True)]
        first, last = np.searchsorted(self._whole_ids, (start, start + rows.num_rows)).tolist()
        for number in range(first, last):
            texts[self._whole_ids[number] - start] = self._whole[number]
        return pa.array(texts, pa.string())

    def _search(self) -> Ids:
        return first_of_equal(self._all()) if self._num_rows else np.empty(0, np.int64)

    def _all(self) -> Iterator[pa.Array]:
        start = 0
        for shard in self._num_rows:
            rows = read_rows(self._dest, shard, ["pixels_hash", SMALL_HASH])
            self._num_rows[shard] = rows.num_rows
            self._any_small = self._any_small or rows[SMALL_HASH].null_count < rows.num_rows
            yield self.of(start, rows)
            start += rows.num_rows

    def _look_closely(self) -> None:
        first = self.first_equals
        again = np.flatnonzero(first >= 0)
        ids = np.union1d(again, first[again])
        group = np.where(first[ids] >= 0, first[ids], ids)
        del again
        files = self._files(ids)
        # One entry for each file of each group; `own` says which is a sample's.
        order = np.lexsort((*files.digest.T, group))
        keys = np.column_stack((group.view(np.uint64), files.digest))[order]
        starts = np.ones(len(order), bool)
        starts[1:] = (keys[1:] != keys[:-1]).any(axis=1)
        own = np.empty(len(order), np.int64)
        own[order] = np.cumsum(starts) - 1
        _, back, files_of_group = np.unique(group[order[starts]], return_inverse=True, return_counts=True)
        doubtful = files_of_group[back] > 1  # for each entry: whether its group has other files too
        todo = {}
        for number in np.flatnonzero(doubtful[own]).tolist():
            if own[number] not in todo or files.whole[number]:
                todo[int(own[number])] = number
        found = dict(zip(todo, self._decoded(files, list(todo.values())), strict=True))
        self._whole_ids = ids[doubtful[own]]
        self._whole = [found[entry] for entry in own[doubtful[own]].tolist()]

    def _files(self, ids: Ids) -> _Files:
        digests, whole, places, start = [], [], [], 0
        for shard, size in self._num_rows.items():
            first, last = np.searchsorted(ids, (start, start + size)).tolist()
            if last > first:
                rows = read_rows(self._dest, shard, ["sha256", "pixels_hash", "offset", "size"])
                rows = rows.take(pa.array(ids[first:last] - start))
                digests.append(np.column_stack(halves(text[:32] for text in rows["sha256"].to_pylist())))
                whole += rows["pixels_hash"].to_pylist()
                offsets, sizes = rows["offset"].to_pylist(), rows["size"].to_pylist()
                places += zip([shard] * len(sizes), offsets, sizes, strict=True)
            start += size
        return _Files(np.concatenate(digests), whole, places)

    def _decoded(self, files: _Files, numbers: list[int]) -> list[str]:
        def hash_of(number: int) -> str:
            known = files.whole[number]
            return known or hash_stored(self._dest, *files.places[number])

        with ThreadPoolExecutor(available_cpus()) as threads:  # decoding lets go of the interpreter
            return list(threads.map(hash_of, numbers))


def hash_stored(dest: Place, shard: int, offset: int, size: int) -> str:
    """The hash of all pixels of a JPEG that lies in a shard and was kept as it was."""
    data = dest.read_range(layout.shard_name(shard), offset, size)
    header = simple_header(data, 1 << 62)
    pixels = None if header is None else simple_jpeg(data, header)
    assert pixels is not None, f"{layout.shard_name(shard)} at {offset}: a JPEG that was proven"
    return pixels_hash(pixels)


@dataclass(frozen=True)
class _Files:
    """Of some samples: 128 bits of their files' SHA-256, (N, 2); the hash of all their pixels, where known; shard, offset and size."""

    digest: npt.NDArray[np.uint64]
    whole: list[str | None]
    places: list[tuple[int, int, int]]
