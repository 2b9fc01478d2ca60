"""Memory for a stream of views: which slots an engine, a cache and a device come to."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch

from pipelines.augment.recipe import Recipe
from pipelines.engines.batch_engine import BatchEngine, BatchOptions, batch_slots
from pipelines.engines.engine_table import ImageEngine, make_engine, refuse_deep, whole_batches
from pipelines.kernels.view_params import PLAIN, Form
from pipelines.loading.mask_slot import with_masks
from pipelines.loading.masks import NO_MASK
from pipelines.streaming.cache import Samples, open_samples
from pipelines.streaming.stream import SLOTS, HostMemory, HostSlot, Renderer, Slot, SlotMaker, work_stream
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError


def open_slots(
    shards: ShardSet,
    recipe: Recipe,
    engine: str,
    *,
    batch: int,
    threads: int,
    device: torch.device,
    augment_on: str = "cpu",
    decode: str = "cpu",
    cache: str = "none",
    cache_gb: float = 0.0,
    side_stream: bool = True,
    form: Form = PLAIN,
    masks: bool = False,
    mask_ignore: int = NO_MASK,
) -> tuple[Samples, SlotMaker]:
    """The images as an engine wants them, and what gives memory for a stream of its views; `batch`: samples in the largest batch.

    Raises:
        UserError: as `open_loader`.
    """
    on_gpu = augment_on == "gpu"
    if on_gpu and (engine == "reference" or device.type != "cuda"):
        raise UserError(
            "data.augment_on gpu needs another --data.engine than reference, and a GPU to train on: set --data.augment-on cpu."
        )
    if cache == "gpu" and not (on_gpu and engine == "fused"):
        raise UserError(
            "data.cache gpu needs the views to be made on the GPU by --data.engine fused: add --data.augment-on gpu, or set "
            "--data.cache ram."
        )
    if decode == "gpu" and not (on_gpu and engine == "fused"):
        raise UserError(
            "data.decode gpu needs the views to be made on the GPU by --data.engine fused: add --data.augment-on gpu, or set "
            "--data.decode cpu."
        )
    kept: dict[str, Any] = {"cache": cache, "cache_gb": cache_gb, "masks": masks}
    channels = len(recipe.mean)
    if whole_batches(engine):
        refuse_deep(engine, shards)
        largest = (int(shards.widths.max()), int(shards.heights.max()))
        options = BatchOptions(device if on_gpu else "cpu", threads, batch, largest)
        maker = cast(BatchEngine, make_engine(engine, recipe, options))
        samples = open_samples(shards, maker.decode, channels, **kept)
        slots = batch_slots(samples, maker, device, side_stream=side_stream)
    else:
        made = cast(ImageEngine, make_engine(engine, recipe))
        samples = open_samples(shards, made.decode, channels, **kept, only_encoded=decode == "gpu")
        if on_gpu:
            more: dict[str, Any] = {
                "decode_threads": threads if decode == "gpu" else 0,
                "side_stream": side_stream,
                "form": form,
            }
            slots = gpu_slots(samples, recipe, device, cache == "gpu", cache_gb, **more)
        else:
            shapes = view_shapes(recipe)
            slots = partial(host_slots, samples, made, shapes, batch, device, side_stream=side_stream)
    if masks:
        sides = [recipe.side(view) for view in range(recipe.total_views)]
        cached = cache == "gpu"
        slots = with_masks(
            slots, samples, sides, batch, device, mask_ignore, on_gpu_cache=cached, side_stream=side_stream
        )
    return samples, slots


def whole_only(engine: str, augment_on: str) -> str:
    """Return why batches cannot be taken chunk by chunk; empty where they can."""
    if augment_on == "gpu" and whole_batches(engine):
        return (
            f"data.augment_on gpu with --data.engine {engine} makes a batch as a whole, and train.micro_batch takes it in chunks: set "
            "--data.engine fused, which makes each chunk's views when it is needed, or --data.augment-on cpu."
        )
    return ""


def view_shapes(recipe: Recipe) -> list[tuple[int, int, int]]:
    """(C, S, S) of each view."""
    return [(len(recipe.mean), recipe.side(view), recipe.side(view)) for view in range(recipe.total_views)]


def host_slots(
    samples: Samples,
    engine: Renderer,
    shapes: Sequence[tuple[int, ...]],
    batch: int,
    device: torch.device,
    *,
    in_chunks: bool = False,
    side_stream: bool = True,
) -> list[HostSlot]:
    """Memory for a stream of views that the CPU makes; `shapes`: (C, S, S) of each view; `batch`: samples in the largest batch."""
    copies = None if in_chunks else work_stream(device, side_stream)
    return [HostSlot(samples, engine, HostMemory(shapes, batch, device, copies)) for _ in range(SLOTS)]


def gpu_slots(
    samples: Samples,
    recipe: Recipe,
    device: torch.device,
    store: bool,
    cache_gb: float = 0,
    *,
    decode_threads: int = 0,
    side_stream: bool = True,
    form: Form = PLAIN,
) -> SlotMaker:
    """What gives memory for a stream whose views the device makes.

    Args:
        store: all streams share one cache on the device.
        decode_threads: host threads that help the device decode; 0 leaves decoding to the CPU.
        form: how the views lie in memory.
    """
    from pipelines.loading.chunk_slot import ChunkBuffer, ChunkSlot
    from pipelines.loading.gpu_decode import gpu_decoder
    from pipelines.loading.gpu_slot import GpuSlot, GpuStore

    # One for all streams of views, so that what one has put into the store is there for the next.
    side = work_stream(device, side_stream)
    # All memory is taken on the stream that uses it: freed in the midst of work, it is not given to another one too early.
    with torch.cuda.stream(side):  # on a CPU: None, which is no stream
        kept = GpuStore(samples, device, cache_gb) if store else None
        if kept is not None:
            samples.note = kept.note
        decoder = gpu_decoder(samples, device, decode_threads) if decode_threads else None
    decoding = work_stream(device, side_stream) if decoder is not None else None

    def slots(*, in_chunks: bool = False) -> Sequence[Slot]:
        with torch.cuda.stream(side):
            more = {"form": form, "decoder": decoder, "decoding": decoding}
            if in_chunks:
                buffer = ChunkBuffer(device, side is not None)
                return [ChunkSlot(buffer, samples, recipe, device, side, kept, **more) for _ in range(SLOTS)]
            return [GpuSlot(samples, recipe, device, side, kept, **more) for _ in range(SLOTS)]

    return slots
