"""Where files lie: a local folder, or any store that fsspec reaches, behind the same few calls."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

from shards.errors import UserError
from shards.storage.atomic_files import atomic_write, lock_file, remove_unfinished

T = TypeVar("T")

_ONE_READ = 1 << 30  # bytes; the system gives at most twice as many at once


def open_place(where: str | os.PathLike | Place) -> Place:
    """The place of a path, or of a URL such as `s3://bucket/shards`; a Place is returned as it is.

    Raises UserError where the package for a URL's protocol is missing (extra `remote`) or the protocol is unknown.
    """
    if isinstance(where, Place):
        return where
    text = os.fspath(where)
    if "://" not in text or text.startswith("file://"):
        return LocalPlace(text)
    from shards.storage.remote import RemotePlace

    return RemotePlace(text)


class Place:
    """A folder of files; names in it are relative, with forward slashes. Picklable.

    `url` is what the user wrote; `local` is the folder on this machine, None for a remote place; `name` its own last part. What is
    missing raises FileNotFoundError. All else that goes wrong raises OSError in a local place, and in a remote one
    `shards.storage.remote.Unreachable`, a UserError: there it is no fault of the file.
    """

    url: str
    local: Path | None = None

    @property
    def name(self) -> str:
        return self.url.rstrip("/").rpartition("/")[2]

    def __truediv__(self, name: str) -> str:
        return f"{self.url.rstrip('/')}/{name}"

    def is_there(self) -> bool:
        """Whether the folder answers."""
        raise NotImplementedError

    def check_folder(self, what: str) -> None:
        """Raises UserError where there is no such folder; `what` says what it is for, such as SOURCE."""
        raise NotImplementedError

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        return self.size(name) is not None

    def size(self, name: str) -> int | None:
        """A file's bytes; None where there is no such file."""
        raise NotImplementedError

    def names(self, folder: str = "") -> list[str]:
        """The files directly in a folder, by their own names, sorted; none where there is no such folder."""
        raise NotImplementedError

    def walk(self) -> Iterator[tuple[str, int]]:
        """All files below, with their bytes, one by one in any order; hidden names and `__MACOSX` are skipped."""
        raise NotImplementedError

    def read(self, name: str, listed_bytes: int = 0) -> bytes:
        """A whole file. `listed_bytes`, as a listing gave them, save a remote place a question; 0 where they are not known."""
        raise NotImplementedError

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`; OSError where the file holds fewer."""
        raise NotImplementedError

    def open(self, name: str) -> IO[bytes]:
        """A file to read and seek in."""
        raise NotImplementedError

    def write(self, name: str, content: bytes | Callable[[Any], T]) -> T | None:
        """Writes a file whole or not at all; `content` is its bytes, or a function that writes them and whose result is returned."""
        raise NotImplementedError

    def remove(self, name: str) -> None:
        """Removes a file; one that is missing is no error."""
        raise NotImplementedError

    def remove_tree(self, folder: str) -> None:
        """Removes a folder and all in it; one that is missing is no error."""
        raise NotImplementedError

    def remove_unfinished(self, folder: str = "", names: Collection[str] | None = None) -> None:
        """Removes what killed writers left in a folder, of the files `names` or of all files."""

    def make(self) -> None:
        """Creates the folder, where there is such a thing."""

    def check_writable(self, way_out: str) -> None:
        """Raises UserError, ending with `way_out`, where nothing can ever be written: on a web server."""

    def sizes(self) -> dict[str, int] | None:
        """The bytes of each file directly in the folder, in one question; None where the place lists no sizes."""
        return None

    def lock(self, name: str, *, shared: bool = False) -> contextlib.AbstractContextManager[None]:
        """Holds a lock, exclusive or shared; UserError where another process holds it."""
        raise NotImplementedError


class LocalPlace(Place):
    """A folder on this machine."""

    def __init__(self, path: str | os.PathLike):
        self.url = os.fspath(path)
        self.local: Path = Path(self.url.removeprefix("file://"))

    def __reduce__(self):
        # Whoever unpickles it may work in another folder, on another machine even.
        return LocalPlace, (os.path.abspath(self.local),)

    @property
    def name(self) -> str:
        return self.local.resolve().name

    def is_there(self) -> bool:
        return self.local.is_dir()

    def check_folder(self, what: str) -> None:
        if not self.local.exists():
            raise UserError(f"there is no folder '{self.url}'; check the path of {what}.")
        if not self.local.is_dir():
            raise UserError(f"'{self.url}' is a file; {what} is the folder that holds the images.")

    def size(self, name: str) -> int | None:
        try:
            status = os.stat(self.local / name)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return status.st_size

    def names(self, folder: str = "") -> list[str]:
        try:
            return sorted(os.listdir(self.local / folder))
        except FileNotFoundError:
            return []

    def walk(self) -> Iterator[tuple[str, int]]:
        """See `Place.walk`. Follows links to folders, not in circles; leaves out pipes and devices, which would block a reader.

        A dangling link counts as a file of 0 bytes: it will be reported. UserError for a folder that cannot be read and a name that is
        not valid UTF-8.
        """
        yield from _walk(str(self.local), "", frozenset())

    def read(self, name: str, listed_bytes: int = 0) -> bytes:
        # Joining paths takes as long as reading a small image, and so does making a file object.
        path = f"{self.local}/{name}"
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            # One byte more would show that the file has grown.
            data = os.read(descriptor, min(listed_bytes, _ONE_READ) + 1)
            if len(data) != listed_bytes:
                with open(descriptor, "rb", buffering=0, closefd=False) as file:
                    data += file.readall()
            return data
        except OSError as fault:
            fault.filename = path
            raise
        finally:
            os.close(descriptor)

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        with open(self.local / name, "rb", buffering=0) as file:
            data = os.pread(file.fileno(), size, offset)
        return whole(data, self / name, offset, size)

    def open(self, name: str) -> IO[bytes]:
        return open(self.local / name, "rb")

    def write(self, name: str, content: bytes | Callable[[Any], T]) -> T | None:
        path = self.local / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return atomic_write(path, content)

    def remove(self, name: str) -> None:
        (self.local / name).unlink(missing_ok=True)

    def remove_tree(self, folder: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.local / folder)

    def remove_unfinished(self, folder: str = "", names: Collection[str] | None = None) -> None:
        if (self.local / folder).is_dir():
            remove_unfinished(self.local / folder, names)

    def make(self) -> None:
        self.local.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def lock(self, name: str, *, shared: bool = False) -> Iterator[None]:
        try:
            lock = lock_file(self.local / name, shared=shared)
        except BlockingIOError:
            raise UserError(
                f"another conversion is at work in '{self.url}'; wait for it, or give another DEST."
            ) from None
        except OSError as fault:
            raise UserError(
                f"'{self.url}' cannot be written ({fault.strerror}); choose another DEST."
            ) from fault
        with lock:
            yield


def whole(data: bytes, where: str, offset: int, size: int) -> bytes:
    """The data, if it is all `size` bytes; OSError where a read came back short."""
    if len(data) != size:
        raise OSError(f"'{where}' gave {len(data)} bytes of {size} at {offset}")
    return data


def _walk(path: str, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[tuple[str, int]]:
    try:
        here = os.stat(path)
        with os.scandir(path) as listing:
            entries = list(listing)
    except OSError as fault:
        raise UserError(
            f"the folder '{path}' cannot be read ({fault.strerror}); mend its permissions."
        ) from fault
    identity = (here.st_dev, here.st_ino)
    if identity in above:  # a link to a folder that it lies in
        return
    for entry in entries:
        if entry.name.startswith(".") or entry.name == "__MACOSX":
            continue
        if entry.is_dir():
            _check_name(entry)
            yield from _walk(entry.path, f"{prefix}{entry.name}/", above | {identity})
        elif entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path)):
            _check_name(entry)
            try:
                size = entry.stat().st_size
            except FileNotFoundError:
                size = 0
            yield prefix + entry.name, size


def _check_name(entry: os.DirEntry[str]) -> None:
    try:
        entry.name.encode()
    except UnicodeEncodeError:
        shown = os.fsencode(entry.path).decode(errors="backslashreplace")
        raise UserError(f"the name of '{shown}' is not valid UTF-8; rename it.") from None
