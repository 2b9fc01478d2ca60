"""Local and remote places: the same calls, the same bytes."""

import pickle
from pathlib import Path

import fsspec
import pytest

from shards.conversion.convert import convert
from shards.errors import UserError
from shards.storage import remote
from shards.storage.local import LocalPlace
from shards.storage.opening import open_place
from shards.storage.place import Place
from tests.pictures import fingerprints


@pytest.fixture(params=["local", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "local":
        return open_place(tmp_path / "there")
    return open_place(f"memory://{tmp_path.name}/there")


def test_what_is_written_is_read(place: Place):
    place.make()
    place.write("a.bin", b"0123456789")
    assert place.write("deep/b.bin", lambda file: file.write(b"xyz")) == 3
    assert (place.read("a.bin"), place.read_range("deep/b.bin", 1, 2)) == (b"0123456789", b"yz")
    assert (place.size("a.bin"), place.size("no.bin"), place.exists("deep/b.bin")) == (10, None, True)
    assert place.names() == ["a.bin", "deep"] if place.local else ["a.bin"]
    assert place.names("deep") == ["b.bin"]
    assert sorted(place.walk()) == [("a.bin", 10), ("deep/b.bin", 3)]
    with place.open("a.bin") as file:
        file.seek(8)
        assert file.read() == b"89"
    with pytest.raises(FileNotFoundError):
        place.read("no.bin")
    copy = pickle.loads(pickle.dumps(place))
    assert (copy.url, copy.read("a.bin")) == (place.url, b"0123456789")
    place.remove("a.bin")
    place.remove("a.bin")
    place.remove_tree("deep")
    assert [name for name, _ in place.walk()] == []


def test_a_short_read_is_an_error(place: Place, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.0)
    place.make()
    place.write("a.bin", b"0123")
    with pytest.raises((OSError, remote.Unreachable), match="gave 2 bytes of 5 at 2"):
        place.read_range("a.bin", 2, 5)


def test_dropped_connections_are_tried_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.0)
    place = open_place(f"memory://{tmp_path.name}/drops")
    place.write("a.bin", b"0123")
    store = fsspec.filesystem("memory")
    really, calls = store.cat_file, []

    def dropping(path: str, **options):
        calls.append(path)
        if len(calls) < 8:
            raise ConnectionResetError("dropped")
        return really(path, **options)

    monkeypatch.setattr(type(store), "cat_file", lambda self, path, **options: dropping(path, **options))
    assert place.read("a.bin") == b"0123"
    assert len(calls) == remote.TRIES == 8
    calls.clear()
    monkeypatch.setattr(remote, "TRIES", remote.TRIES - 1)  # one too few
    with pytest.raises(remote.Unreachable, match=f"a.bin' failed {remote.TRIES} times, last: dropped"):
        place.read("a.bin")


def test_shards_written_to_a_remote_store_are_the_same(make_folder, tmp_path: Path):
    source = make_folder(20)
    convert(source, tmp_path / "out", samples_per_shard=6)
    url = f"memory://{tmp_path.name}/shards"
    manifest = convert(source, url, samples_per_shard=6, workers=0)
    there = open_place(url)
    for name, data in fsspec.filesystem("memory").store.items():
        if name.startswith(f"/{tmp_path.name}/shards/"):
            (tmp_path / "copy").mkdir(exist_ok=True)
            (tmp_path / "copy" / name.rpartition("/")[2]).write_bytes(data.getvalue())
    wanted = fingerprints(tmp_path / "out")
    wanted.pop(".lock")
    assert fingerprints(tmp_path / "copy") == wanted
    there.remove("shard-000001.tar")
    assert convert(source, url, samples_per_shard=6, workers=0) == manifest
    assert there.size("shard-000001.tar") is not None


def test_images_in_a_remote_store_convert_as_local_ones(make_folder, tmp_path: Path):
    source = make_folder(9)
    there = open_place(f"memory://{tmp_path.name}/photos")
    for path in source.rglob("*.*"):
        there.write(path.relative_to(source).as_posix(), path.read_bytes())
    convert(source, tmp_path / "a")
    convert(there.url, tmp_path / "b", workers=0)
    assert fingerprints(tmp_path / "a") == fingerprints(tmp_path / "b")


@pytest.mark.parametrize(
    ("url", "end"),
    [
        ("s3://b/x", ": pip install s3fs."),
        ("gs://b/x", ": pip install gcsfs."),
        ("https://b/x", ": pip install aiohttp requests."),
        ("abfs://b/x", "(Install it)."),
    ],
)
def test_a_missing_package_is_named(url: str, end: str, monkeypatch: pytest.MonkeyPatch):
    def missing(*_, **__):
        raise ImportError("Install it")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(UserError) as caught:
        remote.RemotePlace(url)
    assert str(caught.value).endswith(end)


def test_unknown_protocols_are_user_errors():
    with pytest.raises(UserError, match="of no known protocol"):
        open_place("nonsense://bucket")
    assert isinstance(open_place("file:///tmp"), LocalPlace)


def test_a_home_folder_is_the_users_own(tmp_path, monkeypatch):
    """A shell expands ~, Python does not: a folder of that name would be made here."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_place("~/shards").local == tmp_path / "shards"
