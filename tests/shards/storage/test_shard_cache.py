"""Remote shards on a local disk: one download for all, a limit, and nothing wrong that is taken for right."""

import hashlib
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shards.conversion.convert import convert
from shards.dataset import remote_shards
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError
from shards.format.layout import MANIFEST, TABLE, shard_name
from shards.storage import remote, shard_cache
from shards.storage.cache_settings import CacheSettings
from shards.storage.opening import open_place
from shards.storage.shard_cache import CachedFile, ShardCache
from shards.units import parse_bytes
from tests.needs import HANGS_S
from tests.s3 import FAULTS, FaultProxy

ROOT = Path(__file__).parents[3]
READ_ALL = """
import hashlib, sys
from shards.storage.cache_settings import CacheSettings
from shards.dataset.shard_set import ShardSet
shards = ShardSet.open(sys.argv[1], CacheSettings(sys.argv[2], "1GB"))
print("open", flush=True)
print(hashlib.sha256(b"".join(bytes(shards.read(i)) for i in range(len(shards)))).hexdigest())
"""


@pytest.fixture
def local(make_folder, tmp_path: Path) -> ShardSet:
    """12 samples in shards of 3, on this machine."""
    convert(make_folder(12), tmp_path / "out", samples_per_shard=3)
    return ShardSet.open(tmp_path / "out")


@pytest.fixture
def url(local: ShardSet, bucket: str) -> str:
    place = open_place(bucket)
    for name in (*(shard.name for shard in local.manifest.shards), TABLE, MANIFEST):
        place.write(name, (Path(local.folder) / name).read_bytes())
    return bucket


@pytest.fixture
def settings(tmp_path: Path) -> CacheSettings:
    return CacheSettings(str(tmp_path / "cache"), "1GB")


def all_bytes(shards: ShardSet) -> bytes:
    return b"".join(bytes(shards.read(i)) for i in range(len(shards)))


def downloads(proxy: FaultProxy, shard: int) -> int:
    return proxy.requests("GET", shard_name(shard))


def held(settings: CacheSettings) -> list[str]:
    """The numbers of the shards in a cache, as text; nothing else may lie there."""
    names = sorted(path.name for path in Path(settings.folder).iterdir())
    tars = [re.fullmatch(r"shard-0*(\d+)-[0-9a-f]{40}\.tar", name) for name in names]
    assert {name for name, tar in zip(names, tars, strict=True) if not tar and "samples-" not in name} == {
        ".lock"
    }
    return [tar[1] for tar in tars if tar]


def wait_until(happened: Callable[[], bool], limit_s: float = HANGS_S) -> None:
    end_s = time.monotonic() + limit_s
    while not happened():
        assert time.monotonic() < end_s
        time.sleep(0.005)


def start(url: str, settings: CacheSettings) -> subprocess.Popen:
    command = [sys.executable, "-c", READ_ALL, url, settings.folder]
    return subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
    )


