"""What a shard folder holds, in numbers: from the sample table and the manifest, without decoding an image."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from shards.format import layout
from shards.format.label_table import read_labels
from shards.format.layout import Manifest
from shards.format.sample_table import rows_in_use
from shards.storage.opening import Where, open_place

PERCENTILES = (0, 1, 25, 50, 75, 99, 100)
_COLUMNS = ["width", "height", "size", "channels", "dtype", "ext", "stored", "label", "mask_size", "group"]


@dataclass(frozen=True)
class Overview:
    """Counts and distributions of a shard folder.

    widths, heights (pixels), sizes (bytes of the stored images): (num_samples,); labels: (num_samples,), -1 where there is none;
    formats: counts by (ext, channels, dtype); stored: counts by the words of the table's `stored`; extra: the source's own columns as
    (name, type, nulls, text of the values).
    """

    manifest: Manifest
    widths: npt.NDArray[np.int32]
    heights: npt.NDArray[np.int32]
    sizes: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    formats: Counter[tuple[str, int, str]]
    stored: Counter[str]
    num_groups: int
    num_duplicates: int
    extra: list[tuple[str, str, int, str]]

    def __repr__(self) -> str:
        manifest = self.manifest
        kinds = ", ".join(
            f"{count:,} {ext} of {channels} x {dtype}"
            for (ext, channels, dtype), count in self.formats.most_common(3)
        )
        classes = f"{len(manifest.classes):,} classes"
        return f"<Overview: {manifest.num_samples:,} samples ({kinds}) in {len(manifest.shards):,} shards, {classes}>"

    @property
    def aspects(self) -> npt.NDArray[np.float64]:
        """Width / height, (num_samples,)."""
        return self.widths / self.heights

    @property
    def short_sides(self) -> npt.NDArray[np.int32]:
        """The shorter side in pixels, (num_samples,)."""
        return np.minimum(self.widths, self.heights)

    def class_counts(self) -> npt.NDArray[np.int64]:
        """Samples of each class, (num_classes,)."""
        return np.bincount(self.labels[self.labels >= 0], minlength=len(self.manifest.classes))

    def pixel_values(self) -> dict[str, dict[str, list[float]]]:
        """The manifest's statistics by "dtype/channels", in the values that are stored: mean, std, p1 to p99, each by channel."""
        found = {}
        for kind, facts in self.manifest.statistics.items():
            dtype = np.dtype(kind.partition("/")[0])
            full = np.iinfo(dtype).max if dtype.kind == "u" else 1
            found[kind] = {
                name: [full * value for value in values] for name, values in facts.items() if name != "pixels"
            }
        return found

    def percentiles(self) -> dict[str, npt.NDArray[np.float64]]:
        """The PERCENTILES of each distribution, by its name."""
        of = {
            "width": self.widths,
            "height": self.heights,
            "short side": self.short_sides,
            "width / height": self.aspects,
            "bytes": self.sizes,
        }
        return {name: np.percentile(values, PERCENTILES) for name, values in of.items()}


def inspect(folder: Where) -> Overview:
    """Describe a finished shard folder from its manifest and table. Raise UserError where it is unfinished."""
    place = open_place(folder)
    manifest = Manifest.load(place)
    given = read_labels(place, manifest)
    with place.open(layout.TABLE) as file, pq.ParquetFile(file) as parquet:
        names = parquet.schema_arrow.names
        table = rows_in_use(
            parquet.read(["shard", *_COLUMNS, "duplicate_of"], use_threads=False), place, manifest
        )
        extra = []
        for name in names:
            if name not in layout.SCHEMA.names:
                column = parquet.read([name], use_threads=False)[name].slice(0, manifest.num_samples)
                extra.append((name, str(column.type), column.null_count, _values(column)))
    kinds = zip(*(table[name].to_pylist() for name in ("ext", "channels", "dtype")), strict=True)
    return Overview(
        replace(manifest, classes=given.classes),
        table["width"].to_numpy(),
        table["height"].to_numpy(),
        table["size"].to_numpy(),
        given.over(table["label"].fill_null(-1).to_numpy()),
        Counter(kinds),
        _counts(table["stored"]),
        len(table["group"].drop_null().unique()),
        len(table) - table["duplicate_of"].null_count,
        extra,
    )


def _counts(column: Any) -> Counter[str]:
    return Counter({pair["values"]: pair["counts"] for pair in column.value_counts().to_pylist()})


def _values(column: Any) -> str:
    """A few words about a column's values: its range, or how many different ones there are and the most frequent."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_temporal(kind):
        ends = pc.min_max(column).as_py()  # pyright: ignore[reportAttributeAccessIssue] (made at run time)
        return f"{ends['min']} to {ends['max']}"
    try:
        counts = _counts(column.drop_null())
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):  # lists and the like
        return ""
    most = ", ".join(f"{value} ({count:,})" for value, count in counts.most_common(3))
    return f"{len(counts):,} different: {most}" if counts else ""
