"""Where a repair makes files again, and how they get from there into the folder."""

from __future__ import annotations

import shutil

from shards.storage.local import LocalPlace
from shards.storage.place import Place


class Scratch(LocalPlace):
    """A folder for what is made again. Parts of a tar that was removed from it, once compared, are read from the `whole` folder."""

    def __init__(self, folder: str, whole: Place):
        super().__init__(folder)
        self._whole = whole

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        if self.exists(name):
            return super().read_range(name, offset, size)
        return self._whole.read_range(name, offset, size)


def same_file(one: Place, other: Place, name: str) -> bool:
    """Whether both places have the file, with the same bytes."""
    return one.exists(name) and other.exists(name) and one.read(name) == other.read(name)


def copy_file(source: Place, name: str, dest: Place) -> None:
    """Copy a file, whole or not at all; nothing where it is missing."""
    if not source.exists(name):
        return
    with source.open(name) as file:
        dest.write(name, lambda out: shutil.copyfileobj(file, out, 1 << 20))
