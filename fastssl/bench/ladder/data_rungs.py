"""The data path's rungs of the ladder: the rate of each stage by itself, on some images of the run's own shards."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastssl.bench.installed import is_there
from fastssl.bench.ladder.verdict import AUGMENT, DECODE, READ, TO_DEVICE
from fastssl.bench.loaders.bench_loader import call_in_threads, read_batches
from fastssl.bench.loaders.work import Work
from fastssl.bench.report import Row
from fastssl.pretraining.build import view_form
from pipelines.augment.draws import draw
from pipelines.engines.engine_table import make_engine, whole_batches
from pipelines.loading.loader import default_threads, open_loader
from pipelines.loading.loader_options import LoaderOptions
from pipelines.loading.slots import gpu_slots, host_slots, view_shapes
from pipelines.streaming.batch import BatchRequest
from pipelines.streaming.batch_stream import stream
from pipelines.streaming.cache import Samples
from shards.dataset.order import epoch_order
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError

if TYPE_CHECKING:
    from fastssl.bench.step_timer import StepTimer
    from fastssl.pretraining.run_config import Resolved

# More than a measurement takes; a stream makes only the batches that are requested.
MANY_STEPS = 10**6
NO_CHANGES: Mapping[str, Any] = MappingProxyType({})
# An image of 500 x 375 takes half a megabyte decoded.
RESIDENT_BATCHES, RESIDENT_IMAGES = 4, 2048


class Resident(Samples):
    """Some images, decoded in advance, so that making their views needs neither disk nor decoder."""

    def __init__(
        self, shards: ShardSet, decode: Callable[[memoryview], np.ndarray], channels: int, ids: np.ndarray
    ):
        super().__init__(shards, decode, channels)
        self._pixels = {int(i): super(Resident, self).pixels(int(i)) for i in ids}

    def pixels(self, sample_id: int) -> np.ndarray:
        """See `Samples.pixels`."""
        return self._pixels[sample_id]


def open_work(resolved: Resolved) -> Work:
    """Return some batches of the run's images, the same for every rung; raise UserError for fewer images than a batch."""
    cfg = resolved.config
    shards = cfg.data.open()
    if len(shards) < cfg.train.batch:
        raise UserError(
            f"'{cfg.data.shards}' has {len(shards)} samples in use, fewer than one batch of {cfg.train.batch}: lower --train.batch, "
            "or convert more images."
        )
    count = max(cfg.train.batch, min(RESIDENT_BATCHES * cfg.train.batch, RESIDENT_IMAGES))
    ids = shards.ids[epoch_order(len(shards), cfg.train.seed, 0)[:count]]
    return Work(shards, cfg.recipe, ids, cfg.train.batch, cfg.data.threads or default_threads())


def data_rows(resolved: Resolved, work: Work, timer: StepTimer) -> dict[str, Callable[[], Row]]:
    """Return functions that measure read, decode, to device and augment."""
    data = resolved.config.data

    def timed(name: str, made: Generator[Any]) -> Row:
        with contextlib.closing(made) as batches:
            return timer.row(name, lambda: next(batches), batch=work.batch)

    def decode() -> Row:
        if data.decode == "gpu":
            return Row(DECODE, error="the GPU decodes as part of the loader: data.decode is gpu")
        name = "fused" if whole_batches(data.engine) else data.engine
        engine: Any = make_engine(name, work.recipe)
        return timed(
            DECODE, call_in_threads(work, lambda sample_id: engine.decode(work.shards.read(sample_id)))
        )

    return {
        READ: lambda: timed(READ, read_batches(work)),
        DECODE: decode,
        TO_DEVICE: lambda: _copy_row(resolved, timer),
        AUGMENT: lambda: timed(AUGMENT, resident_views(resolved, work, timer.device)),
    }


def _copy_row(resolved: Resolved, timer: StepTimer) -> Row:
    from fastssl.bench.ladder.step_rungs import views

    if timer.device.type == "cpu":
        return Row(TO_DEVICE, error="nothing is copied: the views are made on the device that uses them")
    if resolved.config.data.augment_on == "gpu":
        return Row(TO_DEVICE, error="pixels are copied as part of the augment rung: data.augment_on is gpu")
    images = [view.pin_memory() for view in views(resolved, "cpu", timer.batch)]
    target = [torch.empty_like(view, device=timer.device) for view in images]

    def copy() -> None:
        for to, view in zip(target, images, strict=True):
            to.copy_(view, non_blocking=True)

    row = timer.row(TO_DEVICE, copy)
    row.more["bytes"] = sum(view.nbytes for view in images)
    return row


def resident_views(
    resolved: Resolved, work: Work, device: torch.device, in_chunks: bool = False
) -> Generator[Sequence[Tensor]]:
    """Yield views of images that are decoded already, made as the run makes them, batch after batch without end.

    `in_chunks`: for a step that takes a batch chunk by chunk.

    Raises:
        NotImplementedError: the engine decodes and augments in one graph.
    """
    data, recipe, shards = resolved.config.data, work.recipe, work.shards
    if whole_batches(data.engine):
        raise NotImplementedError(f"the engine '{data.engine}' decodes and augments in one graph")
    engine: Any = make_engine(data.engine, recipe)
    samples = Resident(shards, engine.decode, len(recipe.mean), work.sample_ids)
    if data.augment_on == "gpu":
        form = view_form(resolved.config.train, device)
        slots = gpu_slots(samples, recipe, LoaderOptions(device=device, form=form))(in_chunks=in_chunks)
    else:
        options = LoaderOptions(device=device, reuse_memory=True)
        slots = host_slots(samples, engine, view_shapes(recipe), work.batch, options, in_chunks=in_chunks)
    requests = (
        BatchRequest(ids, draw(recipe, 0, epoch, ids, shards.widths[ids], shards.heights[ids]), epoch)
        for epoch, ids in work.batches()
    )
    return _views(stream(samples, slots, requests, work.threads))


def _views(batches: Any) -> Generator[Sequence[Tensor]]:
    with contextlib.closing(batches):
        for made in batches:
            yield made.views


def loader_views(
    resolved: Resolved, device: torch.device, in_chunks: bool, changes: Mapping[str, Any] = NO_CHANGES
) -> Generator[Sequence[Tensor]]:
    """Yield the views of the run's own loader without end, as one stream: a new stream each epoch would pause there.

    Args:
        in_chunks: for a step that takes a batch chunk by chunk.
        changes: settings of the section `data` that differ from the run's.

    Raises:
        UserError: the loader does not work with these settings here; nvImageCodec is missing where the GPU is to decode.
    """
    cfg = resolved.config
    data = dataclasses.replace(cfg.data, **changes)
    if data.decode == "gpu":
        refuse_without_decoder()
    options = data.options(device=device, form=view_form(cfg.train, device), reuse_memory=True)
    loader = open_loader(data.open(), cfg.recipe, batch=cfg.train.batch, seed=cfg.train.seed, options=options)
    loader = loader.in_chunks() if in_chunks else loader
    return _views(loader.steps(0, MANY_STEPS))


def refuse_without_decoder() -> None:
    """Raise UserError if nvImageCodec is not installed, before shards are opened or workers started."""
    if not is_there("nvidia.nvimgcodec"):
        raise UserError(
            "data.decode gpu needs the package nvidia-nvimgcodec-cu12, which is not installed: install it, or set --data.decode cpu."
        )
