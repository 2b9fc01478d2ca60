"""Damage of every kind, mended from plan and source: afterwards every file has its first bytes again."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fastssl.cli import main
from shards.checking.repair import Repair, repair
from shards.checking.verify import verify
from shards.conversion import shard_maker
from shards.conversion.convert import convert
from shards.errors import UserError
from shards.format import layout
from shards.sources.source import Source
from shards.sources.source_kinds import open_source
from shards.sources.source_options import ListOptions, RasterOptions, SourceOptions
from shards.storage.opening import open_place
from tests.pictures import encoded, fingerprints, photo, picture


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `photos`, and `out`: four shards of them, a refused image and a dropped duplicate."""
    root = tmp_path_factory.mktemp("repair")
    for i in range(18):
        path = root / "photos" / ("ant", "bee")[i % 2] / f"{i:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(0 if i == 6 else i), "JPEG"))
    (root / "photos" / "bad.jpg").write_bytes(b"text")
    convert(root / "photos", root / "out", samples_per_shard=5, dedupe="drop")
    return root


@pytest.fixture
def photos(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "photos", tmp_path / "photos"))


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "out", tmp_path / "out"))


def mend(folder: Path, source: Source | Path | None, workers: int = 0) -> Repair:
    place = open_place(folder)
    if isinstance(source, Path):
        source = open_source(str(source))
    return repair(place, verify(place, workers=0), source, workers=workers)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-700])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


