"""Columns as arrays, compared with Arrow's own way, which needs pandas."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards.format.columns import integers, read_columns


@pytest.mark.parametrize("kind", [pa.int16(), pa.int32(), pa.int64(), pa.uint32()])
def test_integers_are_those_of_arrow(kind):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 30_000, 50)
    pieces = [
        pa.array(values, kind),
        pa.array(values, kind, mask=values % 3 == 0),
        pa.array([], kind),
        pa.array(values, kind, mask=values % 5 == 0).slice(11, 23),  # its bits begin inside a byte
        pa.array([None] * 4, kind),
        pa.array(values, kind).slice(7),
    ]
    for column in (pa.chunked_array(pieces), *(pa.chunked_array([piece]) for piece in pieces)):
        found = integers(column, 7)
        assert found.dtype == np.dtype(kind.to_pandas_dtype())
        assert found.tolist() == column.fill_null(7).to_pylist()
    assert integers(pa.chunked_array([], kind)).shape == (0,)


def test_large_integers_keep_every_bit():
    column = pa.chunked_array([pa.array([2**62 + 1, None, -(2**62) - 1])])
    assert integers(column, -1).tolist() == [2**62 + 1, -1, -(2**62) - 1]


def test_a_table_is_read_without_pandas(tmp_path: Path):
    table = pa.table({"a": [1, None, 3], "b": ["x", "y", "z"]})
    path = tmp_path / "t.parquet"
    pq.write_table(table, path)
    assert read_columns(path).equals(table)
    with open(path, "rb") as file:
        assert read_columns(file, ["b"]).equals(table.select(["b"]))
        assert not file.closed
    code = (
        "import sys; from shards.format.columns import integers, read_columns; "
        f"integers(read_columns({str(path)!r}, ['a'])['a'], 0); print('pandas' in sys.modules)"
    )
    root = Path(__file__).parents[3]
    assert subprocess.check_output([sys.executable, "-c", code], cwd=root, text=True) == "False\n"
