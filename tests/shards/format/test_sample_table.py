"""The sample table of shards that were appended to."""

from pathlib import Path

import pyarrow.parquet as pq

from shards import convert
from shards.format import layout
from shards.format.layout import Manifest
from tests.shards.growing import begin


def test_the_table_keeps_a_row_group_for_each_shard(tmp_path: Path):
    """Readers look a shard's samples up by its group; a group of all of them would be decoded for each shard."""
    folder = begin(tmp_path) / "shards"

    def groups() -> list[list[int]]:
        parquet = pq.ParquetFile(folder / layout.TABLE)
        return [
            parquet.read_row_group(i)["shard"].unique().to_pylist() for i in range(parquet.num_row_groups)
        ]

    assert groups() == [[0], [1], [2]]
    convert(tmp_path / "second", folder, append=True)
    assert groups() == [[i] for i in range(len(Manifest.load(folder).shards))]
