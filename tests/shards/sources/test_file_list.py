"""Lists: columns found by name, typed, kept; every mistake told with its line."""

import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from shards.conversion.convert import convert
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError
from shards.format import layout
from shards.images.pixels import BadImage
from shards.sources import source as sources
from shards.sources.file_list import ListSource
from shards.sources.source_kinds import check_apart, open_source
from shards.sources.source_options import ListOptions, SourceOptions
from shards.storage.opening import open_place
from tests import needs
from tests.pictures import encoded, fingerprints, picture


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images 0.jpg to 5.jpg, and `m/` with a mask of each."""
    root = tmp_path / "set"
    (root / "m").mkdir(parents=True)
    for i in range(6):
        (root / f"{i}.jpg").write_bytes(encoded(picture(i), "JPEG"))
        (root / "m" / f"{i}.png").write_bytes(encoded(Image.fromarray(class_map(i)), "PNG"))
    return root


def class_map(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 5, (16, 24), dtype=np.uint8)


def write(folder: Path, text: str | bytes, name: str = "list.csv") -> str:
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return str(folder / name)


def listed(source: ListSource) -> list[dict]:
    return [row for batch in source.entries() for row in batch.to_pylist()]


def samples_json(out: Path) -> dict[str, dict]:
    """Each sample's JSON, by its source."""
    found = {}
    for shard in sorted(out.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    about = json.load(tar.extractfile(member))
                    found[about["source"]] = about
    return found


FULL = """image,class,m,scene,cloud,note,fine,zip,width
0.jpg,10,m/0.png,alps,0.5,"yes, ""so""
and so",true,007,11
1.jpg,2,m/1.png,alps,,plain,false,012,
2.jpg,,,rhine,1e-3,,,100,13
"""


def test_every_column_arrives_in_table_and_json(folder: Path, tmp_path: Path):
    options = ListOptions(label_column="class", mask_column="m", group_column="scene")
    source = ListSource(write(folder, FULL), options)
    manifest = convert(source, tmp_path / "out")
    assert manifest is not None
    assert (manifest.kind, manifest.source, manifest.num_masks) == ("list", "list.csv", 2)
    assert manifest.classes == ["2", "10"]  # as numbers
    table = pq.read_table(tmp_path / "out" / layout.TABLE)
    extra = table.schema.names[len(layout.SCHEMA) :]
    assert [(name, str(table.schema.field(name).type)) for name in extra] == [
        ("cloud", "double"),
        ("note", "string"),
        ("fine", "bool"),
        ("zip", "string"),  # 007 is no number
        ("list_width", "int64"),  # the table has a width of its own
    ]
    rows = {row["source"]: row for row in table.to_pylist()}
    assert [rows[f"{i}.jpg"]["label"] for i in range(3)] == [1, 0, None]
    assert [rows[f"{i}.jpg"]["group"] for i in range(3)] == ["alps", "alps", "rhine"]
    assert [rows["0.jpg"][name] for name in extra] == [0.5, 'yes, "so"\nand so', True, "007", 11]
    assert [rows["1.jpg"][name] for name in extra] == [None, "plain", False, "012", None]
    assert [rows["2.jpg"][name] for name in extra] == [0.001, None, None, "100", 13]
    about = samples_json(tmp_path / "out")["1.jpg"]
    kept = {"fine": False, "note": "plain", "zip": "012"}
    assert about == kept | {"height": 16, "width": 24, "label": "2", "source": "1.jpg"}
    opened = ShardSet.open(tmp_path / "out")
    for i in range(3):
        mask = opened.read_mask(i)
        number = int(opened.name(i)[0])
        assert bytes(opened.read(i)) == (folder / f"{number}.jpg").read_bytes()
        if number == 2:
            assert mask is None
        else:
            assert mask is not None
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(mask))), class_map(number))


@pytest.mark.parametrize(
    ("header", "columns"),
    [
        ("path,label", {"path": "path", "label": "label"}),
        ("id,Filename,Class", {"path": "Filename", "label": "Class"}),
        ("image,path,group,mask_path", {"path": "path", "mask": "mask_path", "group": "group"}),
        ("img", {"path": "img"}),
    ],
)
def test_columns_are_found_by_their_usual_names(folder: Path, header: str, columns: dict):
    source = ListSource(write(folder, f"{header}\n"))
    assert source.settings()["columns"] == columns


