"""Engines that make a batch of views at a time, and their place in the stream of batches.

The threads of the stream load the images; when all are there, the batch goes to a worker thread, which makes the
views while the next batch is being loaded and the caller works on the one before.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipelines.augment.draws import DRAW
from pipelines.augment.noise import unit_noise
from pipelines.augment.recipe import Recipe
from pipelines.kernels.decode import decode_rgb
from pipelines.streaming.batch import BatchRequest
from pipelines.streaming.batch_stream import SLOTS, Slot, SlotMaker, Spoiled, hand_over, work_stream
from pipelines.streaming.cache import Samples, Unreadable
from pipelines.streaming.pinned import pinned_empty


@dataclass(frozen=True)
class BatchOptions:
    """How an engine that makes whole batches works."""

    device: torch.device | str = "cpu"
    """Where the views are made."""
    threads: int = 1
    """Threads of its own, where it has any."""
    batch: int = 1
    """Samples in the largest batch."""
    largest: tuple[int, int] = (0, 0)
    """Width and height of the largest image, to take memory for; 0 where unknown."""


ALONE = BatchOptions()  # one image at a time, on the CPU


class BatchEngine(ABC):
    """An engine that makes the views of a batch at a time."""

    foreign_memory = False
    """Whether the views lie in memory that PyTorch does not manage."""
    workers = 1
    """Threads that may call `render` at the same time."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe

    def __call__(self, data: memoryview, draws: np.ndarray, out: Sequence[np.ndarray]) -> None:
        """As `engines.Engine.__call__`: the views of one image, by a batch of one."""
        try:
            views = self.render([self.prepare(data)], draws[:, None])
        except BadItems as bad:
            raise RuntimeError(bad.faults[0]) from bad
        for view, made in zip(out, views, strict=True):
            view[:] = made[0].cpu().numpy()

    def decode(self, data: memoryview) -> np.ndarray:
        """Return the pixels of an encoded image, uint8 (H, W, 3). Raise RuntimeError where it does not decode."""
        return decode_rgb(data).permute(1, 2, 0).numpy()

    def load(self, samples: Samples, sample_id: int) -> np.ndarray:
        """Return what `render` needs of one sample: its pixels. Called by many threads. Raises Unreadable for a bad sample."""
        return samples.pixels(sample_id)

    def prepare(self, data: memoryview) -> np.ndarray:
        """Return what `load` would give for an encoded image."""
        return self.decode(data)

    @abstractmethod
    def render(self, items: Sequence[np.ndarray], draws: np.ndarray) -> list[torch.Tensor]:
        """Return the views of what `load` gave, N samples, with DRAW records (V, N): V tensors float32 (N, 3, S, S).

        They are on the engine's device. Called by up to `workers` threads at a time. Raises BadItems where some samples do not decode.
        """

    def erase(self, view: torch.Tensor, draws: np.ndarray) -> torch.Tensor:
        """Fill the rectangles of DRAW records (N,) in finished views (N, 3, S, S), in place; the last operation of a recipe."""
        erased = self.recipe.erased()
        for i in np.flatnonzero(draws["erase_height"]):
            top, left, height, width = (
                int(draws[f"erase_{name}"][i]) for name in ("top", "left", "height", "width")
            )
            box = np.s_[:, top : top + height, left : left + width]
            if erased:
                fill = torch.tensor(erased)[:, None, None]
            else:
                noise = unit_noise(int(draws["erase_seed"][i]), view[i].numel())
                fill = torch.from_numpy(noise).view(view[i].shape)[box]
            view[i][box] = fill.to(view.device, non_blocking=True)
        return view


class BadItems(Exception):
    """Samples of a batch that do not decode: `faults` maps their places in it to the reasons."""

    def __init__(self, faults: dict[int, str]):
        super().__init__(f"{len(faults)} of a batch do not decode")
        self.faults = faults


