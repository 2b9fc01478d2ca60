"""Names and classes of appended images: a label, a name, a class number means one thing before and after."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from shards import ShardSet, UserError, convert, label
from shards.conversion.convert import Part
from shards.format import layout
from shards.format.label_table import LabelTable, write_labels
from shards.format.layout import Manifest
from shards.storage.opening import open_place
from tests.shards.growing import begin


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return begin(tmp_path_factory.mktemp("append"))


@pytest.fixture
def folder(begun: Path, tmp_path: Path) -> Path:
    shutil.copytree(begun / "shards", tmp_path / "shards")
    return tmp_path / "shards"


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
