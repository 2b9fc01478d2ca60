"""Names and classes of appended images: a label, a name, a class number means one thing before and after."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from shards import ShardSet, UserError, convert, label, repair, verify
from shards.conversion.append import Base
from shards.conversion.convert import Part
from shards.format import layout
from shards.format.label_table import LabelTable, write_labels
from shards.format.layout import Manifest
from shards.storage.opening import open_place
from tests.pictures import fingerprints
from tests.shards.growing import images


def test_while_an_append_is_unfinished_no_labels_are_given(begun: Path, folder: Path, tmp_path: Path):
    """Its plan has numbered its classes: a new one would have got the number of `cow`."""
    table = tmp_path / "l.csv"
    table.write_text("source,label\nant/001.jpg,zebra\n")
    convert(begun / "second", folder, append=True, part=Part(0, 1))
    for dry_run in (True, False):
        with pytest.raises(
            UserError, match=r"An append to .* --append` again .* or delete '.*plan-001.parquet'"
        ):
            label(folder, table, dry_run=dry_run)
    convert(begun / "second", folder, append=True)
    label(folder, table)
    shards = ShardSet.open(folder)
    assert shards.classes == ["ant", "bee", "cow", "zebra"]
    wanted = {"ant/001.jpg": "zebra"}
    for i in range(24):
        assert shards.classes[shards.labels[i]] == wanted.get(shards.name(i), shards.name(i)[:3])


def test_classes_that_contradict_each_other_are_refused(begun: Path, folder: Path):
    convert(begun / "second", folder, append=True, part=Part(0, 1))
    before = Manifest.load(folder)
    given = LabelTable(["ant", "bee", "zebra"], np.full(14, 2))
    write_labels(open_place(folder), before, given)
    with pytest.raises(
        UserError, match="number 2 to the class 'zebra', the append that was begun to 'cow': delete 'plan-001"
    ):
        convert(begun / "second", folder, append=True)
    assert set(ShardSet.open(folder).labels) == {2}
    (folder / layout.LABELS).unlink()
    convert(begun / "second", folder, append=True)
    write_labels(open_place(folder), before, given)
    with pytest.raises(
        UserError,
        match=r"give the number 2 to two classes, '(zebra|cow)' and '(cow|zebra)'\. Delete it and run",
    ):
        ShardSet.open(folder)


@pytest.mark.parametrize("dedupe", ["mark", "drop", "keep"])
def test_a_name_that_is_taken_is_refused_and_the_folder_stays(tmp_path: Path, dedupe: str):
    for day in range(3):
        images(tmp_path / f"day{day}", range(10 * day, 10 * day + 4), "ant", "bee")
    names = sorted(path.relative_to(tmp_path / "day0") for path in (tmp_path / "day0").rglob("*.jpg"))
    convert(tmp_path / "day0", tmp_path / "out", dedupe=dedupe)
    convert(tmp_path / "day1", tmp_path / "out", append=True, dedupe=dedupe)
    before = fingerprints(tmp_path / "out")
    for day, path in ((0, names[2]), (1, Path("bee/011.jpg"))):
        other = tmp_path / f"other{day}"
        shutil.copytree(tmp_path / "day2", other)
        shutil.move(other / "bee" / "021.jpg", other / path)
        with pytest.raises(
            UserError, match=rf"'{path}' of 'other{day}' has the name of sample \d of '.*', from 'day{day}'"
        ):
            convert(other, tmp_path / "out", append=True, dedupe=dedupe)
        assert fingerprints(tmp_path / "out") == before
    # The way out: a list further up, in which the same images have names of their own.
    paths = sorted((tmp_path / "other0").rglob("*.jpg"))
    rows = [f"{path.relative_to(tmp_path)},{path.parent.name}\n" for path in paths]
    (tmp_path / "list.csv").write_text("path,label\n" + "".join(rows))
    convert(tmp_path / "list.csv", tmp_path / "out", append=True, dedupe=dedupe)
    shards = ShardSet.open(tmp_path / "out")
    assert len(shards) == len({shards.name(i) for i in range(len(shards))}) == 12
    convert(tmp_path / "out", tmp_path / "again")
    assert len(ShardSet.open(tmp_path / "again")) == 12


def test_a_name_of_two_samples_is_given_no_label(folder: Path, tmp_path: Path, monkeypatch):
    """A folder of an earlier version may hold them."""
    monkeypatch.setattr(Base, "check_names", lambda *_: None)
    images(tmp_path / "more", range(30, 33), "bee")
    (tmp_path / "more" / "bee" / "031.jpg").rename(tmp_path / "more" / "bee" / "002.jpg")
    convert(tmp_path / "more", folder, append=True)
    shards, table = ShardSet.open(folder), tmp_path / "l.csv"
    twins = [i for i in range(len(shards)) if shards.name(i) == "bee/002.jpg"]
    assert len(twins) == 2
    for name in ("bee/002.jpg", "002.jpg"):
        table.write_text(f"source,label\nant/001.jpg,zebra\n{name},zebra\n")
        with pytest.raises(UserError, match=rf"line 3: '{name}' means 2 samples"):
            label(folder, table)
    assert not (folder / layout.LABELS).exists()
    key = pq.read_table(folder / layout.TABLE)["key"][twins[1]].as_py()
    table.write_text(f"key,label\n{key},zebra\n")
    assert label(folder, table).labelled == 1
    shards = ShardSet.open(folder)
    assert [i for i in range(len(shards)) if shards.classes[shards.labels[i]] == "zebra"] == twins[1:]


@pytest.mark.parametrize("suffix", ["npy", "bmp"])
@pytest.mark.parametrize("dedupe", ["mark", "drop"])
def test_other_images_of_the_same_names_and_sizes_are_not_taken_for_those_inside(
    tmp_path: Path, suffix: str, dedupe: str
):
    """Of raw files the sizes tell nothing: the second folder was said to be complete, and none of it was appended."""
    rng = np.random.default_rng(0)
    for day in ("day1", "day2", "day3"):
        (tmp_path / day / "images").mkdir(parents=True)
        for i in range(20):
            path = tmp_path / day / "images" / f"{'late-' * (day == 'day3')}{i}.{suffix}"
            pixels = rng.integers(0, 255, (8, 8, 3), np.uint8)
            np.save(path, pixels) if suffix == "npy" else Image.fromarray(pixels).save(path)
    convert(tmp_path / "day1" / "images", tmp_path / "out", dedupe=dedupe, samples_per_shard=7)
    convert(tmp_path / "day3" / "images", tmp_path / "out", append=True, dedupe=dedupe)
    before = fingerprints(tmp_path / "out")
    with pytest.raises(
        UserError, match=rf"\.{suffix}' of 'images' has the name of sample \d+ of .*from 'images'"
    ):
        convert(tmp_path / "day2" / "images", tmp_path / "out", append=True, dedupe=dedupe)
    for day in ("day1", "day3"):  # these are inside
        convert(tmp_path / day / "images", tmp_path / "out", append=True, dedupe=dedupe)
    assert fingerprints(tmp_path / "out") == before


def test_a_folder_that_has_grown_gives_its_new_images_only(tmp_path: Path):
    """Also where the duplicates of the first conversion are marked; another image under a name that is taken is still refused."""
    source, out = images(tmp_path / "grown", range(6), "ant"), tmp_path / "out"
    convert(source, out, workers=0)
    images(source, range(6, 9), "ant")
    with pytest.raises(UserError, match="add --dedupe drop, which leaves it out"):
        convert(source, out, append=True, workers=0)
    assert convert(source, out, append=True, dedupe="drop", workers=0).num_samples == 9
    shards = ShardSet.open(out)
    assert sorted(shards.name(i) for i in range(9)) == sorted(
        f"ant/{path.name}" for path in (source / "ant").iterdir()
    )
    manifest = Manifest.load(out)
    assert (manifest.dedupe, manifest.appended[0].dedupe, manifest.num_duplicates) == ("mark", "drop", 6)
    before = fingerprints(out)
    (out / layout.plan_name(1)).unlink()
    repair(out, verify(out), source, workers=0)
    assert fingerprints(out) == before
    with pytest.raises(UserError, match="what is appended has 'keep'"):
        convert(source, out, append=True, dedupe="keep", workers=0)
