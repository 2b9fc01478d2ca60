"""A folder of images as a source, the plainest kind."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from shards.errors import UserError
from shards.images.mask_images import MaskFolder
from shards.sources import source
from shards.sources.file_set import (
    IMAGE_SUFFIXES,
    UNREAD_SUFFIXES,
    UNREAD_WAY_OUT,
    MaskFolders,
    names_file,
    names_files,
    nothing_found,
    told_kinds,
)
from shards.sources.source import Picture, Source, SourceKind, entry_batch, read_file
from shards.sources.source_options import SourceOptions
from shards.storage.opening import open_place
from shards.storage.place import Place
from shards.units import plural


class FolderSource(Source):
    """All images below a folder, found by their names; an image's label is the first folder of its path.

    Follows links to folders; skips hidden names and `__MACOSX`. `masks`: a second folder with masks of the same relative names.
    """

    kind = "folder"

    def __init__(self, place: Place, masks: MaskFolder | None = None):
        self.place = self.searched = place
        self.masks = masks
        self.name = place.name
        self._others: Counter[str] = Counter()
        self._example = ""
        self._num_masks = 0
        self._folders = MaskFolders()

    def settings(self) -> dict[str, Any]:
        """The rule by which masks are found, where there are any."""
        return {"masks": self.masks.settings()} if self.masks else {}

    def entries(self) -> Iterator[pa.RecordBatch]:
        """See `Source.entries`; also raises UserError for a name that is not valid UTF-8."""
        self.place.check_folder("SOURCE")
        self._others.clear()
        self._folders = MaskFolders()
        names: list[str] = []
        sizes: list[int] = []
        found = False
        for name, size in self._files():
            suffix = os.path.splitext(name)[1].lower()
            if suffix not in IMAGE_SUFFIXES:
                self._others[suffix or "without extension"] += 1
                if suffix in (".tar", ".parquet"):
                    self._example = "*/" * name.count("/") + f"*{suffix}"
                continue
            found = True
            self._folders.see(name)
            names.append(name)
            sizes.append(size)
            if len(names) == source.BATCH_ROWS:
                yield self._batch(names, sizes)
                names, sizes = [], []
        if names:
            yield self._batch(names, sizes)
        if found and self.masks:
            self.masks.check()
        if not found:
            raise UserError(nothing_found(self.place.url, self._others, example=self._example))

    def _files(self) -> Iterator[tuple[str, int]]:
        """All files but those of the masks, where these lie among the images."""
        if not (self.masks and self.masks.lies_in(self.place)):
            yield from self.place.walk()
            return
        found = list(self.place.walk())
        masks = self.masks.among([name for name, _ in found])
        self._num_masks = len(masks)
        yield from ((name, size) for name, size in found if name not in masks)

    def _batch(self, names: list[str], sizes: list[int]) -> pa.RecordBatch:
        labels = [folder_label(name) for name in names]
        masks = [self.masks.find(name) for name in names] if self.masks else None
        return entry_batch(
            {"source": names, "bytes": np.array(sizes, np.int64), "label": labels, "mask": masks}
        )

    def read(self, row: dict[str, Any]) -> Picture:
        """The file's bytes, and its mask's."""
        data = read_file(self.place, row["source"], row["bytes"])
        mask = self.masks.read(row["mask"]) if self.masks and row["mask"] else None
        return Picture(data, mask)

    def describe(self) -> list[str]:
        """What lies in the folder beside the images."""
        others = Counter({kind: n for kind, n in self._others.items() if kind not in UNREAD_SUFFIXES})
        masks = (
            [f"{plural(self._num_masks, 'file')} among the images are their masks."]
            if self._num_masks
            else []
        )
        return masks + (
            [f"Other files are left out, by their names: {told_kinds(others)}."] if others else []
        )

    def left_out(self) -> str:
        """See `Source.left_out`."""
        return told_kinds(self._others)

    def warnings(self) -> list[str]:
        """Images of kinds that are not read, and images without mask."""
        unread = Counter({kind: n for kind, n in self._others.items() if kind in UNREAD_SUFFIXES})
        found = (
            [f"images of kinds that are not read are left out: {told_kinds(unread)}; {UNREAD_WAY_OUT}."]
            if unread
            else []
        )
        found += self._folders.warnings(self.place.url)
        return found + (self.masks.warnings() if self.masks else [])


def folder_label(name: str) -> str | None:
    """The label of an image: the first folder of its path, or None."""
    return name.partition("/")[0] if "/" in name else None


def mask_folder(options: SourceOptions) -> MaskFolder | None:
    """The folder of masks that the options name, if any."""
    return MaskFolder(open_place(options.masks), options.mask_suffix) if options.masks else None


def _open(where: str, options: SourceOptions) -> FolderSource:
    if names_files(where) and names_file(where, IMAGE_SUFFIXES):
        raise UserError(
            f"'{where}': a pattern names tars or Parquet files; of images give the folder, and all in it and below count."
        )
    if os.path.isfile(where):
        raise UserError(
            f"'{where}' is one file: SOURCE is a folder, a list (.csv, .tsv, .parquet) or a .tar; one raster needs --tile N."
        )
    return FolderSource(open_place(where), mask_folder(options))


KIND = SourceKind("folder", "a folder of images", lambda where, options: True, _open)
