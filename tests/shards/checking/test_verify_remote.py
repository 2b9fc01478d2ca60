"""`fastssl verify` and its repair where the shards lie in a store, or on a web server that can only be read."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastssl.cli import main
from shards.checking.repair import repair
from shards.checking.verify import verify
from shards.conversion.convert import convert
from shards.errors import UserError
from shards.format import layout
from shards.sources.source_kinds import open_source
from shards.storage import remote
from shards.storage.opening import open_place
from shards.storage.place import Place
from tests.pictures import fingerprints
from tests.s3 import FaultProxy, web_server
from tests.shards.storage.test_s3 import downloaded, now_and_then, upload


@pytest.fixture
def shards(make_folder, bucket: str, tmp_path: Path) -> str:
    """Four shards of 12 images in a store, as a conversion on this machine made them."""
    convert(make_folder(12), tmp_path / "out", samples_per_shard=3, workers=0, dedupe="drop")
    (tmp_path / "out" / layout.LOCK).unlink()
    upload(tmp_path / "out", f"{bucket}/shards")
    return f"{bucket}/shards"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.001)


def flip(place: Place, name: str, at: int) -> None:
    data = bytearray(place.read(name))
    data[at] ^= 4
    place.write(name, bytes(data))


def offset_of(folder: Path, source: str) -> tuple[str, int]:
    """The shard of an image and a byte within it."""
    import pyarrow.parquet as pq

    for row in pq.read_table(folder / layout.TABLE).to_pylist():
        if row["source"] == source:
            return layout.shard_name(row["shard"]), row["offset"] + row["size"] // 2
    raise AssertionError(source)


def test_names_and_lengths_take_one_question_for_all_shards(shards: str, proxy: FaultProxy):
    place = open_place(shards)
    before = len(proxy.seen)
    assert verify(place, level="fast").findings == []
    assert not [path for _, path, _ in proxy.seen[before:] if ".tar" in path or ".idx" in path]
    place.write(layout.shard_name(2), b"cut")
    place.remove(layout.index_name(1))
    place.remove(layout.shard_name(3))
    found = {(finding.file, finding.kind) for finding in verify(place, level="fast").findings}
    assert found == {
        ("shard-000002.tar", "length"),
        ("shard-000001.idx", "missing"),
        ("shard-000003.tar", "missing"),
    }


def test_a_flipped_byte_in_a_store_is_named_and_mended_alone(
    shards: str, proxy: FaultProxy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    wanted = fingerprints(tmp_path / "out")
    tar, at = offset_of(tmp_path / "out", "bee/0004.jpg")
    flip(open_place(shards), tar, at)
    assert main(["verify", shards, "--workers", "0"]) == 1
    told = capsys.readouterr().out
    assert "bee/0004.jpg" in told
    assert f"{shards} is DAMAGED: 1 file, 1 sample of 12 samples in 4 shards" in told
    assert downloaded(shards, tmp_path)[tar] != wanted[tar]

    before = len(proxy.seen)
    proxy.faults = now_and_then(0.1)
    source = str(tmp_path / "photos")
    assert main(["verify", shards, "--repair", "--source", source, "--workers", "0"]) == 0
    assert proxy.num_faults
    proxy.faults = lambda *_: None
    assert f"Mended, byte for byte: {tar}." in capsys.readouterr().out
    changed = {path for method, path, _ in proxy.seen[before:] if method not in ("GET", "HEAD")}
    assert {path.partition("?")[0].rpartition("/")[2] for path in changed} == {tar, layout.LOCK}
    assert downloaded(shards, tmp_path) == wanted
    assert main(["verify", shards, "--decode", "--workers", "0"]) == 0


def harm_plan(place: Place) -> None:
    flip(place, layout.PLAN, 100)


def harm_all_but_shards(place: Place) -> None:
    for name in (layout.TABLE, layout.QUARANTINE, layout.MANIFEST):
        place.remove(name)
    place.remove(layout.index_name(1))


def harm_checksums(place: Place) -> None:
    place.write(layout.SUMS, b"0" * 80)


@pytest.mark.parametrize("harm", [harm_plan, harm_all_but_shards, harm_checksums])
def test_every_other_file_of_a_store_is_mended_too(
    shards: str, tmp_path: Path, harm: Callable[[Place], None], bucket: str
):
    """Also from images that lie in a store."""
    upload(tmp_path / "photos", f"{bucket}/photos")
    wanted = fingerprints(tmp_path / "out")
    place = open_place(shards)
    harm(place)
    done = repair(place, verify(place, workers=0), open_source(f"{bucket}/photos"), workers=0)
    assert done.failed == []
    assert downloaded(shards, tmp_path) == wanted


@pytest.fixture
def web(make_folder, tmp_path: Path) -> Iterator[FaultProxy]:
    """A web server, with listings, of the folder `shards`."""
    convert(make_folder(9), tmp_path / "www" / "shards", samples_per_shard=3, workers=0)

    with web_server(tmp_path / "www") as proxy:
        yield proxy


def test_on_a_web_server_damage_is_found_and_the_way_out_told(web: FaultProxy, tmp_path: Path):
    url = f"{web.url}/shards"
    assert verify(open_place(url), workers=0).findings == []
    folder = tmp_path / "www" / "shards"
    tar, at = offset_of(folder, "bee/0004.jpg")
    flip(open_place(folder), tar, at)
    (folder / layout.index_name(0)).unlink()
    dice = now_and_then(0.1)
    web.faults = lambda method, path, count: None if path.endswith("/") else dice(method, path, count)
    verdict = verify(open_place(url), workers=0)
    found = {(finding.file, finding.source) for finding in verdict.findings}
    assert found == {(tar, "bee/0004.jpg"), (layout.index_name(0), None)}
    assert main(["verify", url, "--workers", "0"]) == 1
    web.faults = lambda *_: "500"  # nothing is asked
    assert main(["verify", url, "--repair", "--source", str(tmp_path / "photos")]) == 2
    with pytest.raises(UserError, match=r"web server and can only be read; .* download it, repair the copy"):
        repair(open_place(url), verdict, open_source(str(tmp_path / "photos")), workers=0)
