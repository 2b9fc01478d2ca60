"""A place on this machine."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

from shards.errors import UserError
from shards.storage.atomic_files import atomic_write, lock_file, remove_unfinished
from shards.storage.place import Place, whole

T = TypeVar("T")

_ONE_READ = 1 << 30  # bytes; the system gives at most twice as many at once


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
            raise UserError(f"There is no folder '{self.url}'; check the path of {what}.")
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

        A dangling link counts as a file of 0 bytes: it will be reported.

        Raise UserError for a folder that cannot be read and a name that is not valid UTF-8.
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
        except OSError as error:
            error.filename = path
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
        """See `Place.lock`. What fails while it holds a new lock alone leaves no file of that."""
        is_new = not (self.local / name).exists()
        try:
            lock = lock_file(self.local / name, shared=shared)
        except BlockingIOError:
            raise UserError(
                f"Another conversion is at work in '{self.url}'; wait for it, or give another DEST."
            ) from None
        except OSError as error:
            raise UserError(
                f"'{self.url}' cannot be written ({error.strerror}); choose another DEST."
            ) from error
        with lock:
            try:
                yield
            except BaseException:
                if is_new and not shared:
                    self.remove(name)
                raise


def _walk(path: str, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[tuple[str, int]]:
    try:
        here = os.stat(path)
        with os.scandir(path) as listing:
            entries = list(listing)
    except OSError as error:
        raise UserError(
            f"The folder '{path}' cannot be read ({error.strerror}); mend its permissions."
        ) from error
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
        raise UserError(f"The name of '{shown}' is not valid UTF-8; rename it.") from None
