"""How much of the masks each class has, and what speaks against masks: read from a few hundred of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shards.format import layout
from shards.format.layout import Manifest
from shards.format.sample_table import table_batches
from shards.images.decoding import decode
from shards.overview.mask_overlay import IGNORED
from shards.storage.place import Place

MOST = 256


@dataclass(frozen=True)
class MaskShares:
    """shares: index -> its share of all pixels of the masks read, 0 to 1; num_read, num_masks: how many of how many those are."""

    shares: dict[int, float]
    num_read: int
    num_masks: int

    def warnings(self) -> list[str]:
        """What is probably not meant."""
        if set(self.shares) == {0, IGNORED}:
            return [
                f"the masks hold 0 and {IGNORED} only, and {IGNORED} is the index that losses ignore: all that is no background would "
                "have no part in training. Where it is a class, write it as 1."
            ]
        if self.shares and set(self.shares) == {IGNORED}:
            return [f"the masks hold {IGNORED} only, the index that losses ignore."]
        return []


def mask_shares(place: Place, manifest: Manifest, most: int = MOST) -> MaskShares:
    """Read at most `most` masks of a finished folder, evenly chosen. Masks that cannot be read are passed over: verify names them."""
    if not manifest.num_masks:
        return MaskShares({}, 0, 0)
    columns = ["shard", "mask_offset", "mask_size"]
    batches = [b.filter(b["mask_offset"].is_valid()) for b in table_batches(place, manifest, columns)]
    rows = pa.Table.from_batches(batches)
    chosen = np.unique(np.linspace(0, rows.num_rows - 1, min(most, rows.num_rows)).astype(np.int64))
    counts: npt.NDArray[np.int64] = np.zeros(1 << 16, np.int64)
    num_read = 0
    for row in rows.take(pa.array(chosen)).to_pylist():
        try:
            data = place.read_range(layout.shard_name(row["shard"]), row["mask_offset"], row["mask_size"])
            mask = decode(data)
        # Damaged bytes raise many kinds.
        except Exception:
            continue
        counts += np.bincount(mask.ravel(), minlength=len(counts))[: len(counts)]
        num_read += 1
    total = max(1, int(counts.sum()))
    shares = {int(index): int(counts[index]) / total for index in np.flatnonzero(counts)}
    return MaskShares(shares, num_read, rows.num_rows)
