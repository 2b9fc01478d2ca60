"""Duplicates, parts for job arrays, and masks."""

import fcntl
import io
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from shards.conversion.convert import OnProgress, Part, convert
from shards.conversion.labelling import label
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError
from shards.format import layout
from shards.images.mask_images import MaskFolder
from shards.sources.image_folder import FolderSource
from shards.storage.opening import open_place
from tests.pictures import encoded, fingerprints, picture


@pytest.fixture
def doubled(make_folder) -> Path:
    """12 images, three of which are there twice; one of the copies is another file with the same pixels."""
    source = make_folder(12)
    for i, name in enumerate(["ant/0000.jpg", "bee/0001.jpg"]):
        shutil.copy(source / name, source / "cat" / f"copy{i}.jpg")
    pixels = Image.open(source / "cat" / "0002.png")
    (source / "cat" / "other.png").write_bytes(encoded(pixels, "PNG", compress_level=1))
    assert (source / "cat" / "other.png").read_bytes() != (source / "cat" / "0002.png").read_bytes()
    return source


def test_duplicates_are_marked_with_the_first_of_them(doubled: Path, tmp_path: Path):
    manifest = convert(doubled, tmp_path / "out", samples_per_shard=4)
    assert manifest is not None
    assert (manifest.num_samples, manifest.num_duplicates) == (15, 3)
    rows = pq.read_table(tmp_path / "out" / layout.TABLE).to_pylist()
    pairs = {
        frozenset((row["source"], rows[row["duplicate_of"]]["source"]))
        for row in rows
        if row["duplicate_of"] is not None
    }
    twins = [
        ("ant/0000.jpg", "cat/copy0.jpg"),
        ("bee/0001.jpg", "cat/copy1.jpg"),
        ("cat/0002.png", "cat/other.png"),
    ]
    assert pairs == {frozenset(twin) for twin in twins}
    assert all(row["duplicate_of"] < row["sample_id"] for row in rows if row["duplicate_of"] is not None)


def test_kept_duplicates_are_not_looked_for(doubled: Path, tmp_path: Path):
    manifest = convert(doubled, tmp_path / "out", dedupe="keep")
    assert manifest is not None
    assert (manifest.num_samples, manifest.num_duplicates) == (15, 0)
    assert pq.read_table(tmp_path / "out" / layout.TABLE)["duplicate_of"].null_count == 15


def test_dropped_duplicates_are_in_no_shard_and_can_be_made_again(doubled: Path, tmp_path: Path):
    out = tmp_path / "out"
    manifest = convert(doubled, out, samples_per_shard=4, dedupe="drop")
    assert manifest is not None
    assert (manifest.num_samples, manifest.num_duplicates) == (12, 3)
    table = pq.read_table(out / layout.TABLE)
    assert len(set(table["pixels_hash"].to_pylist())) == 12
    dropped = pq.read_table(out / layout.DROPPED).to_pylist()
    pixels = {path.name: np.asarray(Image.open(path)).tobytes() for path in doubled.rglob("*.*")}
    assert all(pixels[Path(row["source"]).name] == pixels[Path(row["same_as"]).name] for row in dropped)
    assert all(row["source"] != row["same_as"] for row in dropped)
    assert {row["source"] for row in dropped} | set(table["source"].to_pylist()) == {
        str(path.relative_to(doubled)) for path in doubled.rglob("*.*")
    }
    before = fingerprints(out)
    for file in manifest.shards:
        (out / file.name).unlink()
    convert(doubled, out, samples_per_shard=4, dedupe="drop")
    assert fingerprints(out) == before
    convert(doubled, tmp_path / "again", samples_per_shard=4, dedupe="drop", workers=2)
    assert fingerprints(tmp_path / "again") == before


def test_parts_and_a_merge_give_the_bytes_of_one_run(make_folder, tmp_path: Path):
    source = make_folder(30)
    convert(source, tmp_path / "whole", samples_per_shard=4)
    for i in (2, 0, 1):
        assert convert(source, tmp_path / "out", samples_per_shard=4, part=Part(i, 3)) is None
        assert not (tmp_path / "out" / layout.MANIFEST).exists()
    calls = []
    convert(source, tmp_path / "out", samples_per_shard=4, report=OnProgress(lambda *c: calls.append(c)))
    assert calls == []
    for lock in (tmp_path / "out").glob(f"{layout.LOCK}-*"):
        lock.unlink()
    assert fingerprints(tmp_path / "out") == fingerprints(tmp_path / "whole")


