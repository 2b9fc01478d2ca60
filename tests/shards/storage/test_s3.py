"""Conversion from and to a server of the S3 protocol and a plain web server, over a network that fails."""

import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shards.conversion.convert import Part, convert
from shards.conversion.shard_plan import read_plan
from shards.errors import UserError
from shards.format import layout
from shards.storage import lease, remote
from shards.storage.opening import open_place
from shards.storage.place import Place
from tests.pictures import encoded, fingerprints, picture
from tests.s3 import FAULTS, FaultProxy, web_server
from tests.shards.conversion.test_crash import PER_SHARD, SLOW, start


@pytest.fixture
def web(make_folder) -> Iterator[FaultProxy]:
    """A web server, with listings, of the folder that holds `photos`; each answers with failures of one's choice."""

    folder = make_folder(9)
    (folder / "ant" / "a b+ü%2.png").write_bytes(encoded(picture(77), "PNG"))
    with web_server(folder.parent) as proxy:
        yield proxy


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.001)


def now_and_then(share: float, kinds: tuple[str, ...] = FAULTS) -> Callable[[str, str, int], str | None]:
    """A failure of any kind for each request with this probability, always the same ones."""
    dice = random.Random(0)
    return lambda *_: dice.choice(kinds) if dice.random() < share else None


def downloaded(url: str, to: Path) -> dict[str, str]:
    """Fingerprints of all files of a place."""
    place, to = open_place(url), to / "downloaded"
    for name in place.names():
        to.mkdir(exist_ok=True)
        (to / name).write_bytes(place.read(name))
    return fingerprints(to)


def local(source: Path, tmp_path: Path, **options) -> dict[str, str]:
    """Fingerprints of a conversion to this machine; a store holds no lock file when all is done."""
    convert(source, tmp_path / "local", **options)
    wanted = fingerprints(tmp_path / "local")
    return {name: sha for name, sha in wanted.items() if not name.startswith(".lock")}


def upload(folder: Path, url: str) -> None:
    place = open_place(url)
    for path in filter(Path.is_file, folder.rglob("*")):
        place.write(path.relative_to(folder).as_posix(), path.read_bytes())


def test_from_one_bucket_to_another_over_a_bad_line(
    make_folder, proxy: FaultProxy, bucket: str, tmp_path: Path
):
    source = make_folder(12)
    upload(source, f"{bucket}/photos")
    proxy.faults = now_and_then(0.15)
    convert(f"{bucket}/photos", f"{bucket}/shards", samples_per_shard=6, workers=1)
    assert proxy.num_faults > 10
    proxy.faults = lambda *_: None
    assert downloaded(f"{bucket}/shards", tmp_path) == local(source, tmp_path, samples_per_shard=6)
    before = len(proxy.seen)
    convert(f"{bucket}/photos", f"{bucket}/shards", samples_per_shard=6, workers=0)
    assert not [path for method, path, _ in proxy.seen[before:] if method == "PUT" and ".lock" not in path]


def test_a_store_that_stays_away_stops_the_conversion_and_nothing_is_lost(
    make_folder, proxy: FaultProxy, bucket: str, tmp_path: Path
):
    source = make_folder(12)
    upload(source, f"{bucket}/photos")
    options = {"samples_per_shard": 3, "workers": 0}
    proxy.faults = lambda method, path, _: "drop" if method == "PUT" and "shard-000002.tar" in path else None
    with pytest.raises(
        remote.Unreachable, match=r"/shards/shard-000002\.tar' failed 8 times.*Run the same command"
    ):
        convert(f"{bucket}/photos", f"{bucket}/shards", **options)
    assert open_place(f"{bucket}/shards").exists(".rows/shard-000001.parquet")
    # An image that cannot be read now may be there later: it is no bad image.
    name = read_plan(open_place(f"{bucket}/shards")).rows(2)["source"][0].as_py()
    proxy.faults = lambda method, path, _: "short" if method == "GET" and name in path else None
    with pytest.raises(
        remote.Unreachable, match=rf"/photos/{name}' failed 8 times, last: .* gave \d+ bytes of \d+"
    ):
        convert(f"{bucket}/photos", f"{bucket}/shards", **options)
    # What the store says is not there any more is.
    proxy.faults = lambda method, path, _: "404" if method == "GET" and name in path else None
    manifest = convert(f"{bucket}/photos", f"{bucket}/shards", **options)
    assert manifest is not None
    assert (manifest.num_samples, manifest.num_quarantined) == (11, 1)
    assert f'"source": "{name}"'.encode() in open_place(f"{bucket}/shards").read(layout.QUARANTINE)


def test_killed_and_run_again_the_bytes_are_the_same(
    make_folder, proxy: FaultProxy, bucket: str, tmp_path: Path
):
    source = make_folder(16)
    url = f"{bucket}/shards"
    process = start(SLOW, source, url, tmp_path)
    wait_for(process, lambda: proxy.requests("PUT", ".rows") >= 2)
    with pytest.raises(
        UserError, match=rf"Another conversion is at work in '{url}' \(process {process.pid} on "
    ):
        convert(source, url, samples_per_shard=PER_SHARD, workers=0)
    with pytest.raises(UserError, match="Another conversion is at work"):
        convert(source, url, samples_per_shard=PER_SHARD, workers=0, part=Part(0, 2))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not open_place(url).exists(layout.MANIFEST)
    assert open_place(url).exists(layout.LOCK)
    made = proxy.requests("PUT", "shard-000000.tar")
    convert(source, url, samples_per_shard=PER_SHARD, workers=0)  # on the same machine it is known to be dead
    assert proxy.requests("PUT", "shard-000000.tar") == made
    assert downloaded(url, tmp_path) == local(source, tmp_path, samples_per_shard=PER_SHARD)


