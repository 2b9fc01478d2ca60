import errno
import fcntl
import os
import stat
import subprocess
import sys
import tempfile
import threading
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


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path: Path):
    for name in (".a.123.fastssl-tmp", "a", ".hidden", "b.tmp", ".b.tmp", ".backup.2024.tmp"):
        (tmp_path / name).write_bytes(b"")
    remove_unfinished(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".b.tmp", ".backup.2024.tmp", ".hidden", "a", "b.tmp"]


def test_a_pipe_is_written_to_and_stays_one(tmp_path: Path):
    """As root a rename would put a file in the place of /dev/stdout, for every program of the machine."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    got: list[bytes] = []
    for content in (b"whole", lambda file: file.write(b"by parts")):
        reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
        reader.start()
        check_output(pipe, "--json")
        atomic_write(pipe, content)
        reader.join()
    assert got == [b"whole", b"by parts"]
    assert stat.S_ISFIFO(pipe.lstat().st_mode)
    assert os.listdir(tmp_path) == ["pipe"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes devices")
def test_a_device_stays_one_and_a_link_to_it_too(tmp_path: Path):
    null, link = tmp_path / "null", tmp_path / "link"
    try:
        os.mknod(null, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except OSError:
        pytest.skip("this container makes no devices")
    link.symlink_to(null)
    for path in (null, link):
        check_output(path, "--json")
        atomic_write(path, b"gone")
    assert stat.S_ISCHR(null.lstat().st_mode)
    assert link.is_symlink()


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
@pytest.mark.parametrize("to_file", [True, False])
def test_stdout_gets_the_content_after_what_was_printed(name: str, to_file: bool, tmp_path: Path):
    code = (
        "from shards.storage.atomic_files import atomic_write, check_output\n"
        f"print('before'); check_output({name!r}, '--json'); atomic_write({name!r}, b'content\\n'); print('after')"
    )
    before = os.lstat(name) if name == "/dev/stdout" else None
    with open(tmp_path / "out", "wb") as file:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=file if to_file else subprocess.PIPE, check=True
        )
    shown = (tmp_path / "out").read_bytes() if to_file else done.stdout
    assert shown == b"before\ncontent\nafter\n"
    assert before is None or stat.S_ISLNK(os.lstat(name).st_mode) == stat.S_ISLNK(before.st_mode)
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "folder"])
def test_a_lock_empties_nothing_and_writes_through_no_link(kind: str, tmp_path: Path):
    victim, lock = tmp_path / "victim", tmp_path / ".lock"
    if kind == "pipe":
        os.mkfifo(lock)
    elif kind == "folder":
        lock.mkdir()
    else:
        lock.symlink_to(victim)
    if kind == "link":
        victim.write_bytes(b"mine")
    with pytest.raises(
        UserError, match=r"\.lock' should be our lock, a plain file, and is a link or another thing"
    ):
        lock_file(lock)
    assert (victim.read_bytes() == b"mine") if kind == "link" else not victim.exists()


def test_a_link_in_the_place_of_an_output_is_replaced_and_what_it_leads_to_stays(tmp_path: Path):
    victim, out = tmp_path / "victim", tmp_path / "out"
    victim.write_bytes(b"mine")
    out.symlink_to(victim)
    atomic_write(out, b"new")
    assert (victim.read_bytes(), out.read_bytes(), out.is_symlink()) == (b"mine", b"new", False)


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
