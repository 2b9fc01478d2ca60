"""Columns of Parquet files as numpy arrays, without pandas, and hashes of their values.

Where pandas is installed, `pyarrow.parquet.read_table`, `fill_null` and `to_numpy` import it, which takes longer than reading a
million rows does.
"""

from __future__ import annotations

import json
import os
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from xxhash import xxh3_64_intdigest

_NULL = 0x6E756C6C


def read_columns(file: str | os.PathLike | IO[bytes], columns: list[str] | None = None) -> pa.Table:
    """These columns of a Parquet file, or all."""
    with pq.ParquetFile(file) as parquet:
        # Arrow's threads that read from a Python file can abort the process when it ends.
        return parquet.read(columns, use_threads=False)


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


def hash_values(column: pa.Array) -> npt.NDArray[np.uint64]:
    """A 64-bit hash of each value, (N,) uint64: XXH3 of strings, the bits of integers, XXH3 of JSON for all else.

    A value's hash does not hang on the others of the column; nulls have one of their own.
    """
    if pa.types.is_integer(column.type):
        bits = column.fill_null(0).to_numpy(zero_copy_only=False).astype(np.uint64)
        return (
            np.where(column.is_valid().to_numpy(zero_copy_only=False), bits, np.uint64(_NULL))
            if column.null_count
            else bits
        )
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        values = column.cast(pa.large_binary()).to_pylist()
    else:
        values = [
            None if value is None else json.dumps(value, default=str).encode() for value in column.to_pylist()
        ]
    hashes = (_NULL if value is None else xxh3_64_intdigest(value) for value in values)
    return np.fromiter(hashes, np.uint64, len(column))
