"""Conversion to and from a server of Google Cloud Storage's JSON API, over a network that fails."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastssl.cli import main
from shards.conversion.convert import convert
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError
from shards.format import layout
from shards.storage import remote
from shards.storage.opening import open_place
from tests.gs import gs_server
from tests.s3 import FaultProxy
from tests.shards.storage.test_s3 import downloaded, local, now_and_then, upload

pytestmark = pytest.mark.filterwarnings(
    "ignore:Sending a large body directly:ResourceWarning"
)  # gcsfs' matter


@pytest.fixture
def google(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """What `gs://bucket/...` goes through in this test."""
    with gs_server() as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        monkeypatch.setenv("NO_GCE_CHECK", "true")
        monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.001)
        forget_connections()
        yield proxy
        forget_connections()


def forget_connections() -> None:
    """Ends all connections at once: gcsfs leaves that to the garbage collector, which may come in another test."""
    from fsspec.asyn import sync

    place = open_place("gs://bucket")
    stores = type(place._store)  # pyright: ignore[reportAttributeAccessIssue]
    for store in list(stores._cache.values()):
        if store._session is not None:
            sync(store.loop, store._session.close)
    stores.clear_instance_cache()


def test_from_one_bucket_to_another_over_a_bad_line_and_mended(
    make_folder, google: FaultProxy, tmp_path: Path
):
    source = make_folder(12)
    upload(source, "gs://bucket/photos")
    google.faults = now_and_then(0.1)
    url = "gs://bucket/some/shards"
    convert("gs://bucket/photos", url, samples_per_shard=4, workers=0)
    assert google.num_faults > 5
    google.faults = lambda *_: None
    wanted = local(source, tmp_path, samples_per_shard=4)
    assert downloaded(url, tmp_path) == wanted
    place = open_place(url)
    data = bytearray(place.read("shard-000001.tar"))
    data[700] ^= 1
    place.write("shard-000001.tar", bytes(data))
    before = len(google.seen)
    assert main(["verify", url, "--repair", "--source", str(source), "--workers", "0"]) == 0
    uploads = [path for method, path, _ in google.seen[before:] if method in ("POST", "PUT")]
    assert len(uploads) == 2  # the lock and the shard
    assert downloaded(url, tmp_path) == wanted
    shards = ShardSet.open(url)
    assert len(bytes(shards.read(5))) > 100


def test_what_places_do(google: FaultProxy, monkeypatch: pytest.MonkeyPatch):
    place = open_place("gs://bucket/a")
    assert isinstance(place, remote.RemotePlace)
    assert place.names() == []
    big = os.urandom(7 << 20)  # more than one piece of a resumable upload
    place.write("deep/big", big)
    place.write("small", b"0123456789")
    assert place.read("deep/big") == big
    assert place.read_range("small", 3, 4) == b"3456"
    assert (place.size("small"), place.size("none"), place.sizes()) == (10, None, {"small": 10})
    assert sorted(place.walk()) == [("deep/big", 7 << 20), ("small", 10)]
    with pytest.raises(remote.Unreachable, match="gave 2 bytes of 4"):
        place.read_range("small", 8, 4)
    assert [place.create("lock", b"1"), place.create("lock", b"2"), place.read("lock")] == [True, False, b"1"]
    with (
        place.lock(layout.LOCK),
        pytest.raises(UserError, match="Another conversion is at work"),
        place.lock(layout.LOCK),
    ):
        pass
    place.remove("small")
    place.remove("small")
    place.remove_tree("deep")
    assert place.names() == ["lock"]
    assert not open_place("gs://bucket/none").is_there()


def test_failures_are_told_soon_and_rightly(google: FaultProxy, monkeypatch: pytest.MonkeyPatch):
    place = open_place("gs://bucket/a")
    place.write("x", b"data")
    for status in ("401", "403"):
        google.faults = lambda *_, status=status: status
        with pytest.raises(UserError, match=r"'gs://bucket/a/x' may not be used .*; check the credentials"):
            place.read("x")
    google.faults = lambda *_: "503"
    before = len(google.seen)
    with pytest.raises(remote.Unreachable, match=r"'gs://bucket/a/x' failed 8 times"):
        place.read("x")
    asked = [path for _, path, _ in google.seen[before:] if "alt=media" in path]
    assert len(asked) == remote.TRIES  # and not six times as many
    monkeypatch.setattr(remote, "SILENCE_S", 0.2)
    forget_connections()
    place = open_place("gs://bucket/a")
    stalls = iter(["stall"])
    google.faults = lambda *_: next(stalls, None)
    assert place.read("x") == b"data"
    assert google.num_faults
