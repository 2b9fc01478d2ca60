"""A finished shard folder as a source: the same samples in other shards, or some of them, with all that is known of each."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from shards.errors import UserError
from shards.format import layout
from shards.format.columns import read_columns
from shards.format.label_table import read_labels
from shards.format.layout import Manifest
from shards.format.sample_table import table_batches
from shards.format.tar_reader import BLOCK
from shards.sources import source
from shards.sources.file_set import may_be_folder
from shards.sources.source import Picture, Source, SourceKind, entry_batch, read_file
from shards.sources.source_options import SourceOptions
from shards.sources.tar import INSIDE
from shards.storage.opening import open_place
from shards.storage.place import Place

_pc: Any = pyarrow.compute  # its functions are made at run time
_OWN = ("height", "width", "label", "source")  # what the JSON says of every sample


class ShardFolderSource(Source):
    """The samples of a shard folder under the names that they had: labels, masks, groups, further columns and JSON are kept.

    `only`: sample ids to take, (N,); None for all. Raises UserError where the folder is unfinished, a shard missing or cut short, and
    for ids that it has not.
    """

    kind = "shards"

    def __init__(self, where: str, only: npt.NDArray[np.int64] | None = None):
        self.place = self.searched = open_place(where)
        self.name = self.place.name
        manifest = Manifest.load(self.place)
        for shard in manifest.shards:
            found = self.place.size(shard.name)
            if found != shard.bytes:
                has = (
                    "is missing" if found is None else f"has {found:,} bytes and should have {shard.bytes:,}"
                )
                raise UserError(
                    f"'{self.place / shard.name}' {has}; run the `fastssl shard` command that made it again to mend it."
                )
        if not self.place.exists(layout.TABLE):
            raise UserError(
                f"'{self.place / layout.TABLE}' is missing; run the command that made it again to mend it."
            )
        self._manifest = manifest
        self._given = read_labels(self.place, manifest)
        self.classes = self._given.classes  # of a part, too: a label is an index into them
        self._only = None if only is None else np.unique(only)
        if self._only is not None:
            _check_ids(self._only, manifest.num_samples, self.place.url)
        with self.place.open(layout.TABLE) as file:
            schema = pq.read_schema(file)
        self.extra_schema = pa.schema([column for column in schema if column.name not in layout.SCHEMA.names])

    def describe(self) -> list[str]:
        """How many of the samples are taken."""
        num_samples = self._manifest.num_samples
        taken = num_samples if self._only is None else len(self._only)
        return [f"Finished shards: {taken:,} of their {num_samples:,} samples, read in place."]

    def entries(self) -> Iterator[pa.RecordBatch]:
        """See `Source.entries`: the sample table, in batches."""
        classes = pa.array(self.classes, pa.string())
        wanted = [
            "sample_id",
            "key",
            "shard",
            "offset",
            "size",
            "label",
            "mask_offset",
            "mask_size",
            "group",
            "source",
        ]
        names = [*wanted, *self.extra_schema.names]
        for batch in self._given.on(table_batches(self.place, self._manifest, names, source.BATCH_ROWS)):
            if self._only is not None:
                batch = batch.filter(pa.array(np.isin(batch["sample_id"].to_numpy(), self._only)))
            if not batch.num_rows:
                continue
            known = batch["mask_offset"].is_valid()
            masks = _pc.binary_join_element_wise(batch["key"], layout.MASK_EXT, ".")
            spans = pa.array(
                [np.array(span) for span in _spans(batch, "mask_offset", "mask_size")],
                pa.list_(pa.int64()),
            )
            columns = {name: batch[name] for name in ("source", "group", *self.extra_schema.names)}
            columns |= {
                "path": _paths(batch["shard"]),
                "window": pa.array(list(_spans(batch, "offset", "size")), pa.list_(pa.int64())),
                "bytes": batch["size"],
                "label": classes.take(batch["label"]),
                "mask": _pc.if_else(known, masks, pa.scalar(None, pa.string())),
                "mask_window": _pc.if_else(known, spans, pa.scalar(None, pa.list_(pa.int64()))),
            }
            yield entry_batch(columns, self.extra_schema)

    def read(self, row: dict[str, Any]) -> Picture:
        """The stored image and mask, and what the JSON knows beyond the table."""
        offset, size = row["window"]
        data = read_file(self.place, row["path"], size, offset)
        facts = self._facts(row["path"], offset + size + -size % BLOCK)
        facts = {
            key: value
            for key, value in facts.items()
            if key not in _OWN and key not in self.extra_schema.names
        }
        mask = row["mask_window"] and read_file(
            self.place, row["path"], row["mask_window"][1], row["mask_window"][0]
        )
        return Picture(data, mask, facts)

    def _facts(self, tar: str, at: int) -> dict[str, Any]:
        """The sample's JSON, which lies behind the image and the class."""
        for _ in range(2):
            header = read_file(self.place, tar, BLOCK, at)
            name, size = header[:100].rstrip(b"\0"), int(header[124:135] or b"0", 8)
            if name.endswith(b".json"):
                return json.loads(read_file(self.place, tar, size, at + BLOCK))
            at += BLOCK + size + -size % BLOCK
        return {}