def wait_for(process: subprocess.Popen, happened: Callable[[], bool]) -> None:
    while not happened():
        assert process.poll() is None, "it ended before that"
        time.sleep(0.002)


def test_parts_are_made_on_their_own_and_merged(make_folder, proxy: FaultProxy, bucket: str, tmp_path: Path):
    source = make_folder(9)
    url = f"{bucket}/shards"
    options = {"samples_per_shard": 3, "workers": 0, "dedupe": "drop"}
    for index in (1, 0):
        assert convert(source, url, part=Part(index, 2), **options) is None
        assert not open_place(url).exists(layout.MANIFEST)
    made = proxy.requests("PUT", ".tar")
    assert made == 3
    convert(source, url, **options)
    assert proxy.requests("PUT", ".tar") == made
    assert downloaded(url, tmp_path) == local(source, tmp_path, **options)


@pytest.fixture
def place(proxy: FaultProxy, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(lease, "DEAD_S", 0.5)
    monkeypatch.setattr(lease, "LOOK_S", 0.02)
    monkeypatch.setattr(lease, "BEAT_S", 0.05)
    return open_place(bucket)


def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on this process is of another machine."""
    monkeypatch.setattr(lease, "_process", lambda pid: f"elsewhere {pid} 1")


def test_a_lock_of_another_machine_is_watched(place: Place, monkeypatch: pytest.MonkeyPatch):
    with place.lock("lock"):
        held = place.read("lock")
        elsewhere(monkeypatch)
        with pytest.raises(UserError, match="Another conversion is at work"), place.lock("lock"):
            pass
        with pytest.raises(UserError, match="Another conversion is at work"), place.lock("lock", shared=True):
            pass
    assert not place.exists("lock")
    place.write("lock", held)  # and no beat
    start_s = time.monotonic()
    with place.lock("lock"):
        assert json.loads(place.read("lock"))["process"] == f"elsewhere {os.getpid()} 1"
    assert time.monotonic() - start_s >= 0.5
    assert place.names() == []


def test_the_whole_is_refused_while_a_part_is_made(place: Place):
    with place.lock("lock", shared=True), place.lock("lock-1-of-2"):
        with place.lock("lock", shared=True), place.lock("lock-0-of-2"):
            pass
        with pytest.raises(UserError, match="Another conversion is at work"), place.lock("lock"):
            pass
    with place.lock("lock"):
        pass
    assert place.names() == []


def test_of_two_that_come_at_once_one_gets_the_lock(place: Place):
    gate, created = threading.Barrier(6), []

    def create(i: int) -> None:
        gate.wait()
        created.append(place.create("lock", str(i).encode()))  # pyright: ignore[reportAttributeAccessIssue]

    threads = [threading.Thread(target=create, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(created) == [False] * 5 + [True]


def test_images_on_a_web_server(web: FaultProxy, tmp_path: Path):
    dice = now_and_then(0.3)
    # A listing is HTML and has no length of its own: a server that gives half of it in good order cannot be found out.
    web.faults = lambda method, path, count: None if path.endswith("/") else dice(method, path, count)
    convert(f"{web.url}/photos/", tmp_path / "out", workers=0, samples_per_shard=4)
    assert web.num_faults > 5
    shards = convert(tmp_path / "photos", tmp_path / "local", workers=0, samples_per_shard=4)
    assert shards is not None
    assert shards.num_samples == 10
    tars = [name for name in fingerprints(tmp_path / "local") if name.endswith(".tar")]
    assert sorted(tars) == [name for name in fingerprints(tmp_path / "out") if name.endswith(".tar")]


def test_a_web_server_that_fails_has_not_lost_its_files(web: FaultProxy):
    place = open_place(f"{web.url}/photos")
    size = place.size("ant/0000.jpg")
    assert size
    for kind in ("500", "503", "drop"):
        web.faults = lambda *_, kind=kind: kind
        with pytest.raises(remote.Unreachable, match=rf"{web.url}/photos/ant/0000.jpg' failed 8 times"):
            place.size("ant/0000.jpg")
    web.faults = lambda *_: None
    assert place.size("ant/none.jpg") is None
    with pytest.raises(FileNotFoundError, match=r"photos/ant/none\.jpg"):
        place.read("ant/none.jpg")
    # Python's server ignores ranges and gives the whole file.
    assert place.read_range("ant/0000.jpg", 3, 5) == place.read("ant/0000.jpg")[3:8]
    with place.open("ant/0000.jpg") as file:
        assert (file.seek(-4, os.SEEK_END), len(file.read())) == (size - 4, 4)


def test_destinations_and_credentials_that_cannot_work(
    web: FaultProxy, bucket: str, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(UserError, match="can only be read; give a DEST"):
        convert(f"{web.url}/photos", f"{web.url}/shards")
    with pytest.raises(UserError, match=r"There is nothing at 's3://bucket/.*/no'; check the URL of SOURCE"):
        convert(f"{bucket}/no", f"{bucket}/shards")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    type(open_place(bucket)._store).clear_instance_cache()  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(UserError, match=r"needs credentials \(Unable to locate credentials\)"):
        open_place(bucket).read("a")
