"""The rows of `samples.parquet` that the manifest counts: while images are appended, the table may hold those to come already."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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


def rows_in_use(table: pa.Table, place: Place, manifest: Manifest) -> pa.Table:
    """The rows of a table that was read whole. Raise UserError where their number is not the manifest's."""
    if table.num_rows > manifest.num_samples and layout.is_appending(place, manifest):
        return table.slice(0, manifest.num_samples)
    if table.num_rows != manifest.num_samples:
        raise UserError(
            f"'{place / layout.TABLE}' has {table.num_rows} samples, the manifest {manifest.num_samples}; the files are of different "
            "conversions: convert to a new folder."
        )
    return table
