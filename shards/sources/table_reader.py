"""Tables of images as they come: CSV, TSV and Parquet, read in batches, with the line of every mistake."""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from shards.errors import UserError
from shards.sources import source
from shards.storage.place import Place

TABLE_SUFFIXES = (".csv", ".tsv", ".parquet")
UNREADABLE = (pa.ArrowException, OSError, UnicodeDecodeError)  # what Arrow raises of a damaged Parquet file
_DELIMITERS = ",;\t|"
_MAX_CELL = 1 << 24
# Text that gives itself back when it is read and written as this type: 007 stays text. RE2's syntax.
_INT = r"^-?(0|[1-9][0-9]{0,17})$"
_FLOAT = r"^-?((0|[1-9][0-9]{0,14})|(0|[1-9][0-9]*)?\.[0-9]+|(0|[1-9][0-9]*)\.?[0-9]*[eE][-+]?[0-9]+|nan|NaN|NAN|inf)$"
_BOOL = r"^(true|false|True|False|TRUE|FALSE)$"
# As pandas, R and others write a missing value; None, null and N/A may as well be names.
UNKNOWN = ["", "nan", "NaN", "NAN", "<NA>", "NaT"]
_KINDS = ((_BOOL, pa.bool_()), (_INT, pa.int64()), (_FLOAT, pa.float64()))
_pc: Any = pyarrow.compute  # its functions are made at run time


@dataclass(frozen=True)
class Rows:
    """Some rows of a list: `first_lines` are their line numbers in a CSV, their row numbers in Parquet, from 1."""

    first_lines: Sequence[int]
    columns: dict[str, pa.Array]


class ListFile:
    """A table in a file. `where`: for messages; `columns`: names as in the file, with types where the file says them."""

    where: str
    row_word: str  # what a row's number counts
    columns: dict[str, pa.DataType | None]

    def types(self, names: Sequence[str]) -> list[pa.DataType]:
        """The types in which these columns are kept; reads the whole file where it does not say."""
        raise NotImplementedError

    def rows(self, text: Sequence[str], typed: dict[str, pa.DataType]) -> Iterator[Rows]:
        """All rows in batches: the columns `text` as strings, `typed` as these types. Empty cells are null."""
        raise NotImplementedError


def open_list(place: Place, name: str, where: str) -> ListFile:
    """The list `name`, called `where` in messages; raise UserError where it is missing, empty, damaged or names a column twice."""
    if not place.exists(name):
        raise UserError(f"There is no file '{where}'; check the path of SOURCE.")
    listed = (
        ParquetFile(place, name, where) if name.lower().endswith(".parquet") else TextFile(place, name, where)
    )
    if not listed.columns:
        raise UserError(f"'{listed.where}' has no columns with a name; its first line must hold the names.")
    return listed


