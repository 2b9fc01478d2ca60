"""The files that a SOURCE means: one, all of one kind in a folder, or those that a pattern names."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterator

from shards.errors import UserError
from shards.sources import source
from shards.sources.source import split_url
from shards.storage.place import Place, open_place


class FileSet:
    """The files with the ending `suffix` in the folder `where`, the one file `where`, or those that its `*` or `{000..012}` name.

    place, pattern: the folder, and what is looked for in it; name: what the source is called; searches: whether files in it and below
    count that are not named one by one, so that DEST must not be there. Raises UserError where the folder is missing.
    """

    def __init__(self, where: str, suffix: str):
        if not os.path.isdir(where) and (where.lower().endswith(suffix) or is_pattern(where)):
            folder, self.pattern = _split_pattern(where)
            self.name = self.pattern
            self.place = open_place(folder)
            self.searches = "*" in self.pattern and "/" in self.pattern
        else:
            self.place = open_place(where)
            self.place.check_folder("SOURCE")
            self.pattern = f"*{suffix}"
            self.name = self.place.name
            self.searches = True

    def sizes(self) -> Iterator[tuple[str, int]]:
        """Each file's name in `place` and its bytes; UserError where there is none."""
        names = expand_braces(self.pattern)
        if "*" not in self.pattern:
            for name in names:
                yield name, self._size(name)
            return
        found = False
        for name, size in self._below():
            if any(_matches(name, one) for one in names):
                found = True
                yield name, self._size(name) if size is None else size
        if not found:
            raise UserError(f"'{self.place.url}' holds no file '{self.pattern}'; check the path of SOURCE.")

    def _below(self) -> Iterator[tuple[str, int | None]]:
        return self.place.walk() if "/" in self.pattern else ((name, None) for name in self.place.names())

    def _size(self, name: str) -> int:
        size = self.place.size(name)
        if size is None:
            raise UserError(f"there is no file '{self.place / name}'; check the path of SOURCE.")
        return size


def _split_pattern(where: str) -> tuple[str, str]:
    """The folder before the first part with `*` or `{`, and the pattern below it."""
    parts = where.split("/")
    magic = [i for i, part in enumerate(parts) if is_pattern(part)]
    if not magic:
        return split_url(where)
    return "/".join(parts[: magic[0]]) or ("/" if where.startswith("/") else "."), "/".join(parts[magic[0] :])


def _matches(name: str, pattern: str) -> bool:
    """Whether a name fits a pattern part by part: `*` stands for no slash."""
    parts, wanted = name.split("/"), pattern.split("/")
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))


def is_pattern(where: str) -> bool:
    """Whether a SOURCE names several tars: with `*`, or with numbers in braces."""
    return "*" in where or expand_braces(where) != [where]


def expand_braces(pattern: str) -> list[str]:
    """`a-{000..012}.tar` as WebDataset writes it: the 13 names. A pattern without numbers in braces is its only name."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not found:
        return [pattern]
    first, last = found[1], found[2]
    width = len(first) if first.startswith("0") else 0
    numbers = (f"{number:0{width}d}" for number in range(int(first), int(last) + 1))
    return [
        name
        for number in numbers
        for name in expand_braces(pattern[: found.start()] + number + pattern[found.end() :])
    ]


def looks_like_split_files(names: list[str]) -> list[str]:
    """The splits that files are named after, such as `train-00000.parquet` and `test-00000.parquet`; none for one at most."""
    firsts = {re.split(r"[-_.]", name.rpartition("/")[2])[0] for name in names}
    found = sorted(first for first in firsts if first.lower() in source.SPLITS)
    return found if len(found) > 1 else []


def holds_only(place: Place, suffix: str) -> bool:
    """Whether a folder holds files with this ending and neither images nor folders, hidden ones aside."""
    names = [name for name in place.names() if not name.startswith(".")]
    found = [name for name in names if name.lower().endswith(suffix)]
    if not found or any(name.lower().endswith(source.SUFFIXES) for name in names):
        return False
    return place.local is None or not any((place.local / name).is_dir() for name in names)