def test_spaces_around_cells_do_not_count(folder: Path):
    """As around the names of columns: ' cat' is no class beside 'cat', and a cell of spaces is empty."""
    text = "image, class ,cloud\n0.jpg, cat,  7 \n 1.jpg ,cat\t,8\n2.jpg,   ,9\n"
    path = write(folder, text)
    convert(path, folder.parent / "out", workers=0)
    assert sorted(samples_json(folder.parent / "out")) == ["0.jpg", "1.jpg", "2.jpg"]
    found = ShardSet.open(folder.parent / "out")
    assert found.classes == ["cat"]
    assert sorted(found.labels) == [-1, 0, 0]
    assert sorted(about["cloud"] for about in samples_json(folder.parent / "out").values()) == [7, 8, 9]


def pair(*labels: str) -> str:
    return "path,label\n" + "".join(f"{i}.jpg,{label}\n" for i, label in enumerate(labels))


def in_parquet(folder: Path, *labels: float | None) -> str:
    table = {"path": [f"{i}.jpg" for i in range(len(labels))], "label": pa.array(labels, pa.float64())}
    pq.write_table(pa.table(table), folder / "list.parquet")
    return str(folder / "list.parquet")


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (("10.0", "2.0", "", "nan", "2"), ["2", "10"]),
        (("1e1", "-1.0", "NaN"), ["-1", "10"]),
        (("10", "9", "nan"), ["9", "10"]),
        (("cat", "nan", "1.0"), ["1.0", "cat"]),  # not all are numbers: names
        (("007", "1.5", ""), ["007", "1.5"]),
        (("nan", "NAN"), []),
        ((10.0, 2.0, None, float("nan"), 2.0), ["2", "10"]),
    ],
)
def test_whole_numbers_are_classes_and_what_is_none_is_no_label(folder: Path, labels: tuple, classes: list):
    path = write(folder, pair(*labels)) if isinstance(labels[0], str) else in_parquet(folder, *labels)
    source = ListSource(path)
    manifest = convert(source, folder.parent / "out", workers=0)
    assert manifest is not None
    assert manifest.classes == classes
    shards = ShardSet.open(folder.parent / "out")
    none = {f"{i}.jpg" for i, label in enumerate(labels) if str(label).lower() in ("", "none", "nan")}
    assert {shards.name(i) for i in range(len(shards)) if shards.labels[i] < 0} == none
    said = [f"{len(none)} of {len(labels)} images have no label."] if none else []
    assert source.describe()[1:] == said


def test_fractions_are_no_labels(folder: Path):
    for path, line, shown in (
        (write(folder, pair("1", "2.5")), "line 3", "2.5"),
        (write(folder, pair("1.0", "2", "inf"), "b.csv"), "line 4", "inf"),
        (in_parquet(folder, 1.0, None, 2.5), "row 3", "2.5"),
    ):
        with pytest.raises(
            UserError, match=f"{line}: {shown} in the column 'label' is no label; a class is a whole"
        ):
            listed(ListSource(path))
        without = listed(ListSource(path, ListOptions(label_column="none")))
        assert {row["label"] for row in without} == {None}


def test_the_search_for_columns_can_be_switched_off(folder: Path):
    options = ListOptions(label_column="none", group_column="none")
    source = ListSource(write(folder, "path,label,group\n0.jpg,a,g\n"), options)
    [row] = listed(source)
    assert (row["label"], row["group"]) == (None, None)
    assert (row["list_label"], row["list_group"]) == ("a", "g")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "\ufeffpath,label\r\n0.jpg,a\r\n\r\n1.jpg,b\r\n"),  # a byte order mark, a blank line
        ("a.csv", "path;label\n0.jpg;a\n1.jpg;b"),
        ("a.tsv", "path\tlabel\n0.jpg\ta\n1.jpg\tb\n"),
        ("a.csv", ",path,label\n0,0.jpg,a\n1,1.jpg,b\n"),  # the index that pandas writes has no name
    ],
)
def test_dialects(folder: Path, name: str, text: str):
    found = listed(ListSource(write(folder, text, name)))
    assert [(row["source"], row["label"]) for row in found] == [("0.jpg", "a"), ("1.jpg", "b")]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("path,label\n0.jpg,a\n1.jpg\n", r"list\.csv', line 3: 1 cell, but 2 columns"),
        ('path,label\n"0\n.jpg",a\n1.jpg\n', r"line 4: 1 cell,"),
        ("path,label\n0.jpg,a\n\n,b\n", r"line 4: the cell of the column 'path' is empty"),
        (b"path,label\n0.jpg,a\n1.jpg,caf\xe9\n", r"line 3: 'caf\\xe9' is not valid UTF-8"),
        (b"p\xe4th,label\n0.jpg,a\n", r"line 1: 'p\\xe4th' is not valid UTF-8"),
        ('path,label\n0.jpg,"a\n1.jpg,b\n', r"line 2: unexpected end of data; mend its quotes"),
        ('path,label\n0.jpg,"a"b\n', r"line 2: ',' expected after '\"'"),
        ("", r"is empty; its first line must hold the names"),
        (",\n", r"has no columns with a name"),
        ("path,label\n", r"a header and no rows"),
        ("path,a,a\n", r"two columns named 'a'"),
        ("path,width,list_width\n0.jpg,1,2\n", r"two columns would be named 'list_width'"),
        ("x,y\n0.jpg,1\n", r"no column named path, .*give --path-column NAME. It has: x, y\."),
        ("path,label\n0.jpg,a\n".encode("utf-16"), r"is in UTF-16; save it as UTF-8"),
        (b"PK\x03\x04rest", r"no text but an archive, a workbook"),
        (
            "path\nnone.jpg\nno.jpg\n",
            r"Not one of the 2 files .* is there, such as 'none\.jpg' \(line 2\).*--root",
        ),
        ("path\n0.jpg\nftpx://a/b.jpg\n", r"line 3: 'ftpx://a' is of no known protocol"),
    ],
)
def test_mistakes_are_told_with_their_line(folder: Path, text: str | bytes, words: str):
    with pytest.raises(UserError, match=words):
        listed(ListSource(write(folder, text)))


