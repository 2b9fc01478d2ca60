"""Images that lie in Parquet files themselves, as Hugging Face data sets have them: encoded bytes in a column, one image a row."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from shards.counter_hash import fold
from shards.errors import UserError
from shards.format.columns import hash_values
from shards.format.parquet_pages import Column, Page
from shards.images.pixels import BadImage
from shards.sources import source
from shards.sources.file_list import NO_MASKS, choose, extra_columns, is_binary, read_listed, unlabelled
from shards.sources.file_set import (
    FileSet,
    holds_only,
    looks_like_split_files,
    names_file,
    names_files,
    split_url,
    told_kinds,
)
from shards.sources.parquet_columns import choose_image, class_names, has_path, holds_images, is_image
from shards.sources.source import Picture, Source, SourceKind, entry_batch, read_file
from shards.sources.source_options import NO_COLUMN, ListOptions, SourceOptions
from shards.sources.table_reader import UNREADABLE, ParquetFile, as_text, class_text, has_point, known_text
from shards.storage.opening import open_place
from shards.storage.place import Place
from shards.units import human_size, plural

_LARGE_PAGE_BYTES = 50_000_000
_IMAGE, _MASK = "image", "mask"


class ImageTableSource(Source):
    """The images in one Parquet file, in those of a folder, or in those that a pattern names: called `FILE@ROW`, rows from 0.

    The image is a column of binary data, or a struct of `bytes` and `path` as Hugging Face writes it; so is the mask, if there is one.
    Numbers of a `ClassLabel` become their names. Memory: some pages of the column. Raises UserError for columns that are not there.
    """

    kind = "parquet"

    def __init__(self, where: str, options: ListOptions | None = None):
        options = options or ListOptions()
        if options.root:
            raise UserError(
                f"--root {options.root} goes with a list of paths; '{where}' has its images inside."
            )
        self.files = FileSet(where, ".parquet")
        self.place, self.name = self.files.place, self.files.name
        self.searched = self.place if self.files.searches else None
        first = min(name for name, _ in self.files.sizes())
        self._table = ParquetFile(self.place, first, self.place / first)
        kinds = self._table.columns
        images = [name for name, kind in kinds.items() if kind is not None and is_image(kind)]
        self._columns: dict[str, str] = {_IMAGE: choose_image(self._table, images, options)}
        if (mask := choose(self._table, _MASK, options.mask_column)) in images and mask != self._columns[
            _IMAGE
        ]:
            self._columns[_MASK] = mask
        elif options.mask_column not in ("", NO_COLUMN):
            raise UserError(
                f"'{self._table.where}': --mask-column '{mask}' holds {kinds[mask] if mask else ''}; encoded images are wanted."
            )
        for role in ("label", "group"):
            found = choose(self._table, role, getattr(options, f"{role}_column"))
            if found is not None and not pa.types.is_nested(kinds[found]) and found not in images:
                self._columns[role] = found
        self._leaves = {
            role: self._leaf(self._columns[role]) for role in (_IMAGE, _MASK) if role in self._columns
        }
        self._pages = {role: Column(self.place, first, leaf) for role, leaf in self._leaves.items()}
        self._path = ""  # the column of the images' own names
        used = {*self._columns.values(), *images}
        names, self._notes = extra_columns(self._table, used)
        self._extra = {old: new for old, new in names.items() if not is_binary(self._kind(old))}
        fields = [pa.field(new, self._kind(old)) for old, new in self._extra.items()]
        if (
            has_path(self._kind(self._columns[_IMAGE]))
            and f"{self._columns[_IMAGE]}_path" not in self._extra.values()
        ):
            self._path = f"{self._columns[_IMAGE]}_path"
            fields.append(pa.field(self._path, pa.string()))
        self.extra_schema = pa.schema(fields)
        self._left_out = [name for name in images if name not in self._columns.values()]
        self._left_out += [old for old in names if old not in self._extra]
        self.classes: list[str] = []
        # Files whose labels are numbers: one that tells the names of its classes, one that does not.
        self._named = self._numbered = ""
        self._later: dict[str, str] = {}  # columns that the first file has not -> a file that has them
        self._num_files = self._largest_bytes = 0
        self._split_files: list[str] = []
        self._unlabelled: list[str] = []

    def _kind(self, name: str) -> pa.DataType:
        kind = self._table.columns[name]
        assert kind is not None, "Parquet says all types"
        return kind

    def _leaf(self, name: str) -> tuple[str, ...]:
        return (name, "bytes") if pa.types.is_struct(self._kind(name)) else (name,)

    def settings(self) -> dict[str, Any]:
        """Which files and columns."""
        extra = {column.name: str(column.type) for column in self.extra_schema}
        return {"tables": self.files.pattern, "columns": self._columns, "extra": extra}

    def describe(self) -> list[str]:
        """Which columns were taken for what, and how many images have no label."""
        roles = ", ".join(f"{role} '{name}'" for role, name in self._columns.items())
        extra = f"; kept as well: {', '.join(self.extra_schema.names)}" if self.extra_schema.names else ""
        return [
            f"Images in {plural(self._num_files, 'Parquet file')}. Columns: {roles}{extra}.",
            *self._notes,
            *self._unlabelled,
        ]

    def warnings(self) -> list[str]:
        """Columns that are left out, files of several splits."""
        found = []
        if self._left_out:
            found.append(f"columns of binary data are left out: {', '.join(self._left_out)}.")
        if self._later:
            told = ", ".join(f"{column} ('{name}')" for column, name in self._later.items())
            found.append(f"columns that '{self._table.where}' does not have are left out: {told}.")
        if self._largest_bytes > _LARGE_PAGE_BYTES:
            found.append(
                f"pages of the table have up to {human_size(self._largest_bytes)}, and each process needs some four times that: where "
                "memory is short, use fewer --workers, or write the table with row groups of 100 rows."
            )
        if self.files.others:
            found.append(f"files beside the tables are left out: {told_kinds(self.files.others)}.")
        if self._split_files:
            found.append(
                f"files of {', '.join(self._split_files)} are put together. To keep them apart, convert each: fastssl shard "
                f"'{self.place / self._split_files[0]}*.parquet' ..."
            )
        return found

    def left_out(self) -> str:
        """See `Source.left_out`."""
        return told_kinds(self.files.others)

    def entries(self) -> Iterator[pa.RecordBatch]:
        """See `Source.entries`. Reads all columns but those of images, and of these the headers of the pages."""
        num_rows = num_unlabelled = self._num_files = self._largest_bytes = 0
        self._named = self._numbered = ""
        self._later.clear()
        names = []
        for name, _ in self.files.sizes():
            self._num_files += 1
            names.append(name)
            for batch in self._file(name):
                num_rows += batch.num_rows
                num_unlabelled += batch["label"].null_count
                yield batch
        self._unlabelled = unlabelled(num_unlabelled if "label" in self._columns else 0, num_rows)
        self._split_files = looks_like_split_files(names)
        if not num_rows:
            raise UserError(
                f"'{self.place / self.files.pattern}' holds no images: it has columns and no rows."
            )

    def _file(self, name: str) -> Iterator[pa.RecordBatch]:
        windows = {
            role: self._windows(column.pages(self.place, name)) for role, column in self._pages.items()
        }
        for first, table, schema in self._rows(name):
            num_rows = table.num_rows
            taken = {role: [next(rows) for _ in range(num_rows)] for role, rows in windows.items()}
            known = {new: self._fitted(name, table, old) for old, new in self._extra.items()}
            if self._path:
                known[self._path] = as_text(table[self._columns[_IMAGE]].field("path"), name, self._path)
            columns = {
                "source": [f"{name}@{row}" for row in range(first, first + num_rows)],
                "path": pa.repeat(name, num_rows),
                "window": [window for window, _ in taken[_IMAGE]],
                "bytes": np.array([size for _, size in taken[_IMAGE]], np.int64),
                **known,
            }
            if _MASK in taken:
                columns["mask"] = [f"{source}.{_MASK}" for source in columns["source"]]
                columns["mask_window"] = [window for window, _ in taken[_MASK]]
            if "label" in self._columns:
                columns["label"] = self._labels(name, table[self._columns["label"]], first, schema)
            if "group" in self._columns:
                columns["group"] = known_text(
                    as_text(table[self._columns["group"]], name, self._columns["group"])
                )
            yield entry_batch(columns, self.extra_schema)

    def _rows(self, name: str) -> Iterator[tuple[int, pa.RecordBatch, pa.Schema]]:
        """The columns that are not images, in batches, each with its first row's number and the schema of the file."""
        roles = [column for role, column in self._columns.items() if role not in self._leaves]
        wanted = [*roles, *self._extra]
        if self._path:
            wanted.append(f"{self._columns[_IMAGE]}.path")
        first = 0
        try:
            with self.place.open(name) as file, pq.ParquetFile(file) as parquet:
                missing = [
                    column for column in (*roles, *self._extra) if column not in parquet.schema_arrow.names
                ]
                if missing:
                    raise UserError(
                        f"'{self.place / name}' has no column '{missing[0]}', which '{self._table.where}' has; convert it by itself."
                    )
                for column in parquet.schema_arrow.names:
                    if column not in self._table.columns and not column.startswith("__index_level_"):
                        self._later.setdefault(column, name)
                for batch in parquet.iter_batches(source.BATCH_ROWS, columns=wanted, use_threads=False):
                    batch.validate(full=True)  # text that is no UTF-8
                    yield first, batch, parquet.schema_arrow
                    first += batch.num_rows
        except UNREADABLE as error:
            raise UserError(
                f"'{self.place / name}' cannot be read from row {first:,} on ({error})."
            ) from error

    def _fitted(self, name: str, table: pa.RecordBatch, column: str) -> pa.Array:
        """A further column in the type that the first file has it in."""
        wanted = self._kind(column)
        try:
            return table[column].cast(wanted)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            raise UserError(
                f"'{self.place / name}': the column '{column}' holds {table[column].type}, and in '{self._table.where}' {wanted}; "
                "write both as one type, or convert the files one by one."
            ) from None

    def _classes(self, name: str, schema: pa.Schema) -> list[str]:
        """The names of the classes that a file's numbers stand for; each file has its own, and they are joined by name."""
        label = self._columns.get("label", "")
        if not label or not (
            pa.types.is_integer(schema.field(label).type) or has_point(schema.field(label).type)
        ):
            return []
        classes = class_names(schema, label)
        if classes:
            self._named = self._named or name
        else:
            self._numbered = self._numbered or name
        if self._named and self._numbered:
            raise UserError(
                f"'{self.place / self._named}' tells the names of its classes, and '{self.place / self._numbered}' has numbers alone "
                "as labels, which may mean others: convert them one by one, or write the names into both."
            )
        self.classes = list(dict.fromkeys([*self.classes, *classes]))
        return classes

    def _labels(self, name: str, values: pa.Array, first: int, schema: pa.Schema) -> pa.Array:
        classes = self._classes(name, schema)
        rows = range(first, first + len(values))
        labels = class_text(values, self.place / name, self._columns["label"], "row", rows)
        if not classes:
            return labels
        numbers = [None if text is None else int(text) for text in labels.to_pylist()]
        for row, number in zip(rows, numbers, strict=True):
            if number is not None and not -1 <= number < len(classes):
                raise UserError(
                    f"'{self.place / name}', row {row}: the label is {number}, but the file names {len(classes)} classes, "
                    f"0 to {len(classes) - 1}."
                )
        # -1 stands for none.
        return pa.array([None if i in (None, -1) else classes[i] for i in numbers], pa.string())

    def _windows(self, pages: Iterator[Page]) -> Iterator[tuple[list[int], int]]:
        """For each row: where it lies (its index in the page, then all that `_page` needs), and about how many bytes it has."""
        for page in pages:
            self._largest_bytes = max(self._largest_bytes, page.size)
            where = [page.offset, page.size, page.num_rows, *page.dictionary, page.codec]
            for index in range(page.num_rows):
                yield [index, *where], page.row_bytes

    def units(self, batch: pa.RecordBatch) -> npt.NDArray[np.uint64]:
        """The page of each row: whoever reads one of its images has read them all."""
        pages = np.array([window[1] for window in batch["window"].to_pylist()], np.uint64)
        return fold(hash_values(batch["path"]), pages)

    def read(self, row: dict[str, Any]) -> Picture:
        """One image and its mask, from their pages."""
        data = self._cell(_IMAGE, row["path"], row["window"])
        if data is None:
            path = row[self._path] if self._path else None
            if not path:
                raise BadImage("its cell is empty")
            data = read_listed(path, self.place)
        return Picture(
            data, self._cell(_MASK, row["path"], row["mask_window"]) if row["mask_window"] else None
        )

    def _cell(self, role: str, name: str, window: Sequence[int]) -> bytes | None:
        index, *where = window
        return _page(self.place, name, self._pages[role], len(self._pages), *where)[index].as_py()


