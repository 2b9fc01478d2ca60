"""Several Parquet files as one source: what one file says is not taken for the others; names of columns with a dot."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards.conversion.convert import convert
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError
from shards.sources.parquet_images import ImageTableSource
from shards.sources.source_options import ListOptions
from tests.pictures import encoded, picture

CATS, BIRDS = ["cat", "dog"], ["bird", "cat", "dog"]


def write(
    path: Path, names: list[str] | None, labels: pa.Array, image: str = "image", **more: pa.Array
) -> None:
    """A table of one picture a label, with the names of a ClassLabel in its metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = sum(path.name.encode())
    pictures = pa.array([encoded(picture(seed + i), "PNG") for i in range(len(labels))], pa.binary())
    about: dict[str, Any] = {"info": {"features": {"label": {"_type": "ClassLabel", "names": names}}}}
    table = pa.table({image: pictures, "label": labels, **more})
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(about)} if names else {}), path)


def test_classes_of_several_files_are_joined_by_name(tmp_path: Path):
    write(tmp_path / "in" / "a.parquet", CATS, pa.array([0, 1]))
    write(tmp_path / "in" / "b.parquet", BIRDS, pa.array([0, 1, 2, -1, None]))
    source = ImageTableSource(str(tmp_path / "in"))
    manifest = convert(source, tmp_path / "out", workers=0)
    assert manifest is not None
    assert manifest.classes == ["bird", "cat", "dog"]
    opened = ShardSet.open(tmp_path / "out")
    labels = {opened.name(i): opened.labels[i] for i in range(7)}
    named = {name: manifest.classes[label] if label >= 0 else None for name, label in labels.items()}
    assert named == {
        **{"a.parquet@0": "cat", "a.parquet@1": "dog"},
        **{
            "b.parquet@0": "bird",
            "b.parquet@1": "cat",
            "b.parquet@2": "dog",
            "b.parquet@3": None,
            "b.parquet@4": None,
        },
    }


def test_names_without_numbers_and_names_as_text_go_together(tmp_path: Path):
    write(tmp_path / "in" / "a.parquet", CATS, pa.array([0, 1]))
    write(tmp_path / "in" / "b.parquet", None, pa.array(["cat", "fox"]))
    rows = [row for batch in ImageTableSource(str(tmp_path / "in")).entries() for row in batch.to_pylist()]
    assert [row["label"] for row in rows] == ["cat", "dog", "cat", "fox"]


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        (
            (CATS, [0, 1]),
            (None, [0, 1]),
            r"'.*a\.parquet' tells the names .* '.*b\.parquet' has numbers alone",
        ),
        (
            (None, [0, 1]),
            (CATS, [0, 1]),
            r"'.*b\.parquet' tells the names .* '.*a\.parquet' has numbers alone",
        ),
        (
            (BIRDS, [0]),
            (CATS, [0, 2]),
            r"b\.parquet', row 1: the label is 2, but the file names 2 classes, 0 to 1",
        ),
        ((BIRDS, [0]), (CATS, [-2]), r"b\.parquet', row 0: the label is -2"),
    ],
)
def test_labels_that_have_no_sure_name_are_refused(tmp_path: Path, one: tuple, other: tuple, words: str):
    for name, (names, labels) in (("a", one), ("b", other)):
        write(tmp_path / "in" / f"{name}.parquet", names, pa.array(labels))
    with pytest.raises(UserError, match=words):
        convert(ImageTableSource(str(tmp_path / "in")), tmp_path / "out", workers=0)


def test_a_column_of_two_types_is_refused_and_one_of_later_files_is_told(tmp_path: Path):
    write(tmp_path / "in" / "a.parquet", None, pa.array([0]), w=pa.array([1]))
    write(tmp_path / "in" / "b.parquet", None, pa.array([0]), w=pa.array([1], pa.int8()), more=pa.array([1]))
    source = ImageTableSource(str(tmp_path / "in"))
    rows = [row for batch in source.entries() for row in batch.to_pylist()]
    assert [row["w"] for row in rows] == [1, 1]
    assert source.warnings() == [
        f"columns that '{tmp_path / 'in' / 'a.parquet'}' does not have are left out: more ('b.parquet')."
    ]
    write(tmp_path / "in" / "b.parquet", None, pa.array([0]), w=pa.array(["x"]))
    with pytest.raises(
        UserError, match=r"b\.parquet': the column 'w' holds string, and in '.*a\.parquet' int64"
    ):
        list(ImageTableSource(str(tmp_path / "in")).entries())


@pytest.mark.parametrize("image", ["image.bytes", "my.image"])
@pytest.mark.parametrize("struct", [False, True])
def test_columns_may_have_a_dot_in_their_names(tmp_path: Path, image: str, struct: bool):
    data = [encoded(picture(i), "PNG") for i in range(3)]
    cells = [{"bytes": one, "path": f"{i}.png"} for i, one in enumerate(data)] if struct else data
    columns = {
        image: cells,
        "a.b": [1, 2, 3],
        "the.label": ["x", "y", "x"],
        "a": [{"b": i} for i in range(3)],
    }
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    options = ListOptions(path_column=image, label_column="the.label")
    manifest = convert(ImageTableSource(str(tmp_path / "x.parquet"), options), tmp_path / "out", workers=0)
    assert manifest is not None
    assert manifest.classes == ["x", "y"]
    opened = ShardSet.open(tmp_path / "out")
    table = pq.ParquetFile(tmp_path / "out" / "samples.parquet").read(use_threads=False)
    for i, row in enumerate(table.to_pylist()):
        number = int(row["source"].rpartition("@")[2])
        assert bytes(opened.read(i)) == data[number]
        assert row["a.b"] == number + 1
        assert row["a"] == {"b": number}
