"""Every entry of a source once, in a shuffled order that depends on names and seed alone; memory does not grow with their number.

An entry's place is decided by a hash of its name, so it does not matter in which order a file system lists its files. More than a
million entries are sorted in parts, on disk.
"""

from __future__ import annotations

import itertools
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from shards.counter_hash import fold, hash_key
from shards.dataset.order import PLAN_TAG
from shards.errors import UserError
from shards.format.columns import hash_values
from shards.sources.source import Source

IN_MEMORY = 1_000_000  # entries, above which they are sorted on disk
IN_MEMORY_BYTES = 256 * 2**20  # the same, where entries have long columns
MAX_CLASSES = 100_000
_BUCKET_BITS = 8
_WRITE_ROWS = 1 << 14
_KEY = "_key"
SCRATCH = ".listing."  # begins the name of the folder of what is sorted on disk
_INTEGER = re.compile(r"[-+]?[0-9]{1,18}")
_JPEG_NAME = r"(?i)\.jpe?g$"


@dataclass(frozen=True)
class Listing:
    """What a source holds, without the entries: `digest` changes with any value of any entry, not with their order."""

    num_images: int
    num_bytes: int
    classes: list[str]
    digest: str
    all_jpeg: bool  # by their names


class Survey:
    """Reads all entries of a source once; afterwards `listing` is their sum, and `ordered` gives them in the plan's order.

    `scratch`: folder for the parts of large listings, removed by `close`. `seen(num)` is called with the number of entries so far.
    Without `keep` there is the sum only, for comparison with a plan that stands: nothing is held, nothing sorted.
    """

    def __init__(
        self,
        source: Source,
        seed: int,
        scratch: Path | None = None,
        seen: Callable[[int], None] | None = None,
        *,
        keep: bool = True,
    ):
        self._schema = pa.schema([*_entry_schema(source), (_KEY, pa.uint64())])
        self._pending: list[pa.RecordBatch] = []
        self._num_pending = self._num_pending_bytes = 0
        self._files: list[tuple[IO[bytes], pa.RecordBatchStreamWriter]] = []
        self._scratch = scratch
        self._keep = keep
        self._source = source
        self._folder: tempfile.TemporaryDirectory | None = None
        self.listing = self._read(source, seed, seen)

    def _read(self, source: Source, seed: int, seen: Callable[[int], None] | None) -> Listing:
        num_images = num_bytes = 0
        all_jpeg = True
        classes: set[str] = set()
        digest = np.zeros(2, np.uint64)
        for batch in source.entries():
            if not batch.num_rows:
                continue
            names = hash_values(batch["source"])
            digest += _digest(batch, names)
            num_images += batch.num_rows
            num_bytes += int(batch["bytes"].fill_null(0).to_numpy(zero_copy_only=False).sum())
            all_jpeg = all_jpeg and _all_jpeg(batch["source"])
            classes.update(batch["label"].drop_null().unique().to_pylist())
            if len(classes) > MAX_CLASSES:
                raise UserError(
                    f"'{source.name}' has more than {MAX_CLASSES:,} different labels: a column of names or numbers is no label; "
                    "choose another, or none."
                )
            if self._keep:
                self._add(batch, _keys(seed, names, source.units(batch)))
            if seen:
                seen(num_images)
        # Some sources know them only now, when they have been read.
        classes.update(source.classes)
        text = "".join(f"{int(part):016x}" for part in digest)
        return Listing(num_images, num_bytes, class_order(classes), text, all_jpeg)

    def _add(self, batch: pa.RecordBatch, keys: npt.NDArray[np.uint64]) -> None:
        columns = [*batch.columns, pa.array(keys)]
        self._pending.append(pa.RecordBatch.from_arrays(columns, schema=self._schema))
        self._num_pending += batch.num_rows
        self._num_pending_bytes += batch.nbytes
        if self._num_pending >= IN_MEMORY or self._num_pending_bytes >= IN_MEMORY_BYTES:
            self._spill()

    def _spill(self) -> None:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(
                dir=self._scratch, prefix=SCRATCH, ignore_cleanup_errors=True
            )
            for bucket in range(1 << _BUCKET_BITS):
                file = open(Path(self._folder.name) / f"{bucket:03d}.arrow", "wb")  # noqa: SIM115 (closed by `close`)
                self._files.append((file, pa.ipc.new_stream(file, self._schema)))
        table = self._take_pending()
        tops = table[_KEY].to_numpy() >> np.uint64(64 - _BUCKET_BITS)
        order = np.argsort(tops, kind="stable")
        ends = np.searchsorted(tops[order], np.arange(1, (1 << _BUCKET_BITS) + 1))
        table = table.take(pa.array(order))
        start = 0
        for (_, writer), end in zip(self._files, ends.tolist(), strict=True):
            if end > start:
                writer.write_table(
                    table.slice(start, end - start).combine_chunks(), max_chunksize=_WRITE_ROWS
                )
            start = end

    def _take_pending(self) -> pa.Table:
        table = pa.Table.from_batches(self._pending, schema=self._schema)
        self._pending, self._num_pending, self._num_pending_bytes = [], 0, 0
        return table

    def ordered(self) -> Iterator[pa.Table]:
        """The entries in the plan's order, in tables of any size; once, and with `keep`. Raise UserError for a name listed twice."""
        if self._folder is None:
            yield self._sorted(self._take_pending())
            return
        self._spill()
        for file, writer in self._files:
            writer.close()
            file.close()
        for file, _ in self._files:
            with pa.ipc.open_stream(file.name) as reader:
                table = reader.read_all()
            Path(file.name).unlink()
            if table.num_rows:
                yield self._sorted(table)

    def _sorted(self, table: pa.Table) -> pa.Table:
        keys = table[_KEY].to_numpy()
        order = np.argsort(keys, kind="stable")
        twice = np.flatnonzero(np.diff(keys[order]) == 0)
        if len(twice):  # a name listed twice, or (once in 2^64 / N^2 listings) two names of one hash
            table = table.append_column("_row", pa.array(np.arange(table.num_rows)))
            order = table.sort_by([(_KEY, "ascending"), ("source", "ascending")])["_row"].to_numpy()
            table = table.drop_columns(["_row"])
            names = table["source"].take(pa.array(order[np.unique(np.r_[twice, twice + 1])])).to_pylist()
            for one, other in itertools.pairwise(names):
                if one == other:
                    where = self._source.locate(one)
                    raise UserError(
                        f"'{one}' is listed twice in the source{f', {where}' if where else ''}: remove one of the two."
                    )
        return table.drop_columns([_KEY]).take(pa.array(order))

    def close(self) -> None:
        """Remove what lies on disk."""
        for file, _ in self._files:
            file.close()
        if self._folder:
            self._folder.cleanup()

    def __enter__(self) -> Survey:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _keys(
    seed: int, names: npt.NDArray[np.uint64], units: npt.NDArray[np.uint64] | None
) -> npt.NDArray[np.uint64]:
    """The place of each entry in the plan: by the hash of its name; by that of its unit before it, where there is one."""
    keys = np.asarray(hash_key(seed, PLAN_TAG, names))
    if units is None:
        return keys
    half = np.uint64(32)
    return np.asarray(hash_key(seed, PLAN_TAG, units)) >> half << half | keys >> half


