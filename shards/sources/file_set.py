"""The files that a SOURCE means: one, all of one kind in a folder, or those that a pattern names."""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping

from shards.errors import UserError
from shards.storage.opening import open_place

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".npy"),
)
# Images all the same, but of kinds that are not read.
UNREAD_SUFFIXES = (
    *(
        ".heic",
        ".heif",
        ".avif",
        ".jxl",
        ".jp2",
        ".j2k",
        ".jpx",
        ".psd",
        ".svg",
        ".eps",
        ".exr",
        ".hdr",
        ".tga",
        ".ico",
        ".dcm",
    ),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"),
)
UNREAD_WAY_OUT = "turn these into JPEG or PNG first"
_SHOWN_KINDS = 12
_IMAGE_FOLDERS = {"image", "images", "img", "imgs", "photos", "jpegimages", "leftimg8bit"}
_MASK_FOLDERS = {
    *(
        "mask",
        "masks",
        "label",
        "labels",
        "annotation",
        "annotations",
        "gt",
        "gtfine",
        "ground_truth",
        "groundtruth",
    ),
    *("seg", "segmentation", "segmentations", "segmentationclass", "labelids"),
}
SPLITS = {"train", "val", "valid", "validation", "test"}


class FileSet:
    """The files with the ending `suffix` in the folder `where`, the one file `where`, or those that its `*` or `{000..012}` name.

    place, pattern: the folder, and what is looked for in it; name: what the source is called; searches: whether files in it and below
    count that are not named one by one, so that DEST must not be there; others: after `sizes`, the further files of a folder whose
    files of this kind are all meant, by their endings. Raises UserError where the folder is missing.
    """

    def __init__(self, where: str, suffix: str):
        self.others: Counter[str] = Counter()
        self._all_of = ""
        if names_file(where, suffix) or names_files(where):
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
            self._all_of = suffix

    def sizes(self) -> Iterator[tuple[str, int]]:
        """Each file's name in `place` and its bytes; UserError where there is none."""
        names = expand_braces(self.pattern)
        if "*" not in self.pattern:
            for name in names:
                yield name, self._size(name)
            return
        found = False
        self.others.clear()
        for name, size in self._below():
            if self._all_of and not name.lower().endswith(self._all_of):
                if not name.startswith("."):
                    self.others[os.path.splitext(name)[1].lower() or "without extension"] += 1
            elif self._all_of or any(_matches(name, one) for one in names):
                found = True
                yield name, self._size(name) if size is None else size
        if not found:
            raise UserError(f"'{self.place.url}' holds no file '{self.pattern}'; check the path of SOURCE.")

    def _below(self) -> Iterator[tuple[str, int | None]]:
        return self.place.walk() if "/" in self.pattern else ((name, None) for name in self.place.names())

    def _size(self, name: str) -> int:
        size = self.place.size(name)
        if size is None:
            raise UserError(f"There is no file '{self.place / name}'; check the path of SOURCE.")
        return size


def split_url(where: str) -> tuple[str, str]:
    """A file's path or URL as (folder, name); a query belongs to the name."""
    if "://" not in where:
        folder, name = os.path.split(where)
        return folder or ".", name
    head, mark, query = where.partition("?")
    folder, _, name = head.rpartition("/")
    return folder, name + mark + query


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


def is_folder(where: str) -> bool:
    """Whether a SOURCE is a folder of this machine."""
    return "://" not in where and os.path.isdir(where)


def names_file(where: str, suffixes: str | tuple[str, ...]) -> bool:
    """Whether a SOURCE names one file, or files by a pattern, with one of these endings."""
    return not is_folder(where) and where.partition("?")[0].lower().endswith(suffixes)


def names_files(where: str) -> bool:
    """Whether a SOURCE is a pattern."""
    return not is_folder(where) and is_pattern(where)


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


def looks_like_splits(classes: list[str]) -> bool:
    """Whether the class folders are named as train/validation/test splits, so that labels would be these."""
    return bool(classes) and {name.lower() for name in classes} <= SPLITS


