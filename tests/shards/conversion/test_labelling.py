"""`label`: from a table onto finished shards; the right sample gets the right class, and nothing else changes."""

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards import ShardSet, SplitRule, UserError, convert, inspect, label, open_split, repair, split, verify
from shards.commands.label_command import run
from shards.format import layout
from shards.format.columns import read_columns
from shards.sources.shard_folder import ShardFolderSource
from tests.pictures import fingerprints

ROOT = Path(__file__).parents[3]


@pytest.fixture
def folder(make_folder, tmp_path: Path) -> Path:
    convert(make_folder(12), tmp_path / "shards", samples_per_shard=5)
    return tmp_path / "shards"


@pytest.fixture
def bare(make_folder, tmp_path: Path) -> Path:
    """Shards without labels."""
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in make_folder(12).rglob("*.*"):
        path.rename(flat / path.name)
    convert(flat, tmp_path / "bare", samples_per_shard=5)
    return tmp_path / "bare"


def write(path: Path, header: str, *rows: tuple) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header.split(","), *rows])
    return path


def column(folder: Path, name: str) -> list:
    return read_columns(folder / layout.TABLE)[name].to_pylist()


def named(shards: ShardSet) -> dict[str, str | None]:
    return {
        shards.name(i): shards.classes[shards.labels[i]] if shards.labels[i] >= 0 else None
        for i in range(len(shards))
    }


def test_labels_by_source_reach_every_reader_and_no_tar_changes(bare: Path, tmp_path: Path):
    before = fingerprints(bare)
    sources = column(bare, "source")
    wanted = {name: "odd" if int(name[:4]) % 2 else "even" for name in sources}
    table = write(tmp_path / "labels.csv", "source,label", *wanted.items())
    done = label(bare, table)
    assert (done.labelled, done.changed, done.new_classes) == (12, 12, ["even", "odd"])
    assert (done.unknown, done.without, done.repeated, done.empty) == (0, 0, 0, 0)
    after = fingerprints(bare)
    assert set(after) - set(before) == {layout.LABELS}
    assert {name: after[name] for name in before} == before

    assert named(ShardSet.open(bare)) == wanted
    overview = inspect(bare)
    assert overview.manifest.classes == ["even", "odd"]
    assert overview.class_counts().tolist() == [6, 6]
    split(bare, SplitRule(val=1 / 3, stratify="label", labelled=(0.5,)))
    val = open_split(bare, "val")
    assert np.bincount(val.labels[val.ids]).tolist() == [2, 2]
    half = open_split(bare, "labelled-0.5")
    assert np.bincount(half.labels[half.ids]).tolist() == [2, 2]
    convert(ShardFolderSource(str(bare)), tmp_path / "again")
    assert named(ShardSet.open(tmp_path / "again")) == wanted


def test_known_classes_keep_their_numbers_and_unnamed_samples_their_labels(folder: Path, tmp_path: Path):
    keys, sources = column(folder, "key"), column(folder, "source")
    old = dict(zip(sources, named(ShardSet.open(folder)).values(), strict=True))
    changed = {sources[2]: "zebra", sources[3]: "aardvark", sources[4]: "bee"}
    table = write(tmp_path / "l.tsv", "key,class", *[(keys[sources.index(s)], c) for s, c in changed.items()])
    # A comma separates nothing in a TSV, so the file is written anew with tabs.
    table.write_text(table.read_text().replace(",", "\t"))
    done = label(folder, table)
    assert done.new_classes == ["aardvark", "zebra"]
    shards = ShardSet.open(folder)
    assert shards.classes == ["ant", "bee", "cat", "aardvark", "zebra"]
    assert named(shards) == old | changed
    # Given once more, other samples: what was given before stays.
    label(folder, write(tmp_path / "m.csv", "source,label", (sources[0], "cat")))
    assert named(ShardSet.open(folder)) == old | changed | {sources[0]: "cat"}
    assert ShardSet.open(folder).classes == shards.classes


def test_keys_may_be_numbers_and_sources_file_names(bare: Path, tmp_path: Path):
    keys = [int(key) for key in column(bare, "key")]
    pq.write_table(pa.table({"key": keys, "y": [key % 3 for key in keys]}), tmp_path / "numbers.parquet")
    done = label(bare, tmp_path / "numbers.parquet", label_column="y")
    assert (done.labelled, done.new_classes) == (12, ["0", "1", "2"])
    assert ShardSet.open(bare).labels.tolist() == [key % 3 for key in keys]