def class_order(classes: set[str]) -> list[str]:
    """Class names sorted: as numbers where all are integers (2 before 10), else as text."""
    if all(_INTEGER.fullmatch(name) for name in classes):
        return sorted(classes, key=lambda name: (int(name), name))
    return sorted(classes)


def _entry_schema(source: Source) -> pa.Schema:
    from shards.format.layout import SCHEMA
    from shards.sources.source import ENTRIES

    taken = {*ENTRIES.names, *SCHEMA.names, _KEY, "position"}
    for name in source.extra_schema.names:
        if name in taken:
            raise UserError(
                f"'{source.name}' has a column '{name}', a name that the sample table uses itself: rename that column."
            )
    return pa.schema([*ENTRIES, *source.extra_schema])


def _all_jpeg(names: pa.Array) -> bool:
    found = pc.match_substring_regex(names, _JPEG_NAME)  # pyright: ignore[reportAttributeAccessIssue] (made at run time)
    return pc.all(found).as_py()  # pyright: ignore[reportAttributeAccessIssue]


def _digest(batch: pa.RecordBatch, names: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The sum over the rows of a 128-bit hash of each: uint64 (2,). A sum, so that the order of the rows has no part in it."""
    rows = [names, fold(names, np.uint64(1))]
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if name == "source" or column.null_count == len(column):
            continue
        values = hash_values(column)
        folded = [fold(row, values) for row in rows]
        if column.null_count:
            # Nulls are passed over row by row: which rows share a batch depends on the order in which they were found.
            known = column.is_valid().to_numpy(zero_copy_only=False)
            folded = [np.where(known, new, row) for new, row in zip(folded, rows, strict=True)]
        rows = folded
    return np.array([row.sum(dtype=np.uint64) for row in rows])
