"""Make one shard: a pure function of (source, plan, shard number), so that any worker produces identical bytes."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from shards.conversion.shard_plan import Plan, extra_fields
from shards.conversion.workers import Count
from shards.format import layout
from shards.format.layout import ShardFile
from shards.format.tar_writer import Entry, Sample, write_index, write_shard
from shards.images.channel_statistics import Statistics
from shards.images.mask_images import prove_mask
from shards.images.policy import Policy
from shards.images.proof import BadImage, Depth, Stored, prove
from shards.sources.source import Picture, Source
from shards.storage.place import Place

NOT_YET = ("sample_id", "duplicate_of")  # known when all shards are
SMALL_HASH = "small_hash"  # a column of a shard's rows only: see `duplicates`
_ROWS = [
    *(column for column in layout.SCHEMA if column.name not in NOT_YET),
    pa.field(SMALL_HASH, pa.string()),
]
STATISTICS_IMAGES = 2048  # of a large set of JPEGs, at least so many are decoded whole, and counted


@dataclass(frozen=True)
class Marks:
    """What a finished shard notes beside its rows. `shard` is None where no image of it was good."""

    shard: ShardFile | None
    quarantined: list[dict[str, Any]]
    statistics: dict[str, Any]
    num_dropped: int


@dataclass(frozen=True)
class Maker:
    """Makes shards of one conversion; picklable. `dropped`: positions left out of each shard, as duplicates."""

    source: Source
    dest: Place
    plan: Plan
    policy: Policy
    dropped: dict[int, frozenset[int]]

    def __call__(self, shard: int, count: Count) -> None:
        """Write tar, index and, last, the rows that mark the shard as finished."""
        dropped = self.dropped.get(shard, frozenset())
        work = _Work(self, shard, dropped, count)
        written = write_shard(self.dest, layout.shard_name(shard), work.samples())
        file = None
        if written:
            file, entries = written
            index = write_index(self.dest, layout.index_name(shard), [entry.members for entry in entries])
            file = replace(file, index_sha256=index)
            work.locate(entries)
        marks = Marks(file, work.quarantined, work.statistics.to_json(), len(dropped))
        write_rows(self.dest, shard, work.table(), marks)


class _Work:
    def __init__(self, maker: Maker, shard: int, dropped: frozenset[int], count: Count):
        self.statistics = Statistics()
        self.quarantined: list[dict[str, Any]] = []
        self._maker = maker
        self._shard = shard
        self._dropped = dropped
        self._count = count
        self._rows: list[dict[str, Any]] = []
        planned = maker.plan.rows(shard)
        self._extra = extra_fields(planned.schema)
        policy, settings = maker.policy, maker.plan.settings
        # Other formats, and scaled images, are decoded anyhow, and have nothing that the small copy of a JPEG can be compared with.
        self._small = maker.plan.all_jpeg and policy.store in ("keep", "jpeg") and not policy.short_side
        self._every = max(1, settings.num_images // STATISTICS_IMAGES)
        # Appended images are compared with earlier ones by either hash.
        self._both = bool(settings.after)
        self._planned = planned.to_pylist()

    def samples(self) -> Iterator[Sample]:
        rows = [row for row in self._planned if row["position"] not in self._dropped]
        if len(rows) < len(self._planned):
            self._count(len(self._planned) - len(rows), 0)
        for row, found in zip(rows, self._maker.source.read_all(rows), strict=True):
            position = row["position"]
            try:
                if isinstance(found, BadImage):
                    raise found
                sample, columns = self._sample(row, found)
            except BadImage as error:
                about = {"source": row["source"], "reason": error.reason, "position": position}
                self.quarantined.append(about)
                self._count(1, 1)
                continue
            self._rows.append(columns)
            yield sample
            self._count(1, 0)

    def _sample(self, row: dict[str, Any], picture: Picture) -> tuple[Sample, dict[str, Any]]:
        maker, name = self._maker, row["source"]
        stored = prove(picture.image, name, maker.policy, self._depth(row["position"]))
        mask = None
        if picture.mask is not None:
            laid = maker.source.mask_orientation
            mask = prove_mask(picture.mask, row["mask"] or name, stored, maker.policy, laid)
        if stored.sample is not None:
            self.statistics.add(stored.sample, stored.sample_known)
        label = row["label"]
        extra = {column.name: row[column.name] for column in self._extra}
        facts = {key: value for key, value in (extra | picture.facts).items() if _is_known(value)}
        class_name = None if label is None else maker.plan.classes[label]
        key = layout.sample_key(row["position"])
        columns = _columns(stored) | extra
        columns |= {"key": key, "source": name, "label": label, "group": row["group"]}
        return Sample(key, stored, name, label, class_name, mask, facts), columns

    def _depth(self, position: int) -> Depth:
        if not self._small:
            return "pixels"
        return "small" if position % self._every and not self._both else "both"

    def locate(self, entries: list[Entry]) -> None:
        """Enter where each sample's files lie in the tar."""
        for row, entry in zip(self._rows, entries, strict=True):
            row["shard"] = self._shard
            row["offset"] = entry.members[0].offset
            row["tar_crc32"] = entry.crc32
            for member in entry.members:
                if member.name.endswith(f".{layout.MASK_EXT}"):
                    row["mask_offset"], row["mask_size"] = member.offset, member.size

    def table(self) -> pa.Table:
        return pa.Table.from_pylist(self._rows, schema=pa.schema([*_ROWS, *self._extra]))


def _is_known(value: Any) -> bool:
    """Whether the JSON gets a value: there is no null, and JSON has no NaN and no infinity."""
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


def _columns(stored: Stored) -> dict[str, Any]:
    return {
        "size": len(stored.data),
        "ext": stored.ext,
        "width": stored.width,
        "height": stored.height,
        "channels": stored.channels,
        "dtype": stored.dtype,
        "sha256": hashlib.sha256(stored.data).hexdigest(),
        "pixels_hash": stored.pixels_hash,
        SMALL_HASH: stored.small_hash,
        "stored": stored.how,
    }


def rows_path(shard: int) -> str:
    """Where, in the destination, the finished shard's rows lie."""
    return f"{layout.ROWS}/{layout.rows_name(shard)}"


def write_rows(dest: Place, shard: int, table: pa.Table, marks: Marks) -> None:
    """Mark a shard as finished: its rows, and what it noted, in one file."""
    about = {
        "shard": marks.shard and vars(marks.shard),
        "quarantined": marks.quarantined,
        "statistics": marks.statistics,
        "num_dropped": marks.num_dropped,
    }
    text = json.dumps(about, ensure_ascii=False, sort_keys=True)
    table = table.replace_schema_metadata({"marks": text})

    def write(file: BinaryIO) -> None:
        # Read once or twice and then removed: plain is fastest.
        pq.write_table(table, file, compression="none", use_dictionary=False, write_statistics=False)

    dest.write(rows_path(shard), write)


def read_marks(dest: Place, shard: int) -> Marks | None:
    """What a finished shard noted; None where it is not finished."""
    try:
        with dest.open(rows_path(shard)) as file:
            about = json.loads(pq.read_schema(file).metadata[b"marks"])
    except FileNotFoundError:
        return None
    shard_file = about.pop("shard")
    return Marks(shard_file and ShardFile(**shard_file), **about)


def read_rows(dest: Place, shard: int, columns: list[str] | None = None) -> pa.Table:
    """The rows of a finished shard."""
    with dest.open(rows_path(shard)) as file, pq.ParquetFile(file) as parquet:
        return parquet.read(columns, use_threads=False).replace_schema_metadata(None)
