"""The contract of a place where files lie: a folder on this machine, or in any store that fsspec reaches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

T = TypeVar("T")


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
        """Raise UserError where there is no such folder; `what` says what it is for, such as SOURCE."""
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
        """Write a file whole or not at all; `content` is its bytes, or a function that writes them and whose result is returned."""
        raise NotImplementedError

    def remove(self, name: str) -> None:
        """Remove a file; one that is missing is no error."""
        raise NotImplementedError

    def remove_tree(self, folder: str) -> None:
        """Remove a folder and all in it; one that is missing is no error."""
        raise NotImplementedError

    def remove_unfinished(self, folder: str = "", names: Collection[str] | None = None) -> None:
        """Remove what killed writers left in a folder, of the files `names` or of all files."""

    def make(self) -> None:
        """Create the folder, where there is such a thing."""

    def check_writable(self, way_out: str) -> None:
        """Raise UserError, ending with `way_out`, where nothing can ever be written: on a web server."""

    def sizes(self) -> dict[str, int] | None:
        """The bytes of each file directly in the folder, in one question; None where the place lists no sizes."""
        return None

    def lock(self, name: str, *, shared: bool = False) -> contextlib.AbstractContextManager[None]:
        """Hold a lock, exclusive or shared; UserError where another process holds it."""
        raise NotImplementedError


def whole(data: bytes, where: str, offset: int, size: int) -> bytes:
    """The data, if it is all `size` bytes; OSError where a read came back short."""
    if len(data) != size:
        raise OSError(f"'{where}' gave {len(data)} bytes of {size} at {offset}")
    return data
