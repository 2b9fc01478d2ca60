"""`open_loader`: one call that yields batches of views from shards, for every engine."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch

from pipelines.augment.channels import check_operations, fit_recipe
from pipelines.augment.draws import draw, eval_draws
from pipelines.augment.recipe import Recipe
from pipelines.engines.fused_engine import FusedEngine
from pipelines.kernels.view_params import PLAIN, Form
from pipelines.loading.mask_slot import with_masks
from pipelines.loading.masks import NO_MASK
from pipelines.loading.slots import host_slots, open_slots, view_shapes, whole_only
from pipelines.streaming.bad_samples import BadSamples
from pipelines.streaming.cache import Samples, open_samples
from pipelines.streaming.prefetch import Ahead, Uses, choose_window
from pipelines.streaming.stream import Batch, Job, SlotMaker, default_threads, exact_device, stream
from shards.dataset.order import block_order, epoch_order, rank_positions, steps_per_epoch
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError

__all__ = ["Batch", "Loader", "default_threads", "eval_batches", "open_loader"]


def open_loader(
    shards: ShardSet,
    recipe: Recipe,
    *,
    batch: int,
    seed: int,
    rank: int = 0,
    world: int = 1,
    engine: str = "fused",
    threads: int = 0,
    augment_on: str = "cpu",
    decode: str = "cpu",
    order: str = "auto",
    block_shards: int = 16,
    cache: str = "none",
    cache_gb: float = 0.0,
    value_range: str = "type",
    side_stream: bool = True,
    max_bad_share: float = 0.001,
    masks: bool = False,
    mask_ignore: int = NO_MASK,
    device: torch.device | str = "cpu",
    form: Form = PLAIN,
    log: Callable[[str], None] | None = None,
) -> Loader:
    """Open the training stream of one rank.

    Args:
        batch: samples per step over all ranks; must divide by `world`.
        seed: decides order and draws together with the epoch.
        device: where the views go; copies to a GPU overlap with the work on it.
        form: how views lie in memory that the engine fused makes on a GPU; all others are float32, channel after channel.
        masks: `Batch.masks` holds the masks of the views, by the same crops, flips and turns. The CPU makes them, for every engine.
        mask_ignore: stands where no class is known: in the masks of samples that have none, and where a view is erased. Pixels that
            are stored with this index keep it (`fastssl shard` stores 255 beyond the edge of rasters without nodata value).
        log: takes one line about each sample found bad; without it they are warnings.

    Raises:
        UserError: the batch does not divide by the ranks, or the data set has fewer samples than one batch, or the engine is
            unknown, or the cache does not fit, or the recipe's operations or values are not for the images' channels, or masks are
            asked for and no sample has one.
    """
    rank_positions(0, batch, rank, world)  # names both numbers where the batch does not divide
    if len(shards) < batch:
        part = f"the split '{shards.split}' of " if shards.split else ""
        raise UserError(
            f"{part}'{shards.folder}' has {len(shards)} samples, fewer than one batch of {batch}: lower the batch size "
            f"(--train.batch) to at most {len(shards)}, or convert more images."
        )
    recipe = fit_recipe(recipe, shards, value_range)
    check_operations(recipe)
    device = exact_device(device)
    threads = threads or default_threads()
    samples, make_slots = open_slots(
        shards,
        recipe,
        engine,
        batch=batch // world,
        threads=threads,
        augment_on=augment_on,
        decode=decode,
        cache=cache,
        cache_gb=cache_gb,
        device=device,
        side_stream=side_stream,
        form=form,
        masks=masks,
        mask_ignore=mask_ignore,
    )
    window, note = choose_window(shards, order, block_shards)
    samples.note = "\n".join(filter(None, (note, samples.note)))
    return Loader(
        samples,
        make_slots,
        recipe,
        BadSamples(shards, recipe, seed, max_bad_share, log),
        batch=batch,
        seed=seed,
        rank=rank,
        world=world,
        threads=threads,
        device=device,
        block_shards=window,
        whole_only=whole_only(engine, augment_on),
    )


class Loader:
    """Batches of one rank in the global order; made by `open_loader`.

    `bad` counts the samples that went bad (`samples`, different ones, and `replaced`); `note` says what a cache holds, or is empty.
    """

    def __init__(
        self,
        samples: Samples,
        make_slots: SlotMaker,
        recipe: Recipe,
        bad: BadSamples,
        *,
        batch: int,
        seed: int,
        rank: int,
        world: int,
        threads: int,
        device: torch.device,
        block_shards: int,
        whole_only: str = "",
    ):
        """`whole_only`: why batches cannot be taken in chunks; empty where they can."""
        self.shards, self.recipe, self.bad, self.note = samples.shards, recipe, bad, samples.note
        self.batch, self.seed, self.rank, self.world = batch, seed, rank, world
        self.threads, self.device = threads, device
        self.steps_per_epoch = steps_per_epoch(len(self.shards), batch)
        self._samples, self._make_slots, self._block_shards = samples, make_slots, block_shards
        self._whole_only, self._in_chunks = whole_only, False

    def in_chunks(self) -> Loader:
        """Return the same stream, of batches that the caller takes chunk by chunk, so that the device never holds a whole one.

        Views that the CPU makes stay in host memory, page-locked for the device, for copies of some rows on the current stream; those
        of `augment_on` gpu are `LazyViews`, made when some rows are asked for. Either are valid until the next batch is asked for. The
        host holds `SLOTS` batches: of views, or of decoded images.

        Raises:
            UserError: the engine makes whole batches on the GPU.
        """
        if self._whole_only:
            raise UserError(self._whole_only)
        other = copy.copy(self)
        other._in_chunks = True
        return other

    def epoch(self, epoch: int, start_step: int = 0) -> Generator[Batch, None, None]:
        """Yield the batches of `epoch` from `start_step` on; a pure function of (seed, epoch, step)."""
        first = epoch * self.steps_per_epoch
        return self.steps(first + start_step, first + self.steps_per_epoch)

    def steps(self, start: int, stop: int) -> Generator[Batch, None, None]:
        """Yield the batches of the global steps start .. stop - 1, on from one epoch to the next without a pause."""
        slots = self._make_slots(in_chunks=self._in_chunks)
        return stream(self._samples, slots, self._jobs(start, stop), self.threads, self.bad)

    def order(self, epoch: int) -> np.ndarray:
        """The sample ids of an epoch, in the order of all ranks together: int64 (len(shards),).

        The order is one of positions among the samples in use, so that of a split does not depend on what lies outside of it.
        """
        shards = self.shards
        if self._block_shards:
            ends = np.cumsum([shard.num_samples for shard in shards.manifest.shards])
            inside = np.searchsorted(shards.ids, ends)
            return shards.ids[block_order(np.diff(inside, prepend=0), self.seed, epoch, self._block_shards)]
        order = epoch_order(len(shards), self.seed, epoch)
        return shards.ids[order] if shards.split else order

    def _jobs(self, start: int, stop: int) -> Iterator[Job]:
        """What to make at each step. The next epoch's order is made in a thread while this epoch lasts."""
        if start >= stop:
            return
        first, last = start // self.steps_per_epoch, (stop - 1) // self.steps_per_epoch
        ahead = Ahead(self.shards, self._block_shards)

        def plan(epoch: int) -> tuple[np.ndarray, Uses | None]:
            order = self.order(epoch)
            return order, ahead.uses(order[: self.steps_per_epoch * self.batch])

        with ThreadPoolExecutor(1, thread_name_prefix="order") as pool:
            coming = pool.submit(plan, first)
            for epoch in range(first, last + 1):
                order, uses = coming.result()
                if epoch < last:
                    coming = pool.submit(plan, epoch + 1)
                begin = epoch * self.steps_per_epoch
                for step in range(max(start, begin), min(stop, begin + self.steps_per_epoch)):
                    at = (step - begin) * self.batch
                    then = coming.result()[1] if epoch < last and coming.done() else None
                    ahead.at(uses, at, at + self.batch, then)
                    ids = order[rank_positions(step - begin, self.batch, self.rank, self.world)]
                    widths, heights = self.shards.widths[ids], self.shards.heights[ids]
                    yield Job(ids, draw(self.recipe, self.seed, epoch, ids, widths, heights), epoch)


