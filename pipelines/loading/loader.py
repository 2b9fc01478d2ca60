"""`open_loader`: one call that gives batches of views from shards, for every engine."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np

from pipelines.augment.channels import check_operations, fit_recipe
from pipelines.augment.draws import draw
from pipelines.augment.recipe import Recipe, get_recipe
from pipelines.loading.loader_options import LoaderOptions, make_options
from pipelines.loading.loader_state import check_state, describe_run
from pipelines.loading.slots import open_slots, whole_only
from pipelines.streaming.bad_samples import BadSamples
from pipelines.streaming.batch import Batch, BatchRequest
from pipelines.streaming.batch_stream import SlotMaker, default_threads, exact_device, stream
from pipelines.streaming.cache import Samples, fill_ahead
from pipelines.streaming.shard_downloads import ShardPrefetch, ShardUses, choose_window
from shards.dataset.order import block_order, rank_positions, steps_per_epoch
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError
from shards.splits.split_table import open_mix, reopen
from shards.units import plural

Folder = str | os.PathLike | ShardSet

__all__ = ["Batch", "Loader", "default_threads", "open_loader", "open_shards"]


def open_loader(
    shards: Folder | Sequence[Folder],
    recipe: str | Recipe,
    *,
    batch: int,
    seed: int = 0,
    split: str = "",
    weights: Sequence[float] | None = (),
    options: LoaderOptions | None = None,
    **keywords: Any,
) -> Loader:
    """Open the training loader of one process.

    Args:
        shards: folder of shards, its URL, or an open `ShardSet`; or several folders, which are read as one set.
        recipe: what happens to the images: a `Recipe`, or the name of a preset in `RECIPES`.
        batch: samples per step over all ranks; must divide by `world`.
        seed: decides order and draws together with the epoch.
        split: part of the shards that `fastssl split` made, such as train; empty: all of them.
        weights: how much of an epoch each of several folders gives; empty: each sample once. See `MixedShardSet`.
        options: how the loader works.
        keywords: fields of `LoaderOptions`, on top of `options`: engine, threads, rank, world, device, cache, masks, ...

    Raises:
        UserError: an unknown keyword, preset, split or engine; a batch that does not divide by the ranks; fewer samples than one
            batch; a cache that does not fit; operations or values of the recipe that are not for the images' channels; masks asked
            for where no sample has one.
    """
    options = make_options("open_loader", keywords, base=options)
    for name, value, least in (("batch", batch, 1), ("seed", seed, 0)):
        if not isinstance(value, int | np.integer) or not least <= value < 2**63:
            raise UserError(f"{name} is {value!r}, but it must be a whole number of {least} or more.")
    recipe = get_recipe(recipe) if isinstance(recipe, str) else recipe
    shards = open_shards(shards, split, weights or ())
    # Names both numbers where the batch does not divide.
    rank_positions(0, batch, options.rank, options.world)
    if len(shards) < batch:
        part = f"the split '{shards.split}' of " if shards.split else ""
        raise UserError(
            f"{part}'{shards.folder}' has {len(shards)} samples, fewer than one batch of {batch}: lower the batch size "
            f"(--train.batch) to at most {len(shards)}, or convert more images."
        )
    recipe = fit_recipe(recipe, shards, options.value_range)
    check_operations(recipe)
    options = replace(
        options, device=exact_device(options.device), threads=options.threads or default_threads()
    )
    samples, make_slots = open_slots(shards, recipe, batch // options.world, options)
    window, note = choose_window(shards, options.order, options.block_shards)
    samples.note = "\n".join(filter(None, (note, samples.note)))
    bad = BadSamples(shards, recipe, seed, options.max_bad_share, options.log)
    return Loader(samples, make_slots, recipe, bad, batch=batch, seed=seed, options=options, window=window)


def open_shards(
    shards: Folder | Sequence[Folder], split: str = "", weights: Sequence[float] = ()
) -> ShardSet:
    """Return the samples of a folder, of a URL, of an open `ShardSet` or of several of these, or those of one split of them.

    Raises:
        UserError: as `open_mix`, or the set is that of another split already.
    """
    if weights or not isinstance(shards, ShardSet):
        several = [shards] if isinstance(shards, str | os.PathLike | ShardSet) else shards
        return open_mix(several, split, weights)
    if not split or split == shards.split:
        return shards
    if shards.split:
        raise UserError(
            f"split is '{split}', but the ShardSet of '{shards.folder}' is that of the split '{shards.split}': give the folder."
        )
    return reopen(shards, split)


class Loader:
    """Batches of one process in the global order; made by `open_loader`.

    `for batch in loader` gives the batches of the current epoch. When they are all taken, the next epoch becomes the current one;
    `set_epoch` chooses another. A loop that is left early begins the epoch anew the next time. `state_dict` says how far the latest
    loop has come, also in the midst of an epoch.

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
        options: LoaderOptions,
        window: int = 0,
    ):
        """Start at epoch 0. `window`: the number of shards whose samples are shuffled together; 0 for all."""
        self.shards, self.recipe, self.bad, self.note = samples.shards, recipe, bad, samples.note
        self.batch, self.seed, self.options = batch, seed, options
        self.steps_per_epoch = steps_per_epoch(len(self.shards), batch)
        self.current_epoch = 0
        self._samples, self._make_slots, self._window = samples, make_slots, window
        self._in_chunks = False
        # Where the next loop begins, how many steps of the epoch the latest one has given, and which one that is.
        self._start, self._given, self._latest = 0, 0, object()

    def __repr__(self) -> str:
        options = self.options
        part = f", split '{self.shards.split}'" if self.shards.split else ""
        place = f"rank {options.rank} of {options.world}, " if options.world > 1 else ""
        at = f"at epoch {self.current_epoch}, step {self._given}"
        return (
            f"Loader('{self.shards.folder}'{part}: {len(self.shards):,} samples; batch {self.batch}, {len(self):,} steps an epoch, "
            f"seed {self.seed}; {place}engine {options.engine}, views on {options.device}; {at})"
        )

    def __len__(self) -> int:
        """Return the steps of an epoch; samples that do not fill a batch are left out, others in each epoch."""
        return self.steps_per_epoch

    def __iter__(self) -> Generator[Batch, None, None]:
        """Return an iterator over the batches of the current epoch that are left."""
        return self._rest(self.current_epoch, self._start)

    def _rest(self, epoch: int, start: int) -> Generator[Batch, None, None]:
        loop = object()
        # Only now: an iterator that is dropped before its first batch takes nothing.
        if self.current_epoch == epoch:
            self._start, self._given, self._latest = 0, start, loop
        batches = self.epoch(epoch, start)
        try:
            for step, batch in enumerate(batches, start):
                if self._latest is loop:
                    self._given = step + 1
                yield batch
                # Or the batch would live here while the next one is made.
                del batch
        finally:
            batches.close()
        if self._latest is loop and self.current_epoch == epoch:
            self.set_epoch(epoch + 1)

    def set_epoch(self, epoch: int) -> None:
        """Make `epoch` the current one. Nothing changes where it is that already, so that a loop may call it after a resume too."""
        if epoch < 0:
            raise UserError(f"The epoch is {epoch}, but it must be 0 or more.")
        if epoch != self.current_epoch:
            self.current_epoch, self._start, self._given = epoch, 0, 0
            # A loop that is still open no longer counts.
            self._latest = object()

    @property
    def sampler(self) -> Loader:
        """Return the loader itself: Lightning calls `set_epoch` of a loader's sampler at the start of each epoch."""
        return self

    def tell_left_out(self) -> str:
        """Return a line about the samples of an epoch that fill no batch; empty where there are none."""
        left = len(self.shards) - self.steps_per_epoch * self.batch
        if not left:
            return ""
        return (
            f"{left:,} of {plural(len(self.shards), 'image')} ({left / len(self.shards):.1%}), others in each epoch, are left out: "
            f"they do not fill a batch of {self.batch:,}"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the current epoch, the steps of it that were given, and what decides the batches; plain numbers and words.

        A batch counts as given from the moment at which the loop has it. The state is the same on every rank.
        """
        run = describe_run(self.shards, self.recipe, self.batch, self.seed, self._window)
        return {"epoch": self.current_epoch, "step": self._given, **run}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batches that were given when `state` was made; the number of ranks may differ.

        Raises:
            UserError: the state is that of another data set, batch, seed or order, and its batches would not be these; a warning where
                only the recipe is another.
        """
        check_state(state, describe_run(self.shards, self.recipe, self.batch, self.seed, self._window))
        epoch, step = state["epoch"], state["step"]
        if type(epoch) is not int or type(step) is not int or epoch < 0 or not 0 <= step <= len(self):
            raise UserError(
                f"The state is at epoch {epoch!r}, step {step!r}, but an epoch of this loader has the steps 0 to {len(self)}: it is "
                "damaged, or was changed."
            )
        # After the last batch of an epoch comes the first of the next one.
        epoch, step = (epoch + 1, 0) if step == len(self) else (epoch, step)
        self.current_epoch, self._start, self._given = epoch, step, step
        self._latest = object()

    @property
    def samples(self) -> Samples:
        """Return where the images come from: shards, or a cache."""
        return self._samples

    def fill_cache(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Read, and decode, all that `cache` ram keeps, before the first batch. All ranks call it: those of a machine share the work.

        Without it, what is kept is kept from its first use on. `progress` takes the samples that are held and their number.
        """
        fill_ahead(self._samples, self.options.threads or default_threads(), progress)

    def in_chunks(self) -> Loader:
        """Return the same loader, of batches that the caller takes chunk by chunk, so that the device never holds a whole one.

        Views that the CPU makes stay in host memory, page-locked for the device, for copies of some rows on the current stream; those
        of `augment_on` gpu are `LazyViews`, made when some rows are asked for. Either are valid until the next batch is asked for,
        whatever `reuse_memory` is. The host holds `SLOTS` batches: of views, or of decoded images.

        Raises:
            UserError: the engine makes whole batches on the GPU.
        """
        reason = whole_only(self.options)
        if reason:
            raise UserError(reason)
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
        threads = self.options.threads or default_threads()
        return stream(self._samples, slots, self._requests(start, stop), threads, self.bad)

    def order(self, epoch: int) -> np.ndarray:
        """Return the sample ids of an epoch, in the order of all ranks together: int64 (len(shards),)."""
        return self._order(epoch)[0]

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the sample ids of an epoch, and the numbers that key their draws."""
        shards = self.shards
        if not self._window:
            return shards.epoch_ids(self.seed, epoch)
        ends = np.cumsum([shard.num_samples for shard in shards.manifest.shards])
        inside = np.searchsorted(shards.ids, ends)
        ids = shards.ids[block_order(np.diff(inside, prepend=0), self.seed, epoch, self._window)]
        return ids, ids

    def _requests(self, start: int, stop: int) -> Iterator[BatchRequest]:
        """Yield what to make at each step. The next epoch's order is made in a thread while this epoch lasts."""
        if start >= stop:
            return
        first, last = start // self.steps_per_epoch, (stop - 1) // self.steps_per_epoch
        prefetch = ShardPrefetch(self.shards, self._window)

        def plan(epoch: int) -> tuple[tuple[np.ndarray, np.ndarray], ShardUses | None]:
            order = self._order(epoch)
            return order, prefetch.uses(order[0][: self.steps_per_epoch * self.batch])

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
                    prefetch.at(uses, at, at + self.batch, then)
                    own = rank_positions(step - begin, self.batch, self.options.rank, self.options.world)
                    ids, keys = (numbers[own] for numbers in order)
                    widths, heights = self.shards.widths[ids], self.shards.heights[ids]
                    yield BatchRequest(ids, draw(self.recipe, self.seed, epoch, keys, widths, heights), epoch)