class BatchSlot(Slot):
    """Memory for one batch that an engine makes as a whole; a `stream.Slot`."""

    def __init__(
        self,
        samples: Samples,
        engine: BatchEngine,
        worker: ThreadPoolExecutor,
        device: torch.device,
        side: torch.cuda.Stream | None,
        on_host: bool,
    ):
        """`device`: where the views go; `side`: the stream for their making or copying there."""
        self._samples, self._engine, self._worker = samples, engine, worker
        self._device, self._side, self._on_host = device, side, on_host
        self._used = torch.cuda.Event() if on_host and device.type == "cuda" else None
        self._locked: list[torch.Tensor] = []
        self._items: list[Any] = []
        self._draws = np.empty(0, dtype=DRAW)
        self._made: Future[tuple[list[torch.Tensor], torch.cuda.Event | None]] | None = None

    def begin(self, request: BatchRequest) -> None:
        """As `Slot.begin`."""
        if self._used is not None:
            self._used.synchronize()
        self._items, self._draws = [None] * len(request.ids), request.draws.copy()

    def fill(self, i: int, sample_id: int, draws: np.ndarray) -> None:
        """As `Slot.fill`: load one sample."""
        self._items[i] = self._engine.load(self._samples, sample_id)
        self._draws[:, i] = draws

    def complete(self) -> list[int]:
        """As `Slot.complete`: the batch is under way from here on."""
        self._made = self._worker.submit(self._render)
        return []

    def launch(self) -> None:
        """As `Slot.launch`: make a batch again whose bad samples have been replaced."""
        if self._made is None:
            self._made = self._worker.submit(self._render)

    def views(self) -> list[torch.Tensor]:
        """As `Slot.views`; waits for the making of the views on a CPU and for its launches on a GPU."""
        assert self._made is not None
        try:
            views, ready = self._made.result()
        except BadItems as bad:
            self._made = None
            raise Spoiled({i: Unreadable(reason) for i, reason in bad.faults.items()}) from bad
        self._made, self._items = None, []
        if ready is not None:
            hand_over(views, ready, self._device)
        return views

    def done(self) -> None:
        """As `Slot.done`: what was lent on the host may still be on its way to the GPU."""
        if self._used is not None:
            self._used.record(torch.cuda.current_stream(self._device))
        if self._side is not None and self._engine.foreign_memory:
            # It is given back in the order of the stream that it was made on, which knows nothing of the step that reads it.
            self._side.wait_stream(torch.cuda.current_stream(self._device))

    def _render(self) -> tuple[list[torch.Tensor], torch.cuda.Event | None]:
        if self._side is None:
            views = self._engine.render(self._items, self._draws)
            if self._on_host and self._device.type == "cuda":
                views = self._lock(views)
            return views, None
        with torch.cuda.stream(self._side):
            views = self._engine.render(self._items, self._draws)
            views = [view.to(self._device, non_blocking=True) for view in views]
            ready = torch.cuda.Event()
            ready.record()
        return views, ready

    def _lock(self, views: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return copies in page-locked memory, which is taken once for all batches of a size."""
        if [memory.shape for memory in self._locked] != [view.shape for view in views]:
            self._locked = [pinned_empty(tuple(view.shape), view.dtype) for view in views]
        for memory, view in zip(self._locked, views, strict=True):
            memory.copy_(view)
        return list(self._locked)


def batch_slots(
    samples: Samples,
    engine: BatchEngine,
    device: torch.device,
    *,
    side_stream: bool = True,
) -> SlotMaker:
    """Return a maker of memory for streams whose views `engine` makes; all streams share the workers that call it."""
    worker = ThreadPoolExecutor(engine.workers, thread_name_prefix="engine")

    def slots(*, in_chunks: bool = False) -> Sequence[BatchSlot]:
        side = None if in_chunks else work_stream(device, side_stream)
        return [BatchSlot(samples, engine, worker, device, side, in_chunks) for _ in range(SLOTS)]

    return slots
