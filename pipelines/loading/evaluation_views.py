"""`eval_batches`: the one fixed view of each sample that evaluation, embedding and search look at."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from pipelines.augment.channels import fit_recipe
from pipelines.augment.draws import eval_draws
from pipelines.augment.recipe import Recipe, get_recipe
from pipelines.engines.fused_engine import FusedEngine
from pipelines.loading.loader import Folder, open_shards
from pipelines.loading.loader_options import make_options
from pipelines.loading.mask_slot import with_masks
from pipelines.loading.slots import host_slots, view_shapes
from pipelines.streaming.batch import Batch, BatchRequest
from pipelines.streaming.batch_stream import SlotMaker, default_threads, stream
from pipelines.streaming.cache import (
    Samples,
    choose_kept,
    decoded_sizes,
    eight_bit,
    make_cache,
    open_samples,
)
from pipelines.streaming.shard_downloads import ShardPrefetch
from shards.dataset.shard_set import ShardSet

# Those of `LoaderOptions` that mean something for views which are not drawn.
_OPTIONS = ("device", "mask_ignore", "masks", "reuse_memory", "threads", "value_range")


def eval_batches(
    shards: Folder | Sequence[Folder],
    recipe: str | Recipe,
    sample_ids: np.ndarray | None = None,
    *,
    batch: int = 256,
    split: str = "",
    samples: Samples | None = None,
    **keywords: Any,
) -> Generator[Batch, None, None]:
    """Yield the fixed evaluation view of the given samples, in their order; the last batch may be smaller.

    Args:
        shards: folder of shards, its URL, or an open `ShardSet`; or several, one after the other.
        recipe: a `Recipe`, or the name of a preset; its `size`, `eval_crop`, mean, std and value range count.
        sample_ids: int64 (N,); without them all samples in use, in the order in which they are stored.
        batch: samples in a batch.
        split: part of the shards that `fastssl split` made.
        samples: where the pixels come from; None reads and decodes each, see `eval_cache`.
        keywords: device, threads, masks, mask_ignore, value_range and reuse_memory, as in `LoaderOptions`.

    Raises:
        UserError: a sample does not decode (none stands in for it: the result would be that of another data set), or masks are
            asked for and no sample has one, or a keyword is unknown.
    """
    options = make_options("eval_batches", keywords, _OPTIONS)
    shards = open_shards(shards, split)
    recipe = fit_recipe(
        get_recipe(recipe) if isinstance(recipe, str) else recipe, shards, options.value_range
    )
    ids = shards.ids if sample_ids is None else sample_ids

    def requests() -> Iterator[BatchRequest]:
        prefetch = ShardPrefetch(shards)
        uses = prefetch.uses(ids)
        for start in range(0, len(ids), batch):
            prefetch.at(uses, start, start + batch)
            part = ids[start : start + batch]
            yield BatchRequest(part, eval_draws(recipe, shards.widths[part], shards.heights[part]))

    engine = FusedEngine(recipe)
    samples = samples or open_samples(shards, engine.decode, len(recipe.mean))
    shapes, largest = view_shapes(recipe)[:1], min(batch, len(ids))
    slots: SlotMaker = partial(host_slots, samples, engine, shapes, largest, options)
    if options.masks:
        slots = with_masks(slots, samples, [recipe.size], largest, options)
    return stream(samples, slots(), requests(), options.threads or default_threads())


def eval_cache(
    shards: ShardSet, recipe: Recipe, ids: np.ndarray, cache_gb: float = 0, taken: int = 0
) -> Samples:
    """Return samples kept in memory for `eval_batches`, by this process alone: pixels where they fit, encoded bytes where not.

    Args:
        shards: the data set.
        recipe: as for `eval_batches`.
        ids: those that are kept, int64 (N,).
        cache_gb: memory that all caches may fill, in 10^9 bytes; 0 means half of what is free now.
        taken: bytes that other caches will fill.

    Raises:
        UserError: not even the encoded images fit.
    """
    recipe = fit_recipe(recipe, shards)
    channels, encoded = len(recipe.mean), int(shards.sizes[ids].sum())
    decoded = int(decoded_sizes(shards, channels, ids).sum()) if eight_bit(shards) else None
    what = f"{len(ids):,} images for evaluation"
    kept = choose_kept(what, encoded, decoded, cache_gb, taken)
    return make_cache(shards, FusedEngine(recipe).decode, channels, kept, ids)