_held: OrderedDict[tuple[str, str, int], pa.ChunkedArray] = OrderedDict()


def _page(
    place: Place,
    name: str,
    column: Column,
    num_held: int,
    offset: int,
    size: int,
    num_rows: int,
    dictionary: int,
    dictionary_size: int,
    codec: int,
) -> pa.ChunkedArray:
    """The values of a page. `num_held` pages, one of each column, stay in memory: the plan keeps the rows of a page together."""
    key = place.url, name, offset
    if key in _held:
        _held.move_to_end(key)
        return _held[key]
    while len(_held) >= num_held:  # before the next is read: some are large
        _held.popitem(last=False)
    refers_to = read_file(place, name, dictionary_size, dictionary) if dictionary_size else b""
    try:
        values = column.values(read_file(place, name, size, offset), num_rows, refers_to, codec)
    except UNREADABLE as error:
        raise BadImage(f"its page in the table is damaged ({str(error).splitlines()[0]})") from error
    if len(values) != num_rows:
        raise BadImage(
            f"its page in the table holds {len(values)} rows, not {num_rows} as when the plan was made"
        )
    _held[key] = values
    return values


def _matches(where: str, options: SourceOptions) -> bool:
    if not names_file(where, ".parquet"):
        return holds_only(where, ".parquet")
    if names_files(where):
        return True
    folder, name = split_url(where)
    return holds_images(open_place(folder), name, options.list)


KIND = SourceKind(
    "parquet",
    "a .parquet with the images inside, a pattern of such files or a folder of nothing else",
    _matches,
    lambda where, options: ImageTableSource(where, options.list),
    ("list",),
    NO_MASKS,
)
