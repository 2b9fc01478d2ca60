"""Download remote shards before a stream uses them; the order keeps the number in use at a time small."""

from __future__ import annotations

from typing import Literal

import numpy as np

from shards.dataset.mixed_set import MixedShardSet
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError
from shards.units import human_size

# Shards asked for before they are in use, at least.
REACH = 8


def resolve_order(
    shards: ShardSet, order: Literal["auto", "global", "blocks"]
) -> Literal["global", "blocks"]:
    """Return the order that data.order means for these shards: auto is blocks where they are remote."""
    if order == "auto":
        return "blocks" if shards.near is not None else "global"
    return order


def choose_window(
    shards: ShardSet, order: Literal["auto", "global", "blocks"], block_shards: int
) -> tuple[int, str]:
    """Return the number of shards in a block, 0 for the global order, and a note for the user.

    Raises:
        UserError: the cache of remote shards is too small for the order.
    """
    if order == "blocks" and isinstance(shards, MixedShardSet) and shards.weights:
        raise UserError("data.order blocks does not go with data.weights: leave one of them out.")
    window = block_shards if resolve_order(shards, order) == "blocks" else 0
    if shards.near is None:
        return window, ""
    total, limit = shards.near.num_bytes, shards.near.cache.limit_bytes
    sizes = (
        f"'{shards.folder}' has {human_size(total)} of shards and their cache may hold {human_size(limit)}"
    )
    if not window:
        if total > limit:
            raise UserError(
                f"data.order global needs all shards near, but {sizes}: set --data.order blocks, or raise --data.cache-bytes."
            )
        return 0, f"remote shards: {sizes} in '{shards.near.cache.folder}'"
    block = shards.near.largest_bytes(window)
    if block > limit:
        raise UserError(
            f"A block of {window} shards takes up to {human_size(block)}, but {sizes}: lower --data.block-shards, or raise "
            "--data.cache-bytes."
        )
    fits = "; --data.order global shuffles all of them" if total <= limit else ""
    note = f"remote shards: {sizes} in '{shards.near.cache.folder}'; the order is by blocks of {window} shards{fits}"
    return window, note


class ShardUses:
    """The positions at which a stream uses each shard `first` and `last`, with `shards` in the order of their first use; (S,) each."""

    def __init__(self, numbers: np.ndarray):
        """Read off `numbers`, the shard's number at each position (N,)."""
        positions = np.arange(len(numbers))
        first, last = np.full((2, int(numbers.max()) + 1), -1)
        first[numbers[::-1]] = positions[::-1]  # of values for one place the last one stays
        last[numbers] = positions
        used = np.flatnonzero(first >= 0)
        self.shards = used[np.argsort(first[used])]
        self.first, self.last = first[self.shards], last[self.shards]

    def wanted(self, start: int, stop: int, reach: int) -> list[int]:
        """Return the shards in use at positions start .. stop - 1, those begun before and still needed, and the next `reach`."""
        begun = int(np.searchsorted(self.first, stop))
        in_use = self.shards[:begun][self.last[:begun] >= start]
        return [*in_use.tolist(), *self.shards[begun : begun + reach].tolist()]


class ShardPrefetch:
    """Asks for remote shards while batches are made: for those in use first, then for the next ones."""

    def __init__(self, shards: ShardSet, reach: int = REACH):
        self._shards, self._reach = shards, max(reach, REACH)
        self._asked: list[int] = []

    def uses(self, sample_ids: np.ndarray) -> ShardUses | None:
        """Return when a stream of these samples (N,) uses which shard; None for local shards."""
        return ShardUses(self._shards.shard_numbers(sample_ids)) if self._shards.near is not None else None

    def at(self, uses: ShardUses | None, start: int, stop: int, then: ShardUses | None = None) -> None:
        """Ask for what positions start .. stop - 1 need, which the stream reads next; `then` follows after all of `uses`."""
        if uses is None:
            return
        wanted = uses.wanted(start, stop, self._reach)
        if then is not None and stop > uses.first[-1]:
            following = then.shards[: self._reach].tolist()
            wanted += [shard for shard in following if shard not in wanted]
        if wanted != self._asked:
            self._asked = wanted
            self._shards.prefetch(wanted)
