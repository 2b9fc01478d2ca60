"""Images inside of Parquet files: as Hugging Face writes them and as others do, page by page, killed and gone on with."""

import itertools
import json
import multiprocessing
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastssl.cli import main
from shards.conversion.convert import convert
from shards.conversion.shard_plan import read_plan
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError
from shards.format import layout, thrift
from shards.format.parquet_pages import Column
from shards.images.pixels import BadImage
from shards.sources import parquet_images
from shards.sources.parquet_images import ImageTableSource
from shards.sources.source_kinds import check_apart, open_source
from shards.sources.source_options import ListOptions, SourceOptions
from shards.storage.opening import open_place
from tests.pictures import encoded, fingerprints, picture
from tests.shards.conversion.test_crash import ROOT, wait_for_shards
from tests.shards.sources.test_file_list import samples_json

NAMES = ["cat", "dog", "eel"]
FEATURES = {
    "info": {"features": {"label": {"_type": "ClassLabel", "names": NAMES}, "image": {"_type": "Image"}}}
}


def jpeg(seed: int) -> bytes:
    return encoded(picture(seed), "JPEG")


def hugging(path: Path, seeds: range, **options) -> Path:
    """A file as Hugging Face writes it: a struct of bytes and path, the names of the classes in the schema's metadata."""
    columns = {
        "image": [{"bytes": jpeg(i), "path": f"{i}.jpg"} for i in seeds],
        "label": pa.array([i % 4 - 1 for i in seeds]),  # -1: none
        "note": [None if i % 5 == 0 else f"n{i}" for i in seeds],
    }
    table = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps(FEATURES)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)
    return path


def values() -> list[bytes | None]:
    dice = random.Random(0)
    found = [None if i % 17 == 5 else dice.randbytes(dice.randrange(3000)) for i in range(2100)]
    return [*found, *[b"again"] * 300]


ENCODINGS = [(True, None), (False, None), (False, "DELTA_LENGTH_BYTE_ARRAY"), (False, "DELTA_BYTE_ARRAY")]


@pytest.mark.parametrize("struct", [False, True])
@pytest.mark.parametrize("codec", ["none", "snappy", "zstd", "gzip", "brotli", "lz4"])
def test_pages_hold_what_the_column_holds(tmp_path: Path, struct: bool, codec: str):
    wanted = values()
    cells = (
        [None if v is None and i % 2 else {"bytes": v, "path": "x"} for i, v in enumerate(wanted)]
        if struct
        else wanted
    )
    table = pa.table({"n": range(len(wanted)), "image": pa.array(cells), "z": ["z"] * len(wanted)})
    path = ("image", "bytes") if struct else ("image",)
    place = open_place(tmp_path)
    for (dictionary, encoding), version in itertools.product(ENCODINGS, ("1.0", "2.0")):
        options = {"column_encoding": {".".join(path): encoding}} if encoding else {}
        pq.write_table(
            table, tmp_path / "x.parquet", compression=codec, use_dictionary=dictionary, data_page_version=version,
            row_group_size=1500, data_page_size=100_000, write_batch_size=64, **options,
        )  # fmt: skip
        data = (tmp_path / "x.parquet").read_bytes()
        column = Column(place, "x.parquet", path)
        found, num_pages = [], 0
        for page in column.pages(place, "x.parquet"):
            assert page.first == len(found)
            at, size = page.dictionary
            body = data[page.offset : page.offset + page.size]
            found += column.values(body, page.num_rows, data[at : at + size], page.codec).to_pylist()
            num_pages += 1
        assert found == wanted
        assert num_pages >= 6


def test_thrift_gives_itself_back():
    fields: thrift.Struct = {
        1: (thrift.TRUE, True),
        2: (thrift.TRUE, False),
        20: (thrift.I64, -(2**62)),
        21: (thrift.BINARY, b"x" * 300),
        40: (thrift.LIST, (thrift.I32, list(range(-40, 40)))),
        41: (thrift.LIST, (thrift.STRUCT, [{1: (thrift.DOUBLE, 0.5)}, {}])),
        300: (thrift.STRUCT, {7: (thrift.BYTE, 9), 8: (thrift.LIST, (thrift.TRUE, [True, False]))}),
    }
    data = thrift.write_struct(fields)
    assert thrift.read_struct(b"??" + data, 2) == (fields, len(data) + 2)
    for size in range(len(data)):
        with pytest.raises(thrift.Malformed):
            thrift.read_struct(data[:size])