def test_a_column_that_is_missing_names_those_that_exist(folder: Path):
    path = write(folder, "image,class\n0.jpg,a\n")
    with pytest.raises(UserError, match=r"no column 'klass' \(--label-column\). It has: image, class\."):
        ListSource(path, ListOptions(label_column="klass"))
    with pytest.raises(UserError, match="There is no file"):
        ListSource(path + "x.csv")


def test_a_path_listed_twice_names_its_lines(folder: Path, tmp_path: Path):
    path = write(folder, "path\n0.jpg\n1.jpg\n0.jpg\n")
    with pytest.raises(UserError, match=r"'0\.jpg' is listed twice in the source, lines 2, 4: remove"):
        convert(ListSource(path), tmp_path / "out")


def test_missing_files_are_quarantined_and_told(folder: Path, tmp_path: Path):
    source = ListSource(write(folder, "path,mask\n0.jpg,\nnone.jpg,\n1.jpg,m/none.png\n"))
    manifest = convert(source, tmp_path / "out")
    assert manifest is not None
    assert (manifest.num_samples, manifest.num_quarantined) == (1, 2)
    assert source.warnings() == [
        "1 of 3 files are not there, such as 'none.jpg' (line 3); they will be quarantined."
    ]
    refused = (tmp_path / "out" / layout.QUARANTINE).read_text()
    assert "its mask 'm/none.png' cannot be read: No such file" in refused


def test_root_absolute_paths_and_urls(folder: Path, tmp_path: Path):
    needs.module("fsspec")
    open_place("memory://lists").write("4.jpg", (folder / "4.jpg").read_bytes())
    (tmp_path / "lists").mkdir()
    paths = ["0.jpg", "m/../1.jpg", f"{folder}/2.jpg", f"file://{folder}/3.jpg", "memory://lists/4.jpg"]
    path = write(tmp_path / "lists", "path\n" + "\n".join(paths) + "\n")
    source = pickle.loads(pickle.dumps(ListSource(path, ListOptions(root=str(folder)))))
    rows = listed(source)
    for i, row in enumerate(rows):
        assert row["source"] == paths[i]
        assert source.read(row).data == (folder / f"{i}.jpg").read_bytes()
    with pytest.raises(BadImage, match="there is no such file"):
        source.read(rows[4] | {"source": "memory://none/at/all.jpg"})
    nowhere = rows[2] | {"source": f"{tmp_path}/none/9.jpg", "bytes": 0}
    with pytest.raises(BadImage, match="its folder is not there"):
        source.read(nowhere)
    with pytest.raises(UserError, match="no longer there"):
        source.read(nowhere | {"bytes": 5})