def test_numbers_with_a_point_are_whole_classes_and_nan_is_none(bare: Path, tmp_path: Path, capsys):
    """As pandas writes a column of integers that has gaps."""
    keys = [f"{int(key)}.0" for key in column(bare, "key")]
    table = write(tmp_path / "l.csv", "key,label", *zip(keys, ("10.0", " 9.0", "", "nan", "9"), strict=False))
    run([str(bare), str(table)])
    assert "Rows without a label (an empty cell or NaN): 2; their samples keep" in capsys.readouterr().out
    assert ShardSet.open(bare).classes == ["9", "10"]
    assert ShardSet.open(bare).labels[:5].tolist() == [1, 0, -1, -1, 0]
    before = (bare / layout.LABELS).read_bytes()
    for table in (
        write(tmp_path / "f.csv", "key,label", ("0", "1"), ("1", "0.5")),
        tmp_path / "f.parquet",
    ):
        pq.write_table(pa.table({"key": [0, 1], "label": [1.0, 0.5]}), tmp_path / "f.parquet")
        with pytest.raises(
            UserError, match=r"(line 3|row 2): 0\.5 in the column 'label' is no label; a class is a whole"
        ):
            label(bare, table)
    assert (bare / layout.LABELS).read_bytes() == before
    label(bare, write(tmp_path / "t.csv", "key,label", ("0", "1.0"), ("1", "cat"), ("2", "nan")))
    assert ShardSet.open(bare).classes == ["9", "10", "1.0", "cat"]


def test_file_names_alone_mean_a_sample_where_they_are_unique(folder: Path, tmp_path: Path):
    sources = column(folder, "source")
    rows = [(name.rpartition("/")[2], "x") for name in sources[:2]]
    assert label(folder, write(tmp_path / "l.csv", "file,label", *rows)).labelled == 2
    assert [named(ShardSet.open(folder))[name] for name in sources[:2]] == ["x", "x"]
    # By its whole name and by its last part, with two labels.
    both = write(tmp_path / "b.csv", "file,label", (sources[0], "x"), (rows[0][0], "y"))
    with pytest.raises(UserError, match=r"has the label 'x' in line 2 and 'y' in line 3"):
        label(folder, both)


def test_a_file_name_of_several_samples_is_refused(make_folder, tmp_path: Path):
    photos = make_folder(6)
    (photos / "bee" / "0000.jpg").write_bytes((photos / "bee" / "0001.jpg").read_bytes())
    convert(photos, tmp_path / "out")
    with pytest.raises(UserError, match=r"line 2: '0000.jpg' means 2 samples, which differ in their folders"):
        label(tmp_path / "out", write(tmp_path / "l.csv", "path,label", ("0000.jpg", "x")))
    assert not (tmp_path / "out" / layout.LABELS).exists()


def test_what_does_not_fit_is_counted_and_named(bare: Path, tmp_path: Path, capsys):
    sources = column(bare, "source")
    rows = [(sources[0], "a"), (sources[0], "a"), (sources[1], ""), ("gone.jpg", "b"), ("away.jpg", "a")]
    table = write(tmp_path / "l.csv", "source,label", *rows)
    done = label(bare, table, dry_run=True)
    assert (done.labelled, done.repeated, done.empty, done.unknown, done.without) == (1, 1, 1, 2, 11)
    assert done.unknown_names == ["gone.jpg", "away.jpg"]
    assert done.new_classes == ["a"]  # no sample is b
    assert done.without_names == sources[1:4]
    assert not (bare / layout.LABELS).exists()
    run([str(bare), str(table)])
    told = capsys.readouterr().out
    assert "1 sample of" in told
    assert "Names that are no sample's: 2, 'gone.jpg', 'away.jpg'." in told
    assert f"Samples without a label: 11, '{sources[1]}', '{sources[2]}', '{sources[3]}' ..." in told
    assert (bare / layout.LABELS).exists()


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        ("source,label", [("0000.jpg", "a"), ("0001.jpg", "b"), ("0000.jpg", "c")],
         "'0000.jpg' has the label 'a' in line 2 and 'c' in line 4: remove one of the two"),
        ("source,label", [("x.jpg", "a")], "Not one of the 1 names in .* is a sample's source, such as 'x.jpg'"),
        ("name,label", [("0000.jpg", "a")], "no column named key, source, path or the like.*It has: name, label"),
        ("source,tag", [("0000.jpg", "a")], "no column named label.*give --label-column NAME. It has: source, tag"),
        ("source,label", [("0000.jpg", "")], "gives no labels: 1 rows, all of them without one"),
        ("source,label", [("", "a")], "line 2: the cell of the column 'source' is empty"),
    ],
)  # fmt: skip
def test_refused_tables_change_nothing(bare: Path, tmp_path: Path, header: str, rows: list, message: str):
    with pytest.raises(UserError, match=message):
        label(bare, write(tmp_path / "l.csv", header, *rows))
    assert not (bare / layout.LABELS).exists()


