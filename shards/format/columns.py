"""Columns of Parquet files as numpy arrays, without pandas.

Where pandas is installed, `pyarrow.parquet.read_table`, `fill_null` and `to_numpy` import it, which takes longer than reading a
million rows does.
"""

from __future__ import annotations

import os
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq


def read_columns(file: str | os.PathLike | IO[bytes], columns: list[str] | None = None) -> pa.Table:
    """These columns of a Parquet file, or all."""
    with pq.ParquetFile(file) as parquet:
        return parquet.read(columns)


def integers(column: pa.ChunkedArray, null: int = 0) -> npt.NDArray[Any]:
    """A column of integers, in its own type, (N,), with `null` where there is none."""
    dtype = np.dtype(str(column.type))
    out = np.empty(len(column), dtype)
    start = 0
    for chunk in column.chunks:
        valid, data = chunk.buffers()
        place = out[start : start + len(chunk)]
        place[:] = np.frombuffer(data, dtype, len(chunk), chunk.offset * dtype.itemsize)
        if chunk.null_count:
            bits = np.unpackbits(np.frombuffer(valid, np.uint8), bitorder="little")
            place[bits[chunk.offset : chunk.offset + len(chunk)] == 0] = null
        start += len(chunk)
    return out