def _spans(batch: pa.RecordBatch, offset: str, size: str) -> list[list[int]]:
    return np.stack(
        [batch[name].fill_null(0).to_numpy(zero_copy_only=False) for name in (offset, size)], axis=1
    ).tolist()


def _paths(shards: pa.Array) -> pa.Array:
    encoded = shards.dictionary_encode()
    names = pa.array([layout.shard_name(shard) for shard in encoded.dictionary.to_pylist()], pa.string())
    return names.take(encoded.indices)


def _check_ids(ids: npt.NDArray[np.int64], num_samples: int, where: str) -> None:
    if not len(ids):
        raise UserError("--only names no samples.")
    wrong = ids[(ids < 0) | (ids >= num_samples)]
    if len(wrong):
        raise UserError(
            f"--only names the sample {wrong[0]}, but '{where}' has the samples 0 to {num_samples - 1}."
        )


def read_only(where: str, only: str) -> npt.NDArray[np.int64]:
    """The sample ids that `--only` means: a file with one id a line, or with a column `sample_id` (Parquet); else a split's name."""
    if not os.path.isfile(only):
        from shards.splits.split_table import open_split

        if only.endswith((".txt", ".csv", ".parquet")):
            raise UserError(
                f"There is no file '{only}'; --only is a file of sample ids, or the name of a split."
            )
        return open_split(where, only).ids
    try:
        if only.endswith(".parquet"):
            return read_columns(only, ["sample_id"])["sample_id"].to_numpy().astype(np.int64)
        with open(only, encoding="utf-8-sig") as file:
            lines = [(number, line.strip()) for number, line in enumerate(file, 1) if line.strip()]
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        raise UserError(f"'{only}' (--only) cannot be read ({error}).") from error
    for number, line in lines:
        if not line.isdecimal():
            raise UserError(
                f"'{only}', line {number}: '{line[:40]}' is no sample id; one number a line is wanted."
            )
    return np.array([int(line) for _, line in lines], np.int64)


def is_shard_folder(place: Place) -> bool:
    """Whether a folder is one of ours, finished or not; a `manifest.json` alone may be anybody's."""
    return place.exists(layout.PLAN) or (place.exists(layout.MANIFEST) and place.exists(layout.TABLE))


def _matches(where: str, options: SourceOptions) -> bool:
    return may_be_folder(where) and is_shard_folder(open_place(where))


def _open(where: str, options: SourceOptions) -> ShardFolderSource:
    return ShardFolderSource(where, read_only(where, options.only) if options.only else None)


KIND = SourceKind("shards", "a finished shard folder", _matches, _open, ("only",), INSIDE)