@pytest.mark.parametrize("text", ["3/3", "1", "a/2", "-1/2", "0/0", ""])
def test_impossible_parts_are_refused(text: str):
    with pytest.raises(UserError, match=r"must be I/N with 0 <= I < N"):
        Part.parse(text)


def test_masks_travel_with_their_images(tmp_path: Path):
    source, masks = tmp_path / "tiles", tmp_path / "masks"
    for folder in (source, masks):
        folder.mkdir()
    classes = {}
    for i in range(6):
        (source / f"{i}.jpg").write_bytes(encoded(picture(i, (24, 16)), "JPEG"))
        classes[f"{i}.jpg"] = np.random.default_rng(i).integers(0, 300 if i else 5, (16, 24), dtype=np.uint16)
        if i < 4:
            (masks / f"{i}_mask.png").write_bytes(encoded(Image.fromarray(classes[f"{i}.jpg"]), "PNG"))
    (masks / "4_mask.png").write_bytes(encoded(picture(0, (8, 8), "L"), "PNG"))
    pair = FolderSource(open_place(source), MaskFolder(open_place(masks), "_mask"))
    manifest = convert(pair, tmp_path / "out")
    assert manifest is not None
    assert (manifest.num_samples, manifest.num_masks, manifest.num_quarantined) == (5, 4, 1)
    assert "has 8 x 8 pixels, the image 24 x 16" in (tmp_path / "out" / layout.QUARANTINE).read_text()
    assert pair.warnings() == ["1 images have no mask, such as 5.jpg; they are converted without one."]
    opened = ShardSet.open(tmp_path / "out")
    for i in range(5):
        mask = opened.read_mask(i)
        if opened.name(i) == "5.jpg":
            assert mask is None
        else:
            assert mask is not None
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(mask))), classes[opened.name(i)])


@pytest.mark.parametrize("part", [None, Part(0, 2)])
def test_a_refused_conversion_leaves_nothing(make_folder, tmp_path: Path, part: Part | None):
    (tmp_path / "empty").mkdir()
    (tmp_path / "twice.csv").write_text("path\na.jpg\na.jpg\n")
    (tmp_path / "a.jpg").write_bytes(next(make_folder(3).rglob("*.jpg")).read_bytes())
    before = sorted(tmp_path.rglob("*"))
    for source, words in (("empty", "holds no images"), ("twice.csv", "is listed twice")):
        for dest in ("out", "new/folders/out", "empty"):
            if source != dest:
                with pytest.raises(UserError, match=words):
                    convert(str(tmp_path / source), tmp_path / dest, part=part)
                assert sorted(tmp_path.rglob("*")) == before
    # A conversion that is at work there keeps its lock.
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / layout.LOCK, "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="Another conversion is at work"):
            convert(tmp_path / "photos", tmp_path / "out", part=part)
        assert [path.name for path in (tmp_path / "out").iterdir()] == [layout.LOCK]


def test_what_a_plan_was_made_for_stays(make_folder, tmp_path: Path):
    """Only the same command can go on with it, and the quarantine says what is wrong with the images."""
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_bytes(b"text")
    with pytest.raises(UserError, match="None of the 1 images can be used"):
        convert(tmp_path / "bad", tmp_path / "out")
    assert {layout.PLAN, layout.QUARANTINE} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_labels_that_are_refused_leave_no_lock(make_folder, tmp_path: Path):
    convert(make_folder(3), tmp_path / "out")
    (tmp_path / "out" / layout.LOCK).unlink()
    (tmp_path / "l.csv").write_text("source,label\nnone.jpg,a\n")
    before = sorted(tmp_path.rglob("*"))
    for folder, words in (
        ("out", "Not one of the 1 names"),
        ("photos", "no shard folder"),
        ("nowhere", "There is no folder"),
    ):
        with pytest.raises(UserError, match=words):
            label(tmp_path / folder, tmp_path / "l.csv")
        assert sorted(tmp_path.rglob("*")) == before