class MaskFolders:
    """Notices folders that are named as images and their masks, both of them taken as images."""

    def __init__(self):
        self._images = self._masks = ""

    def see(self, name: str) -> None:
        """Take the name of an image."""
        if self._images and self._masks:
            return
        folders = name.split("/")[:-1]
        for depth, folder in enumerate(folders, 1):
            if folder.lower() in _IMAGE_FOLDERS:
                self._images = self._images or "/".join(folders[:depth])
            elif folder.lower() in _MASK_FOLDERS:
                self._masks = self._masks or "/".join(folders[:depth])

    def warnings(self, where: str) -> list[str]:
        """A sentence where there are both; `where`: the source, or "" where masks cannot be told apart by options."""
        if not (self._images and self._masks):
            return []
        text = f"the folders '{self._images}' and '{self._masks}' look like images and their masks, and both are taken as images"
        if where:
            folders = (shlex.quote(f"{where.rstrip('/')}/{folder}") for folder in (self._images, self._masks))
            text += ": fastssl shard {} ... --masks {}".format(*folders)
        return [f"{text}."]


def looks_like_split_files(names: list[str]) -> list[str]:
    """The splits that files are named after, such as `train-00000.parquet` and `test-00000.parquet`; none for one at most."""
    firsts = {re.split(r"[-_.]", name.rpartition("/")[2])[0] for name in names}
    found = sorted(first for first in firsts if first.lower() in SPLITS)
    return found if len(found) > 1 else []


def may_be_folder(where: str) -> bool:
    """Whether a SOURCE can be a folder: it is no file of this machine, and is not named as a list or an archive."""
    if "://" not in where and os.path.exists(where):
        return os.path.isdir(where)
    return not names_files(where) and not names_file(where, (".csv", ".tsv", ".parquet", ".tar"))


def holds_only(where: str, suffix: str) -> bool:
    """Whether a SOURCE is a folder of files with this ending and neither images nor folders, hidden ones aside."""
    if not may_be_folder(where):
        return False
    place = open_place(where)
    names = [name for name in place.names() if not name.startswith(".")]
    found = [name for name in names if name.lower().endswith(suffix)]
    if not found or any(name.lower().endswith(IMAGE_SUFFIXES) for name in names):
        return False
    return place.local is None or not any((place.local / name).is_dir() for name in names)


def told_kinds(others: Counter[str], examples: Mapping[str, str] | None = None) -> str:
    """How many files of which kinds, the most frequent first: `9 .txt, 2 .heic`; `examples`: names for kinds of several words."""
    shown = others.most_common(_SHOWN_KINDS)
    words = [
        f"{count:,} {kind}" + (f" (such as '{examples[kind]}')" if examples and " " in kind else "")
        for kind, count in shown
    ]
    left = others.total() - sum(count for _, count in shown)
    more = f" and {left:,} of {len(others) - len(shown):,} further kinds" if left else ""
    return ", ".join(words) + more


_WAYS_OUT = {
    ".arrow": "save a Hugging Face data set with its `to_parquet`",
    **dict.fromkeys((".tar", ".parquet"), "tars and Parquet files in folders below are named by a pattern"),
    **dict.fromkeys(
        (".zip", ".gz", ".tgz", ".xz", ".zst", ".7z"), "unpack archives, or give them as plain .tar"
    ),
    **dict.fromkeys(UNREAD_SUFFIXES, UNREAD_WAY_OUT),
}


def nothing_found(
    where: str,
    others: Counter[str],
    what: str = "images",
    suffixes: tuple[str, ...] = IMAGE_SUFFIXES,
    example: str = "",
) -> str:
    """What to say of a folder without images; `others` counts what it holds, by suffix; `example`: a file below, for a pattern."""
    if not others:
        return f"'{where}' is empty: it holds no {what} and no other files (hidden ones do not count)."
    seen = told_kinds(others)
    noun = "file" if others.total() == 1 else "files"
    text = f"'{where}' holds no {what}, only {others.total()} other {noun} ({seen}); {what} are files named {', '.join(suffixes)}."
    for way_out in dict.fromkeys(
        _WAYS_OUT[suffix] for suffix, _ in others.most_common() if suffix in _WAYS_OUT
    ):
        pattern = f": '{where.rstrip('/')}/{example}'" if "pattern" in way_out and example else ""
        text += f" {way_out[0].upper()}{way_out[1:]}{pattern}."
    return text