class TextFile(ListFile):
    """CSV or TSV in UTF-8, with or without a byte order mark; the first line holds the names; quotes as in RFC 4180.

    White space around a name or a cell does not count.
    """

    row_word = "line"

    def __init__(self, place: Place, name: str, where: str):
        self.where = where
        self._place = place
        self._name = name
        with self._open() as file:
            first = file.readline(_MAX_CELL)
        if name.lower().endswith(".tsv"):
            self._delimiter = "\t"
        else:
            self._delimiter = max(_DELIMITERS, key=first.count)
        header = next(self._records(), None)
        if header is None:
            raise UserError(f"'{self.where}' is empty; its first line must hold the names of the columns.")
        self._header = [cell.strip() for cell in header[1]]
        self._check_text(1, self._header)
        named = [cell for cell in self._header if cell]
        twice = sorted({cell for cell in named if named.count(cell) > 1})
        if twice:
            raise UserError(f"'{self.where}' has two columns named '{twice[0]}'; rename one of them.")
        self.columns = dict.fromkeys(named)

    def _open(self) -> io.TextIOWrapper:
        file = self._place.open(self._name)
        try:
            head = file.read(4)
            file.seek(0)
            if head.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise UserError(f"'{self.where}' is in UTF-16; save it as UTF-8.")
            if head.startswith((b"PK\x03\x04", b"\x1f\x8b", b"PAR1")):
                raise UserError(
                    f"'{self.where}' is no text but an archive, a workbook or Parquet; save it as CSV."
                )
            # What is no UTF-8 is let through here, since the line is known only once it is read.
            return io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
        except BaseException:
            file.close()
            raise

    def _records(self) -> Iterator[tuple[int, list[str]]]:
        """(line it begins at, cells) of each record that is not blank, the header first."""
        before = csv.field_size_limit(_MAX_CELL)
        line = 1
        try:
            with self._open() as file:
                reader = csv.reader(file, delimiter=self._delimiter, strict=True)
                for record in reader:
                    if record:
                        yield line, record
                    line = reader.line_num + 1
        except csv.Error as error:
            raise UserError(
                f"'{self.where}', line {line}: {error}; mend its quotes, each \" in a quoted cell is written twice."
            ) from error
        finally:
            csv.field_size_limit(before)

    def _batches(self) -> Iterator[tuple[list[int], dict[str, pa.Array]]]:
        records = self._records()
        next(records)
        while chunk := list(itertools.islice(records, source.BATCH_ROWS)):
            lines = [line for line, _ in chunk]
            for line, cells in chunk:
                if len(cells) != len(self._header):
                    found = f"{len(cells)} cell{'' if len(cells) == 1 else 's'}"
                    raise UserError(
                        f"'{self.where}', line {line}: {found}, but {len(self._header)} columns; a cell with {self._delimiter!r} in "
                        "it must be in quotes."
                    )
            try:
                columns = {
                    name: _pc.utf8_trim_whitespace(pa.array(cells, pa.string()))
                    for name, cells in zip(
                        self._header, zip(*(cells for _, cells in chunk), strict=True), strict=True
                    )
                    if name
                }
            except UnicodeEncodeError:
                for line, cells in chunk:
                    self._check_text(line, cells)
                raise
            yield lines, columns

    def _check_text(self, line: int, cells: Sequence[str]) -> None:
        for cell in cells:
            try:
                cell.encode()
            except UnicodeEncodeError:
                shown = cell.encode(errors="surrogateescape").decode(errors="backslashreplace")
                raise UserError(
                    f"'{self.where}', line {line}: '{shown[:80]}' is not valid UTF-8; save the list as UTF-8."
                ) from None

    def types(self, names: Sequence[str]) -> list[pa.DataType]:
        """bool, int64 or float64 where every cell of the file is one or empty; else string."""
        left = {name: list(_KINDS) for name in names}
        seen = dict.fromkeys(names, False)
        for _, columns in self._batches() if names else ():
            for name, kinds in left.items():
                cells = columns[name]
                cells = cells.filter(_pc.not_equal(cells, ""))
                seen[name] |= len(cells) > 0
                kinds[:] = [
                    kind
                    for kind in kinds
                    if _pc.all(_pc.match_substring_regex(cells, kind[0])).as_py() is not False
                ]
        return [left[name][0][1] if left[name] and seen[name] else pa.string() for name in names]

    def rows(self, text: Sequence[str], typed: dict[str, pa.DataType]) -> Iterator[Rows]:
        """See `ListFile.rows`."""
        for lines, columns in self._batches():
            kept = {}
            for name in (*text, *typed):
                cells = _pc.if_else(_pc.equal(columns[name], ""), pa.scalar(None, pa.string()), columns[name])
                kept[name] = cells.cast(typed.get(name, pa.string()))
            yield Rows(lines, kept)