def hurt(path: Path) -> None:
    flip(path, path.stat().st_size // 3)


@pytest.mark.parametrize("harm", [Path.unlink, cut, lengthen, hurt])
def test_shards_and_indexes_get_their_bytes_back(folder: Path, photos: Path, harm: Callable[[Path], None]):
    wanted = fingerprints(folder)
    harm(folder / layout.shard_name(1))
    harm(folder / layout.shard_name(3))
    harm(folder / layout.index_name(3))
    harm(folder / layout.index_name(2)) if harm is not cut else lengthen(folder / layout.index_name(2))
    untouched = (folder / layout.shard_name(0)).stat()
    done = mend(folder, photos)
    assert set(done.mended) == {
        layout.shard_name(1),
        layout.shard_name(3),
        layout.index_name(3),
        layout.index_name(2),
    }
    assert done.failed == []
    assert fingerprints(folder) == wanted
    assert (folder / layout.shard_name(0)).stat() == untouched


@pytest.mark.parametrize("harm", [Path.unlink, hurt])
@pytest.mark.parametrize(
    "name",
    [layout.TABLE, layout.MANIFEST, layout.QUARANTINE, layout.DROPPED, layout.PLAN, layout.SUMS],
)
def test_any_other_file_gets_its_bytes_back(
    folder: Path, photos: Path, name: str, harm: Callable[[Path], None]
):
    wanted = fingerprints(folder)
    harm(folder / name)
    assert mend(folder, photos) == Repair([name], [])
    assert fingerprints(folder) == wanted


def test_a_shard_and_the_table_at_once_by_processes(folder: Path, photos: Path):
    wanted = fingerprints(folder)
    cut(folder / layout.shard_name(2))
    hurt(folder / layout.TABLE)
    (folder / ".samples.parquet.77.fastssl-tmp").write_bytes(b"litter")
    assert set(mend(folder, photos, workers=2).mended) == {layout.shard_name(2), layout.TABLE}
    assert fingerprints(folder) == wanted


def test_flips_at_random_are_found_and_mended(folder: Path, photos: Path):
    wanted = fingerprints(folder)
    rng = random.Random(5)
    files = [path for path in sorted(folder.iterdir()) if path.name.endswith((".tar", ".idx"))]
    for _ in range(6):
        for path in rng.sample(files, 2):
            flip(path, rng.randrange(path.stat().st_size))
        assert mend(folder, photos).failed == []
        assert fingerprints(folder) == wanted


def test_without_a_source_only_the_index_is_mended(folder: Path):
    hurt(folder / layout.index_name(1))
    cut(folder / layout.shard_name(2))
    before = fingerprints(folder)[layout.shard_name(2)]
    done = mend(folder, None)
    assert done.mended == [layout.index_name(1)]
    assert [(fault.file, fault.what) for fault in done.failed] == [
        (
            layout.shard_name(2),
            "is made again from the images: give --source and the options that `fastssl shard` had",
        )
    ]
    assert fingerprints(folder)[layout.shard_name(2)] == before


def test_an_image_that_changed_is_named_and_its_shard_left_alone(folder: Path, photos: Path):
    wanted = fingerprints(folder)
    for shard in range(4):
        cut(folder / layout.shard_name(shard))
    damaged = fingerprints(folder)
    (photos / "ant" / "04.jpg").write_bytes(encoded(picture(99), "JPEG"))
    (photos / "bee" / "07.jpg").unlink()
    done = mend(folder, photos)
    told = " ".join(fault.what for fault in done.failed)
    assert "'ant/04.jpg' has changed since the conversion" in told
    assert "'bee/07.jpg' is refused now (cannot be read: No such file or directory)" in told
    failed = {fault.file for fault in done.failed}
    assert 1 <= len(failed) <= 2
    now = fingerprints(folder)
    for name in wanted:
        assert now[name] == (damaged if name in failed else wanted)[name]


def test_an_image_refused_then_and_good_now_is_named(folder: Path, photos: Path):
    for shard in range(4):
        cut(folder / layout.shard_name(shard))
    (photos / "bad.jpg").write_bytes(encoded(picture(1), "JPEG"))
    (fault,) = mend(folder, photos).failed
    assert "'bad.jpg' was refused then, and is not now" in fault.what


def test_a_source_that_has_gone_is_an_error_and_nothing_changes(folder: Path, tmp_path: Path):
    cut(folder / layout.shard_name(2))
    before = fingerprints(folder)
    with pytest.raises(UserError, match=r"nowhere' is no longer there"):
        mend(folder, tmp_path / "nowhere")
    assert fingerprints(folder) == before


def test_another_kind_of_source_or_other_options_are_refused(folder: Path, photos: Path):
    cut(folder / layout.shard_name(2))
    source = open_source(str(photos), SourceOptions(raster=RasterOptions(tile=8)))
    with pytest.raises(UserError, match=r"was made with kind 'folder', now it is 'rasters'"):
        mend(folder, source)


def test_a_list_is_made_again_too(photos: Path, tmp_path: Path):
    names = sorted(str(path.relative_to(photos)) for path in photos.rglob("*.jpg"))
    lines = [f"{name},{i % 3},{i / 7}" for i, name in enumerate(names)]
    (photos / "list.csv").write_text("\n".join(["path,group,weight", *lines]) + "\n")
    dest = open_place(tmp_path / "listed")
    convert(open_source(str(photos / "list.csv")), dest, samples_per_shard=6)
    wanted = fingerprints(tmp_path / "listed")
    cut(tmp_path / "listed" / layout.shard_name(1))
    hurt(tmp_path / "listed" / layout.TABLE)
    source = open_source(str(photos / "list.csv"), SourceOptions(list=ListOptions()))
    assert mend(tmp_path / "listed", source).failed == []
    assert fingerprints(tmp_path / "listed") == wanted


def test_the_command_mends(folder: Path, photos: Path, capsys: pytest.CaptureFixture):
    wanted = fingerprints(folder)
    cut(folder / layout.shard_name(2))
    assert main(["verify", str(folder), "--repair"]) == 1
    assert "shard-000002.tar: is made again from the images: give --source" in capsys.readouterr().out
    assert main(["verify", str(folder), "--source", str(photos)]) == 2
    assert main(["verify", str(folder), "--repair", "--sorce", str(photos)]) == 2
    assert "There is no option '--sorce'. Did you mean '--source'?" in capsys.readouterr().err
    assert main(["verify", str(folder), "--repair", "--source", str(photos)]) == 0
    assert "is whole again" in capsys.readouterr().out
    assert fingerprints(folder) == wanted


def test_a_table_is_made_again_where_jpegs_of_other_bytes_have_equal_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """All their pixels are compared, which needs tars that the repair has removed by then."""
    # As in a large set: not every image is decoded whole at once.
    monkeypatch.setattr(shard_maker, "STATISTICS_IMAGES", 1)
    (tmp_path / "in").mkdir()
    data = encoded(photo(96, 64), "JPEG", quality=90)
    for name, content in (("a.jpg", data), ("b.jpg", data[:2] + b"\xff\xfe\0\x06abcd" + data[2:])):
        (tmp_path / "in" / name).write_bytes(content)
    convert(tmp_path / "in", tmp_path / "out")
    wanted = fingerprints(tmp_path / "out")
    (tmp_path / "out" / layout.TABLE).unlink()
    assert repair(tmp_path / "out", verify(tmp_path / "out"), tmp_path / "in").failed == []
    assert fingerprints(tmp_path / "out") == wanted
