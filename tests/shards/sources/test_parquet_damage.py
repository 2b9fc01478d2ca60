"""Parquet files and tars within tars with wrong bytes anywhere: what is wrong is said, and nothing else happens."""

import random
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards.conversion.listing import Survey
from shards.errors import UserError
from shards.images.pixels import BadImage
from shards.sources import parquet_images
from shards.sources.file_list import ListSource
from shards.sources.parquet_images import ImageTableSource
from shards.sources.source import Source
from shards.sources.tar import TarSource
from tests.shards.sources.test_parquet_images import hugging, jpeg
from tests.shards.sources.test_tar import write

TRIES = 200


def spoilt(data: bytes, dice: random.Random, tail_bytes: int) -> bytes:
    """The data with some bytes changed, more often among the last ones; cut short; or with a few bytes left out."""
    changed = bytearray(data)
    how = dice.random()
    if how < 0.6:
        for _ in range(dice.randint(1, 3)):
            first = len(data) - tail_bytes if dice.random() < 0.7 else 0
            changed[dice.randrange(first, len(data))] = dice.randrange(256)
    elif how < 0.8:
        del changed[dice.randrange(len(data)) :]
    else:
        at = dice.randrange(len(data))
        del changed[at : at + dice.randint(1, 9)]
    return bytes(changed)


def outcome(open_source, path: Path) -> str:
    """How reading all of a source ends, where that is a way in which it may end."""
    parquet_images._held.clear()
    try:
        source: Source = open_source(str(path))
        with Survey(source, 0) as survey:
            rows = [row for table in survey.ordered() for row in table.to_pylist()]
    except UserError:
        return "refused"
    num_bad = 0
    for row in rows:
        try:
            assert isinstance(source.read(row).data, bytes)
        except BadImage:
            num_bad += 1
    return "some bad" if num_bad else "whole"


def test_a_table_with_wrong_bytes(tmp_path: Path):
    path = hugging(tmp_path / "x.parquet", range(12), row_group_size=5)
    data, dice = path.read_bytes(), random.Random(0)
    footer = int.from_bytes(data[-8:-4], "little") + 8
    found: Counter[str] = Counter()
    for _ in range(TRIES):
        path.write_bytes(spoilt(data, dice, footer))
        found[outcome(ImageTableSource, path)] += 1
    assert found["refused"] > TRIES / 5
    assert found["some bad"] > 0


def test_tars_in_a_tar_with_wrong_bytes(tmp_path: Path):
    inner = [write(tmp_path / f"{k}.tar", [(f"{k}{i}.jpg", jpeg(i)) for i in range(3)]) for k in range(2)]
    path = write(tmp_path / "all.tar", [(file.name, file.read_bytes()) for file in inner])
    data, dice = path.read_bytes(), random.Random(0)
    found: Counter[str] = Counter()
    for _ in range(TRIES):
        path.write_bytes(spoilt(data, dice, len(data)))
        found[outcome(TarSource, path)] += 1
    assert found["some bad"] > TRIES / 10


@pytest.mark.parametrize("kind", [ImageTableSource, ListSource])
def test_text_that_is_no_utf8(tmp_path: Path, kind: type[Source]):
    text = pa.array([b"caf\xe9"]).view(pa.string())
    columns = {"image": [jpeg(0)]} if kind is ImageTableSource else {"path": ["a.jpg"]}
    pq.write_table(pa.table(columns | {"note": text}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"x\.parquet' cannot be read from row \d on \(.*UTF8"):
        list(kind(str(tmp_path / "x.parquet")).entries())  # pyright: ignore[reportCallIssue]
