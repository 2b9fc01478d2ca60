"""Measurements of `fastssl bench augment`: each engine is opened and warmed up, then all are measured in turns."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from fastssl.bench.guard import Guard
from fastssl.bench.loaders.augmenters import Augmenter, Decoded, Step, measured_levels
from fastssl.bench.report import PeakMemory, Row
from fastssl.bench.screen import say_row
from fastssl.bench.step_timer import StepTimer
from fastssl.bench.turns import take_turns
from pipelines.augment.draws import draw
from pipelines.previews.engine_fidelity import classify

OURS = ("triton", "torch", "fused")
# Batches before a measurement: compiling, cuDNN's choice of algorithms, the first blocks of memory, pools of threads.
WARM_UP = 3
# Batches launched ahead, to time the device alone.
QUEUED = 5
LONGEST_LAUNCH_S = 0.3
# Clock of the fastest GPUs; slower ones sleep longer.
CLOCK_HZ = 2e9


def measure(
    chosen: list[Augmenter],
    rows: list[Row],
    work: Decoded,
    repeats: int,
    seconds: float,
    console: Any,
    save: Callable[[], None] = lambda: None,
) -> None:
    """Measure augmenters in turns, each into its row of `rows`.

    An augmenter that cannot run here or fails leaves the reason in its row. `save` is called after each measurement.
    """
    guard = Guard(
        work.device, f"a batch of {work.batch} does not fit in the memory of the device: lower --batch"
    )
    with contextlib.ExitStack() as opened:
        turns: list[_Turn] = []
        for each, row in zip(chosen, rows, strict=True):
            with console.status(f"warming up {each.name}"):
                turn = guard.run([row], lambda each=each, row=row: _Turn(each, work, row, opened, seconds))
            if turn is None:
                say_row(console, row)
            else:
                turns.append(turn)

        def measured(_number: int, turn: _Turn, row: Row) -> None:
            guard.run([row], lambda: turn.take(console))
            _compare(rows)
            save()

        take_turns(range(1, repeats + 1), turns, [turn.row for turn in turns], measured, console)


def _compare(rows: list[Row]) -> None:
    """Set each row's ratio to the fastest of our engines."""
    measured = [row for row in rows if row.rates and row.name in OURS]
    ours = max(measured, key=lambda row: row.images_per_s or 0, default=None)
    for row in rows:
        row.compare(ours)
        if row.ratio:
            row.more["ours_over_this"] = 1 / row.ratio


def least_bytes(work: Decoded) -> int:
    """Return the bytes that any engine must move for a batch: its crop boxes read once, its float32 views written once."""
    recipe = work.recipe
    drawn = draw(recipe, 0, 0, work.sample_ids, *work.sides())
    boxes = 3 * float((drawn["width"].astype(float) * drawn["height"]).mean(axis=1).sum())
    views = 3 * 4 * sum(recipe.side(view) ** 2 for view in range(recipe.total_views))
    return round(work.batch * (boxes + views))


class _Turn:
    """An augmenter, opened and warmed up, and its measurements."""

    def __init__(
        self, each: Augmenter, work: Decoded, row: Row, opened: contextlib.ExitStack, seconds: float
    ):
        if work.device.type not in each.devices:
            raise NotImplementedError(f"{each.name} does not run on a {work.device.type} device")
        if each.peer:
            work.refuse_local_views_and_erasing(each.name)
        else:
            levels = measured_levels(each, work)
            row.fidelity = classify(levels)
            row.note += f"; on average {levels:.2f} gray levels from the reference"
            row.more["mean_levels"] = levels
        self.each, self.row = each, row
        self._device, self._batch, self._seconds = work.device, work.batch, seconds
        self._least_bytes = least_bytes(work)
        self._ms: dict[str, list[float]] = {"ms_p50": [], "ms_p95": [], "device_ms": []}
        with _Memory(work.device, each.foreign_memory) as memory:
            self._step: Step = opened.enter_context(each.open(work))
            for _ in range(WARM_UP):
                began = time.perf_counter()
                self._step()
                self._timer(1, None).wait()
                self._step_s = time.perf_counter() - began
        row.more["peak_memory_bytes"] = memory.taken_bytes

    def take(self, console: Any) -> None:
        """Add one measurement."""
        timer = self._timer(max(1, round(self._seconds / self._step_s)), console)
        made = timer.row(self.row.name, self._step, warm_up=1)
        alone = device_ms(self._step, timer) if self._device.type == "cuda" else None
        for name, figure in {**made.more, "device_ms": alone}.items():
            if name in self._ms and figure is not None:
                self._ms[name].append(figure)
                self.row.more[name] = statistics.median(self._ms[name])
        self.row.more["least_bytes"] = self._least_bytes
        self.row.more["gb_per_s"] = self._least_bytes / self.row.more["ms_p50"] / 1e6
        # The rate comes last, so that Ctrl-C leaves no half of a row.
        self.row.add(made.rates[0], made.cores[0])

    def _timer(self, steps: int, console: Any) -> StepTimer:
        return StepTimer(self._device, self._batch, steps, 1, console)


class _Memory:
    """Measure the peak of memory inside the context, beyond what was in use before: of the GPU, or of this process on a CPU."""

    def __init__(self, device: torch.device, foreign: bool):
        """`foreign`: the memory is not PyTorch's, so the GPU's own count at the end is used."""
        self._device, self._foreign = device, foreign
        self._watch = PeakMemory() if device.type == "cpu" else None
        self.taken_bytes = 0

    def __enter__(self) -> _Memory:
        if self._watch is not None:
            with PeakMemory() as now:
                pass
            self._before = now.most_bytes
            self._watch.__enter__()
        elif self._foreign:
            self._before = torch.cuda.mem_get_info(self._device)[0]
        else:
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        return self

    def __exit__(self, *_: object) -> None:
        if self._watch is not None:
            self._watch.__exit__()
            taken = self._watch.most_bytes - self._before
        elif self._foreign:
            taken = self._before - torch.cuda.mem_get_info(self._device)[0]
        else:
            taken = torch.cuda.max_memory_allocated(self._device) - self._before
        self.taken_bytes = max(0, taken)


def device_ms(step: Step, timer: StepTimer) -> float | None:
    """Return the milliseconds of device work per batch, with all launches queued before it starts: what a step beside it loses.

    None for engines that wait for the device, or launch so slowly or so much that the queue runs empty or full.
    """
    sleep = getattr(torch.cuda, "_sleep", None)
    timer.wait()
    began = time.perf_counter()
    for _ in range(QUEUED):
        step()
    launch_s = time.perf_counter() - began
    timer.wait()
    if sleep is None or launch_s > LONGEST_LAUNCH_S:
        return None
    # Twice: the first time, pinned memory for so many batches at once has to be allocated.
    for _ in range(2):
        sleep(int(2 * launch_s * CLOCK_HZ))
        first = timer.mark()
        for _ in range(QUEUED):
            step()
        # All launches were queued before the first began.
        asleep = not first.query()
        last = timer.mark()
        timer.wait()
        if asleep:
            return timer.between_ms(first, last) / QUEUED
    return None