def test_parquet_keeps_types_and_lists(folder: Path, tmp_path: Path):
    table = pa.table(
        {
            "image": pa.array([f"{i}.jpg" for i in range(4)]).dictionary_encode(),
            "label": pa.array([2.0, 10.0, None, 2.0]),  # whole numbers with a gap, as pandas writes them
            "tags": pa.array([["a", "b"], [], None, ["c"]]),
            "when": pa.array([0, 1, 2, None], pa.timestamp("s")),
            "score": pa.array([0.5, float("nan"), float("inf"), 2.0], pa.float32()),
            "blob": pa.array([b"x", b"y", b"z", b""]),
            "empty": pa.nulls(4),
        }
    )
    pq.write_table(table, folder / "list.parquet", row_group_size=3)
    source = ListSource(str(folder / "list.parquet"))
    manifest = convert(source, tmp_path / "out")
    assert manifest is not None
    assert manifest.classes == ["2", "10"]
    assert source.warnings() == ["columns of binary data are left out: blob."]
    found = pq.read_table(tmp_path / "out" / layout.TABLE)
    assert {n: str(found.schema.field(n).type) for n in ("tags", "when", "score", "empty")} == {
        "tags": "list<element: string>",
        "when": "timestamp[ms]",
        "score": "float",
        "empty": "string",
    }
    rows = {row["source"]: row for row in found.to_pylist()}
    assert [rows[f"{i}.jpg"]["tags"] for i in range(4)] == [["a", "b"], [], None, ["c"]]
    about = samples_json(tmp_path / "out")
    assert (about["0.jpg"]["tags"], about["0.jpg"]["when"]) == (["a", "b"], "1970-01-01 00:00:00")
    assert "score" not in about["1.jpg"]  # JSON has no NaN
    assert "score" not in about["2.jpg"]


def test_several_labels_an_image_are_kept_as_a_column(folder: Path):
    pq.write_table(pa.table({"path": ["0.jpg"], "labels": [["a", "b"]]}), folder / "list.parquet")
    source = ListSource(str(folder / "list.parquet"))
    [row] = listed(source)
    assert row["label"] is None
    assert row["labels"] == ["a", "b"]
    assert "several labels an image: kept in the sample table" in source.warnings()[0]


def test_parquet_mistakes(folder: Path):
    path = str(folder / "list.parquet")
    pq.write_table(pa.table({"image": [{"bytes": b"x", "path": "0.jpg"}]}), path)
    with pytest.raises(UserError, match=r"column 'image' holds struct.*text or numbers are wanted"):
        listed(ListSource(path))
    pq.write_table(pa.table({"path": ["0.jpg", "", "1.jpg"]}), path)
    with pytest.raises(UserError, match=r"row 2: the cell of the column 'path' is empty"):
        listed(ListSource(path))
    Path(path).write_text("path,label")
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        ListSource(path)


def test_long_lists_come_in_batches_with_the_same_rows(folder: Path, monkeypatch: pytest.MonkeyPatch):
    lines = [f"{i % 6}.jpg?{i},{i}" for i in range(19)]
    path = write(folder, "path,number\n0.jpg,1.5\n" + "\n".join(lines) + "\n")
    whole = listed(ListSource(path))
    monkeypatch.setattr(sources, "BATCH_ROWS", 4)
    source = ListSource(path)
    assert [batch.num_rows for batch in source.entries()] == [4, 4, 4, 4, 4]
    assert listed(source) == whole
    assert source.extra_schema.field("number").type == pa.float64()  # the first batch alone has a fraction


def test_workers_moves_and_interruptions_do_not_change_a_byte(folder: Path, tmp_path: Path):
    path = write(folder, "path,label,note\n" + "".join(f"{i}.jpg,{i},n{i}\n" for i in range(6)))
    convert(ListSource(path), tmp_path / "here", samples_per_shard=2, workers=0)
    (tmp_path / "moved").mkdir()
    folder.rename(tmp_path / "moved" / "set")
    moved = str(tmp_path / "moved" / "set" / "list.csv")
    convert(ListSource(moved), tmp_path / "there", samples_per_shard=2, workers=2)
    assert fingerprints(tmp_path / "here") == fingerprints(tmp_path / "there")
    before = fingerprints(tmp_path / "here")
    (tmp_path / "here" / layout.shard_name(1)).unlink()
    convert(ListSource(moved), tmp_path / "here", samples_per_shard=2)
    assert fingerprints(tmp_path / "here") == before
    with pytest.raises(UserError, match="label"):
        convert(ListSource(moved, ListOptions(label_column="none")), tmp_path / "here", samples_per_shard=2)


def test_options_that_do_not_go_with_the_source(folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"--label-column x goes with a list .* and '.*set' is none"):
        open_source(str(folder), SourceOptions(list=ListOptions(label_column="x")))
    path = write(folder, "path\n0.jpg\n")
    with pytest.raises(UserError, match="--masks goes with a folder; in a list, --mask-column"):
        open_source(path, SourceOptions(masks=str(folder / "m")))
    listed = open_source(path)
    assert listed.kind == "list"
    check_apart(listed, open_place(folder / "out"))
