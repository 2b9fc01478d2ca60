"""Files that appear whole or not at all."""

import contextlib
import errno
import fcntl
import io
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import IO, Any, BinaryIO, TypeVar

from shards.errors import UserError

T = TypeVar("T")
# No other program's file ends so: what a killed writer left is removed by its name.
_MARK = "fastssl-tmp"
_UNFINISHED = re.compile(rf"\..+\.\d+\.{_MARK}")
_SALT = secrets.randbelow(10**6)  # process ids of two machines, or containers, may be equal
_FULL = {errno.ENOSPC, errno.EDQUOT}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO}


class RangeFile(io.RawIOBase):
    """`size` bytes to read and seek in, each piece of them given by `read(offset, wanted)`: exactly `wanted` bytes."""

    def __init__(self, size: int, read: Callable[[int, int], bytes]):
        self._size, self._read, self._at = size, read, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._size - self._at)
        if wanted <= 0:
            return 0
        buffer[:wanted] = self._read(self._at, wanted)
        self._at += wanted
        return wanted


def atomic_write(path: str | os.PathLike, content: bytes | Callable[[BinaryIO], T]) -> T | None:
    """Write a file so that a crash at any moment leaves the old file or the whole new one.

    `content` is the bytes, or a function that writes them to the open file; its result is returned. Written
    beside the target, flushed to the disk, renamed over it, and the folder flushed too. A device or a pipe, such
    as /dev/stdout, is written to and stays what it is. Raise UserError when the disk is full, read-only or failing,
    or the file too large for it; the unfinished file is then removed.
    """
    path = Path(path)
    if is_device(path):
        return _write_to_device(path, content)
    # Process id and salt keep two writers apart; whatever a killed one leaves is removed by `remove_unfinished`.
    tmp = path.with_name(f".{path.name}.{os.getpid()}{_SALT:06d}.{_MARK}")
    try:
        with open(tmp, "xb", buffering=1 << 17) as file:
            if callable(content):
                result = content(file)
            else:
                file.write(content)
                result = None
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp, path)
        _flush_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            tmp.unlink()
        if isinstance(error, OSError) and error.errno in _FULL:
            free = shutil.disk_usage(path.parent).free
            raise UserError(
                f"The disk is full: '{path}' could not be written, {free:,} bytes are free. Make room there; "
                "what is finished is kept, and the same command goes on from it."
            ) from error
        if isinstance(error, OSError) and error.errno == errno.EFBIG:
            raise UserError(
                f"'{path}' became larger than its file system or this shell (ulimit -f) allows; choose another place, or fewer "
                "--samples-per-shard."
            ) from error
        # Whatever `content` reads has a name of its own.
        if isinstance(error, OSError) and error.errno in _REFUSED and error.filename in (None, str(tmp)):
            raise UserError(
                f"'{path}' could not be written ({error.strerror}): mend that, or choose another place. What is finished is kept."
            ) from error
        raise
    return result


def is_device(path: Path) -> bool:
    """Whether a path is a device, a pipe, a socket, or one of the files that this process has open, as /dev/stdout is."""
    if _own_descriptor(path) is not None:
        return True
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def _own_descriptor(path: Path) -> int | None:
    """The number of the open file that a path names, or None: /dev/stdout leads to /proc/self/fd/1, /dev/fd to /proc/self/fd."""
    with contextlib.suppress(OSError):
        named = Path(os.readlink(path)) if path.parent == Path("/dev") and path.is_symlink() else path
        if named.name.isdigit() and os.path.realpath(named.parent) == f"/proc/{os.getpid()}/fd":
            return int(named.name)
    return None


def _write_to_device(path: Path, content: bytes | Callable[[BinaryIO], T]) -> T | None:
    own = _own_descriptor(path)
    try:
        # Opened anew, a file behind /dev/stdout would be written over from its start.
        sys.stdout.flush()
        with open(path if own is None else os.dup(own), "wb") as file:
            if callable(content):
                return content(file)
            file.write(content)
            return None
    except OSError as error:
        raise UserError(f"'{path}' could not be written ({error.strerror}): choose another place.") from error


def check_output(path: str | os.PathLike, flag: str) -> None:
    """Make sure that `atomic_write` will be able to write `path`: called before the work, not after it.

    Raise UserError, naming the `flag` that gave the path, where it is a folder, or where its own folder is missing or
    not writable. What stands at `path` is left as it is.
    """
    path = Path(path)
    if is_device(path):
        if not os.access(path, os.W_OK):
            raise UserError(f"{flag} '{path}' cannot be written: choose another place.")
        return
    if path.is_dir():
        raise UserError(f"{flag} '{path}' is a folder: name a file.")
    if not path.parent.is_dir():
        raise UserError(f"There is no folder '{path.parent}' for {flag} '{path}': make it first.")
    try:
        # A trial, because the mode bits say nothing of read-only and remote file systems. It leaves no file.
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(
            f"{flag} '{path}' cannot be written ({error.strerror}): choose another folder."
        ) from error


def remove_unfinished(folder: Path, names: Collection[str] | None = None) -> None:
    """Remove what killed processes left of `atomic_write` in `folder`: of the files `names`, or of all.

    No writer of them may be at work there.
    """
    for path in folder.iterdir():
        if is_unfinished(path.name) and (names is None or path.name[1:].rsplit(".", 2)[0] in names):
            path.unlink(missing_ok=True)


def lock_file(path: Path, *, shared: bool = False) -> IO[str]:
    """An open file that holds a lock on itself until it is closed; the system frees it if we are killed.

    Whoever holds it alone may remove the file before closing it.

    Raises BlockingIOError where another process holds it (unless both share it), OSError where the file cannot be made,
    UserError where something else has its name: a link would empty the file that it leads to.
    """
    while True:
        try:
            descriptor = os.open(
                path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666
            )
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
                raise UserError(_other_file(path)) from error
            raise
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise UserError(_other_file(path))
        file = os.fdopen(descriptor, "r+")
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        # Its last holder has removed it since it was opened: a lock on it would keep nobody out.
        file.close()


def _other_file(path: Path) -> str:
    return f"'{path}' should be our lock, a plain file, and is a link or another thing: remove it, or choose another folder."


def missing_folders(folder: Path) -> list[Path]:
    """The folder and those above it, as far as they are not there yet; for `remove_empty`."""
    return [place for place in (folder, *folder.parents) if not place.exists()]


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders, the innermost first, up to one that holds something or is gone."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def is_unfinished(name: str) -> bool:
    """Whether `atomic_write` gives such a name to a file it is writing: `.shard-000012.tar.4711.fastssl-tmp`."""
    return _UNFINISHED.fullmatch(name) is not None


def _flush_folder(folder: Path) -> None:
    # A rename is only on the disk once its folder is.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
