"""The images of a folder, in a fixed order."""

import os
from array import array
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shards.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
SPLITS = {"train", "val", "valid", "validation", "test"}
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Sources:
    """What `scan_folder` found; columns rather than objects, since a folder may hold millions of images.

    paths   relative to the folder, forward slashes, sorted by their UTF-8 bytes; large_string (N,)
    labels  index into `classes`, -1 for an image directly in the folder; int32 (N,)
    sizes   bytes, 0 for a dangling link; int64 (N,)
    """

    paths: pa.LargeStringArray
    labels: npt.NDArray[np.int32]
    sizes: npt.NDArray[np.int64]
    classes: list[str]

    def __len__(self) -> int:
        return len(self.paths)


def looks_like_splits(classes: list[str]) -> bool:
    """Whether the class folders are named as train/validation/test splits, so that labels would be these."""
    return bool(classes) and {name.lower() for name in classes} <= SPLITS


def scan_folder(root: str | os.PathLike) -> Sources:
    """Finds the images below `root` by their file names; an image's class is the first folder of its path.

    Follows links to folders; skips hidden names and `__MACOSX`. Raises UserError when the folder is missing,
    unreadable, empty or without images, and for a name that is not valid UTF-8.
    """
    root = Path(root)
    if not root.exists():
        raise UserError(f"there is no folder '{root}'; check the path of SOURCE.")
    if not root.is_dir():
        raise UserError(f"'{root}' is a file; SOURCE is the folder that holds the images.")
    scan = _Scan()
    scan.folder(str(root), "", -1, frozenset())
    if not scan.num_images:
        raise UserError(_nothing_found(root, scan.others))
    return scan.sorted()


class _Scan:
    def __init__(self):
        self.num_images = 0
        self.others: Counter[str] = Counter()
        self._top_names: list[str] = []
        self._names: list[str] = []
        self._chunks: list[pa.LargeStringArray] = []
        self._tops = array("i")
        self._sizes = array("q")

    def folder(self, path: str, prefix: str, top: int, above: frozenset[tuple[int, int]]) -> None:
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
                if not prefix:
                    self._top_names.append(entry.name)
                label = top if prefix else len(self._top_names) - 1
                self.folder(entry.path, f"{prefix}{entry.name}/", label, above | {identity})
            else:
                self._file(entry, prefix, top)

    def _file(self, entry: os.DirEntry[str], prefix: str, top: int) -> None:
        suffix = os.path.splitext(entry.name)[1].lower()
        # Pipes and devices would block a reader for ever. A dangling link is kept: it will be reported.
        regular = entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
        if suffix not in SUFFIXES or not regular:
            self.others[suffix or "without extension"] += 1
            return
        _check_name(entry)
        self.num_images += 1
        self._names.append(prefix + entry.name)
        self._tops.append(top)
        try:
            self._sizes.append(entry.stat().st_size)
        except FileNotFoundError:
            self._sizes.append(0)
        if len(self._names) == _CHUNK:
            self._pack()

    def _pack(self) -> None:
        self._chunks.append(pa.array(self._names, pa.large_string()))
        self._names = []

    def sorted(self) -> Sources:
        self._pack()
        columns = [pa.chunked_array(self._chunks), np.array(self._tops), np.array(self._sizes)]
        table = pa.table(columns, names=["path", "top", "size"]).sort_by("path")
        tops = table["top"].to_numpy()
        classes = sorted(self._top_names[top] for top in np.unique(tops[tops >= 0]))
        # Folders without images are no classes, so the numbers close up; the last place serves the -1.
        known = {name: label for label, name in enumerate(classes)}
        labels = np.array([known.get(name, -1) for name in self._top_names] + [-1], np.int32)[tops]
        paths = pa.concat_arrays(table["path"].chunks)
        return Sources(paths, labels, table["size"].to_numpy(), classes)


def _check_name(entry: os.DirEntry[str]) -> None:
    try:
        entry.name.encode()
    except UnicodeEncodeError:
        shown = os.fsencode(entry.path).decode(errors="backslashreplace")
        raise UserError(f"the name of '{shown}' is not valid UTF-8; rename it.") from None


def _nothing_found(root: Path, others: Counter[str]) -> str:
    if not others:
        return f"'{root}' is empty: it holds no images and no other files (hidden ones do not count)."
    seen = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5))
    noun = "file" if others.total() == 1 else "files"
    return (
        f"'{root}' holds no images, only {others.total()} other {noun} ({seen}); "
        f"images are files named {', '.join(SUFFIXES)}."
    )