def test_a_row_whose_key_and_source_are_two_samples_is_refused(make_folder, tmp_path: Path):
    photos = make_folder(12)
    # A whole name that is the last part of another.
    (photos / "0000.jpg").write_bytes(next(photos.glob("*/0001.*")).read_bytes())
    convert(photos, tmp_path / "out", samples_per_shard=5)
    out = tmp_path / "out"
    keys, sources = column(out, "key"), column(out, "source")
    by_source = dict(zip(sources, keys, strict=True))
    last = sources[3].rpartition("/")[2]
    # Right: the whole source, the last part of it, none, and one that no sample has.
    right = [
        (keys[2], sources[2], "a"),
        (keys[3], last, "b"),
        (keys[4], "", "c"),
        (keys[5], "moved.jpg", "d"),
    ]
    assert label(out, write(tmp_path / "r.csv", "key,source,label", *right)).labelled == 4
    before = (out / layout.LABELS).read_bytes()
    elsewhere = sources[4].rpartition("/")[2]
    [twin] = [name for name in sources if name.endswith("/0000.jpg")]
    for rows, line, key, source, meant, more in (
        ([(keys[1], sources[0], "x")], 6, keys[1], sources[0], keys[0], ""),
        ([(keys[1], elsewhere, "x")], 6, keys[1], elsewhere, keys[4], ""),
        # A whole name before the last part of another; a row that repeats the label of an earlier one.
        ([(by_source[twin], "0000.jpg", "x")], 6, by_source[twin], "0000.jpg", by_source["0000.jpg"], ""),
        ([(keys[2], sources[1], "a"), (keys[1], sources[0], "x")], 6, keys[2], sources[1], keys[1], " So it is in 2 rows."),
    ):  # fmt: skip
        table = write(tmp_path / "l.csv", "key,path,label", *right, *rows)
        with pytest.raises(UserError) as told:
            label(out, table)
        assert str(told.value) == (
            f"'{table}', line {line}: the key '{key}' is the sample '{sources[keys.index(key)]}', and the path '{source}' is that of "
            f"the sample '{meant}'.{more} Mend the table, or choose the column that counts: --key-column key or --source-column path. "
            "Nothing was changed."
        )
    assert (out / layout.LABELS).read_bytes() == before
    assert label(out, table, key_column="key").labelled == 5
    assert label(
        out, write(tmp_path / "s.csv", "key,path,label", (keys[1], sources[0], "x")), source_column="path"
    )
    assert named(ShardSet.open(out))[sources[0]] == "x"


def test_verify_calls_it_no_damage_and_repair_keeps_the_labels(folder: Path, tmp_path: Path):
    sources = column(folder, "source")
    label(folder, write(tmp_path / "l.csv", "source,label", *[(name, "all") for name in sources]))
    assert verify(folder).findings == []
    wanted = named(ShardSet.open(folder))
    (folder / layout.TABLE).unlink()
    (folder / "shard-000001.tar").write_bytes(b"")
    assert repair(folder, verify(folder), tmp_path / "photos").failed == []
    assert verify(folder).findings == []
    assert named(ShardSet.open(folder)) == wanted


def test_a_damaged_table_of_labels_is_named_and_not_used(folder: Path, tmp_path: Path):
    label(folder, write(tmp_path / "l.csv", "source,label", (column(folder, "source")[0], "x")))
    data = bytearray((folder / layout.LABELS).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / layout.LABELS).write_bytes(bytes(data))
    [finding] = verify(folder).findings
    assert finding.file == layout.LABELS
    assert "Delete it and run `fastssl label` again" in finding.what
    for read in (ShardSet.open, inspect):
        with pytest.raises(UserError, match=r"labels.parquet' is damaged.*fastssl label"):
            read(folder)
    [failed] = repair(folder, verify(folder), tmp_path / "photos").failed
    assert failed.file == layout.LABELS


# Killed at the K-th system call that makes a file last: before and after the flush and the rename.
KILLED = """
import os, signal, sys
from shards import label
left = int(sys.argv[3])
def stepping(function):
    def run(*args):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)
    return run
os.fsync, os.replace = stepping(os.fsync), stepping(os.replace)
label(sys.argv[1], sys.argv[2])
"""


@pytest.mark.parametrize(("kill_at", "is_new"), [(1, False), (2, False), (3, True)])
def test_killed_at_any_moment_the_old_or_the_new_labels_are_there(
    folder: Path, tmp_path: Path, kill_at: int, is_new: bool
):
    sources = column(folder, "source")
    label(folder, write(tmp_path / "old.csv", "source,label", *[(name, "old") for name in sources]))
    new = write(tmp_path / "new.csv", "source,label", *[(name, "new") for name in sources])
    words = [sys.executable, "-c", KILLED, str(folder), str(new), str(kill_at)]
    done = subprocess.run(words, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert set(named(ShardSet.open(folder)).values()) == ({"new"} if is_new else {"old"})
    assert not verify(folder).damaged
    label(folder, new)
    assert set(named(ShardSet.open(folder)).values()) == {"new"}
