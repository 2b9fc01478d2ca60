import errno
import fcntl
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from xxhash import xxh3_64_intdigest

from shards.conversion.convert import OnProgress, convert
from shards.conversion.listing import SCRATCH, Survey
from shards.conversion.shard_plan import default_samples_per_shard
from shards.counter_hash import hash_key
from shards.dataset.order import PLAN_TAG
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError
from shards.format import layout
from shards.format.layout import Manifest
from tests.pictures import encoded, fingerprints, picture


def planned(names: list[str], seed: int) -> list[str]:
    """The names in the plan's order: by a hash of each, whatever the listing's order."""
    return sorted(names, key=lambda name: int(hash_key(seed, PLAN_TAG, xxh3_64_intdigest(name.encode()))))


FINAL = {layout.LOCK, layout.MANIFEST, layout.PLAN, layout.QUARANTINE, layout.SUMS, layout.TABLE}


def test_a_conversion_holds_every_image_once_in_the_planned_order(make_folder, tmp_path: Path):
    source = make_folder(25)
    manifest = convert(source, tmp_path / "out", samples_per_shard=10, seed=4)
    assert (manifest.num_samples, manifest.num_quarantined, len(manifest.shards)) == (25, 0, 3)
    assert manifest == Manifest.load(tmp_path / "out")
    assert manifest.classes == ["ant", "bee", "cat"]
    assert (manifest.source, manifest.max_width, manifest.max_height) == ("photos", 24, 18)
    names = {layout.shard_name(i) for i in range(3)} | {layout.index_name(i) for i in range(3)}
    assert set(os.listdir(tmp_path / "out")) == names | FINAL

    table = pq.read_table(tmp_path / "out" / layout.TABLE)
    assert table.schema.equals(layout.SCHEMA)
    paths = sorted(str(path.relative_to(source)) for path in source.rglob("*.*"))
    wanted = planned(paths, 4)
    assert table["source"].to_pylist() == wanted
    assert table["sample_id"].to_pylist() == list(range(25))
    assert table["key"].to_pylist() == [f"{i:09d}" for i in range(25)]
    assert table["shard"].to_pylist() == [i // 10 for i in range(25)]
    assert table["label"].to_pylist() == [["ant", "bee", "cat"].index(path[:3]) for path in wanted]
    opened = ShardSet.open(tmp_path / "out")
    for i, path in enumerate(wanted):
        assert bytes(opened.read(i)) == (source / path).read_bytes()


def test_workers_and_places_do_not_change_a_byte(make_folder, tmp_path: Path):
    source = make_folder(40)
    convert(source, tmp_path / "here", samples_per_shard=6, workers=0)
    convert(source, tmp_path / "there", samples_per_shard=6, workers=2)
    moved = tmp_path / "moved" / "photos"
    shutil.copytree(source, moved)
    convert(moved, tmp_path / "elsewhere", samples_per_shard=6)
    assert fingerprints(tmp_path / "here") == fingerprints(tmp_path / "there")
    assert fingerprints(tmp_path / "here") == fingerprints(tmp_path / "elsewhere")
    assert str(tmp_path) not in (tmp_path / "here" / layout.MANIFEST).read_text()


def test_the_default_shard_size_depends_on_the_number_of_images_only():
    sizes = [default_samples_per_shard(n) for n in (1, 8192, 8193, 100_000, 262_144, 10**7)]
    assert sizes == [128, 128, 129, 1563, 4096, 4096]


def test_bad_images_are_quarantined_with_reasons(make_folder, tmp_path: Path):
    source = make_folder(12)
    (source / "ant" / "zero.jpg").write_bytes(b"")
    (source / "ant" / "text.jpg").write_text("hello")
    (source / "bee" / "gone.png").symlink_to(source / "nowhere")
    manifest = convert(source, tmp_path / "out", samples_per_shard=4)
    assert (manifest.num_samples, manifest.num_quarantined) == (12, 3)
    lines = (tmp_path / "out" / layout.QUARANTINE).read_text().splitlines()
    bad = {entry["source"]: entry for entry in map(json.loads, lines)}
    assert {name: entry["reason"] for name, entry in bad.items()} == {
        "ant/zero.jpg": "empty file (0 bytes)",
        "ant/text.jpg": "not readable as JPEG, PNG, WebP, BMP, TIFF, GIF or NumPy array",
        "bee/gone.png": "cannot be read: No such file or directory",
    }
    table = pq.read_table(tmp_path / "out" / layout.TABLE)
    assert table["sample_id"].to_pylist() == list(range(12))
    positions = [int(key) for key in table["key"].to_pylist()] + [entry["position"] for entry in bad.values()]
    assert sorted(positions) == list(range(15))


def test_an_unreadable_file_is_quarantined(make_folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = make_folder(6)
    really_open = os.open

    def refuse(path, *args, **kwargs):
        if str(path).endswith("0003.jpg"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return really_open(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    assert convert(source, tmp_path / "out").num_quarantined == 1
    assert "cannot be read: Permission denied" in (tmp_path / "out" / layout.QUARANTINE).read_text()


def test_a_source_that_goes_away_stops_the_conversion(make_folder, tmp_path: Path):
    source = make_folder(6)

    def take_away(done: int, total: int, quarantined: int):
        if source.exists():
            source.rename(tmp_path / "away")

    with pytest.raises(UserError, match="is no longer there"):
        convert(source, tmp_path / "out", report=OnProgress(take_away))


def test_a_shard_without_good_images_is_left_out(tmp_path: Path):
    source = tmp_path / "photos"
    source.mkdir()
    for i in range(8):
        (source / f"{i}.png").write_bytes(encoded(picture(i), "PNG"))
    for name in planned([f"{i}.png" for i in range(8)], 0)[2:4]:
        (source / name).write_bytes(b"bad!")
    manifest = convert(source, tmp_path / "out", samples_per_shard=2)
    assert [file.name for file in manifest.shards] == [layout.shard_name(i) for i in (0, 2, 3)]
    opened = ShardSet.open(tmp_path / "out")
    for sample_id in range(6):
        assert bytes(opened.read(sample_id)) == (source / opened.name(sample_id)).read_bytes()
    assert opened.labels.tolist() == [-1] * 6
    assert manifest.classes == []


def test_nothing_usable_says_why(tmp_path: Path):
    source = tmp_path / "photos"
    source.mkdir()
    for i in range(5):
        (source / f"{i}.jpg").write_bytes(b"text")
    for _ in range(2):
        with pytest.raises(UserError, match=r"None of the 5 images.*(\d\.jpg: not readable[^;]*;? ?){3}"):
            convert(source, tmp_path / "out")
        assert not (tmp_path / "out" / layout.MANIFEST).exists()


def test_progress_counts_every_image(make_folder, tmp_path: Path):
    source = make_folder(12)
    (source / "bad.jpg").write_bytes(b"text")
    for workers in (0, 2):
        calls = []
        convert(
            source,
            tmp_path / f"out{workers}",
            samples_per_shard=3,
            workers=workers,
            report=OnProgress(lambda *c, calls=calls: calls.append(c)),
        )
        assert calls[-1] == (13, 13, 1)
        assert calls == sorted(calls)


def test_the_same_command_again_changes_nothing(make_folder, tmp_path: Path):
    source = make_folder(12)
    first = convert(source, tmp_path / "out", samples_per_shard=5)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*[!k]")}
    calls = []
    assert (
        convert(source, tmp_path / "out", samples_per_shard=5, report=OnProgress(lambda *c: calls.append(c)))
        == first
    )
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*[!k]")} == before
    assert calls == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, r"seed 0, this command has 1"),
        ({"samples_per_shard": 7}, r"samples per shard 5, this command has 7"),
    ],
)
def test_other_settings_are_refused_with_both_values(make_folder, tmp_path: Path, change: dict, message: str):
    source = make_folder(12)
    convert(source, tmp_path / "out", samples_per_shard=5)
    with pytest.raises(UserError, match=message):
        convert(source, tmp_path / "out", **({"samples_per_shard": 5} | change))


def test_another_source_is_refused(make_folder, tmp_path: Path):
    source = make_folder(12)
    convert(source, tmp_path / "out")
    with pytest.raises(UserError, match=r"source 'photos', this command has 'other'"):
        convert(make_folder(12, "other"), tmp_path / "out")
    image = source / "ant" / "0000.jpg"
    image.write_bytes(image.read_bytes() + b"longer")
    with pytest.raises(UserError, match=r"12 images of 'photos' whose names, sizes or labels have changed"):
        convert(source, tmp_path / "out")
    image.unlink()
    with pytest.raises(UserError, match=r"num images 12, this command has 11"):
        convert(source, tmp_path / "out")


def test_foreign_files_are_refused_and_left_alone(make_folder, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match=r"already holds other files, such as 'thesis\.tex'"):
        convert(make_folder(3), tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["thesis.tex"]


def test_a_file_as_destination(make_folder, tmp_path: Path):
    (tmp_path / "out").write_text("precious")
    with pytest.raises(UserError, match=r"out' is a file"):
        convert(make_folder(3), tmp_path / "out")
    with pytest.raises(UserError, match=r"is a file"):
        convert(make_folder(3), tmp_path / "out" / "deeper")


@pytest.mark.parametrize("inside", ["", "shards", "ant/deep"])
def test_a_destination_inside_the_source_is_refused(make_folder, inside: str):
    source = make_folder(3)
    with pytest.raises(UserError, match="lies inside SOURCE"):
        convert(source, source / inside)


def test_impossible_options_are_refused(make_folder, tmp_path: Path):
    source = make_folder(3)
    with pytest.raises(UserError, match="workers must be 0 or more, got -1"):
        convert(source, tmp_path / "out", workers=-1)
    with pytest.raises(UserError, match="samples per shard must be 1 or more, got 0"):
        convert(source, tmp_path / "out", samples_per_shard=0)


def test_two_conversions_into_one_folder_are_refused(make_folder, tmp_path: Path):
    source = make_folder(3)
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / layout.LOCK, "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="Another conversion is at work"):
            convert(source, tmp_path / "out")
    assert convert(source, tmp_path / "out").num_samples == 3


def test_the_order_of_samples_follows_the_seed(make_folder, tmp_path: Path):
    source = make_folder(20)
    convert(source, tmp_path / "a", seed=1)
    convert(source, tmp_path / "b", seed=2)
    names = [[ShardSet.open(tmp_path / out).name(i) for i in range(20)] for out in "ab"]
    assert names[0] != names[1]
    assert sorted(names[0]) == sorted(names[1])


def test_sizes_and_hashes_in_the_table_are_those_of_the_stored_bytes(make_folder, tmp_path: Path):
    source = make_folder(6)
    (source / "ant" / "cmyk.jpg").write_bytes(encoded(picture(1, mode="CMYK"), "JPEG"))
    convert(source, tmp_path / "out")
    opened = ShardSet.open(tmp_path / "out")
    rows = pq.read_table(tmp_path / "out" / layout.TABLE).to_pylist()
    assert {row["stored"] for row in rows} == {"kept", "re-encoded: CMYK to RGB"}
    for row in rows:
        data = opened.read(row["sample_id"])
        assert row["size"] == len(data)
        assert row["sha256"] == hashlib.sha256(data).hexdigest()
    assert np.array_equal(opened.sizes, [row["size"] for row in rows])


def test_a_resumed_run_counts_what_was_refused_before(make_folder, tmp_path: Path):
    source, out = make_folder(12), tmp_path / "out"
    for i in range(3):
        (source / f"bad{i}.jpg").write_bytes(b"text")

    def stop(done: int, total: int, quarantined: int):
        if done == 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, out, samples_per_shard=5, workers=0, report=OnProgress(stop))
    # All shards are finished, none is merged.
    (out / layout.shard_name(2)).unlink()
    calls = []
    convert(source, out, samples_per_shard=5, workers=0, report=OnProgress(lambda *c: calls.append(c)))
    assert calls[-1] == (15, 15, 3)


def test_what_a_killed_listing_left_is_removed(make_folder, tmp_path: Path):
    source, out = make_folder(5), tmp_path / "out"
    (out / f"{SCRATCH}abc").mkdir(parents=True)
    (out / f"{SCRATCH}abc" / "000.arrow").write_bytes(b"x")
    convert(source, out)
    assert not list(out.glob(f"{SCRATCH}*"))


def test_a_plan_that_stands_is_not_sorted_again(make_folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source, out = make_folder(12), tmp_path / "out"
    first = convert(source, out)
    monkeypatch.setattr(Survey, "_add", lambda *_: pytest.fail("an entry was kept"))
    assert convert(source, out) == first
