"""Make batches in threads, ahead of time and in order; all threads end when the stream ends, for whatever reason."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch

from pipelines.streaming.bad_samples import BadSamples, bad_sample
from pipelines.streaming.batch import Batch, BatchRequest
from pipelines.streaming.cache import Samples, Unreadable
from shards.cpus import available_cpus
from shards.errors import UserError

# Batches made ahead: one being filled while one waits.
PREFETCHED_BATCHES = 2
# And one that the caller works on.
SLOTS = PREFETCHED_BATCHES + 1
# Parts a batch is cut in, per thread: small enough that the last part does not keep others waiting.
TASKS_PER_THREAD = 4


class Spoiled(Exception):
    """Samples of a batch that turned out bad only when the batch was made; `errors` maps their places in it to what is wrong."""

    def __init__(self, errors: dict[int, Unreadable]):
        super().__init__(f"{len(errors)} samples of a batch are bad")
        self.errors = errors


class Slot(Protocol):
    """Memory for one batch and the work that fills it."""

    def begin(self, request: BatchRequest) -> None:
        """Get ready for a batch; waits until the memory may be overwritten."""

    def fill(self, i: int, sample_id: int, draws: np.ndarray) -> None:
        """Make sample `i` of the batch, from DRAW records (V,); called by many threads. Raises Unreadable for a bad sample."""

    def complete(self) -> list[int]:
        """Do what is done for the whole batch, off the main thread; return the samples that have to be filled once more."""
        ...

    def launch(self) -> None:
        """Start what the device has to do, now that all samples are there; does not wait for it."""

    def views(self) -> Sequence[torch.Tensor]:
        """Return the views, for use on the current stream.

        Raises:
            Spoiled: samples turned out bad; `fill` is called for their places again and then `launch` and `views`.
        """
        ...

    def masks(self) -> list[torch.Tensor]:
        """Return the masks of the views, for use on the current stream; called after `views`."""
        return []

    def done(self) -> None:
        """Take note that the caller is done with the views and asks for the next batch."""


class SlotMaker(Protocol):
    """Gives memory for a stream of batches."""

    def __call__(self, *, in_chunks: bool = False) -> Sequence[Slot]:
        """Return `SLOTS` slots. `in_chunks`: the caller takes their views chunk by chunk, so that none lies whole on a GPU."""
        ...


def default_threads() -> int:
    """Return the number of cores this process may use, shared among the ranks of this machine (torchrun's LOCAL_WORLD_SIZE)."""
    return max(1, available_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def stream(
    samples: Samples,
    slots: Sequence[Slot],
    requests: Iterator[BatchRequest],
    threads: int,
    bad: BadSamples | None = None,
) -> Generator[Batch, None, None]:
    """Make the batches of `requests` in threads, `PREFETCHED_BATCHES` ahead and in order.

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

    def fill(slot: Slot, ids: np.ndarray, request: BatchRequest, part: Iterable[int]) -> None:
        for i in part:
            # Closed, or the interpreter ends with the stream still open.
            if stopped.is_set() or not main.is_alive():
                return
            # Strided over views in `draws`, contiguous for the compiled kernel.
            ids[i] = _fill_one(
                samples, slot, i, int(ids[i]), np.ascontiguousarray(request.draws[:, i]), request.epoch, bad
            )

    def fill_part(
        slot: Slot, ids: np.ndarray, request: BatchRequest, part: range, left: Iterator[int]
    ) -> None:
        fill(slot, ids, request, part)
        # A step of an iterator is atomic, so one thread alone sees the last part done.
        if next(left) == 0 and not stopped.is_set():
            fill(slot, ids, request, slot.complete())

    def start_next() -> None:
        request = next(requests, None)
        if request is None:
            return
        slot, count, ids = free.popleft(), len(request.ids), np.array(request.ids)
        slot.begin(request)
        if bad is not None:
            bad.expect(count)
        size = max(1, count // (threads * TASKS_PER_THREAD))
        parts = [range(a, min(a + size, count)) for a in range(0, count, size)]
        left = iter(range(len(parts) - 1, -1, -1))
        futures = [pool.submit(fill_part, slot, ids, request, part, left) for part in parts]
        waiting.append(_Filling(slot, request, ids, futures))

    def views(filling: _Filling) -> Sequence[torch.Tensor]:
        while True:
            try:
                return filling.slot.views()
            except Spoiled as spoiled:
                for i, error in spoiled.errors.items():
                    _replace(samples, filling, i, error, bad)
                filling.slot.launch()

    try:
        for _ in range(PREFETCHED_BATCHES):
            start_next()
        while waiting:
            filling = waiting.popleft()
            filling.launch()
            # Into the memory that neither this batch nor the waiting one holds.
            start_next()
            if waiting and all(future.done() for future in waiting[0].futures):
                # The device makes the next views while it is still at this step.
                waiting[0].launch()
            made = views(filling)
            if bad is not None:
                bad.speak()
            replaced = int((filling.ids != filling.request.ids).sum())
            yield Batch(made, filling.ids, samples.shards.labels[filling.ids], replaced, filling.slot.masks())
            del made
            filling.slot.done()
            free.append(filling.slot)
    finally:
        stopped.set()
        pool.shutdown(wait=True, cancel_futures=True)
        if isinstance(requests, Generator):
            requests.close()


class _Filling:
    """A batch that threads are filling."""

    def __init__(self, slot: Slot, request: BatchRequest, ids: np.ndarray, futures: list[Future]):
        """Take note of `ids`, int64 (N,), the samples really used, which threads change where one stands in for another."""
        self.slot, self.request, self.ids, self.futures = slot, request, ids, futures
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
    """Fill place `i` of a batch, with a stand-in where the sample is bad; return the sample used."""
    wanted, attempt = sample_id, 0
    while True:
        if bad is None or sample_id not in bad:
            try:
                slot.fill(i, sample_id, draws)
            except Unreadable as error:
                if bad is None:
                    raise UserError(bad_sample(samples.shards, sample_id, error)) from error
                bad.note(sample_id, error)
            else:
                if attempt and bad is not None:
                    bad.count_replaced()
                return sample_id
        assert bad is not None
        sample_id, draws = bad.stand_in(epoch, wanted, attempt)
        attempt += 1


def _replace(samples: Samples, filling: _Filling, i: int, error: Unreadable, bad: BadSamples | None) -> None:
    """Put a stand-in in place `i` of a batch, whose sample turned out bad after it was loaded."""
    sample_id = int(filling.ids[i])
    if bad is None:
        raise UserError(bad_sample(samples.shards, sample_id, error)) from error
    bad.note(sample_id, error)
    # From the sample that was wanted: the row of its stand-ins is the same however the bad ones are found.
    wanted, draws = int(filling.request.ids[i]), np.ascontiguousarray(filling.request.draws[:, i])
    filling.ids[i] = _fill_one(samples, filling.slot, i, wanted, draws, filling.request.epoch, bad)


def exact_device(device: torch.device | str) -> torch.device:
    """Return the device with its number: 'cuda' means the current one now, while other threads and libraries would take number 0."""
    place = torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if place == torch.device("cuda") else place


def work_stream(device: torch.device, own: bool) -> torch.cuda.Stream | None:
    """Return the stream for copies and views: its `own`, which overlaps with the step, or the step's; None on a CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.Stream(device) if own else torch.cuda.current_stream(device)


def hand_over(views: list[torch.Tensor], made: torch.cuda.Event, device: torch.device) -> None:
    """Let the current stream use tensors that another stream made."""
    compute = torch.cuda.current_stream(device)
    compute.wait_event(made)
    for view in views:
        # Its memory was taken on the other stream.
        view.record_stream(compute)
