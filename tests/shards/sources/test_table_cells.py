"""Cells and names of columns as people and programs write them: white space, missing values, the case of letters."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards.conversion.listing import class_order
from shards.errors import UserError, did_you_mean, nearest
from shards.sources.file_list import ListSource
from shards.sources.source_options import ListOptions
from shards.sources.tar import TarSource
from tests.shards.sources.test_tar import jpeg, write


def rows_of(folder: Path, table: str | dict[str, Any], options: ListOptions | None = None) -> list[dict]:
    for name in "abcd":
        (folder / f"{name}.jpg").write_bytes(jpeg(0))
    if isinstance(table, str):
        (folder / "list.csv").write_text(table)
    else:
        pq.write_table(pa.table(table), folder / "list.parquet")
    name = "list.csv" if isinstance(table, str) else "list.parquet"
    return [row for batch in ListSource(str(folder / name), options).entries() for row in batch.to_pylist()]


@pytest.mark.parametrize(
    "table",
    [
        "path, label ,group\na.jpg, cat,x\nb.jpg ,cat , x \nc.jpg,\tdog,nan\nd.jpg, NaN ,\n",
        {
            "path": ["a.jpg", "b.jpg", "c.jpg", "d.jpg"],
            "label": [" cat", "cat ", "\tdog", "<NA>"],
            "group": ["x", " x", "nan", None],
        },
    ],
)
def test_white_space_is_no_part_of_a_class_or_group_and_a_missing_value_is_none(
    tmp_path: Path, table: str | dict
):
    rows = rows_of(tmp_path, table)
    assert [row["source"] for row in rows] == ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]
    assert [row["label"] for row in rows] == ["cat", "cat", "dog", None]
    assert [row["group"] for row in rows] == ["x", "x", None, None]


def test_a_missing_mask_is_no_file(tmp_path: Path):
    rows = rows_of(tmp_path, "path,mask\na.jpg,nan\nb.jpg,\nc.jpg, m.png \n")
    assert [row["mask"] for row in rows] == [None, None, "m.png"]


def test_numbers_are_sorted_as_numbers(tmp_path: Path):
    rows = rows_of(tmp_path, "path,label\na.jpg,10.0\nb.jpg,2.0\nc.jpg,\n")
    assert class_order({row["label"] for row in rows} - {None}) == ["2", "10"]
    assert class_order({"10", "9", "x"}) == ["10", "9", "x"]


def test_classes_in_tars_are_read_the_same_way(tmp_path: Path):
    files = [
        *(("0.jpg", jpeg(0)), ("0.json", b'{"label": " cat "}')),
        *(("1.jpg", jpeg(1)), ("1.cls", b" 7 \n")),
        *(("2.jpg", jpeg(2)), ("2.cls", b"nan")),
        *(("3.jpg", jpeg(3)), ("3.json", b'{"label": "NaN"}'), ("3.cls", b"8")),
    ]
    source = TarSource(str(write(tmp_path / "a.tar", files)))
    assert [row["label"] for batch in source.entries() for row in batch.to_pylist()] == [
        "cat",
        "7",
        None,
        "8",
    ]


def test_a_column_in_another_case_is_pointed_to(tmp_path: Path):
    with pytest.raises(UserError, match=r"no column 'species' .* Did you mean 'Species'\?"):
        rows_of(tmp_path, "path,Species\na.jpg,cat\n", ListOptions(label_column="species"))
    assert did_you_mean("SCENE", ["scene", "other"]) == " Did you mean 'scene'?"
    assert nearest("LABLE", ["label", "Label"]) in (" Did you mean 'label'?", " Did you mean 'Label'?")
    assert did_you_mean("x", ["scene"]) == ""
