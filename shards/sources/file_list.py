"""Lists: a CSV, TSV or Parquet file with one image a row, and whatever else is known of it."""

from __future__ import annotations

import functools
import os
import posixpath
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from shards.errors import UserError, did_you_mean
from shards.format import layout
from shards.images.mask_images import read_mask
from shards.images.pixels import BadImage
from shards.sources.file_set import IMAGE_SUFFIXES, names_file, split_url
from shards.sources.source import ENTRIES, Picture, Source, SourceKind, entry_batch, read_file
from shards.sources.source_options import NO_COLUMN, ListOptions
from shards.sources.table_reader import TABLE_SUFFIXES, ListFile, class_text, has_point, known_text, open_list
from shards.storage.local import LocalPlace
from shards.storage.opening import open_place
from shards.storage.place import Place
from shards.storage.remote import Refused, RemotePlace, Unreachable
from shards.units import plural

# Where no column is named: the first of these that the list has, in any case of letters.
USUAL = {
    "path": (
        *(
            "path",
            "image_path",
            "img_path",
            "file_path",
            "filepath",
            "image",
            "img",
            "file",
            "filename",
            "file_name",
        ),
        *("image_file", "image_name", "image_filename", "url", "image_url", "uri"),
    ),
    "label": ("label", "class", "class_name", "classname", "label_name", "category", "target", "labels"),
    "mask": ("mask", "mask_path", "mask_file", "segmentation", "label_path"),
    "group": ("group", "group_id"),
}
RENAMED = "list_"  # put before the names that the sample table uses itself


