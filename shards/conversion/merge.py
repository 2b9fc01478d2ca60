"""Merge finished shards: their rows become the sample table, their marks the manifest; duplicates are found on the way."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from shards.conversion.duplicates import PixelHashes
from shards.conversion.shard_maker import Marks, read_marks, read_rows
from shards.conversion.shard_plan import Plan
from shards.errors import UserError
from shards.format import layout
from shards.format.columns import read_columns
from shards.format.layout import Manifest, ShardFile
from shards.images.channel_statistics import Statistics
from shards.storage.place import Place

# no dictionary makes these smaller
_ALL_DIFFERENT = {"sample_id", "key", "offset", "source", "sha256", "pixels_hash"}


def merge(dest: Place, plan: Plan) -> Manifest:
    """Write the sample table and the quarantine, and return the manifest, which is not written yet.

    Every shard must be finished. Memory does not grow with the number of refused images. Raise UserError where no image of any shard
    is good; the quarantine is written then, too.
    """
    files: dict[int, ShardFile] = {}
    statistics = Statistics()
    first_bad: list[dict[str, Any]] = []

    def write_quarantine(file: BinaryIO) -> int:
        num_bad = 0
        for shard in range(plan.num_shards):
            marks = _marks(dest, shard)
            for bad in marks.quarantined:
                file.write((json.dumps(bad, ensure_ascii=False, sort_keys=True) + "\n").encode())
            num_bad += len(marks.quarantined)
            first_bad.extend(marks.quarantined[: 3 - len(first_bad)])
            statistics.merge(Statistics.from_json(marks.statistics))
            if marks.shard:
                files[shard] = marks.shard
        return num_bad

    num_quarantined = dest.write(layout.QUARANTINE, write_quarantine)
    assert num_quarantined is not None, "what is written tells how much it was"
    dropped = read_dropped(dest)
    if not files:
        first = "; ".join(f"{bad['source']}: {bad['reason']}" for bad in first_bad)
        raise UserError(
            f"None of the {num_quarantined:,} images can be used. The first: {first}. All stand in '{dest / layout.QUARANTINE}'."
        )
    made = list(files)
    hashes = PixelHashes(dest, made)
    first_equal = hashes.first_equals if plan.settings.dedupe != "keep" else None
    sums = _Sums()

    def write(file: BinaryIO) -> None:
        schema = pa.schema([*layout.SCHEMA, *plan.extra_fields()])
        few: Any = [name for name in schema.names if name not in _ALL_DIFFERENT]  # the stub knows bool alone
        with pq.ParquetWriter(file, schema, compression="zstd", use_dictionary=few) as writer:
            for shard in made:
                rows = read_rows(dest, shard)
                start = sums.num_samples
                ids = np.arange(start, start + rows.num_rows)
                equal = np.full(len(ids), -1) if first_equal is None else first_equal[ids]
                sums.add(rows, equal)
                known = {"sample_id": pa.array(ids), "duplicate_of": pa.array(equal, mask=equal < 0)}
                known["pixels_hash"] = hashes.of(start, rows)
                columns = [known[name] if name in known else rows[name] for name in schema.names]
                writer.write_table(pa.table(columns, schema=schema))

    dest.write(layout.TABLE, write)
    settings = plan.settings
    return Manifest(
        source=settings.source,
        kind=settings.kind,
        seed=settings.seed,
        num_samples=sums.num_samples,
        num_quarantined=num_quarantined,
        num_duplicates=sums.num_duplicates + len(dropped),
        dedupe=settings.dedupe,
        samples_per_shard=settings.samples_per_shard,
        classes=plan.classes,
        channels=sorted(sums.channels),
        dtypes=sorted(sums.dtypes),
        num_masks=sums.num_masks,
        max_width=sums.max_width,
        max_height=sums.max_height,
        bytes=sum(file.bytes for file in files.values()),
        store=settings.store,
        statistics=statistics.summary(),
        shards=list(files.values()),
        options_sha256=settings.sha256(),
    )


class _Sums:
    def __init__(self):
        self.num_samples = self.num_duplicates = self.num_masks = self.max_width = self.max_height = 0
        self.channels: set[int] = set()
        self.dtypes: set[str] = set()

    def add(self, rows: pa.Table, equal: npt.NDArray[np.int64]) -> None:
        self.num_samples += rows.num_rows
        self.num_duplicates += int((equal >= 0).sum())
        self.num_masks += rows.num_rows - rows["mask_offset"].null_count
        self.channels |= set(np.unique(rows["channels"].to_numpy()).tolist())
        self.dtypes |= set(rows["dtype"].unique().to_pylist())
        self.max_width = max(self.max_width, int(rows["width"].to_numpy().max()))
        self.max_height = max(self.max_height, int(rows["height"].to_numpy().max()))


def _marks(dest: Place, shard: int) -> Marks:
    marks = read_marks(dest, shard)
    assert marks is not None, f"shard {shard} is not finished"
    return marks


def write_dropped(dest: Place, plan: Plan) -> None:
    """Note which images are left out because an earlier one has the same pixels: a table of position, source, same_as.

    Every shard must be finished, with its duplicates still in it.
    """
    made = [shard for shard in range(plan.num_shards) if _marks(dest, shard).shard]
    first = PixelHashes(dest, made).first_equals
    again = np.flatnonzero(first >= 0)
    wanted = np.union1d(again, first[again])  # the names of all the others would be most of the memory
    parts, start = [pa.table({"key": pa.array([], pa.string()), "source": pa.array([], pa.string())})], 0
    for shard in made:
        rows = read_rows(dest, shard, ["key", "source"])
        here = wanted[(wanted >= start) & (wanted < start + rows.num_rows)] - start
        parts.append(rows.take(pa.array(here)))
        start += rows.num_rows
    names = pa.concat_tables(parts)
    rows, same = (pa.array(np.searchsorted(wanted, ids)) for ids in (again, first[again]))
    table = pa.table(
        {
            "position": names["key"].take(rows).cast(pa.int64()),
            "source": names["source"].take(rows),
            "same_as": names["source"].take(same),
        }
    )
    dest.write(layout.DROPPED, lambda file: pq.write_table(table, file, compression="zstd"))


def read_dropped(dest: Place) -> npt.NDArray[np.int64]:
    """The positions left out as duplicates, ascending; none where nothing was dropped."""
    try:
        with dest.open(layout.DROPPED) as file:
            return read_columns(file, ["position"])["position"].to_numpy()
    except FileNotFoundError:
        return np.empty(0, np.int64)


def by_shard(positions: npt.NDArray[np.int64], samples_per_shard: int) -> dict[int, frozenset[int]]:
    """Positions by the shard that they lie in."""
    groups: dict[int, list[int]] = {}
    for position in positions.tolist():
        groups.setdefault(position // samples_per_shard, []).append(position)
    return {shard: frozenset(group) for shard, group in groups.items()}


def quarantine(dest: Place) -> Iterator[dict[str, Any]]:
    """The refused images of a finished conversion, one by one: source, reason, position."""
    with dest.open(layout.QUARANTINE) as file:
        for line in file:
            yield json.loads(line)
