import errno
import fcntl
import os
import tempfile
from pathlib import Path

import pytest

from shards.errors import UserError, nearest
from shards.storage.atomic_files import atomic_write, check_output, lock_file, remove_unfinished
from shards.storage.local import LocalPlace


def test_bytes_and_functions_are_written(tmp_path: Path):
    assert atomic_write(tmp_path / "a", b"one") is None
    assert atomic_write(tmp_path / "b", lambda file: file.write(b"three")) == 5
    assert (tmp_path / "a").read_bytes() == b"one"
    assert (tmp_path / "b").read_bytes() == b"three"
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_write(path, fail)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_names_the_file_and_the_free_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
):
    def full(descriptor: int):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"disk is full: '.*/a' could not be written, [\d,]+ bytes are free"):
        atomic_write(tmp_path / "a", b"one")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.EROFS, r"'.*/a' could not be written \(Read-only file system\)"),
        (errno.EIO, r"'.*/a' could not be written \(Input/output error\)"),
        (errno.EFBIG, r"'.*/a' became larger than .*ulimit -f.* allows"),
    ],
)
def test_a_disk_that_refuses_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, message: str
):
    def refuse(descriptor: int):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UserError, match=message):
        atomic_write(tmp_path / "a", b"one")
    assert os.listdir(tmp_path) == []


def test_a_fault_of_what_is_read_is_not_taken_for_one_of_the_disk(tmp_path: Path):
    def content(file):
        raise PermissionError(errno.EACCES, "Permission denied", "photos/1.jpg")

    with pytest.raises(PermissionError):
        atomic_write(tmp_path / "a", content)


def test_other_system_errors_pass_unchanged(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        atomic_write(tmp_path / "missing" / "a", b"one")


def test_a_write_is_flushed_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls = []
    flush, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("flush"), flush(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("rename"), rename(a, b)))
    atomic_write(tmp_path / "a", b"one")
    assert calls == ["flush", "rename", "flush"]


def test_an_output_is_checked_without_a_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "old").write_bytes(b"old")
    for name in ("old", "new"):
        check_output(tmp_path / name, "--json")
    monkeypatch.chdir(tmp_path)
    check_output("new", "--json")
    assert os.listdir(tmp_path) == ["old"]
    assert (tmp_path / "old").read_bytes() == b"old"


def test_outputs_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_bytes(b"")
    for folder in ("missing", "file"):
        with pytest.raises(
            UserError, match=rf"no folder '.*/{folder}' for --out '.*/{folder}/a': make it first"
        ):
            check_output(tmp_path / folder / "a", "--out")
    for path in (tmp_path, ""):
        with pytest.raises(UserError, match=r"--out '.*' is a folder: name a file"):
            check_output(path, "--out")

    def refuse(**_):  # mode bits do not stop root
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(
        UserError, match=r"--out '.*/a' cannot be written \(Permission denied\): choose another folder"
    ):
        check_output(tmp_path / "a", "--out")


def test_what_killed_writers_left_is_removed(tmp_path: Path):
    for name in (".a.123.tmp", "a", ".hidden", "b.tmp", ".b.tmp"):
        (tmp_path / name).write_bytes(b"")
    remove_unfinished(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".b.tmp", ".hidden", "a", "b.tmp"]


def test_nearest_suggests_or_lists():
    assert nearest("resnet51", ["vit", "resnet50"]) == " Did you mean 'resnet50'?"
    assert nearest("xyz", ["b", "a"]) == " Known: a, b."
    assert nearest("xyz", []) == " Known: none."


def test_a_lock_on_a_file_that_its_holder_removed_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Between opening and locking, the process that held it may remove it: a lock on that keeps nobody out."""
    path, flock, waiting = tmp_path / ".lock", fcntl.flock, [True]

    def late(file, how):
        if waiting:
            waiting.clear()
            path.unlink()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with lock_file(path):
        assert path.exists()
        with pytest.raises(BlockingIOError):
            lock_file(path)


def test_a_new_lock_goes_with_what_failed_under_it(tmp_path: Path):
    place = LocalPlace(tmp_path)
    for shared, left in ((False, []), (True, ["lock"])):
        with pytest.raises(UserError), place.lock("lock", shared=shared):
            raise UserError("refused")
        assert place.names() == left
    # One that was there before stays.
    with pytest.raises(UserError), place.lock("lock"):
        raise UserError("refused")
    assert place.names() == ["lock"]
