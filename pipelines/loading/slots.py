"""Memory for a stream of views: which slots an engine, a cache and a device come to."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch

from pipelines.augment.recipe import Recipe
from pipelines.engines.batch_engine import BatchEngine, BatchOptions, batch_slots
from pipelines.engines.engine_table import ImageEngine, make_engine, refuse_deep, whole_batches
from pipelines.kernels.view_params import PLAIN
from pipelines.loading.loader_options import LoaderOptions
from pipelines.loading.mask_slot import memory_pool, with_masks
from pipelines.streaming.batch_stream import (
    SLOTS,
    Slot,
    SlotMaker,
    default_threads,
    exact_device,
    work_stream,
)
from pipelines.streaming.cache import Samples, open_samples
from pipelines.streaming.host_slot import HostMemory, HostSlot, Renderer
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError


def open_slots(
    shards: ShardSet, recipe: Recipe, batch: int, options: LoaderOptions
) -> tuple[Samples, SlotMaker]:
    """Return the images as the engine wants them, and what gives memory for a stream of its views.

    Args:
        shards: the data set.
        recipe: fits the data set.
        batch: samples in the largest batch of this process.
        options: the loader's.

    Raises:
        UserError: as `open_loader`.
    """
    engine, device = options.engine, exact_device(options.device)
    _check_device(options, device)
    on_gpu, channels = options.augment_on == "gpu", len(recipe.mean)
    threads = options.threads or default_threads()
    kept: dict[str, Any] = {"cache": options.cache, "cache_gb": options.cache_gb, "masks": options.masks}
    if whole_batches(engine):
        refuse_deep(engine, shards)
        largest = (int(shards.widths.max()), int(shards.heights.max()))
        work = BatchOptions(device if on_gpu else "cpu", threads, batch, largest)
        maker = cast(BatchEngine, make_engine(engine, recipe, work))
        samples = open_samples(shards, maker.decode, channels, **kept)
        slots = batch_slots(samples, maker, device, side_stream=options.side_stream)
    else:
        made = cast(ImageEngine, make_engine(engine, recipe))
        samples = open_samples(shards, made.decode, channels, **kept, only_encoded=options.decode == "gpu")
        if on_gpu:
            slots = gpu_slots(samples, recipe, options)
        else:
            slots = partial(host_slots, samples, made, view_shapes(recipe), batch, options)
    if options.masks:
        sides = [recipe.side(view) for view in range(recipe.total_views)]
        slots = with_masks(slots, samples, sides, batch, options)
    return samples, slots


def _check_device(options: LoaderOptions, device: torch.device) -> None:
    """Raise UserError where options ask for a GPU's help that the engine or the device does not give."""
    on_gpu = options.augment_on == "gpu"
    if on_gpu and (options.engine == "reference" or device.type != "cuda"):
        raise UserError(
            "data.augment_on gpu needs another --data.engine than reference, and a GPU to train on: set --data.augment-on cpu."
        )
    if options.cache == "gpu" and not (on_gpu and options.engine == "fused"):
        raise UserError(
            "data.cache gpu needs the views to be made on the GPU by --data.engine fused: add --data.augment-on gpu, or set "
            "--data.cache ram."
        )
    if options.decode == "gpu" and not (on_gpu and options.engine == "fused"):
        raise UserError(
            "data.decode gpu needs the views to be made on the GPU by --data.engine fused: add --data.augment-on gpu, or set "
            "--data.decode cpu."
        )


def whole_only(options: LoaderOptions) -> str:
    """Return why batches cannot be taken chunk by chunk; empty where they can."""
    if options.augment_on == "gpu" and whole_batches(options.engine):
        return (
            f"data.augment_on gpu with --data.engine {options.engine} makes a batch as a whole, and train.micro_batch takes it in "
            "chunks: set --data.engine fused, which makes each chunk's views when it is needed, or --data.augment-on cpu."
        )
    return ""


def view_shapes(recipe: Recipe) -> list[tuple[int, int, int]]:
    """Return (C, S, S) of each view."""
    return [(len(recipe.mean), recipe.side(view), recipe.side(view)) for view in range(recipe.total_views)]


def host_slots(
    samples: Samples,
    engine: Renderer,
    shapes: Sequence[tuple[int, ...]],
    batch: int,
    options: LoaderOptions,
    *,
    in_chunks: bool = False,
) -> list[HostSlot]:
    """Return memory for a stream of views that the CPU makes.

    Args:
        samples: the images.
        engine: makes the views of one of them.
        shapes: (C, S, S) of each view.
        batch: samples in the largest batch.
        options: the loader's.
        in_chunks: views stay on the host, page-locked for a GPU.
    """
    device = exact_device(options.device)
    copies = None if in_chunks else work_stream(device, options.side_stream)
    pool = memory_pool(shapes, batch, options, in_chunks=in_chunks)
    return [
        HostSlot(samples, engine, HostMemory(shapes, batch, device, copies, pool=pool)) for _ in range(SLOTS)
    ]


def gpu_slots(samples: Samples, recipe: Recipe, options: LoaderOptions) -> SlotMaker:
    """Return what gives memory for a stream whose views the device makes; on a CPU the same code runs, for the tests.

    All streams share one cache on the device where `options.cache` is gpu, and one decoder where `options.decode` is.
    """
    from pipelines.loading.chunk_slot import ChunkBuffer, ChunkSlot
    from pipelines.loading.gpu_decode import DeviceDecoding, gpu_decoder
    from pipelines.loading.gpu_slot import GpuSlot, GpuStore

    device = exact_device(options.device)
    # One for all streams of views, so that what one has put into the store is there for the next.
    side = work_stream(device, options.side_stream)
    decoding = None
    # All memory is taken on the stream that uses it: freed in the midst of work, it is not given to another one too early.
    with torch.cuda.stream(side):  # on a CPU: None, which is no stream
        kept = GpuStore(samples, device, options.cache_gb) if options.cache == "gpu" else None
        if kept is not None:
            samples.note = kept.note
        if options.decode == "gpu":
            # Host threads help the device decode.
            decoder = gpu_decoder(samples, device, options.threads or default_threads())
            decoding = DeviceDecoding(decoder, work_stream(device, options.side_stream))

    def slots(*, in_chunks: bool = False) -> Sequence[Slot]:
        with torch.cuda.stream(side):
            more: dict[str, Any] = {"form": options.form or PLAIN, "decoding": decoding}
            if in_chunks:
                buffer = ChunkBuffer(device, side is not None)
                return [ChunkSlot(buffer, samples, recipe, device, side, kept, **more) for _ in range(SLOTS)]
            return [GpuSlot(samples, recipe, device, side, kept, **more) for _ in range(SLOTS)]

    return slots