class ListSource(Source):
    """The images that a list names, with label, mask, group, and all its other columns.

    Paths are relative to the list's folder or `options.root`, absolute, or URLs. Raises UserError for columns that are not there.
    """

    kind = "list"

    def __init__(self, where: str, options: ListOptions | None = None):
        options = options or ListOptions()
        folder, self._file_name = split_url(where)
        self._place = open_place(folder)
        self.name = self._file_name
        self._root = open_place(options.root) if options.root else self._place
        self._root_name = self._root.name if options.root else ""
        if options.root:
            self._root.check_folder("--root")
        self._where = where
        listed = self._open()
        self._row_word = listed.row_word
        self._warnings: list[str] = []
        self._protocols = {"file"}  # of URLs, that are known to be readable
        self._missing: list[str] = []  # the warning about it, if any
        self._unlabelled: list[str] = []
        self._columns = {
            role: found
            for role in USUAL
            if (found := choose(listed, role, getattr(options, f"{role}_column"))) is not None
        }
        self._check_label(listed)
        names, self._notes = extra_columns(listed, set(self._columns.values()))
        label = [self._columns["label"]] if "label" in self._columns else []
        types = dict(zip([*names, *label], listed.types([*names, *label]), strict=True))
        # Numbers with a point are read as numbers: 1.0 is the class 1. Others stay as they are written: 007.
        self._label_type = {name: types[name] for name in label if has_point(types[name])}
        self._extra = {name: types[name] for name in names if not is_binary(types[name])}
        binary = [name for name in names if name not in self._extra]
        if binary:
            self._warnings.append(f"columns of binary data are left out: {', '.join(binary)}.")
        self.extra_schema = pa.schema([(names[name], kind) for name, kind in self._extra.items()])

    def _open(self) -> ListFile:
        return open_list(self._place, self._file_name, self._where)

    def _check_label(self, listed: ListFile) -> None:
        """One label is supported; a column of lists is kept as it is."""
        name = self._columns.get("label")
        kind = listed.columns[name] if name else None
        if kind is not None and pa.types.is_nested(kind):
            del self._columns["label"]
            self._warnings.append(
                f"the column '{name}' holds {kind}, several labels an image: kept in the sample table and the JSON, but there is one "
                "label a sample, so the samples have none."
            )

    def settings(self) -> dict[str, Any]:
        """Which columns are read as what, and the root's own name."""
        extra = {column.name: str(column.type) for column in self.extra_schema}
        return {"columns": self._columns, "extra": extra, "root": self._root_name}

    def describe(self) -> list[str]:
        """Which columns were taken for what, and how many images have no label."""
        roles = ", ".join(f"{role} '{name}'" for role, name in self._columns.items())
        extra = f"; kept as well: {', '.join(self.extra_schema.names)}" if self.extra_schema.names else ""
        return [f"Columns: {roles}{extra}.", *self._notes, *self._unlabelled]

    def warnings(self) -> list[str]:
        """Columns that are left out, and files that are missing."""
        return [*self._warnings, *self._missing]

    def entries(self) -> Iterator[pa.RecordBatch]:
        """See `Source.entries`; UserError with the line of what cannot be read, and where not one file is there."""
        self._missing.clear()
        missing, num_missing, num_local, num_rows, num_unlabelled = "", 0, 0, 0, 0
        text = [name for name in self._columns.values() if name not in self._label_type]
        for rows in self._open().rows(text, self._extra | self._label_type):
            columns = {role: rows.columns[name] for role, name in self._columns.items()}
            if "label" in columns:
                columns["label"] = class_text(
                    columns["label"], self._where, self._columns["label"], self._row_word, rows.first_lines
                )
                num_unlabelled += columns["label"].null_count
            columns |= {role: known_text(columns[role]) for role in ("mask", "group") if role in columns}
            paths = columns.pop("path")
            if paths.null_count:
                line = rows.first_lines[paths.is_null().to_pylist().index(True)]
                raise UserError(
                    f"'{self._where}', {self._row_word} {line}: the cell of the column '{self._columns['path']}' is empty; "
                    "remove the row, or name its file."
                )
            self._check_protocols(paths.to_pylist(), rows.first_lines)
            sizes = [self._size(path) for path in paths.to_pylist()]
            gone = [i for i, size in enumerate(sizes) if size is None]
            if gone and not missing:
                missing = f"'{paths[gone[0]].as_py()}' ({self._row_word} {rows.first_lines[gone[0]]})"
            num_missing += len(gone)
            num_local += sum(size != -1 for size in sizes)
            num_rows += len(sizes)
            known = [0 if size is None or size < 0 else size for size in sizes]
            extra = {
                new: rows.columns[old] for new, old in zip(self.extra_schema.names, self._extra, strict=True)
            }
            columns |= {"source": paths, "bytes": np.array(known, np.int64)} | extra
            yield entry_batch(columns, self.extra_schema)
        if not num_rows:
            raise UserError(f"'{self._where}' lists no images: it has a header and no rows.")
        self._unlabelled = unlabelled(num_unlabelled, num_rows)
        if num_missing and num_missing == num_local == num_rows:
            raise UserError(
                f"Not one of the {num_rows:,} files that '{self._where}' names is there, such as {missing}; looked in "
                f"'{self._root.url}'. Give --root FOLDER, which the paths start from, or another --path-column."
            )
        if num_missing:
            self._missing.append(
                f"{num_missing:,} of {num_rows:,} files are not there, such as {missing}; they will be quarantined."
            )

    def _check_protocols(self, paths: list[str], lines: Sequence[int]) -> None:
        """Raise UserError where one is unknown or its package missing: better now than in the middle."""
        for path, line in zip(paths, lines, strict=True):
            protocol, mark, _ = path.partition("://")
            if mark and protocol not in self._protocols:
                try:
                    _place(split_url(path)[0])
                except UserError as error:
                    raise UserError(f"'{self._where}', {self._row_word} {line}: {error}") from error
                self._protocols.add(protocol)

    def _size(self, path: str) -> int | None:
        """Bytes of a file on this machine, None where it is missing; -1 for what lies elsewhere, which is not asked."""
        if "://" in path:
            return -1
        if self._root.local is None and not os.path.isabs(path):
            return -1
        try:
            return os.stat(os.path.join(self._root.local or "", path)).st_size
        except (OSError, ValueError):  # ValueError: a null character
            return None

    def locate(self, source: str) -> str:
        """The lines or rows that name a path."""
        path = self._columns["path"]
        found = [
            str(rows.first_lines[i])
            for rows in self._open().rows([path], {})
            for i, value in enumerate(rows.columns[path].to_pylist())
            if value == source
        ]
        return f"{self._row_word}s {', '.join(found[:5])}{', ...' if len(found) > 5 else ''}"

    def read(self, row: dict[str, Any]) -> Picture:
        """The file's bytes, and its mask's."""
        data = read_listed(row["source"], self._root, row["bytes"])
        if not row["mask"]:
            return Picture(data)
        mask = row["mask"]
        if "://" not in mask:
            return Picture(data, read_mask(*find_file(mask, self._root)))
        try:
            return Picture(data, read_listed(mask, self._root))
        except BadImage as error:
            raise BadImage(f"its mask '{mask}' {error.reason}") from error


class _Web:
    """What this process knows of the web servers that lists name: one that is gone stops no other, and is not waited for again."""

    def __init__(self):
        self._gone: set[str] = set()
        self._num_in_a_row = 0
        self._good: tuple[Place, str] | None = None

    def read(self, place: Place, name: str) -> bytes:
        """A file; BadImage where its server refuses it or does not answer. Raise UserError where no server answers any more."""
        host = place.url.split("/")[2]
        if isinstance(place, RemotePlace):
            place.tries = TRIES_OF_GONE if host in self._gone else None
        try:
            data = place.read(name)
        except Refused as error:
            raise BadImage(f"cannot be read: {error.reason}") from error
        except Unreachable as error:
            self._gone.add(host)
            self._num_in_a_row += 1
            if self._num_in_a_row % MANY_IN_A_ROW == 0 and not self._others_answer():
                raise
            raise BadImage(f"cannot be read: {error.reason}") from error
        self._num_in_a_row = 0
        self._gone.discard(host)
        self._good = place, name
        return data

    def _others_answer(self) -> bool:
        try:
            return self._good is not None and bool(self._good[0].exists(self._good[1]))
        except UserError:
            return False


