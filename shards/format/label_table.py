"""`labels.parquet`: labels that were given to finished shards, in place of those that the tars and the sample table hold.

One row a sample, `sample_id` and `label`, an index into the classes that the file names itself. It is written whole or not at all and
holds its own SHA-256, so tars, sample table and manifest stay as they are.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from shards.errors import UserError
from shards.format import layout
from shards.format.columns import integers
from shards.format.layout import Manifest
from shards.format.sealed_parquet import check_seal, sealed
from shards.storage.place import Place

_ABOUT = b"labels"
WAY_OUT = "Delete it and run `fastssl label` again."


@dataclass(frozen=True)
class LabelTable:
    """The classes of a shard folder, and the labels given to its first n samples: int64 (n,), -1 for none."""

    classes: list[str]
    labels: npt.NDArray[np.int64]

    def over(self, own: npt.NDArray[np.integer], start: int = 0) -> npt.NDArray[np.int64]:
        """The labels of the samples `start`, `start` + 1, ...: those given, and `own` (N,), of the sample table, for later samples."""
        given = self.labels[start : start + len(own)]
        return np.concatenate([given, own[len(given) :].astype(np.int64)])

    def on(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """The batches of the sample table, from the first sample on, with these labels in their column `label`."""
        start = 0
        for batch in batches:
            labels = self.over(batch["label"].fill_null(-1).to_numpy(), start).astype(np.int32)
            at = batch.schema.get_field_index("label")
            yield batch.set_column(at, "label", pa.array(labels, mask=labels < 0))
            start += batch.num_rows


def read_labels(place: Place, manifest: Manifest) -> LabelTable:
    """The labels that were given to a shard folder, and its classes. Raise UserError where the file is damaged or of other shards."""
    try:
        return _read(place, manifest)
    except FileNotFoundError:
        return LabelTable(manifest.classes, np.empty(0, np.int64))
    except UserError as error:
        raise UserError(f"'{place / layout.LABELS}' {error}. {WAY_OUT}") from error


def write_labels(place: Place, manifest: Manifest, table: LabelTable) -> None:
    """Write the labels of all samples, atomically; the same labels give the same bytes."""
    labels = pa.array(table.labels.astype(np.int32), mask=table.labels < 0)
    about = {"classes": table.classes, "options_sha256": manifest.options_sha256}
    columns = pa.table({"sample_id": pa.array(np.arange(len(labels))), "label": labels})
    place.write(layout.LABELS, sealed(columns.replace_schema_metadata({_ABOUT: json.dumps(about)})))


def labels_fault(place: Place, manifest: Manifest) -> str:
    """What is wrong with the file of labels, in a clause; empty where nothing is, and where there is no such file."""
    try:
        _read(place, manifest)
    except FileNotFoundError:
        pass
    except UserError as error:
        return str(error)
    return ""


def _read(place: Place, manifest: Manifest) -> LabelTable:
    data = place.read(layout.LABELS)
    check_seal(data)
    with pq.ParquetFile(io.BytesIO(data)) as parquet:
        about = json.loads(parquet.schema_arrow.metadata[_ABOUT])
        labels = integers(parquet.read(["label"], use_threads=False)["label"], -1).astype(np.int64)
    # The labels of a folder that has grown since are those of its first samples.
    if len(labels) != manifest.num_samples_at(about["options_sha256"]):
        raise UserError(
            f"labels {len(labels):,} samples of another conversion, '{place.url}' has {manifest.num_samples:,}"
        )
    # One of the two begins the other: a folder that grew may have more classes than its labels, or fewer.
    fewer, more = sorted((manifest.classes, about["classes"]), key=len)
    for number, (one, other) in enumerate(zip(fewer, more, strict=False)):
        if one != other:
            raise UserError(
                f"and the manifest give the number {number} to two classes, '{one}' and '{other}'"
            )
    return LabelTable(more, labels)
