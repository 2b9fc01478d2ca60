"""Merge finished shards: their rows become the sample table, their marks the manifest; duplicates are found on the way."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from shards.conversion.append import AppendedHashes, Base
from shards.conversion.duplicates import PixelHashes
from shards.conversion.shard_maker import Marks, read_marks, read_rows
from shards.conversion.shard_plan import Plan
from shards.errors import UserError
from shards.format import layout
from shards.format.columns import read_columns
from shards.format.layout import Manifest, ShardFile
from shards.format.sample_table import rows_of, table_groups
from shards.images.channel_statistics import Statistics, join_summaries
from shards.storage.place import Place

# no dictionary makes these smaller
_ALL_DIFFERENT = {"sample_id", "key", "offset", "source", "sha256", "pixels_hash"}


def merge(dest: Place, plan: Plan, base: Base | None = None) -> Manifest:
    """Write the sample table and the quarantine, and return the manifest, which is not written yet.

    Every shard must be finished. Memory does not grow with the number of refused images. `base`: the set that the plan's images are
    appended to; its rows and its refused images come first, unchanged. Raise UserError where no image of any shard is good (the
    quarantine of a new folder is written then, too), and where appended images do not go with the others.
    """
    files: dict[int, ShardFile] = {}
    statistics = Statistics()
    first_bad: list[dict[str, Any]] = []
    if base:
        _check_appended(base, plan)

    def write_quarantine(file: BinaryIO) -> int:
        num_bad = base.manifest.num_quarantined if base else 0
        if base:
            with dest.open(layout.QUARANTINE) as old:
                file.writelines(itertools.islice(old, num_bad))
        for shard in plan.shards:
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
    dropped = read_dropped(dest, plan.number)
    if not files:
        first = "; ".join(f"{bad['source']}: {bad['reason']}" for bad in first_bad)
        raise UserError(
            f"None of the {num_quarantined:,} images can be used. The first: {first}. All stand in '{dest / layout.QUARANTINE}'."
        )
    made = list(files)
    hashes = AppendedHashes(base, made) if base else PixelHashes(dest, made)
    first_equal = hashes.first_equals if plan.settings.dedupe != "keep" else None
    sums = _Sums(base.manifest if base else None)
    begin = sums.num_samples

    def write(file: BinaryIO) -> None:
        known = base.schema() if base else layout.SCHEMA
        schema = pa.schema(
            [*known, *(column for column in plan.extra_fields() if column.name not in known.names)]
        )
        few: Any = [name for name in schema.names if name not in _ALL_DIFFERENT]  # the stub knows bool alone
        with pq.ParquetWriter(file, schema, compression="zstd", use_dictionary=few) as writer:
            for rows in table_groups(base.place, base.manifest) if base else ():
                writer.write_table(_fitted(rows, schema, {}))
            for shard in made:
                rows = read_rows(dest, shard)
                start = sums.num_samples
                ids = np.arange(start, start + rows.num_rows)
                equal = np.full(len(ids), -1) if first_equal is None else first_equal[ids - begin]
                sums.add(rows, equal)
                known = {"sample_id": pa.array(ids), "duplicate_of": pa.array(equal, mask=equal < 0)}
                known["pixels_hash"] = hashes.of(start, rows)
                writer.write_table(_fitted(rows, schema, known))

    dest.write(layout.TABLE, write)
    settings = plan.settings
    made_here = Manifest(
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
    if not base:
        return made_here
    before = base.manifest
    new = sums.num_samples - begin
    return replace(
        made_here,
        source=before.source,
        kind=before.kind,
        dedupe=before.dedupe,
        seed=before.seed,
        samples_per_shard=before.samples_per_shard,
        bytes=before.bytes + made_here.bytes,
        statistics=join_summaries([(before.statistics, begin), (made_here.statistics, new)]),
        shards=[*before.shards, *made_here.shards],
        appended=[*before.appended, base.entry(plan)],
    )


def _fitted(rows: pa.Table, schema: pa.Schema, known: dict[str, pa.Array]) -> pa.Table:
    """The columns of a schema, in its order: those `known`, those of the rows, and nulls."""
    columns = dict(zip(rows.column_names, rows.columns, strict=True)) | known
    arrays = [columns.get(column.name, pa.nulls(rows.num_rows, column.type)) for column in schema]
    return pa.table(arrays, schema=schema)


def _check_appended(base: Base, plan: Plan) -> None:
    """Give an append up, with a UserError, that adds no image or adds images which do not go with the others."""
    dest, bad, kinds, made = base.place, [], [], []
    for shard in plan.shards:
        marks = _marks(dest, shard)
        bad += marks.quarantined[: 3 - len(bad)]
        if marks.shard:
            kinds.append(read_rows(dest, shard, ["channels", "dtype"]))
            made.append(shard)
    try:
        if not kinds:
            dropped = len(read_dropped(dest, plan.number))
            first = "".join(f" {one['source']}: {one['reason']}." for one in bad)
            raise UserError(
                f"Nothing was appended to '{dest.url}': of {plan.settings.num_images:,} images {dropped:,} have the pixels of others, "
                f"and the rest cannot be used.{first}"
            )
        found = pa.concat_tables(kinds)
        base.check_kinds(set(found["channels"].to_pylist()), set(found["dtype"].to_pylist()))
        sources = (read_rows(dest, shard, ["source"])["source"].combine_chunks() for shard in made)
        base.check_names(sources, plan.settings.source)
    except UserError:
        base.give_up(plan)
        raise


class _Sums:
    def __init__(self, before: Manifest | None):
        self.num_samples = before.num_samples if before else 0
        self.num_duplicates = before.num_duplicates if before else 0
        self.num_masks = before.num_masks if before else 0
        self.max_width = before.max_width if before else 0
        self.max_height = before.max_height if before else 0
        self.channels = set(before.channels if before else ())
        self.dtypes = set(before.dtypes if before else ())

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


def write_dropped(dest: Place, plan: Plan, base: Base | None = None) -> None:
    """Note which images are left out because an earlier one has the same pixels: a table of position, source, same_as.

    Every shard must be finished, with its duplicates still in it. `base`: the set that they are appended to.
    """
    made = [shard for shard in plan.shards if _marks(dest, shard).shard]
    start = base.manifest.num_samples if base else 0
    first = np.full(0, -1)
    if made:
        first = (AppendedHashes(base, made) if base else PixelHashes(dest, made)).first_equals
    again = start + np.flatnonzero(first >= 0)
    same_as = first[again - start]
    wanted = np.union1d(again, same_as)  # the names of all the others would be most of the memory
    parts = [pa.table({"key": pa.array([], pa.string()), "source": pa.array([], pa.string())})]
    if base:
        old = rows_of(base.place, base.manifest, set(wanted[wanted < start].tolist()), ["key", "source"])
        parts += [pa.Table.from_pylist([old[i] for i in sorted(old)], schema=parts[0].schema)]
    for shard in made:
        rows = read_rows(dest, shard, ["key", "source"])
        here = wanted[(wanted >= start) & (wanted < start + rows.num_rows)] - start
        parts.append(rows.take(pa.array(here)))
        start += rows.num_rows
    names = pa.concat_tables(parts)
    rows, same = (pa.array(np.searchsorted(wanted, ids)) for ids in (again, same_as))
    table = pa.table(
        {
            "position": names["key"].take(rows).cast(pa.int64()),
            "source": names["source"].take(rows),
            "same_as": names["source"].take(same),
        }
    )
    dest.write(layout.dropped_name(plan.number), lambda file: pq.write_table(table, file, compression="zstd"))


def read_dropped(dest: Place, number: int = 0) -> npt.NDArray[np.int64]:
    """The positions of plan `number` that were left out as duplicates, ascending; none where nothing was dropped."""
    try:
        with dest.open(layout.dropped_name(number)) as file:
            return read_columns(file, ["position"])["position"].to_numpy()
    except FileNotFoundError:
        return np.empty(0, np.int64)


def dropped_by_shard(dest: Place, plan: Plan) -> dict[int, frozenset[int]]:
    """The positions of a plan that were left out as duplicates, by the shard that they lie in."""
    groups: dict[int, list[int]] = {}
    for position in read_dropped(dest, plan.number).tolist():
        groups.setdefault(position // plan.settings.samples_per_shard, []).append(position)
    return {shard: frozenset(group) for shard, group in groups.items()}


def quarantine(dest: Place) -> Iterator[dict[str, Any]]:
    """The refused images of a finished conversion, one by one: source, reason, position."""
    with dest.open(layout.QUARANTINE) as file:
        for line in file:
            yield json.loads(line)