TRIES_OF_GONE = 2  # for a server that has not answered before
MANY_IN_A_ROW = 20  # files without an answer, after which it may be this machine that is cut off
_web = _Web()


def read_listed(path: str, root: Place, planned_bytes: int = 0) -> bytes:
    """A file that a table names, by its path below `root` or its URL.

    Raise BadImage where it cannot be read, UserError where the source has gone away: the root, or the net.
    """
    place, name = find_file(path, root)
    web = place.local is None and place.url.startswith(("http://", "https://"))
    try:
        if web and place is not root:
            return _web.read(place, name)
        if place.local is None and place is not root:
            return place.read(name)
        if place is not root and not planned_bytes and not place.is_there():
            raise BadImage("cannot be read: its folder is not there")
        return read_file(place, name, planned_bytes)
    except FileNotFoundError:  # nor is its folder there, in a store that knows files only
        raise BadImage("cannot be read: there is no such file") from None
    except Refused as error:
        # In a store with credentials these are wrong for all files.
        if not web:
            raise
        raise BadImage(f"cannot be read: {error.reason}") from error


def find_file(path: str, root: Place) -> tuple[Place, str]:
    """The place of a file that a table names, and its name there; `root`: where relative ones start.

    Raise BadImage for a null character.
    """
    if "\0" in path:
        raise BadImage(f"its path {path!r} has a null character in it")
    if "://" in path:
        folder, name = split_url(path)
        return _place(folder), name
    if os.path.isabs(path):
        return LocalPlace(os.path.dirname(path)), os.path.basename(path)
    # An object store takes `..` for a name.
    return root, path if root.local else posixpath.normpath(path)


@functools.lru_cache(maxsize=64)
def _place(url: str) -> Place:
    return open_place(url)


def extra_columns(listed: ListFile, used: set[str]) -> tuple[dict[str, str], list[str]]:
    """The columns of a table that are not `used`: their names in it -> those in the sample table; and what the user should know."""
    taken = {*ENTRIES.names, *layout.SCHEMA.names, "position"}
    names, renamed, notes = {}, [], []
    for name in listed.columns:
        if name in used:
            continue
        names[name] = name
        if name in taken or name.startswith("_"):
            names[name] = RENAMED + name.lstrip("_")
            renamed.append(f"{name} as {names[name]}")
    if renamed:
        notes.append(f"Kept under another name, since the sample table has its own: {', '.join(renamed)}.")
    both = sorted(name for name in names.values() if list(names.values()).count(name) > 1)
    if both:
        raise UserError(
            f"'{listed.where}': two columns would be named '{both[0]}' in the sample table; rename one."
        )
    return names, notes


def unlabelled(num: int, num_rows: int) -> list[str]:
    """What is said of images whose label is an empty cell or NaN."""
    return [f"{num:,} of {plural(num_rows, 'image')} have no label."] if num else []


def is_binary(kind: pa.DataType) -> bool:
    """Whether a column holds bytes."""
    return (
        str(kind) == "binary_view"
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
    )


def choose(listed: ListFile, role: str, wanted: str) -> str | None:
    """The column for a role: the one wanted, else the first usual one; None where there is none."""
    known = list(listed.columns)
    if wanted == NO_COLUMN and wanted not in known and role != "path":
        return None
    if wanted:
        if wanted not in known:
            raise UserError(
                f"'{listed.where}' has no column '{wanted}' (--{role}-column). It has: {', '.join(known)}."
                + did_you_mean(wanted, known)
            )
        return wanted
    lowered = {name.lower(): name for name in reversed(known)}
    for usual in USUAL[role]:
        if usual in lowered:
            return lowered[usual]
    if role == "path":
        if any(name.lower().endswith(IMAGE_SUFFIXES) for name in known):
            raise UserError(
                f"The first line of '{listed.where}' seems to be an image already ({', '.join(known)}): put a line with the names of "
                "the columns above it."
            )
        raise UserError(
            f"'{listed.where}' has no column named {', '.join(USUAL['path'][:6])} or the like; give --path-column NAME. "
            f"It has: {', '.join(known)}."
        )
    return None


NO_MASKS = "goes with a folder; in a list, --mask-column names the column of the masks"
KIND = SourceKind(
    "list",
    f"a list ({', '.join(TABLE_SUFFIXES)}) of paths",
    lambda where, options: names_file(where, TABLE_SUFFIXES),
    lambda where, options: ListSource(where, options.list),
    ("list",),
    NO_MASKS,
)
