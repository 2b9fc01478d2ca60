"""Every kind of byte that a shard folder stores, flipped: `verify` finds it and names the sample and the part."""

import json
import random
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastssl.cli import main
from shards.checking.damage import Damage
from shards.checking.verify import verify
from shards.conversion.convert import convert
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError
from shards.format import layout
from shards.format.layout import Manifest
from shards.sources.source_kinds import open_source
from shards.sources.source_options import SourceOptions
from shards.storage.opening import open_place
from tests.pictures import encoded, picture

FLIPS = 12  # of each kind of byte


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards of 17 samples: classes, masks, a duplicate that was dropped, two refused images."""
    root = tmp_path_factory.mktemp("verify")
    for i in range(18):
        path = root / "photos" / ("ant", "bee")[i % 2] / f"é{i:02d}.{'jpg' if i % 3 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(0 if i == 6 else i), "JPEG" if i % 3 else "PNG"))
        if i % 4 == 0 and i != 6:
            mask = root / "masks" / path.parent.name / f"{path.stem}.png"
            mask.parent.mkdir(parents=True, exist_ok=True)
            mask.write_bytes(encoded(picture(i, mode="L").point(lambda v: v // 64), "PNG"))
    for i in range(2):
        (root / "photos" / f"bad{i}.jpg").write_bytes(b"text")
    dest = open_place(root / "out")
    source = open_source(str(root / "photos"), SourceOptions(masks=str(root / "masks")))
    manifest = convert(source, dest, samples_per_shard=5, dedupe="drop")
    assert (manifest.num_samples, manifest.num_quarantined, manifest.num_masks) == (17, 2, 5)
    return root / "out"


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "out"))


def findings(folder: Path, level: str = "hash") -> list[Damage]:
    return verify(open_place(folder), level=level, workers=0).findings


def flip(path: Path, at: int) -> Callable[[], None]:
    """Flips one bit; the function that is returned flips it back."""

    def turn() -> None:
        data = bytearray(path.read_bytes())
        data[at] ^= 1 << at % 8
        path.write_bytes(data)

    turn()
    return turn


def parts(folder: Path) -> dict[str, list[tuple[str, str, str, int, int]]]:
    """All bytes of the tars by kind: (tar, key, member, start, stop), as Python's own tarfile sees them."""
    kinds: dict[str, list[tuple[str, str, str, int, int]]] = {}
    for file in Manifest.load(folder).shards:
        end = 0
        with tarfile.open(folder / file.name) as tar:
            for info in tar:
                key, _, ext = info.name.partition(".")
                kind = "image" if ext in ("jpg", "png") else ext
                data, end = info.offset_data, info.offset_data + -(-info.size // 512) * 512
                for name, start, stop in (
                    ("header", info.offset, data),
                    (kind, data, data + info.size),
                    ("padding", data + info.size, end),
                ):
                    if stop > start:
                        kinds.setdefault(name, []).append((file.name, key, info.name, start, stop))
        kinds.setdefault("end", []).append((file.name, "", "", end, file.bytes))
    return kinds


def test_a_folder_as_it_was_written_is_whole(folder: Path):
    for level in ("fast", "hash", "decode"):
        verdict = verify(open_place(folder), level=level)
        assert (verdict.findings, verdict.damaged) == ([], False)
        assert (verdict.num_samples, verdict.num_shards) == (17, 4)


@pytest.mark.parametrize("kind", ["header", "image", "cls", "json", "mask.png", "padding", "end"])
def test_a_flipped_bit_in_a_tar_is_found_and_its_sample_named(folder: Path, kind: str):
    rng = random.Random(kind)
    places = parts(folder)[kind]
    opened = ShardSet.open(folder)
    names = {
        layout.sample_key(int(key)): i
        for i, key in enumerate(pq.read_table(folder / layout.TABLE)["key"].to_pylist())
    }
    for _ in range(FLIPS):
        tar, key, member, start, stop = rng.choice(places)
        at = rng.randrange(start, stop)
        undo = flip(folder / tar, at)
        (found,) = findings(folder)
        assert (found.file, found.kind) == (tar, "bytes")
        if kind == "end":
            assert (found.sample_id, found.offset) == (None, at)
        else:
            assert (found.key, found.sample_id, found.source) == (key, names[key], opened.name(names[key]))
            # That a JSON's text or a mask's last byte is wrong, only the sample's CRC tells.
            assert found.member == member or (kind in ("json", "mask.png") and found.member is None)
        if kind in ("header", "padding"):
            assert found.offset == at
        undo()
    assert findings(folder) == []


def test_a_flipped_bit_in_an_index_names_the_line(folder: Path):
    rng = random.Random(1)
    keys = pq.read_table(folder / layout.TABLE)["key"].to_pylist()
    for shard in range(4):
        path = folder / layout.index_name(shard)
        for _ in range(FLIPS):
            at = rng.randrange(path.stat().st_size)
            undo = flip(path, at)
            found = findings(folder)
            assert {each.file for each in found} == {path.name}
            lines = path.read_bytes()[: at + 1].count(b"\n") - (path.read_bytes()[at] == ord("\n"))
            was_newline = path.read_bytes()[at] ^ (1 << at % 8) == ord("\n")
            if lines and not was_newline:
                number = keys.index(found[0].key)
                assert found[0].sample_id == number
                assert f"line {lines + 1} is" in found[0].what
            undo()
    assert findings(folder) == []


@pytest.mark.parametrize(
    "name",
    [layout.TABLE, layout.PLAN, layout.DROPPED, layout.MANIFEST, layout.QUARANTINE, layout.SUMS],
)
def test_a_flipped_bit_in_any_other_file_is_found(folder: Path, name: str):
    rng = random.Random(name)
    path = folder / name
    size = path.stat().st_size
    for at in [0, size // 2, size - 1, *(rng.randrange(size) for _ in range(FLIPS))]:
        undo = flip(path, at)
        assert {found.file for found in findings(folder)} == {name}, at
        undo()
    assert findings(folder) == []


def test_without_checksums_the_tars_are_still_checked(folder: Path):
    (folder / layout.SUMS).unlink()
    assert [(found.file, found.kind) for found in findings(folder)] == [(layout.SUMS, "missing")]
    flip(folder / layout.shard_name(1), 600)
    assert {found.file for found in findings(folder)} == {layout.SUMS, layout.shard_name(1)}


@pytest.mark.parametrize("level", ["fast", "hash"])
def test_a_cut_tar_is_found_at_any_length(folder: Path, level: str):
    name = layout.shard_name(1)
    path = folder / name
    data = path.read_bytes()
    rows = [row for row in pq.read_table(folder / layout.TABLE).to_pylist() if row["shard"] == 1]
    members = [entry for kind in parts(folder).values() for entry in kind if entry[0] == name]
    ends = [max(stop for _, key, _, _, stop in members if key == row["key"]) for row in rows]
    for length in (0, 1, 511, 512, 513, 5000, ends[-1] - 1, ends[-1], ends[-1] + 1, len(data) - 1):
        path.write_bytes(data[:length])
        found = findings(folder, level)
        assert [(each.file, each.kind) for each in found] == [(name, "length")]
        assert f"has {length:,} bytes and should have {len(data):,}" in found[0].what
        if level == "hash":
            cut = next((row for row, end in zip(rows, ends, strict=True) if end > length), None)
            assert (found[0].sample_id, found[0].source) == (cut and cut["sample_id"], cut and cut["source"])
    path.write_bytes(data + b"\0")
    (found,) = findings(folder, level)
    assert (found.kind, found.offset) == ("length", len(data) if level == "hash" else None)


def test_missing_files_are_found(folder: Path):
    for name in sorted(path.name for path in folder.iterdir() if path.name != layout.LOCK):
        data = (folder / name).read_bytes()
        (folder / name).unlink()
        for level in ("fast", "hash"):
            assert [(found.file, found.kind) for found in findings(folder, level)] == [(name, "missing")]
        (folder / name).write_bytes(data)
    assert findings(folder) == []


def write_tar(path: Path, leave_out: str) -> None:
    with tarfile.open(path) as tar:
        files = [(info, tar.extractfile(info)) for info in tar]
        with tarfile.open(path.with_suffix(".new"), "w", format=tarfile.USTAR_FORMAT) as new:
            for info, content in files:
                if info.name != leave_out:
                    new.addfile(info, content)
    path.with_suffix(".new").rename(path)


def test_a_missing_member_is_found(folder: Path):
    name = layout.shard_name(0)
    row = pq.read_table(folder / layout.TABLE).to_pylist()[2]
    write_tar(folder / name, f"{row['key']}.cls")
    found = findings(folder)
    assert {each.file for each in found} == {name}
    assert next(each for each in found if each.kind == "bytes").sample_id == 2


def test_a_table_that_disagrees_with_the_tars_is_told_row_by_row(folder: Path):
    table = pq.read_table(folder / layout.TABLE)
    labels = table["label"].to_pylist()
    labels[7] = 1 - labels[7]
    sources = table["source"].to_pylist()
    sources[12] = "other.jpg"
    changed = table.set_column(
        table.schema.get_field_index("label"), layout.SCHEMA.field("label"), pa.array(labels, pa.int32())
    )
    changed = changed.set_column(changed.schema.get_field_index("source"), "source", pa.array(sources))
    pq.write_table(changed, folder / layout.TABLE)
    found = findings(folder)
    assert {each.file for each in found} == {layout.TABLE}
    told = {each.sample_id: each.what for each in found if each.sample_id is not None}
    assert set(told) == {7, 12}
    assert f"label {labels[7]} instead of {1 - labels[7]}" in told[7]
    assert "source 'other.jpg' instead of" in told[12]


def test_a_table_of_another_length_or_another_conversion(folder: Path):
    table = pq.read_table(folder / layout.TABLE)
    pq.write_table(table.slice(0, 16), folder / layout.TABLE)
    assert any("16 rows, but there are 17 samples" in found.what for found in findings(folder, "fast"))


def test_a_sample_that_no_longer_decodes(folder: Path, monkeypatch: pytest.MonkeyPatch):
    from shards.checking import damage
    from shards.images.pixels import BadImage

    prove = damage.prove

    def refuse(data: bytes, name: str, *settings):
        if name.startswith("000000007"):
            raise BadImage("damaged: no")
        return prove(data, name, *settings)

    monkeypatch.setattr(damage, "prove", refuse)
    (found,) = findings(folder, "decode")
    assert (found.kind, found.key, found.what) == ("decode", "000000007", "does not decode: damaged: no")
    assert findings(folder, "hash") == []


def test_litter_is_told_but_is_no_damage(folder: Path):
    (folder / f".{layout.shard_name(2)}.77.fastssl-tmp").write_bytes(b"x")
    (folder / layout.ROWS).mkdir()
    (folder / layout.ROWS / layout.rows_name(0)).write_bytes(b"x")
    verdict = verify(open_place(folder))
    assert [found.kind for found in verdict.findings] == ["stale", "stale"]
    assert not verdict.damaged
    (folder / layout.shard_name(9)).write_bytes(b"x")
    assert verify(open_place(folder)).damaged


def test_processes_find_the_same(folder: Path):
    flip(folder / layout.shard_name(1), 700)
    (folder / layout.shard_name(2)).unlink()
    counts = []
    several = verify(open_place(folder), workers=2, progress=lambda *now: counts.append(now))
    assert several.findings == findings(folder)
    assert len(several.findings) == 2
    assert counts[-1][0] == several.num_bytes - Manifest.load(folder).shards[2].bytes


def test_a_folder_that_is_not_finished_is_an_error(tmp_path: Path):
    with pytest.raises(UserError, match="no folder"):
        verify(open_place(tmp_path / "nowhere"))
    (tmp_path / layout.PLAN).write_bytes(b"")
    with pytest.raises(UserError, match="unfinished"):
        verify(open_place(tmp_path))


def test_the_command_tells_and_exits(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main(["verify", str(folder)]) == 0
    assert "is whole: every byte is as it was written. 17 samples in 4 shards" in capsys.readouterr().out
    flip(folder / layout.shard_name(1), 700)
    assert main(["verify", str(folder), "--json", str(tmp_path / "found.json")]) == 1
    shown = capsys.readouterr().out
    assert "is DAMAGED: 1 file, 1 sample of 17 samples" in shown
    assert "the image's bytes are damaged" in " ".join(shown.split())
    told = json.loads((tmp_path / "found.json").read_text())
    assert told["damaged"]
    assert told["findings"][0]["sample_id"] == 5
    assert main(["verify", str(folder), "--fast"]) == 0
    assert main(["verify", str(folder), "--fast", "--decode"]) == 2
    assert main(["verify", str(folder), "--workers", "-1"]) == 2
    assert main(["verify", str(folder), "--json", str(tmp_path)]) == 2