def eval_batches(
    shards: ShardSet,
    recipe: Recipe,
    sample_ids: np.ndarray,
    *,
    batch: int = 256,
    threads: int = 0,
    device: torch.device | str = "cpu",
    masks: bool = False,
    mask_ignore: int = NO_MASK,
) -> Generator[Batch, None, None]:
    """Yield the fixed evaluation view of the given samples, in their order; the last batch may be smaller.

    With `masks`, batches carry that view's masks; `mask_ignore` as for `open_loader`.

    Raises:
        UserError: a sample does not decode (none stands in for it: the result would be that of another data set), or masks are
            asked for and no sample has one.
    """

    def jobs() -> Iterator[Job]:
        ahead = Ahead(shards)
        uses = ahead.uses(sample_ids)
        for start in range(0, len(sample_ids), batch):
            ahead.at(uses, start, start + batch)
            ids = sample_ids[start : start + batch]
            yield Job(ids, eval_draws(recipe, shards.widths[ids], shards.heights[ids]))

    recipe = fit_recipe(recipe, shards)
    engine = FusedEngine(recipe)
    samples = open_samples(shards, engine.decode, len(recipe.mean))
    shapes = view_shapes(recipe)[:1]
    largest, place = min(batch, len(sample_ids)), exact_device(device)
    slots: SlotMaker = partial(host_slots, samples, engine, shapes, largest, place)
    if masks:
        slots = with_masks(slots, samples, [recipe.size], largest, place, mask_ignore)
    return stream(samples, slots(), jobs(), threads or default_threads())
