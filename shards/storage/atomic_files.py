"""Files that appear whole or not at all."""

import contextlib
import errno
import fcntl
import io
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import IO, Any, BinaryIO, TypeVar

from shards.errors import UserError

T = TypeVar("T")
_UNFINISHED = re.compile(r"\..+\.\d+\.tmp")
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
    beside the target, flushed to the disk, renamed over it, and the folder flushed too. Raise UserError when
    the disk is full, read-only or failing, or the file too large for it; the unfinished file is then removed.
    """
    path = Path(path)
    # Process id and salt keep two writers apart; whatever a killed one leaves is removed by `remove_unfinished`.
    tmp = path.with_name(f".{path.name}.{os.getpid()}{_SALT:06d}.tmp")
    try:
        with open(tmp, "wb", buffering=1 << 17) as file:
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


def check_output(path: str | os.PathLike, flag: str) -> None:
    """Make sure that `atomic_write` will be able to write `path`: called before the work, not after it.

    Raise UserError, naming the `flag` that gave the path, where it is a folder, or where its own folder is missing or
    not writable. What stands at `path` is left as it is.
    """
    path = Path(path)
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

    Raises BlockingIOError where another process holds it (unless both share it), OSError where the file cannot be made.
    """
    while True:
        file = open(path, "w")  # noqa: SIM115 (the caller's)
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


def missing_folders(folder: Path) -> list[Path]:
    """The folder and those above it, as far as they are not there yet; for `remove_empty`."""
    return [place for place in (folder, *folder.parents) if not place.exists()]


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders, the innermost first, up to one that holds something or is gone."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def is_unfinished(name: str) -> bool:
    """Whether `atomic_write` gives such a name to a file it is writing: `.shard-000012.tar.4711.tmp`."""
    return _UNFINISHED.fullmatch(name) is not None


def _flush_folder(folder: Path) -> None:
    # A rename is only on the disk once its folder is.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