def rows_of(folder: Path) -> dict[str, dict]:
    return {row["source"]: row for row in pq.read_table(folder / layout.TABLE).to_pylist()}


def test_a_hugging_face_table_with_its_classes_and_columns(tmp_path: Path):
    path = hugging(tmp_path / "data" / "train-0.parquet", range(20), row_group_size=7)
    source = open_source(str(path))
    manifest = convert(source, tmp_path / "out", samples_per_shard=6, workers=0)
    assert manifest is not None
    assert (manifest.kind, manifest.source, manifest.num_samples) == ("parquet", "train-0.parquet", 20)
    assert manifest.classes == NAMES
    opened = ShardSet.open(tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    for i in range(20):
        row = rows[f"train-0.parquet@{i}"]
        assert bytes(opened.read(row["sample_id"])) == jpeg(i)
        assert row["label"] == (None if i % 4 == 0 else i % 4 - 1)
        assert (row["image_path"], row["note"]) == (f"{i}.jpg", None if i % 5 == 0 else f"n{i}")
    assert samples_json(tmp_path / "out")["train-0.parquet@1"]["note"] == "n1"
    assert source.describe() == [
        "Images in 1 Parquet file. Columns: image 'image', label 'label'; kept as well: note, image_path.",
        "5 of 20 images have no label.",
    ]


def test_labels_of_numbers_are_whole(tmp_path: Path):
    table = {"image": [jpeg(i) for i in range(4)], "label": [10.0, 9.0, float("nan"), None]}
    pq.write_table(pa.table(table), tmp_path / "x.parquet")
    source = ImageTableSource(str(tmp_path / "x.parquet"))
    manifest = convert(source, tmp_path / "out", workers=0)
    assert manifest is not None
    assert manifest.classes == ["9", "10"]
    assert source.describe()[-1] == "2 of 4 images have no label."
    pq.write_table(
        pa.table(table | {"label": [1.0, 2.0, 3.0, 3.5]}), tmp_path / "x.parquet", row_group_size=2
    )
    with pytest.raises(UserError, match=r"x\.parquet', row 3: 3\.5 in the column 'label' is no label"):
        list(ImageTableSource(str(tmp_path / "x.parquet")).entries())


def test_several_files_and_a_plain_column_of_bytes_with_masks(tmp_path: Path):
    mask = encoded(picture(3, mode="L").point(lambda v: v // 64), "PNG")
    for k in range(2):
        table = {
            "jpg": [jpeg(4 * k + i) for i in range(4)],
            "mask": [mask, None] * 2,
            "label": ["a", "b", "", None],
            "other": [b"x"] * 4,
        }
        path = tmp_path / "in" / f"part-{k}.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.table(table), path)
    source = open_source(str(tmp_path / "in"))
    manifest = convert(source, tmp_path / "out", workers=0)
    assert manifest is not None
    assert (manifest.num_samples, manifest.num_masks, manifest.classes) == (8, 4, ["a", "b"])
    assert source.warnings() == ["columns of binary data are left out: other."]
    opened = ShardSet.open(tmp_path / "out")
    for name, row in rows_of(tmp_path / "out").items():
        i = 4 * int(name[5]) + int(name[-1])
        assert bytes(opened.read(row["sample_id"])) == jpeg(i)
        assert (opened.read_mask(row["sample_id"]) is not None) == (i % 2 == 0)
    one = open_source(f"{tmp_path}/in/*-1.parquet")
    check_apart(one, open_place(tmp_path / "in" / "out"))
    assert {row["path"] for batch in one.entries() for row in batch.to_pylist()} == {"part-1.parquet"}
    only = open_source(str(tmp_path / "in"), SourceOptions(list=ListOptions(path_column="other")))
    assert [only.read(row).data for batch in only.entries() for row in batch.to_pylist()] == [b"x"] * 8


def test_rows_of_a_page_stay_together_in_a_shuffled_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hugging(tmp_path / "x.parquet", range(64), row_group_size=8)
    source = ImageTableSource(str(tmp_path / "x.parquet"))
    read: list[int] = []
    values = Column.values
    monkeypatch.setattr(Column, "values", lambda *args: (read.append(1), values(*args))[1])
    parquet_images._held.clear()
    convert(source, tmp_path / "out", samples_per_shard=16, workers=0)
    assert len(read) <= 8
    plan = read_plan(open_place(tmp_path / "out"))
    order = [
        int(name.partition("@")[2]) for shard in range(4) for name in plan.rows(shard)["source"].to_pylist()
    ]
    assert sorted(order) == list(range(64))
    groups = [[row // 8 for row in order[start : start + 8]] for start in range(0, 64, 8)]
    assert all(len(set(group)) == 1 for group in groups)
    assert [group[0] for group in groups] != list(range(8))
    assert order[:8] != sorted(order[:8])


def memory_of_reading(where: str) -> int:
    """By how many bytes the memory of this process grows at most while all images of a table are read."""
    source = ImageTableSource(where)
    rows = [row for batch in source.entries() for row in batch.to_pylist()]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert sum(len(bytes(source.read(row).data)) for row in rows) == 160_000_000
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def test_memory_is_that_of_a_few_pages(tmp_path: Path):
    """20 pages of 8 MB in a row group of 160 MB."""
    path = str(tmp_path / "x.parquet")
    cells = [bytes([i]) * 100_000 for i in range(80)]
    schema = pa.schema([("image", pa.binary())])
    with pq.ParquetWriter(
        path, schema, compression="none", use_dictionary=False, write_batch_size=80
    ) as writer:
        writer.write_table(pa.table([pa.array(cells * 20)], schema=schema), row_group_size=1600)
    source = ImageTableSource(path)
    sizes = {row["window"][2] for batch in source.entries() for row in batch.to_pylist()}
    assert min(sizes) > 8_000_000
    assert max(sizes) < 8_100_000
    assert source.warnings() == []
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(memory_of_reading, path).result() < 70_000_000
    pq.write_table(
        pa.table([pa.array(cells * 20)], schema=schema), path, compression="none", use_dictionary=False
    )
    list(source.entries())
    assert source.warnings()[0].startswith("pages of the table have up to 102.4 MB, and each process needs")


def test_cells_that_hold_no_image(tmp_path: Path):
    (tmp_path / "side.jpg").write_bytes(jpeg(5))
    cells = [
        {"bytes": jpeg(1), "path": None},
        {"bytes": None, "path": "side.jpg"},  # as a data set writes it that was not embedded
        {"bytes": None, "path": str(tmp_path / "side.jpg")},
        {"bytes": None, "path": "gone.jpg"},
        {"bytes": None, "path": None},
        {"bytes": b"text", "path": None},
        None,
    ]
    pq.write_table(pa.table({"image": cells}), tmp_path / "x.parquet")
    manifest = convert(tmp_path / "x.parquet", tmp_path / "out", workers=0)
    assert manifest is not None
    assert manifest.num_samples == 3
    lines = map(json.loads, (tmp_path / "out" / layout.QUARANTINE).read_text().splitlines())
    reasons = {line["source"][-1]: line["reason"] for line in lines}
    assert reasons["4"] == reasons["6"] == "its cell is empty"
    assert "No such file" in reasons["3"]
    assert set(reasons) == set("3456")


def test_a_damaged_page_and_files_that_differ(tmp_path: Path):
    path = hugging(
        tmp_path / "in" / "a.parquet",
        range(40),
        row_group_size=10,
        write_page_checksum=True,
        use_dictionary=False,
    )
    source = ImageTableSource(str(tmp_path / "in"))
    rows = [row for batch in source.entries() for row in batch.to_pylist()]
    data = bytearray(path.read_bytes())
    at = rows[15]["window"][1]
    data[at + rows[15]["window"][2] // 2] ^= 1
    path.write_bytes(data)
    parquet_images._held.clear()
    assert source.read(rows[5]).data == jpeg(5)
    with pytest.raises(BadImage, match="its page in the table is damaged"):
        source.read(rows[15])
    path.write_bytes(data[: at + 3] + data[at + 4 :])
    with pytest.raises(UserError, match=r"a\.parquet' (is damaged|cannot be read)"):
        list(source.entries())
    hugging(path, range(9))
    pq.write_table(pa.table({"image": [jpeg(1)], "label": [1], "note": [""]}), tmp_path / "in" / "b.parquet")
    with pytest.raises(
        UserError, match=r"b\.parquet' has the column 'image' .* another form than the other files"
    ):
        list(source.entries())
    (tmp_path / "in" / "b.parquet").write_bytes(b"PAR1text" * 9)
    with pytest.raises(UserError, match=r"b\.parquet' cannot be read from row 0 on .*magic bytes"):
        list(source.entries())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--path-column", "nope"], "has no column 'nope' (--path-column). It has: image, label, note"),
        (["--path-column", "note"], "Not one of the 9 files"),
        (["--label-column", "nope"], "has no column 'nope' (--label-column)"),
        (["--masks", "m"], "--masks goes with a folder"),
        (["--root", "."], "--root . goes with a list of paths"),
        (["--label-from", "tar"], "--label-from tar goes with tars"),
    ],
)
def test_mistakes_are_told(tmp_path: Path, flags: list[str], words: str, capsys: pytest.CaptureFixture[str]):
    path = hugging(tmp_path / "x.parquet", range(1, 5))
    if "note" in flags:
        path = hugging(path, range(11, 15)) and hugging(path, range(1, 5))
        words = "Not one of the 4 files"
    assert main(["shard", str(path), str(tmp_path / "out"), *flags]) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out" / layout.PLAN).exists()


def test_splits_put_together_are_told_of(tmp_path: Path):
    for name in ("train-0", "train-1", "test-0"):
        hugging(tmp_path / "in" / f"{name}.parquet", range(2))
    pq.write_table(pa.table({"path": ["a.jpg"]}), tmp_path / "list.parquet")
    source = open_source(str(tmp_path / "in"))
    list(source.entries())
    row = next(source.entries()).to_pylist()[1]
    assert pickle.loads(pickle.dumps(source)).read(row).data == jpeg(1)
    [warning] = source.warnings()
    assert warning.startswith("files of test, train are put together. To keep them apart, convert each")
    assert open_source(str(tmp_path / "list.parquet")).kind == "list"
    with pytest.raises(
        UserError, match=r"has no column of images.*It has: path. A list of paths is read from one file"
    ):
        open_source(f"{tmp_path}/li*.parquet")


KILLED = """
import sys, time
from shards.conversion import convert
from shards.conversion import shard_maker as make
prove = make.prove
make.prove = lambda *args, **named: (time.sleep(0.02), prove(*args, **named))[1]
convert.convert(sys.argv[1], sys.argv[2], samples_per_shard=4, workers=0)
"""


def test_killed_moved_gone_on_with_and_mended_the_bytes_are_the_same(tmp_path: Path):
    for k in range(3):
        hugging(tmp_path / "in" / "data" / f"{k}.parquet", range(9 * k, 9 * k + 9), row_group_size=5)
    source = tmp_path / "in" / "data"
    convert(source, tmp_path / "wanted", samples_per_shard=4, workers=0)
    wanted = fingerprints(tmp_path / "wanted")
    (tmp_path / "program.py").write_text(KILLED)
    out = tmp_path / "out"
    command = [sys.executable, str(tmp_path / "program.py"), str(source), str(out)]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)})
    wait_for_shards(process, out, 2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / layout.MANIFEST).exists()
    moved = (tmp_path / "in").rename(tmp_path / "moved") / "data"
    convert(moved, out, samples_per_shard=4, workers=0)
    assert fingerprints(out) == wanted
    tar = out / layout.shard_name(3)
    tar.write_bytes(tar.read_bytes()[:-3000])
    (out / layout.PLAN).unlink()
    assert main(["verify", str(out), "--repair", "--source", str(moved), "--workers", "0"]) == 0
    assert fingerprints(out) == wanted


def test_from_a_store(tmp_path: Path, bucket: str):
    path = hugging(tmp_path / "in" / "a.parquet", range(8), row_group_size=3)
    open_place(bucket).write("in/a.parquet", path.read_bytes())
    for where, name in ((f"{bucket}/in", "remote"), (tmp_path / "in", "local")):
        convert(where, tmp_path / name, workers=0)
    assert fingerprints(tmp_path / "remote") == fingerprints(tmp_path / "local")
