"""Images of equal pixels that were given different classes: one of the two labels is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shards.format import layout
from shards.format.columns import integers, read_columns
from shards.format.label_table import read_labels
from shards.format.layout import Manifest
from shards.format.sample_table import rows_of, table_batches
from shards.storage.place import Place
from shards.units import plural

_SHOWN = 3
_COLUMNS = ["sample_id", "label", "duplicate_of"]


def label_conflicts(place: Place, manifest: Manifest) -> str:
    """Return a sentence that counts them and names the first; "" where there are none. Those that were left out count, too."""
    if not (manifest.num_duplicates and manifest.classes):
        return ""
    given = read_labels(place, manifest)
    batches = given.on(table_batches(place, manifest, _COLUMNS))
    table = pa.Table.from_batches(list(batches)).combine_chunks()
    labels, again = (integers(table[name], -1) for name in ("label", "duplicate_of"))
    other = np.where(again >= 0, labels[again], -1)
    found = np.flatnonzero((labels >= 0) & (other >= 0) & (labels != other))
    names = rows_of(place, manifest, {*found[:_SHOWN].tolist(), *again[found[:_SHOWN]].tolist()}, ["source"])
    pairs = []
    for one in found[:_SHOWN].tolist():
        both = (f"'{names[i]['source']}' ({given.classes[labels[i]]})" for i in (one, int(again[one])))
        pairs.append(" = ".join(both))
    num = len(found)
    for source, own, same_as, theirs in _left_out(place, manifest):
        num += 1
        if len(pairs) < _SHOWN:
            pairs.append(f"'{source}' ({own}) = '{same_as}' ({theirs})")
    if not num:
        return ""
    return (
        f"{plural(num, 'image has', 'images have')} the pixels of an earlier one of another class: {', '.join(pairs)}"
        f"{' ...' if num > len(pairs) else '.'}"
    )


def _left_out(place: Place, manifest: Manifest) -> Iterator[tuple[str, str, str, str]]:
    """(source, class, source of the one that stayed, its class) of images that were left out and differ in their classes."""
    for number in range(len(manifest.identities)):
        try:
            with place.open(layout.dropped_name(number)) as file:
                dropped = read_columns(file, ["position", "source", "same_as"])
            with place.open(layout.plan_name(number)) as file, pq.ParquetFile(file) as plan:
                classes = json.loads(plan.schema_arrow.metadata[b"classes"])
                planned = plan.read(["position", "label"], use_threads=False)
        except FileNotFoundError:
            continue
        at = np.searchsorted(planned["position"].to_numpy(), dropped["position"].to_numpy())
        own = integers(planned["label"], -1)[at]
        wanted = dropped["same_as"].combine_chunks()
        theirs: dict[str, int] = {}
        for batch in table_batches(place, manifest, ["source", "label"]):
            kept = batch.filter(pc.is_in(batch["source"], wanted))  # pyright: ignore[reportAttributeAccessIssue] (made at run time)
            theirs |= dict(
                zip(kept["source"].to_pylist(), kept["label"].fill_null(-1).to_pylist(), strict=True)
            )
        rows = zip(dropped["source"].to_pylist(), own.tolist(), wanted.to_pylist(), strict=True)
        for source, label, same_as in rows:
            other = theirs.get(same_as, -1)
            if label >= 0 and other >= 0 and classes[label] != manifest.classes[other]:
                yield source, classes[label], same_as, manifest.classes[other]
