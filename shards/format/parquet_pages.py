"""One value of a large Parquet column without the rest: each page of the column, as a small Parquet file of its own.

A row group of images may have gigabytes. So the pages are found by their headers once, when the plan is made, and a row is later read
from its page alone. Encodings and compression stay Arrow's work: the page gets a footer that describes a table of this one page.
Format: github.com/apache/parquet-format, README.md and parquet.thrift.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shards.errors import UserError
from shards.format import thrift
from shards.format.thrift import I32, I64, LIST, STRUCT, Struct
from shards.storage.place import Place

_MAGIC = b"PAR1"
_DATA, _DICTIONARY, _DATA_V2 = 0, 2, 3
_HEAD_BYTES = 16 << 10  # read for a page header; those with long statistics are read again
_MAX_HEAD_BYTES = 16 << 20


@dataclass(frozen=True)
class Page:
    """Some rows of a column: `num_rows` from `first` on in the file's order. Offsets and sizes in bytes, with the page's header.

    dictionary: offset and size of the page that its values may refer to; size 0 where there is none. codec: Parquet's
    number. row_bytes: a row's mean bytes in its row group.
    """

    first: int
    num_rows: int
    offset: int
    size: int
    dictionary: tuple[int, int]
    codec: int
    row_bytes: int


class Column:
    """The column at `path` (("image",), or ("image", "bytes") within a struct) in all files that have it in the same form; picklable.

    Raises UserError where the file is no Parquet, encrypted or damaged.
    """

    def __init__(self, place: Place, name: str, path: Sequence[str]):
        self.path = tuple(path)
        footer = _footer(place, name)
        self._schema = _pruned(footer, path)
        self._version = footer[1]

    def pages(self, place: Place, name: str) -> Iterator[Page]:
        """The column's pages in a file, in their order. Raise UserError where the file is damaged or the column of another form."""
        footer = _footer(place, name)
        try:
            schema = _pruned(footer, self.path)
        except KeyError:
            schema = []
        if schema != self._schema:
            raise UserError(
                f"'{place / name}' has the column '{self.path[0]}' not at all or in another form than the other files; "
                "convert it by itself."
            )
        first = 0
        try:
            for group in _get(footer, 4)[1]:
                for page in _pages(place, name, self._chunk(group), first):
                    yield page
                    first = page.first + page.num_rows
        except (thrift.Malformed, KeyError, OSError) as error:
            raise UserError(
                f"'{place / name}' is damaged: page headers after row {first:,} ({error})."
            ) from error
        if first != _get(footer, 3):
            raise UserError(
                f"'{place / name}' is damaged: {first:,} rows of {_get(footer, 3):,} in its pages."
            )

    def _chunk(self, group: Struct) -> Struct:
        wanted = [part.encode() for part in self.path]
        for chunk in _get(group, 1)[1]:
            if _get(_get(chunk, 3), 3)[1] == wanted:
                return _get(chunk, 3)
        raise KeyError(f"no column {'.'.join(self.path)}")

    def values(self, page: bytes, num_rows: int, dictionary: bytes, codec: int) -> pa.ChunkedArray:
        """The values of a page, binary; `page` is its bytes, `dictionary` those of its dictionary page, with their headers.

        Raise pa.ArrowException or OSError where they are damaged.
        """
        meta: Struct = {
            1: (I32, 6),  # BYTE_ARRAY
            2: (LIST, (I32, [0, 3])),
            3: (LIST, (thrift.BINARY, [part.encode() for part in self.path])),
            4: (I32, codec),
            5: (I64, num_rows),
            6: (I64, len(page) + len(dictionary)),  # uncompressed; nobody looks
            7: (I64, len(page) + len(dictionary)),
            9: (I64, len(_MAGIC) + len(dictionary)),
        }
        if dictionary:
            meta[11] = (I64, len(_MAGIC))
        chunk: Struct = {2: (I64, 0), 3: (STRUCT, meta)}
        group: Struct = {1: (LIST, (STRUCT, [chunk])), 2: (I64, len(page)), 3: (I64, num_rows)}
        footer: Struct = {
            1: self._version,
            2: (LIST, (STRUCT, self._schema)),
            3: (I64, num_rows),
            4: (LIST, (STRUCT, [group])),
        }
        tail = thrift.write_struct(footer)
        data = b"".join((_MAGIC, dictionary, page, tail, struct.pack("<I", len(tail)), _MAGIC))
        del page  # it may be large, as is all that follows
        with pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True) as parquet:
            column = parquet.read(use_threads=False).column(0)
        if pa.types.is_struct(column.type):
            column = pa.chunked_array([chunk.flatten()[0] for chunk in column.chunks], pa.binary())
        return column


