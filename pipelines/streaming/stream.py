"""Batches made in threads, ahead of time and in order; ends all its threads at once, whatever ends it."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch

from pipelines.streaming.bad_samples import BadSamples, bad_sample
from pipelines.streaming.cache import Samples, Unreadable
from pipelines.streaming.pinned import pinned_empty
from shards.cpus import available_cpus
from shards.errors import UserError

PREFETCH = 2  # batches made ahead: one being filled while one waits
SLOTS = PREFETCH + 1  # and one that the caller works on
TASKS_PER_THREAD = (
    4  # parts a batch is cut in, per thread: small enough that the last part does not keep others waiting
)


@dataclass(frozen=True)
class Batch:
    """Some samples and their views.

    `views`: (N, C, S, S) each, normalised, the global views first; local ones have a smaller S. float32, or in the form that
    `open_loader` was asked for. `masks`, where the loader makes them, one per view: int32 (N, S, S), the class of each of its pixels
    or the ignore value. `sample_ids` and `labels`: int64 (N,), label -1 where there is none. The ids are those of the samples really
    used, where one stands in for a bad one, and `replaced` counts these. On a CPU views and masks lie in buffers that are used again:
    they are valid until the next batch is asked for. So are views that are taken chunk by chunk (`Loader.in_chunks`); those that a GPU
    makes are `lazy_views.LazyViews` then.
    """

    views: Sequence[torch.Tensor]
    sample_ids: np.ndarray
    labels: np.ndarray
    replaced: int = 0
    masks: list[torch.Tensor] = field(default_factory=list)


class Job(NamedTuple):
    """A batch to make: sample ids (N,), DRAW records (V, N), and the epoch, which chooses the stand-ins for bad samples."""

    ids: np.ndarray
    draws: np.ndarray
    epoch: int = 0


class Spoiled(Exception):
    """Samples of a batch that turned out bad only when the batch was made; `faults` maps their places in it to what is wrong."""

    def __init__(self, faults: dict[int, Unreadable]):
        super().__init__(f"{len(faults)} samples of a batch are bad")
        self.faults = faults


class Slot(Protocol):
    """Memory for one batch and the work that fills it."""

    def begin(self, job: Job) -> None:
        """Get ready for a batch; waits until the memory may be overwritten."""

    def fill(self, i: int, sample_id: int, draws: np.ndarray) -> None:
        """Make sample `i` of the batch, from DRAW records (V,); called by many threads. Raises Unreadable for a bad sample."""

    def complete(self) -> list[int]:
        """Do what is done for the whole batch, off the main thread; returns the samples that have to be filled once more."""
        ...

    def launch(self) -> None:
        """Start what the device has to do, now that all samples are there; does not wait for it."""

    def views(self) -> Sequence[torch.Tensor]:
        """The views, for use on the current stream.

        Raises:
            Spoiled: samples turned out bad; `fill` is called for their places again and then `launch` and `views`.
        """
        ...

    def masks(self) -> list[torch.Tensor]:
        """The masks of the views, for use on the current stream; asked for after `views`."""
        return []

    def done(self) -> None:
        """The caller has taken what it wants from the views and asks for the next batch."""


class SlotMaker(Protocol):
    """Gives memory for a stream of batches."""

    def __call__(self, *, in_chunks: bool = False) -> Sequence[Slot]:
        """Return `SLOTS` slots. `in_chunks`: the caller takes their views chunk by chunk, so that none lies whole on a GPU."""
        ...


class Renderer(Protocol):
    """An engine that makes views one image at a time."""

    def decode(self, data: memoryview) -> np.ndarray:
        """The pixels (H, W, C) of an encoded image."""
        ...

    def render(self, pixels: np.ndarray, draws: np.ndarray, out: Sequence[np.ndarray]) -> None:
        """Write the view of each DRAW record (V,) to `out`, V arrays of float32 (C, S, S)."""


def default_threads() -> int:
    """Cores this process may use, shared among the ranks of this machine (torchrun's LOCAL_WORLD_SIZE)."""
    return max(1, available_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def stream(
    samples: Samples,
    slots: Sequence[Slot],
    jobs: Iterator[Job],
    threads: int,
    bad: BadSamples | None = None,
) -> Generator[Batch, None, None]:
    """Make the batches of `jobs` in threads, `PREFETCH` ahead and in order.

    Args:
        slots: memory for `SLOTS` batches.
        bad: finds stand-ins for bad samples; without it the first one ends the stream.

    Raises:
        UserError: a sample does not decode and nothing may stand in for it; the message names it.
    """
    free, waiting = deque(slots), deque[_Filling]()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="views")
    stopped = threading.Event()
    main = threading.main_thread()

    def fill(slot: Slot, ids: np.ndarray, job: Job, part: Iterable[int]) -> None:
        for i in part:
            if (
                stopped.is_set() or not main.is_alive()
            ):  # closed, or the interpreter ends with the stream still open
                return
            # Strided over views in `draws`, contiguous for the compiled kernel.
            ids[i] = _fill_one(
                samples, slot, i, int(ids[i]), np.ascontiguousarray(job.draws[:, i]), job.epoch, bad
            )

    def fill_part(slot: Slot, ids: np.ndarray, job: Job, part: range, left: Iterator[int]) -> None:
        fill(slot, ids, job, part)
        # A step of an iterator is atomic, so one thread alone sees the last part done.
        if next(left) == 0 and not stopped.is_set():
            fill(slot, ids, job, slot.complete())

    def start_next() -> None:
        job = next(jobs, None)
        if job is None:
            return
        slot, count, ids = free.popleft(), len(job.ids), np.array(job.ids)
        slot.begin(job)
        if bad is not None:
            bad.expect(count)
        size = max(1, count // (threads * TASKS_PER_THREAD))
        parts = [range(a, min(a + size, count)) for a in range(0, count, size)]
        left = iter(range(len(parts) - 1, -1, -1))
        futures = [pool.submit(fill_part, slot, ids, job, part, left) for part in parts]
        waiting.append(_Filling(slot, job, ids, futures))

    def views(filling: _Filling) -> Sequence[torch.Tensor]:
        while True:
            try:
                return filling.slot.views()
            except Spoiled as spoiled:
                for i, fault in spoiled.faults.items():
                    _replace(samples, filling, i, fault, bad)
                filling.slot.launch()

    try:
        for _ in range(PREFETCH):
            start_next()
        while waiting:
            filling = waiting.popleft()
            filling.launch()
            start_next()  # into the memory that neither this batch nor the waiting one holds
            if waiting and all(future.done() for future in waiting[0].futures):
                waiting[0].launch()  # the device makes the next views while it is still at this step
            made = views(filling)
            if bad is not None:
                bad.speak()
            replaced = int((filling.ids != filling.job.ids).sum())
            yield Batch(made, filling.ids, samples.shards.labels[filling.ids], replaced, filling.slot.masks())
            del made
            filling.slot.done()
            free.append(filling.slot)
    finally:
        stopped.set()
        pool.shutdown(wait=True, cancel_futures=True)
        if isinstance(jobs, Generator):
            jobs.close()


class _Filling:
    """A batch that threads are at."""

    def __init__(self, slot: Slot, job: Job, ids: np.ndarray, futures: list[Future]):
        """`ids`: the samples really used, int64 (N,), which the threads change where one stands in for another."""
        self.slot, self.job, self.ids, self.futures = slot, job, ids, futures
        self._launched = False

    def launch(self) -> None:
        """Wait until all samples are there and start the device's part, once."""
        if not self._launched:
            for future in self.futures:
                future.result()
            self.slot.launch()
            self._launched = True


def _fill_one(
    samples: Samples,
    slot: Slot,
    i: int,
    sample_id: int,
    draws: np.ndarray,
    epoch: int,
    bad: BadSamples | None,
) -> int:
    """Fill place `i` of a batch, with a stand-in where the sample is bad; returns the sample used."""
    wanted, attempt = sample_id, 0
    while True:
        if bad is None or sample_id not in bad:
            try:
                slot.fill(i, sample_id, draws)
            except Unreadable as fault:
                if bad is None:
                    raise UserError(bad_sample(samples.shards, sample_id, fault)) from fault
                bad.note(sample_id, fault)
            else:
                if attempt and bad is not None:
                    bad.count_replaced()
                return sample_id
        assert bad is not None
        sample_id, draws = bad.stand_in(epoch, wanted, attempt)
        attempt += 1


def _replace(samples: Samples, filling: _Filling, i: int, fault: Unreadable, bad: BadSamples | None) -> None:
    """Put a stand-in in place `i` of a batch, whose sample turned out bad after it was loaded."""
    sample_id = int(filling.ids[i])
    if bad is None:
        raise UserError(bad_sample(samples.shards, sample_id, fault)) from fault
    bad.note(sample_id, fault)
    # From the sample that was wanted: the row of its stand-ins is the same however the bad ones are found.
    wanted, draws = int(filling.job.ids[i]), np.ascontiguousarray(filling.job.draws[:, i])
    filling.ids[i] = _fill_one(samples, filling.slot, i, wanted, draws, filling.job.epoch, bad)


class HostMemory:
    """Tensors for one batch, made on the host, and pinned there and copied where they go to a GPU."""

    def __init__(
        self,
        shapes: Sequence[tuple[int, ...]],
        batch: int,
        device: torch.device,
        copies: torch.cuda.Stream | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        """`shapes`: those of one sample. `copies`: the stream for copies to a GPU; without it the tensors stay on the host."""
        self._device, self._copies = device, copies
        on_gpu = device.type == "cuda"
        make = pinned_empty if on_gpu else torch.empty
        self._tensors = [make((batch, *shape), dtype=dtype) for shape in shapes]
        self._arrays = [tensor.numpy() for tensor in self._tensors]
        self._copied = torch.cuda.Event() if on_gpu else None
        self._count = 0
        self._made: list[torch.Tensor] = []

    def begin(self, count: int) -> None:
        """Get ready for a batch of `count` samples; waits until the memory may be overwritten."""
        if self._copied is not None:
            self._copied.synchronize()
        self._count = count

    def at(self, i: int) -> list[np.ndarray]:
        """The memory of sample `i`."""
        return [array[i] for array in self._arrays]

    def launch(self) -> None:
        """Copy to a GPU on a stream of its own: it overlaps with the step that the GPU is still at."""
        self._made = [tensor[: self._count] for tensor in self._tensors]
        if self._copies is not None and self._copied is not None:
            with torch.cuda.stream(self._copies):
                self._made = [tensor.to(self._device, non_blocking=True) for tensor in self._made]
                self._copied.record()

    def take(self) -> list[torch.Tensor]:
        """The batch: the current stream waits for the copy, the host does not."""
        made, self._made = self._made, []
        if self._copied is not None and self._copies is not None:
            hand_over(made, self._copied, self._device)
        return made

    def done(self) -> None:
        """The caller has taken what it wants; what was lent on the host may still be on its way to the GPU."""
        if self._copied is not None and self._copies is None:
            self._copied.record(torch.cuda.current_stream(self._device))


class HostSlot(Slot):
    """One batch of views made by the CPU."""

    def __init__(self, samples: Samples, engine: Renderer, memory: HostMemory):
        """`memory`: for (C, S, S) of each view."""
        self._samples, self._engine, self._memory = samples, engine, memory

    def begin(self, job: Job) -> None:
        """As `Slot.begin`."""
        self._memory.begin(len(job.ids))

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


def exact_device(device: torch.device | str) -> torch.device:
    """The device with its number: 'cuda' is the current one now, and threads and libraries that are asked later begin at number 0."""
    place = torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if place == torch.device("cuda") else place


def work_stream(device: torch.device, own: bool) -> torch.cuda.Stream | None:
    """Where a GPU copies and makes views: a stream of its `own`, which overlaps with the step, or the step's; None on a CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.Stream(device) if own else torch.cuda.current_stream(device)


def hand_over(views: list[torch.Tensor], made: torch.cuda.Event, device: torch.device) -> None:
    """Let the current stream use tensors that another stream made."""
    compute = torch.cuda.current_stream(device)
    compute.wait_event(made)
    for view in views:
        view.record_stream(compute)  # its memory was taken on the other stream
