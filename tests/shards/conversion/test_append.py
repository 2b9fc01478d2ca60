"""`convert(..., append=True)`: old files stay, new samples follow, and whatever kills it leaves the old set or the new one."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards import (
    Policy,
    ShardSet,
    SplitRule,
    UserError,
    convert,
    inspect,
    label,
    open_split,
    repair,
    split,
    verify,
)
from shards.commands.shard_command import run
from shards.conversion import append as appending
from shards.conversion.convert import Part
from shards.format import layout
from shards.format.layout import Manifest
from shards.sources.source_kinds import open_source
from tests.pictures import encoded, fingerprints, photo
from tests.shards.growing import images


def table(folder: Path) -> list[dict]:
    return pq.read_table(folder / layout.TABLE).to_pylist()


def pixels(path: Path) -> np.ndarray:
    from shards.images.decoding import decode

    return decode(path.read_bytes())


def test_old_samples_stay_byte_for_byte_and_new_ones_follow(begun: Path, folder: Path):
    old, rows, shards = fingerprints(folder), table(folder), ShardSet.open(folder)
    manifest = convert(begun / "second", folder, append=True)
    assert manifest is not None
    now = fingerprints(folder)
    kept = [name for name in old if name.startswith(("shard-", "plan"))]
    assert len(kept) == 2 * 3 + 1
    assert {name: now[name] for name in kept} == {name: old[name] for name in kept}
    assert table(folder)[:14] == rows
    assert manifest.identities[0] == shards.manifest.options_sha256 != manifest.options_sha256

    grown = ShardSet.open(folder)
    assert len(grown) == manifest.num_samples == 24
    assert grown.classes == ["ant", "bee", "cow"]
    assert grown.labels[:14].tolist() == shards.labels.tolist()
    for i in range(14):
        assert grown.read(i) == shards.read(i)
    # The new ones in the order that a conversion of their own would have given them.
    convert(begun / "second", begun / "alone", samples_per_shard=128)
    alone = ShardSet.open(begun / "alone")
    assert [grown.name(i) for i in range(14, 24)] == [alone.name(i) for i in range(10)]
    for i in range(14, 24):
        assert np.array_equal(grown[i].pixels(), pixels(begun / "second" / grown.name(i)))
        assert grown.classes[grown.labels[i]] == grown.name(i).partition("/")[0]
    new = table(folder)[14:]
    assert [row["sample_id"] for row in new] == list(range(14, 24))
    assert {row["shard"] for row in new} == {3}
    keys = [row["key"] for row in table(folder)]
    assert len(set(keys)) == 24
    assert (manifest.num_quarantined, manifest.num_duplicates) == (2, 1)
    quarantine = [json.loads(line) for line in (folder / layout.QUARANTINE).read_text().splitlines()]
    assert [bad["source"] for bad in quarantine] == ["ant/broken.jpg", "cow/broken.jpg"]
    assert verify(folder, level="decode").findings == []
    assert inspect(folder).class_counts().tolist() == np.bincount(grown.labels).tolist()
    assert not (folder / layout.ROWS).exists()


def test_a_repetition_is_marked_by_the_id_of_the_first_and_told(begun: Path, folder: Path, capsys):
    run([str(begun / "second"), str(folder), "--append"])
    [row] = [row for row in table(folder)[14:] if row["duplicate_of"] is not None]
    first = table(folder)[row["duplicate_of"]]
    assert (row["source"], first["source"]) == ("cow/again.jpg", "bee/004.jpg")
    assert row["pixels_hash"] == first["pixels_hash"]
    assert (
        "1 of the new images have the pixels of earlier ones, marked in the table: 'cow/again.jpg' = 'bee/004.jpg'"
        in capsys.readouterr().out
    )


def test_the_same_command_again_changes_nothing_and_mends(begun: Path, folder: Path):
    for source in ("second", "third"):
        if source == "third":
            images(begun / source, range(40, 44), "dog")
        convert(begun / source, folder, append=True)
    wanted = fingerprints(folder)
    assert Manifest.load(folder).classes == ["ant", "bee", "cow", "dog"]
    for source, append in (("third", True), ("second", True), ("first", True), ("first", False)):
        convert(begun / source, folder, append=append, samples_per_shard=5 if source == "first" else None)
        assert fingerprints(folder) == wanted
    for source, shard in (("first", 1), ("second", 3), ("third", 4)):
        (folder / layout.shard_name(shard)).unlink()
        convert(begun / source, folder, append=True)
        assert fingerprints(folder) == wanted


def test_parts_make_the_same_files(begun: Path, folder: Path, tmp_path: Path):
    images(tmp_path / "many", range(100, 300), "cow", "elk")
    shutil.copytree(folder, tmp_path / "other")
    convert(tmp_path / "many", folder, append=True)
    for index in (1, 0):
        assert convert(tmp_path / "many", tmp_path / "other", append=True, part=Part(index, 2)) is None
    assert len(ShardSet.open(tmp_path / "other")) == 14
    convert(tmp_path / "many", tmp_path / "other", append=True)
    found = fingerprints(tmp_path / "other")
    assert {n: sha for n, sha in found.items() if not n.startswith(f"{layout.LOCK}-")} == fingerprints(folder)
    assert verify(folder).findings == []


def test_a_part_that_lists_longer_keeps_what_others_have_made(begun: Path, folder: Path, tmp_path: Path):
    images(tmp_path / "many", range(100, 300), "cow", "elk")
    slow = open_source(str(tmp_path / "many"))
    entries, made = slow.entries, {}

    def after_the_other() -> Iterator[pa.RecordBatch]:
        convert(tmp_path / "many", folder, append=True, part=Part(0, 2), workers=0)
        made.update(fingerprints(folder))
        yield from entries()

    slow.entries = after_the_other
    convert(slow, folder, append=True, part=Part(1, 2), workers=0)
    new = [name for name in made if "shard-" in name and name.partition("shard-")[2][5] >= "3"]
    assert len(new) == 3
    now = fingerprints(folder)
    assert {name: now.get(name) for name in made} == made
    assert sum("shard-" in name for name in now) > sum("shard-" in name for name in made)


TWIN = photo(96, 64)


@pytest.mark.parametrize("dedupe", ["mark", "drop", "keep"])
def test_equal_pixels_are_found_in_old_and_new_files_of_other_bytes(tmp_path: Path, dedupe: str):
    old, new = tmp_path / "old", tmp_path / "new"
    jpeg = encoded(TWIN, "JPEG", quality=90)
    flat = encoded(photo(96, 64, seed=5).convert("L"), "JPEG")
    for path, data in {
        old / "a.jpg": jpeg,
        old / "other.jpg": encoded(photo(96, 64, seed=1), "JPEG"),
        new / "comment.jpg": jpeg[:2] + b"\xff\xfe\0\x06abcd" + jpeg[2:],
        new / "copy.jpg": jpeg,
        new / "flat.jpg": flat,
        new / "flat-again.jpg": flat[:2] + b"\xff\xfe\0\x06abcd" + flat[2:],
        new / "single.jpg": encoded(photo(96, 64, seed=9), "JPEG"),
    }.items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    convert(old, tmp_path / "out", dedupe=dedupe)
    manifest = convert(new, tmp_path / "out", append=True, dedupe=dedupe)
    assert manifest is not None
    rows = {row["source"]: row for row in table(tmp_path / "out")}
    name_of = {row["sample_id"]: name for name, row in rows.items()}
    if dedupe == "drop":
        assert manifest.num_duplicates == 3
        assert set(rows) in (
            {"a.jpg", "other.jpg", "single.jpg", one} for one in ("flat.jpg", "flat-again.jpg")
        )
        left = pq.read_table(tmp_path / "out" / layout.dropped_name(1)).to_pylist()
        assert {(row["source"], row["same_as"]) for row in left} >= {
            ("comment.jpg", "a.jpg"),
            ("copy.jpg", "a.jpg"),
        }
        assert verify(tmp_path / "out").findings == []
        return
    assert len({rows[name]["pixels_hash"] for name in ("a.jpg", "comment.jpg", "copy.jpg")}) == 1
    assert len({row["pixels_hash"] for row in rows.values()}) == 4
    marked = {
        name: name_of[row["duplicate_of"]] for name, row in rows.items() if row["duplicate_of"] is not None
    }
    if dedupe == "keep":
        assert marked == {}
    else:
        assert len(marked) == manifest.num_duplicates == 3
        assert (marked["comment.jpg"], marked["copy.jpg"]) == ("a.jpg", "a.jpg")


def test_images_that_are_all_inside_already_leave_the_folder_as_it_was(begun: Path, tmp_path: Path):
    convert(begun / "first", tmp_path / "out", dedupe="drop")
    before = fingerprints(tmp_path / "out")
    shutil.copytree(begun / "first" / "bee", tmp_path / "same")
    with pytest.raises(
        UserError, match=r"Nothing was appended to .*: of 7 images 7 have the pixels of others"
    ):
        convert(tmp_path / "same", tmp_path / "out", append=True, dedupe="drop")
    assert fingerprints(tmp_path / "out") == before


def test_images_that_do_not_go_with_the_others_are_refused_with_both_values(
    begun: Path, folder: Path, tmp_path: Path
):
    before = fingerprints(folder)
    for name, array in (("four", np.zeros((8, 8, 4), np.uint8)), ("deep", np.zeros((8, 8, 3), np.uint16))):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "x.npy", array)
    for source, options, message in (
        (tmp_path / "four", {}, r"was made with channels \[3\], and what is appended has \[4\]"),
        (tmp_path / "deep", {}, r"elements of \['uint8'\], and what is appended has \['uint16'\]"),
        (
            begun / "second",
            {"policy": Policy(short_side=8)},
            "made with short side 0, and what is appended has 8",
        ),
        (begun / "second", {"dedupe": "keep"}, "made with --dedupe 'mark', and what is appended has 'keep'"),
        (begun / "second", {"samples_per_shard": 4}, "--samples-per-shard is 4, but .* has 5 in a shard"),
    ):
        with pytest.raises(UserError, match=message):
            convert(source, folder, append=True, **options)
        assert fingerprints(folder) == before
    with pytest.raises(UserError, match=r"There is no folder '.*mistyped'"):
        convert(begun / "second", tmp_path / "mistyped", append=True)
    assert not (tmp_path / "mistyped").exists()


def test_a_contradiction_shows_before_the_work_and_after_it(folder: Path, tmp_path: Path, monkeypatch):
    images(tmp_path / "mostly", range(50, 56))
    np.save(tmp_path / "mostly" / "x.npy", np.zeros((8, 8, 4), np.uint8))
    before = fingerprints(folder)
    for tried in (7, 0):  # one of the first images, or found only when all shards are made
        monkeypatch.setattr(appending, "NUM_TRIED", tried)
        with pytest.raises(UserError, match=r"has \[3, 4\]" if not tried else r"has \[(4|3, 4)\]"):
            convert(tmp_path / "mostly", folder, append=True)
        assert fingerprints(folder) == before


def test_columns_are_joined_by_name_and_a_type_that_differs_is_refused(tmp_path: Path):
    images(tmp_path / "pictures", range(6))
    for name, seeds, columns in (
        ("old", range(3), {"year": [2001, 2002, 2003]}),
        ("new", range(3, 6), {"year": [2011, 2012, 2013], "place": ["x", "y", "z"]}),
        ("bad", range(3, 6), {"year": ["a", "b", "c"]}),
    ):
        paths = [f"pictures/{i:03d}.jpg" for i in seeds]
        pq.write_table(pa.table({"path": paths, **columns}), tmp_path / f"{name}.parquet")
    convert(tmp_path / "old.parquet", tmp_path / "out")
    with pytest.raises(UserError, match="a column 'year' of 'int64', and what is appended has 'string'"):
        convert(tmp_path / "bad.parquet", tmp_path / "out", append=True)
    convert(tmp_path / "new.parquet", tmp_path / "out", append=True)
    found = {row["source"]: (row["year"], row["place"]) for row in table(tmp_path / "out")}
    wanted = {
        0: (2001, None),
        1: (2002, None),
        2: (2003, None),
        3: (2011, "x"),
        4: (2012, "y"),
        5: (2013, "z"),
    }
    assert found == {f"pictures/{i:03d}.jpg": values for i, values in wanted.items()}
    assert verify(tmp_path / "out").findings == []


def test_splits_hold_the_old_samples_until_they_are_made_again(begun: Path, folder: Path):
    split(folder, SplitRule(val=0.3))
    parts = {name: open_split(folder, name).ids.tolist() for name in ("train", "val")}
    convert(begun / "second", folder, append=True)
    assert {name: open_split(folder, name).ids.tolist() for name in parts} == parts
    assert verify(folder).findings == []
    with pytest.raises(
        UserError, match="of the first 14 of its 24 samples; the others were appended and are in no split"
    ):
        split(folder, SplitRule(val=0.3))
    # Another division covers all, and leaves the first one what it was.
    split(folder, SplitRule(test=0.5), "half")
    assert len(open_split(folder, "half/train")) + len(open_split(folder, "half/test")) == 24
    assert {name: open_split(folder, name).ids.tolist() for name in parts} == parts
    split(folder, SplitRule(val=0.3), overwrite=True)
    now = [open_split(folder, name).ids.tolist() for name in ("train", "val")]
    assert sorted(now[0] + now[1]) == list(range(24))
    twins = [row["sample_id"] for row in table(folder) if row["source"] in ("cow/again.jpg", "bee/004.jpg")]
    assert any(set(twins) <= set(part) for part in now)


def test_labels_given_before_stay_and_their_classes_keep_their_numbers(
    begun: Path, folder: Path, tmp_path: Path
):
    names = [row["source"] for row in table(folder)]
    (tmp_path / "l.csv").write_text("source,label\n" + "".join(f"{name},zebra\n" for name in names[:3]))
    label(folder, tmp_path / "l.csv")
    before = ShardSet.open(folder)
    convert(begun / "second", folder, append=True)
    grown = ShardSet.open(folder)
    assert grown.classes == ["ant", "bee", "zebra", "cow"]
    assert grown.labels[:14].tolist() == before.labels.tolist()
    assert [grown.classes[i] for i in grown.labels[14:]] == [grown.name(i)[:3] for i in range(14, 24)]
    (tmp_path / "m.csv").write_text(f"source,label\n{grown.name(20)},yak\n")
    label(folder, tmp_path / "m.csv")
    again = ShardSet.open(folder)
    assert again.classes == ["ant", "bee", "zebra", "cow", "yak"]
    assert [i for i in range(24) if again.labels[i] != grown.labels[i]] == [20]
    assert verify(folder).findings == []


def test_repair_makes_shards_of_either_source_again(begun: Path, folder: Path):
    convert(begun / "second", folder, append=True)
    wanted = fingerprints(folder)
    for name in ("shard-000001.tar", "shard-000003.tar", "shard-000003.idx", "plan-001.parquet"):
        (folder / name).write_bytes(b"")
    done = repair(folder, verify(folder), begun / "second")
    assert {"shard-000003.tar", "plan-001.parquet"} <= set(done.mended)
    [failed] = done.failed
    assert failed.file == "shard-000001.tar"
    assert failed.what.startswith("is made of 'first' (folder): give that as --source")
    assert repair(folder, verify(folder), begun / "first").failed == []
    assert fingerprints(folder) == wanted
    (folder / layout.TABLE).unlink()
    done = repair(folder, verify(folder), begun / "second")
    assert [finding.what for finding in done.failed] == [
        "is made of all that the folder holds, at once: 'first', 'second'; restore it from a copy"
    ]
    with pytest.raises(UserError, match=r"samples.parquet' is missing: `fastssl verify"):
        convert(begun / "first", folder, samples_per_shard=5)
    assert (folder / layout.MANIFEST).exists()


def test_a_folder_that_grew_is_repaired_whole_from_that_folder(tmp_path: Path):
    images(tmp_path / "photos", range(6), "ant")
    convert(tmp_path / "photos", tmp_path / "out", dedupe="drop", samples_per_shard=2)
    images(tmp_path / "photos", range(6, 10), "bee")
    convert(tmp_path / "photos", tmp_path / "out", append=True, dedupe="drop")
    manifest = Manifest.load(tmp_path / "out")
    assert (manifest.num_samples, manifest.num_duplicates) == (10, 6)
    wanted = fingerprints(tmp_path / "out")
    for name in (layout.TABLE, layout.MANIFEST, "shard-000000.tar"):
        (tmp_path / "out" / name).write_bytes(b"")
        assert repair(tmp_path / "out", verify(tmp_path / "out"), tmp_path / "photos").failed == []
        assert fingerprints(tmp_path / "out") == wanted


def test_what_was_begun_is_finished_or_given_up(begun: Path, folder: Path, tmp_path: Path):
    before = fingerprints(folder)
    convert(begun / "second", folder, append=True, part=Part(0, 1))
    images(tmp_path / "other", range(60, 66), "cow")
    with pytest.raises(UserError, match=r"was appended to with .*delete 'plan-001.parquet' to give it up"):
        convert(tmp_path / "other", folder, append=True)
    [finding] = verify(folder).findings
    assert finding.harmless
    (folder / "plan-001.parquet").unlink()
    assert verify(folder).damaged
    convert(tmp_path / "other", folder, append=True)
    assert verify(folder).findings == []
    assert [row["source"][:3] for row in table(folder)[14:]] == ["cow"] * 6
    assert {
        name: sum_ for name, sum_ in fingerprints(folder).items() if name in before and name.endswith(".tar")
    } == {name: sum_ for name, sum_ in before.items() if name.endswith(".tar")}


@pytest.mark.parametrize("grown", [False, True])
def test_what_an_append_left_out_is_told_again(tmp_path: Path, grown: bool):
    old, new, out = tmp_path / "old", tmp_path / ("old" if grown else "new"), tmp_path / "out"
    images(old, range(6), "ant")
    convert(old, out, dedupe="drop", samples_per_shard=2)
    images(new, range(6, 10), "bee")
    for name in ("x", "y"):
        shutil.copy(old / "ant" / "003.jpg", new / "bee" / f"{name}.jpg")
    shutil.copy(new / "bee" / "007.jpg", new / "bee" / "z.jpg")
    convert(new, out, append=True, dedupe="drop")
    wanted, name = fingerprints(out), layout.dropped_name(1)
    pairs = {(row["source"], row["same_as"]) for row in pq.read_table(out / name).to_pylist()}
    assert len(pairs) == 3 + 6 * grown
    (out / name).write_bytes(b"")
    if not grown:
        [failed] = repair(out, verify(out), old).failed
        assert failed.file == name
        assert failed.what.startswith("is made of 'new' (folder): give that as --source")
    for damaged in ([name], [name, "shard-000003.tar"]):
        for file in damaged:
            (out / file).unlink(missing_ok=True)
        done = repair(out, verify(out), new)
        assert (done.failed, set(done.mended)) == ([], set(damaged))
        assert fingerprints(out) == wanted
    for file in (name, layout.TABLE):
        (out / file).unlink()
    failed = {finding.file: finding.what for finding in repair(out, verify(out), new).failed}
    assert set(failed) == {name, layout.TABLE}
    assert "one of them is damaged, too: restore it from a copy" in failed[name]
