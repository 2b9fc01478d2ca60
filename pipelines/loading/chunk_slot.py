"""The fused engine on a GPU for batches taken in chunks: decoded images wait, and a chunk's views are made when the step asks for it.

Draws are pure functions, so a chunk's views are the same bits however often they are made, and a batch needs the memory of its
images only. They stay on the host: on the device there are the images of one chunk, in one buffer for all. Images of a GPU cache, and
those that the device has decoded, are on it already. The same code runs on CPU tensors, for the tests.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.augment.draws import draw
from pipelines.augment.recipe import Recipe
from pipelines.kernels.batched_views import BatchedViews
from pipelines.kernels.view_params import PLAIN, TYPES, Form
from pipelines.loading.gpu_slot import GpuSlot
from pipelines.streaming.cache import decoded_sizes
from pipelines.streaming.lazy_views import LazyViews
from shards.dataset.shard_set import ShardSet


class ChunkBuffer:
    """Memory on a device for the images of one chunk at a time; the chunks of all batches share it."""

    def __init__(self, device: torch.device, on_gpu: bool):
        """Start with no memory. `on_gpu`: whether there are streams to keep in order."""
        self._device = device
        self._pixels = torch.empty(0, dtype=torch.uint8, device=device)
        self._used = torch.cuda.Event() if on_gpu else None

    @contextlib.contextmanager
    def lend(self, count: int) -> Iterator[Tensor]:
        """Lend the memory, uint8 (count,), for use on the current stream, which waits for the previous use."""
        # Grows by quarters, as the memory of the slots does.
        if len(self._pixels) < count:
            self._pixels = torch.empty(count * 5 // 4, dtype=torch.uint8, device=self._device)
        if self._used is None:
            yield self._pixels[:count]
            return
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(self._used)
        # It was taken on the stream of another chunk, or may be given back before this one is done.
        self._pixels.record_stream(stream)
        yield self._pixels[:count]
        self._used.record()


class ChunkSlot(GpuSlot):
    """Memory for one batch of decoded images, and the launches that turn a chunk of them into views."""

    def __init__(self, buffer: ChunkBuffer, *args: Any, **options: Any):
        """Take a `buffer` that all slots of a stream of batches share; the rest is as for `GpuSlot`."""
        super().__init__(*args, **options)
        self._buffer = buffer
        self._lent: ChunkViews | None = None

    def launch(self) -> None:
        """As `Slot.launch`: images go to the cache, if there is one, and everything else is left for later."""
        self._place_strays()
        with torch.cuda.stream(self._side):
            if self._store is not None:
                # The chunks of an earlier batch may still read what is there.
                held = self._store.held[self._ids]
                self._fresh = [i for i in self._fresh if not held[i]]
                self._decoded = {i: pixels for i, pixels in self._decoded.items() if not held[i]}
                self._upload()
            elif self._decoded and self._ready is not None:
                torch.cuda.current_stream(self._device).wait_event(self._ready)
            if self._copied is not None:
                self._copied.record()

    def views(self) -> LazyViews:
        """As `Slot.views`: nothing is made yet."""
        self._lent = ChunkViews(self, len(self._ids), len(self._draws))
        return self._lent

    def done(self) -> None:
        """As `Slot.done`: the memory of the images will be written to again."""
        if self._lent is not None:
            self._lent.close()
            self._lent = None

    def chunk(self, part: slice) -> list[Tensor]:
        """Make the views of the samples in `part`; launches on the current stream without waiting."""
        ids, draws = self._ids[part], self._draws[:, part]
        widths, types = self._samples.shards.widths[ids], self._types[part]
        if self._copied is not None:
            # After the launch and all chunks before, whatever stream they were on: the last record speaks for all.
            torch.cuda.current_stream(self._device).wait_event(self._copied)
        if self._store is not None:
            if self._copied is not None:
                self._store.pixels.record_stream(torch.cuda.current_stream(self._device))
            views = self._make(self._store.pixels, self._store.first_bytes[ids], widths, draws, types)
        else:
            sizes = self._sizes(ids)
            with self._buffer.lend(int(sizes.sum())) as pixels:
                first_bytes = np.cumsum(sizes) - sizes
                self._gather(pixels, first_bytes, sizes, range(len(self._ids))[part])
                views = self._make(pixels, first_bytes, widths, draws, types)
        if self._copied is not None:
            self._copied.record()
        return views

    def _gather(self, pixels: Tensor, first_bytes: np.ndarray, sizes: np.ndarray, places: range) -> None:
        """Copy the images at `places` of the batch to where they begin in `pixels`; at once those that follow each other."""
        decoded = [k for k, i in enumerate(places) if i in self._decoded]
        if decoded:
            made = [self._decoded[places[k]] for k in decoded]
            into = [
                pixels[int(first_bytes[k]) :][: image.numel()].view(image.shape)
                for k, image in zip(decoded, made, strict=True)
            ]
            torch._foreach_copy_(into, made, non_blocking=True)  # pyright: ignore[reportPrivateImportUsage]
        fresh = np.setdiff1d(np.arange(len(places)), decoded)
        source = self._first_bytes[places.start : places.stop]
        # All follow each other but for stand-ins and what the device decoded.
        follows = (np.diff(fresh) == 1) & (source[fresh[1:]] == source[fresh[:-1]] + sizes[fresh[:-1]])
        edges = [0, *(np.flatnonzero(~follows) + 1), len(fresh)] if len(fresh) else []
        for a, b in itertools.pairwise(edges):
            first, last = fresh[a], fresh[b - 1]
            count = int(first_bytes[last] + sizes[last] - first_bytes[first])
            at, begin = int(first_bytes[first]), int(source[first])
            pixels[at : at + count].copy_(self._host[begin : begin + count], non_blocking=True)


class ChunkViews(LazyViews):
    """The views of the batch in a `ChunkSlot`, valid until the slot takes the next batch."""

    def __init__(self, slot: ChunkSlot, num_samples: int, num_views: int):
        self._slot: ChunkSlot | None = slot
        self.num_samples, self.num_views = num_samples, num_views

    def rows(self, part: slice) -> list[Tensor]:
        """As `LazyViews.rows`. RuntimeError after the next batch was asked for, which takes the memory of the images."""
        if self._slot is None:
            raise RuntimeError("Views of a batch were asked for after the next batch: its images are gone.")
        return self._slot.chunk(part)

    def close(self) -> None:
        """Forget the images."""
        self._slot = None


class BlankViews(LazyViews):
    """Views of black images in the sizes of real ones, made as a run makes them, to find out what fits in a device's memory."""

    def __init__(
        self,
        shards: ShardSet,
        recipe: Recipe,
        ids: np.ndarray,
        device: torch.device,
        *,
        form: Form = PLAIN,
        cached: bool = False,
    ):
        """Use the sizes and draws of the samples `ids`. `cached`: images lie in a cache on the device that was allocated before."""
        sizes = decoded_sizes(shards, len(recipe.mean), ids)
        # The largest first, so that they meet in one chunk.
        order = np.argsort(-sizes, kind="stable")
        self._ids, self._sizes = ids[order], sizes[order]
        self._widths = shards.widths[self._ids]
        self._draws = draw(recipe, 0, 0, self._ids, self._widths, shards.heights[self._ids])
        dtypes = shards.manifest.dtypes
        self._make, self._cached = BatchedViews(recipe, device, form=form, dtypes=dtypes), cached
        # Of the type that takes the most memory.
        self._type = max(
            (TYPES.index(name) for name in dtypes), key=lambda kind: np.dtype(TYPES[kind]).itemsize
        )
        self._buffer = ChunkBuffer(device, device.type == "cuda")
        self.num_samples, self.num_views = len(ids), len(self._draws)

    @property
    def image_bytes(self) -> int:
        """Return the bytes of the images of the batch."""
        return int(self._sizes.sum())

    def rows(self, part: slice) -> list[Tensor]:
        """As `LazyViews.rows`."""
        sizes = self._sizes[part]
        # In a cache they are all the same image.
        first_bytes = np.zeros_like(sizes) if self._cached else np.cumsum(sizes) - sizes
        count = int(sizes.max() if self._cached else sizes.sum())
        with self._buffer.lend(count) as pixels:
            pixels.zero_()
            types = np.full(len(sizes), self._type, dtype=np.uint8)
            return self._make(pixels, first_bytes, self._widths[part], self._draws[:, part], types)
