"""The rows of `samples.parquet` that the manifest counts: the table may hold those of an append that was not finished, too."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shards.errors import UserError
from shards.format import layout
from shards.format.layout import Manifest
from shards.storage.place import Place

BATCH_ROWS = 1 << 16


def table_batches(
    place: Place, manifest: Manifest, columns: Sequence[str] | None = None, rows: int = BATCH_ROWS
) -> Iterator[pa.RecordBatch]:
    """These columns of the rows, or all, in batches."""
    left = manifest.num_samples
    with place.open(layout.TABLE) as file, pq.ParquetFile(file) as parquet:
        for batch in parquet.iter_batches(rows, columns=columns, use_threads=False):
            yield batch.slice(0, left)
            left -= batch.num_rows
            if left <= 0:
                return


def table_groups(place: Place, manifest: Manifest) -> Iterator[pa.Table]:
    """All columns of the rows, a row group at a time: the samples of one shard, which readers look up together."""
    left = manifest.num_samples
    with place.open(layout.TABLE) as file, pq.ParquetFile(file) as parquet:
        for group in range(parquet.num_row_groups):
            rows = parquet.read_row_group(group, use_threads=False).slice(0, left)
            left -= rows.num_rows
            if rows.num_rows:
                yield rows


def rows_of(place: Place, manifest: Manifest, ids: set[int], columns: list[str]) -> dict[int, dict[str, Any]]:
    """Some rows, by their sample ids."""
    found: dict[int, dict[str, Any]] = {}
    wanted = np.array(sorted(ids), np.int64)
    for batch in table_batches(place, manifest, ["sample_id", *columns]) if ids else ():
        inside = np.isin(batch["sample_id"].to_numpy(), wanted)
        found |= {row["sample_id"]: row for row in batch.filter(pa.array(inside)).to_pylist()}
    return found


def given_columns(place: Place, manifest: Manifest) -> dict[str, str]:
    """Columns of the lists that the images came from whose values stand under another name: theirs -> that of the sample table."""
    found: dict[str, str] = {}
    for number in range(len(manifest.identities)):
        try:
            with place.open(layout.plan_name(number)) as file:
                settings = json.loads((pq.read_schema(file).metadata or {}).get(b"settings", b"{}"))
        except FileNotFoundError:
            continue
        columns = settings.get("source_settings", {}).get("columns", {})
        for role, own in (("path", "source"), ("label", "label"), ("group", "group")):
            if role in columns:
                found.setdefault(columns[role], own)
    return found


def rows_in_use(table: pa.Table, place: Place, manifest: Manifest) -> pa.Table:
    """The rows of a table that was read whole, `shard` among its columns. Raise UserError where they are not the manifest's."""
    if _ends_with_appended(table["shard"], manifest):
        return table.slice(0, manifest.num_samples)
    if table.num_rows != manifest.num_samples:
        raise UserError(
            f"'{place / layout.TABLE}' has {table.num_rows} samples, the manifest {manifest.num_samples}; the files are of different "
            "conversions: convert to a new folder."
        )
    return table


def is_given_up(place: Place, manifest: Manifest) -> bool:
    """Whether an append that was begun has left shards, or rows in the table, and its plan was deleted."""
    last = layout.shard_number(manifest.shards[-1].name)
    if layout.is_appending(place, manifest):
        return False
    if any(
        layout.shard_number(name) > last for name in place.names(layout.ROWS) if name.startswith("shard-")
    ):
        return True
    try:
        with place.open(layout.TABLE) as file, pq.ParquetFile(file) as parquet:
            return parquet.metadata.num_rows > manifest.num_samples and _ends_with_appended(
                parquet.read(["shard"], use_threads=False)["shard"], manifest
            )
    except Exception:  # a damaged table raises many kinds, and verify tells of them
        return False


def _ends_with_appended(shards: pa.ChunkedArray, manifest: Manifest) -> bool:
    """Whether the rows that the manifest does not count are exactly those of later shards; `shards`: of all rows."""
    num, last = manifest.num_samples, layout.shard_number(manifest.shards[-1].name)
    return len(shards) > num and shards[num - 1].as_py() <= last < shards[num].as_py()