class ParquetFile(ListFile):
    """A Parquet file."""

    row_word = "row"

    def __init__(self, place: Place, name: str, where: str):
        self.where = where
        self._place = place
        self._name = name
        try:
            with place.open(name) as file:
                schema = pq.read_schema(file)
        except UNREADABLE as error:
            raise UserError(f"'{self.where}' cannot be read as Parquet ({error}).") from error
        names = [column for column in schema.names if not column.startswith("__index_level_")]
        twice = sorted({column for column in names if names.count(column) > 1})
        if twice:
            raise UserError(f"'{self.where}' has two columns named '{twice[0]}'; rename one of them.")
        self.columns = {column: _plain(schema.field(column).type) for column in names}

    def types(self, names: Sequence[str]) -> list[pa.DataType]:
        """Those of the file; dictionaries as their values, columns of nulls as strings."""
        found = [self.columns[name] for name in names]
        assert all(found), "Parquet says all types"
        return [kind for kind in found if kind]

    def rows(self, text: Sequence[str], typed: dict[str, pa.DataType]) -> Iterator[Rows]:
        """See `ListFile.rows`."""
        done = 0
        try:
            with self._place.open(self._name) as file, pq.ParquetFile(file) as parquet:
                for batch in parquet.iter_batches(
                    source.BATCH_ROWS, columns=[*text, *typed], use_threads=False
                ):
                    batch.validate(full=True)  # text that is no UTF-8
                    kept = {name: as_text(batch[name], self.where, name) for name in text}
                    kept |= {name: batch[name].cast(kind) for name, kind in typed.items()}
                    yield Rows(range(done + 1, done + 1 + batch.num_rows), kept)
                    done += batch.num_rows
        except UNREADABLE as error:
            raise UserError(f"'{self.where}' cannot be read from row {done + 1:,} on ({error}).") from error


def as_text(values: pa.Array, where: str, name: str) -> pa.Array:
    """A Parquet column as strings, empty ones as nulls; UserError where it holds neither text nor numbers."""
    plain = _plain(values.type)
    values = values.cast(plain)
    if pa.types.is_floating(plain):  # whole numbers with gaps, as pandas writes them
        shown = [
            None
            if value is None or math.isnan(value)
            else f"{value:.0f}"
            if value == value // 1
            else str(value)
            for value in values.to_pylist()
        ]
        return pa.array(shown, pa.string())
    try:
        values = values.cast(pa.string())
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
        raise UserError(
            f"'{where}': the column '{name}' holds {plain}; text or numbers are wanted."
        ) from None
    return _pc.if_else(_pc.equal(values, ""), pa.scalar(None, pa.string()), values)


def has_point(kind: pa.DataType) -> bool:
    """Whether a column of this type holds numbers that may be fractions."""
    return pa.types.is_floating(kind) or pa.types.is_decimal(kind)


def class_text(values: pa.Array, where: str, name: str, row_word: str, rows: Sequence[int]) -> pa.Array:
    """Return a column of labels as the names of classes: null for an empty cell and for NaN; 1.0, in a column of numbers, is "1".

    Args:
        where, name: the table and the column, for messages.
        row_word, rows: what a row's number counts, and the numbers of these rows.

    Raises:
        UserError: a label is a fraction or infinite, or the column holds neither text nor numbers.
    """
    if has_point(_plain(values.type)):
        values = values.cast(pa.float64())
        numbers = values.to_numpy(zero_copy_only=False)  # nulls are NaN
        whole = np.isfinite(numbers) & (numbers == np.floor(numbers))
        odd = np.flatnonzero(~whole & ~np.isnan(numbers))
        if len(odd):
            raise UserError(
                f"'{where}', {row_word} {rows[odd[0]]}: {numbers[odd[0]]:g} in the column '{name}' is no label; a class is a whole "
                "number or a name. Choose another --label-column, or make classes of the numbers first."
            )
    return known_text(as_text(values, where, name))


def known_text(text: pa.Array) -> pa.Array:
    """Return text without white space around it; null where nothing is left, and for what programs write of a missing value."""
    text = _pc.utf8_trim_whitespace(text)
    return _pc.if_else(_pc.is_in(text, pa.array(UNKNOWN)), pa.scalar(None, pa.string()), text)


def _plain(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        return _plain(kind.value_type)
    if pa.types.is_null(kind) or pa.types.is_large_string(kind) or str(kind) == "string_view":
        return pa.string()
    return kind
