"""A manifest that strangers wrote: names are names, and each field is of its type."""

import json
import random
from pathlib import Path

import pytest

from fastssl.cli import main
from shards.errors import UserError
from shards.format import layout
from shards.format.checksums import read_sums
from shards.format.layout import Manifest
from shards.storage.opening import open_place
from tests.pictures import photo_shards


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return photo_shards(tmp_path, 3, 20, 16, "png")


def rewritten(folder: Path, change) -> None:
    path = folder / layout.MANIFEST
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


@pytest.mark.parametrize(
    "name",
    ["../victim/x.tar", "/etc/passwd", "shard-000000.idx", "shard-000000.tar/../x.tar", "s.tar", "", ".."],
)
def test_a_shard_is_only_a_name_of_ours(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    victim = folder.parent / "victim"
    victim.mkdir()
    (victim / "x.tar").write_bytes((folder / layout.shard_name(0)).read_bytes())
    (victim / "x.idx").write_bytes(b"mine")
    rewritten(folder, lambda fields: fields["shards"][0].update(name=name))
    with pytest.raises(UserError, match=r"manifest.json' is damaged \(a shard is called "):
        Manifest.load(folder)
    main(["verify", str(folder), "--repair"])
    assert (victim / "x.idx").read_bytes() == b"mine"
    assert sorted(path.name for path in victim.iterdir()) == ["x.idx", "x.tar"]


def test_checksums_name_files_of_the_folder_only(folder: Path) -> None:
    (folder.parent / "secret").write_bytes(b"x")
    sums = folder / layout.SUMS
    whole = read_sums(open_place(folder))
    assert whole is not None
    assert whole.is_whole
    sums.write_text(f"{'0' * 64}  ../secret\n{sums.read_text()}")
    found = read_sums(open_place(folder))
    assert found is not None
    assert "../secret" not in found.by_name
    assert not found.is_whole


def test_any_field_of_another_type_is_one_sentence(folder: Path) -> None:
    """By mutation, seeded: whatever stands in the file, it is read or refused as damaged, with the field's name."""
    original, rng = (folder / layout.MANIFEST).read_text(), random.Random(0)
    odd = [None, True, -1, 1.5, 2**70, "x", "", [], [None], {}, {"a": 1}, [[1]], float("nan")]
    told: list[str] = []
    for _ in range(400):
        fields = json.loads(original)
        spot = rng.choice([fields, fields, fields["shards"][0]])
        name = rng.choice([*spot, "new"])
        if rng.random() < 0.15:
            spot.pop(name, None)
        else:
            spot[name] = rng.choice(odd)
        (folder / layout.MANIFEST).write_text(json.dumps(fields))
        try:
            Manifest.load(folder)
        except UserError as error:
            told.append(str(error))
    assert len(told) > 200
    assert all(layout.MANIFEST in text for text in told)


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "3", '"x"', "{", '{"format_version": 2}', "\ufeff{}", "[" * 100_000]
)
def test_no_manifest_at_all_is_one_sentence(text: str, folder: Path) -> None:
    (folder / layout.MANIFEST).write_text(text)
    with pytest.raises(UserError, match=r"manifest.json' (is damaged|has format version)"):
        Manifest.load(folder)