def _footer(place: Place, name: str) -> Struct:
    size = place.size(name)
    try:
        if size is None:
            raise FileNotFoundError
        tail = place.read_range(name, size - 8, 8) if size >= 12 else b""
        if tail[4:] != _MAGIC:
            raise thrift.Malformed(
                "encrypted" if tail[4:] == b"PARE" else "its end is missing, or it is no Parquet"
            )
        (length,) = struct.unpack("<I", tail[:4])
        if length > size - 12:
            raise thrift.Malformed("its footer is damaged")
        return thrift.read_struct(place.read_range(name, size - 8 - length, length))[0]
    except FileNotFoundError:
        raise UserError(f"There is no file '{place / name}'.") from None
    except (thrift.Malformed, OSError) as error:
        raise UserError(f"'{place / name}' cannot be read as Parquet ({error}).") from error


def _get(fields: Struct, number: int) -> Any:
    return fields[number][1]


def _pruned(footer: Struct, path: Sequence[str]) -> list[Struct]:
    """The schema's elements for one column only: the root, what is above the column, and the column. KeyError where it is missing."""
    elements = _get(footer, 2)[1]
    kept: list[Struct] = [elements[0] | {5: (I32, 1)}]
    at = 1
    num_siblings = _get(elements[0], 5)
    for depth, part in enumerate(path):
        for _ in range(num_siblings):
            if _get(elements[at], 4) == part.encode():
                break
            at = _behind(elements, at)
        else:
            raise KeyError(".".join(path))
        last = depth == len(path) - 1
        kept.append(elements[at] if last else elements[at] | {5: (I32, 1)})
        num_siblings = _get(elements[at], 5) if 5 in elements[at] else 0
        at += 1
    return kept


def _behind(elements: list[Struct], at: int) -> int:
    """The first element behind the one at `at` and all that lies in it."""
    children = _get(elements[at], 5) if 5 in elements[at] else 0
    at += 1
    for _ in range(children):
        at = _behind(elements, at)
    return at


def _pages(place: Place, name: str, meta: Struct, first: int) -> Iterator[Page]:
    """The pages of one column chunk; `first`: the row group's first row."""
    codec, num_values = _get(meta, 4), _get(meta, 5)
    at = _get(meta, 9)
    dictionary = (0, 0)
    if 11 in meta and 0 < _get(meta, 11) < at:
        at = _get(meta, 11)
    end = at + _get(meta, 7)
    done = 0
    while done < num_values:
        head, length = _page_header(place, name, at, end)
        size = length + _get(head, 3)
        kind = _get(head, 1)
        if size <= 0 or at + size > end:
            raise thrift.Malformed("a page goes on behind its column")
        if kind == _DICTIONARY:
            dictionary = (at, size)
        elif kind in (_DATA, _DATA_V2):
            num_rows = _get(_get(head, 5 if kind == _DATA else 8), 1)
            if num_rows:
                yield Page(first + done, num_rows, at, size, dictionary, codec, _get(meta, 7) // num_values)
            done += num_rows
        at += size


def _page_header(place: Place, name: str, at: int, end: int) -> tuple[Struct, int]:
    size = _HEAD_BYTES
    while True:
        data = place.read_range(name, at, min(size, end - at))
        try:
            return thrift.read_struct(data)
        except thrift.Malformed:
            if size >= min(end - at, _MAX_HEAD_BYTES):
                raise
            size *= 16
