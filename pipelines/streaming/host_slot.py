"""Batches of views that the CPU makes one image at a time, and the memory on the host that they lie in."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from pipelines.streaming.batch import BatchRequest
from pipelines.streaming.batch_stream import SLOTS, Slot, hand_over
from pipelines.streaming.cache import Samples
from pipelines.streaming.pinned import pinned_empty


class Renderer(Protocol):
    """An engine that makes views one image at a time."""

    def decode(self, data: memoryview) -> np.ndarray:
        """Return the pixels (H, W, C) of an encoded image."""
        ...

    def render(self, pixels: np.ndarray, draws: np.ndarray, out: Sequence[np.ndarray]) -> None:
        """Write the view of each DRAW record (V,) to `out`, V arrays of float32 (C, S, S)."""


class MemoryPool:
    """Memory for one batch after the other; each block comes back when the last tensor over it is gone, whoever held it.

    So a batch that is kept stays as it is, and a loop that keeps none gets the same few blocks again and again: memory that is taken
    anew costs the system's clearing of every page.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype):
        """Start with no memory. `shapes`: of the tensors of a batch."""
        self._shapes, self._dtype = shapes, dtype
        self._free: list[list[torch.Tensor]] = [[] for _ in shapes]

    def take(self) -> list[np.ndarray]:
        """Return an uninitialised array of each shape, for `torch.from_numpy`."""
        return [self._lend(i) for i in range(len(self._shapes))]

    def _lend(self, i: int) -> np.ndarray:
        try:
            memory = self._free[i].pop()
        except IndexError:
            memory = torch.empty(self._shapes[i], dtype=self._dtype)
        lent = memory.numpy()
        # At the end of the process the system takes everything back.
        weakref.finalize(lent, _give_back, weakref.ref(self), i, memory).atexit = False
        return lent

    def give_back(self, i: int, memory: torch.Tensor) -> None:
        """Keep a block for a later batch, if not enough of them lie here."""
        # One more than there are slots: a loop holds its batch until it has the next one.
        if len(self._free[i]) <= SLOTS:
            self._free[i].append(memory)


def _give_back(pool: weakref.ref[MemoryPool], i: int, memory: torch.Tensor) -> None:
    """Give a block back to its pool, if there is still one."""
    alive = pool()
    if alive is not None:
        alive.give_back(i, memory)


class HostMemory:
    """Tensors for one batch, made on the host, and pinned there and copied where they go to a GPU."""

    def __init__(
        self,
        shapes: Sequence[tuple[int, ...]],
        batch: int,
        device: torch.device,
        copies: torch.cuda.Stream | None = None,
        dtype: torch.dtype = torch.float32,
        pool: MemoryPool | None = None,
    ):
        """Take the memory, or leave that to `begin`.

        Args:
            shapes: those of one sample.
            batch: samples in the largest batch.
            device: where the batches go.
            copies: the stream for copies to a GPU; without it the tensors stay on the host.
            dtype: of the tensors.
            pool: gives other memory for each batch, on a CPU; without it each batch overwrites the one before.
        """
        self._device, self._copies, self._pool = device, copies, pool
        on_gpu = device.type == "cuda"
        make = pinned_empty if on_gpu else torch.empty
        tensors = [] if pool is not None else [make((batch, *shape), dtype=dtype) for shape in shapes]
        self._arrays = [tensor.numpy() for tensor in tensors]
        self._tensors = tensors
        self._copied = torch.cuda.Event() if on_gpu else None
        self._count = 0
        self._made: list[torch.Tensor] = []

    def begin(self, count: int) -> None:
        """Get ready for a batch of `count` samples; waits until the memory may be overwritten."""
        if self._copied is not None:
            self._copied.synchronize()
        if self._pool is not None:
            self._arrays = self._pool.take()
            self._tensors = [torch.from_numpy(array) for array in self._arrays]
        self._count = count

    def at(self, i: int) -> list[np.ndarray]:
        """Return the memory of sample `i`."""
        return [array[i] for array in self._arrays]

    def launch(self) -> None:
        """Copy to a GPU on a stream of its own: it overlaps with the step that the GPU is still at."""
        self._made = [tensor[: self._count] for tensor in self._tensors]
        if self._copies is not None and self._copied is not None:
            with torch.cuda.stream(self._copies):
                self._made = [tensor.to(self._device, non_blocking=True) for tensor in self._made]
                self._copied.record()

    def take(self) -> list[torch.Tensor]:
        """Return the batch: the current stream waits for the copy, the host does not."""
        made, self._made = self._made, []
        if self._copied is not None and self._copies is not None:
            hand_over(made, self._copied, self._device)
        return made

    def done(self) -> None:
        """Take note that the caller has what it wants; what was lent on the host may still be on its way to the GPU."""
        if self._copied is not None and self._copies is None:
            self._copied.record(torch.cuda.current_stream(self._device))
        if self._pool is not None:
            self._arrays, self._tensors = [], []


class HostSlot(Slot):
    """One batch of views made by the CPU."""

    def __init__(self, samples: Samples, engine: Renderer, memory: HostMemory):
        """Write views to `memory`, (C, S, S) for each view."""
        self._samples, self._engine, self._memory = samples, engine, memory

    def begin(self, request: BatchRequest) -> None:
        """As `Slot.begin`."""
        self._memory.begin(len(request.ids))

    def fill(self, i: int, sample_id: int, draws: np.ndarray) -> None:
        """As `Slot.fill`."""
        self._engine.render(self._samples.pixels(sample_id), draws, self._memory.at(i))

    def complete(self) -> list[int]:
        """As `Slot.complete`: all is done sample by sample."""
        return []

    def launch(self) -> None:
        """As `Slot.launch`."""
        self._memory.launch()

    def views(self) -> list[torch.Tensor]:
        """As `Slot.views`."""
        return self._memory.take()

    def done(self) -> None:
        """As `Slot.done`."""
        self._memory.done()