def test_each_shard_is_downloaded_once_and_stays(
    local: ShardSet, url: str, settings: CacheSettings, proxy: FaultProxy
):
    shards = ShardSet.open(url, settings)
    assert shards.folder == url
    assert shards.labels.tolist() == local.labels.tolist()
    assert [shards.name(i) for i in range(12)] == [local.name(i) for i in range(12)]
    assert shards.shard_path(4) == f"{url}/shard-000001.tar"
    gate, results = threading.Barrier(6), []

    def read() -> None:
        gate.wait()
        results.append(all_bytes(shards))

    threads = [threading.Thread(target=read) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [all_bytes(local)] * 6
    assert all_bytes(ShardSet.open(url, settings)) == results[0]
    assert [downloads(proxy, shard) for shard in range(4)] == [1] * 4
    assert held(settings) == ["0", "1", "2", "3"]


def test_two_processes_download_once_and_one_killed_at_it_does_no_harm(
    local: ShardSet, url: str, settings: CacheSettings, proxy: FaultProxy
):
    wanted = hashlib.sha256(all_bytes(local)).hexdigest()
    proxy.stall_s = 60
    proxy.faults = lambda method, path, _: "stall" if method == "GET" and "shard-000002" in path else None
    process = start(url, settings)
    wait_until(lambda: downloads(proxy, 2) == 1)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    [part] = Path(settings.folder).glob("*.part")
    assert part.stat().st_size == local.manifest.shards[2].bytes  # as long as the whole, and no byte of it
    proxy.faults = lambda *_: None
    before = [downloads(proxy, shard) for shard in range(4)]
    proxy.stall_s = 0.5
    proxy.faults = lambda method, path, _: "stall" if method == "GET" and "shard-" in path else None
    processes = [start(url, settings) for _ in range(2)]
    assert [process.communicate()[0].split() for process in processes] == [["open", wanted]] * 2
    after = [downloads(proxy, shard) for shard in range(4)]
    assert [new - old for new, old in zip(after, before, strict=True)] == [0, 0, 1, 1]
    assert held(settings) == ["0", "1", "2", "3"]


def test_the_part_of_a_dead_process_makes_room(url: str, settings: CacheSettings):
    size = ShardSet.open(url, settings).manifest.shards[0].bytes
    Path(settings.folder, "shard-000009-abc.tar.part").write_bytes(bytes(10**6))
    ShardSet.open(url, CacheSettings(settings.folder, str(10**6 + size // 2))).read(0)
    assert held(settings) == ["0"]


def test_what_was_used_longest_ago_makes_room_and_its_maps_stay(
    local: ShardSet, url: str, settings: CacheSettings, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(remote_shards, "TOUCH_S", 0.0)
    sizes = [shard.bytes for shard in local.manifest.shards]
    table = (Path(local.folder) / TABLE).stat().st_size
    shards = ShardSet.open(url, CacheSettings(settings.folder, str(3 * max(sizes) - 1)))
    assert table < max(sizes)
    views = {i: shards.read(i) for i in (0, 3)}
    assert held(settings) == ["0", "1"]
    shards.read(1)  # of shard 0, mapped already: that counts as a use
    views[6] = shards.read(6)
    assert held(settings) == ["0", "2"]
    views[9] = shards.read(9)
    assert held(settings) == ["2", "3"]
    assert {i: bytes(view) for i, view in views.items()} == {i: bytes(local.read(i)) for i in views}
    assert all_bytes(shards) == all_bytes(local)  # from the maps: nothing is downloaded again
    assert [downloads(proxy, shard) for shard in range(4)] == [1] * 4
    monkeypatch.setattr(remote_shards, "FORGET_S", 0.0)
    again = ShardSet.open(url, CacheSettings(settings.folder, str(2 * max(sizes) - 1)))
    for i in (0, 3, 6, 9):
        again.read(i)
        assert len(again._maps) == 1
        assert list(again._maps) == [i // 3]


def test_a_copy_that_was_changed_is_fetched_again(
    local: ShardSet, url: str, settings: CacheSettings, proxy: FaultProxy
):
    all_bytes(ShardSet.open(url, settings))
    for shard, cut in ((0, False), (1, True)):
        [path] = Path(settings.folder).glob(f"shard-{shard:06d}-*.tar")
        data = bytearray(path.read_bytes())
        data[1000] ^= 1
        path.write_bytes(data[:-512] if cut else data)
    # Flipped on the disk: the times are those of a file that is whole.
    [path] = Path(settings.folder).glob("shard-000002-*.tar")
    status, data = path.stat(), bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    # Copied by hand and right.
    [path] = Path(settings.folder).glob("shard-000003-*.tar")
    path.touch()
    shards = ShardSet.open(url, settings)
    assert bytes(shards.read(0)) == bytes(local.read(0))
    assert bytes(shards.read(3)) == bytes(local.read(3))
    assert bytes(shards.read(6)) + bytes(shards.read(7)) != bytes(local.read(6)) + bytes(local.read(7))
    assert shards.mend(6)
    assert not shards.mend(0)
    assert all_bytes(shards) == all_bytes(local)
    assert not shards.mend(6)
    assert [downloads(proxy, shard) for shard in range(4)] == [2, 2, 2, 1]


def test_a_bad_line_costs_a_piece_not_the_shard(
    local: ShardSet, url: str, settings: CacheSettings, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(remote, "PIECE_BYTES", 2000)
    dice = random.Random(1)
    proxy.faults = lambda *_: dice.choice(FAULTS) if dice.random() < 0.2 else None
    assert all_bytes(ShardSet.open(url, settings)) == all_bytes(local)
    assert proxy.num_faults > 8


def test_a_remote_shard_that_is_missing_or_cut_or_another(
    local: ShardSet, url: str, settings: CacheSettings, proxy: FaultProxy
):
    place, name = open_place(url), shard_name(1)
    whole = place.read(name)
    shards = ShardSet.open(url, settings)
    place.remove(name)
    with pytest.raises(FileNotFoundError, match=rf"{url}/{name}"):
        shards.read(3)
    asked = len(proxy.seen)
    with pytest.raises(FileNotFoundError, match=rf"{url}/{name}"):
        shards.read(4)
    assert len(proxy.seen) == asked  # nor for each of its other samples
    place.write(name, whole[:-512])
    with pytest.raises(
        UserError, match=rf"{name}' has {len(whole) - 512:,} bytes and should have {len(whole):,}"
    ):
        ShardSet.open(url, settings)
    cache = ShardCache(place, Path(settings.folder), 10**9)  # pyright: ignore[reportArgumentType]
    file = CachedFile(name, len(whole), local.manifest.shards[1].sha256, local.manifest.shards[1].sha256)
    with pytest.raises(UserError, match=rf"{name}' has .* and should have .*: it was cut or changed"):
        cache.open(file)
    place.write(name, whole[:-1] + b"!")
    with pytest.raises(UserError, match=rf"{name}' has SHA-256 [0-9a-f]{{16}}.*its manifest says"):
        ShardCache(place, Path(settings.folder), 10**9).open(file)  # pyright: ignore[reportArgumentType]
    place.remove(name)
    with pytest.raises(UserError, match=rf"{name}' is missing"):
        ShardSet.open(url, settings)
    assert held(settings) == []


def test_shards_are_fetched_before_they_are_wanted(
    local: ShardSet, url: str, settings: CacheSettings, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(shard_cache, "DOWNLOADS", 1)
    shards = ShardSet.open(url, settings)
    shards.prefetch([2, 0])
    wait_until(
        lambda: held(settings) == ["0", "2"] if not list(Path(settings.folder).glob("*.part")) else False
    )
    assert [path for method, path, _ in proxy.seen if method == "GET" and "shard-" in path] == [
        f"/bucket/{url.rpartition('/')[2]}/{shard_name(i)}" for i in (2, 0)
    ]
    shards.read(0)
    shards.read(6)
    assert [downloads(proxy, shard) for shard in range(4)] == [1, 0, 1, 0]
    # No more than fits, though more are asked for; those in use stay.
    sizes = [shard.bytes for shard in local.manifest.shards]
    few = ShardSet.open(url, CacheSettings(settings.folder, str(sizes[0] + sizes[3] + 1)))
    few.prefetch([0, 3, 1, 2])
    wait_until(
        lambda: held(settings) == ["0", "3"] if not list(Path(settings.folder).glob("*.part")) else False
    )
    assert [downloads(proxy, shard) for shard in range(4)] == [1, 0, 1, 1]


def test_limits_and_folders_that_cannot_be(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(
        UserError, match=r"shard-00000\d\.tar' has [\d,]+ bytes and the cache .* may hold 1,000"
    ):
        ShardSet.open(url, CacheSettings(str(tmp_path / "cache"), "1kB"))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot be written .*choose another with --data.cache-dir"):
        ShardSet.open(url, CacheSettings(str(tmp_path / "file" / "cache"), "1GB"))
    monkeypatch.setenv("FASTSSL_CACHE_DIR", str(tmp_path / "named"))
    monkeypatch.setenv("FASTSSL_CACHE_BYTES", "3MiB")
    assert (CacheSettings().path(), CacheSettings().limit_bytes()) == (tmp_path / "named", 3 * 2**20)
    assert CacheSettings(str(tmp_path), "1kB").limit_bytes() == 1000
    monkeypatch.delenv("FASTSSL_CACHE_BYTES")
    assert CacheSettings(str(tmp_path / "not" / "there")).limit_bytes() > 10**6


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("200GB", 200 * 10**9),
        ("1.5 tb", 15 * 10**11),
        ("512MiB", 2**29),
        ("1000000", 10**6),
        ("7b", 7),
        ("2K", None),
    ],
)
def test_numbers_of_bytes(text: str, wanted: int | None):
    if wanted is None:
        with pytest.raises(UserError, match="'2K' is no number of bytes; write it as 200GB"):
            parse_bytes(text)
    else:
        assert parse_bytes(text) == wanted
