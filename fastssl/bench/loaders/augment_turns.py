"""The clock of `fastssl bench augment`: each way is opened and warmed up, then all are measured in turns."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from fastssl.bench.clock import Clock
from fastssl.bench.guard import Guard
from fastssl.bench.loaders.augmenters import Augmenter, Decoded, Step, measured_levels
from fastssl.bench.report import PeakMemory, Row
from pipelines.augment.draws import draw
from pipelines.previews.engine_fidelity import classify

OURS = ("triton", "torch", "fused")
WARM_UP = 3  # batches: compiling, cuDNN's choice of algorithms, the first blocks of memory, pools of threads
QUEUED = 5  # batches launched ahead, to see what the device alone needs
LONGEST_LAUNCH_S = 0.3
CLOCK_HZ = 2e9  # of the fastest GPUs; slower ones sleep longer


def measure(
    chosen: list[Augmenter],
    work: Decoded,
    repeats: int,
    seconds: float,
    console: Any,
    save: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """Return one row for each, measured in turns, so that other work on the machine falls on all of them alike.

    What cannot run here, and what fails, leaves its reason in its row. `save` is given all rows after each turn.
    """
    rows = [Row(each.name, each.fidelity, note=each.note) for each in chosen]
    guard = Guard(
        work.device, f"a batch of {work.batch} does not fit in the memory of the device: lower --batch"
    )
    with contextlib.ExitStack() as opened:
        turns: list[_Turn] = []
        for each, row in zip(chosen, rows, strict=True):
            with console.status(f"warming up {each.name}"):
                turn = guard.run([row], lambda each=each, row=row: _Turn(each, work, row, opened, seconds))
            if turn is not None:
                turns.append(turn)
        for _ in range(repeats):
            for turn in turns:
                if not turn.row.error:
                    guard.run([turn.row], lambda turn=turn: turn.take(console))
                    _compare(rows)
                    save(rows)
    _compare(rows)
    save(rows)
    return rows


def _compare(rows: list[Row]) -> None:
    """Set each row's ratio to the best of ours."""
    measured = [row for row in rows if row.rates and row.name in OURS]
    ours = max(measured, key=lambda row: row.images_per_s or 0, default=None)
    for row in rows:
        row.compare(ours)
        if row.ratio:
            row.more["ours_over_this"] = 1 / row.ratio


def least_bytes(work: Decoded) -> int:
    """What has to be moved for a batch at least, whoever makes it: its crop boxes are read once, its float32 views written once."""
    recipe = work.recipe
    drawn = draw(recipe, 0, 0, work.sample_ids, *work.sides())
    boxes = 3 * float((drawn["width"].astype(float) * drawn["height"]).mean(axis=1).sum())
    views = 3 * 4 * sum(recipe.side(view) ** 2 for view in range(recipe.total_views))
    return round(work.batch * (boxes + views))


class _Turn:
    """One way, opened and warmed up, and the measurements of it."""

    def __init__(
        self, each: Augmenter, work: Decoded, row: Row, opened: contextlib.ExitStack, seconds: float
    ):
        if work.device.type not in each.devices:
            raise NotImplementedError(f"it does not run on a {work.device.type} device")
        if each.peer:
            work.refuse_local_views_and_erasing(each.name)
        else:
            levels = measured_levels(each, work)
            row.fidelity = classify(levels)
            row.note += f"; on average {levels:.2f} grey levels from the reference"
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
                self._clock(1, None).wait()
                self._step_s = time.perf_counter() - began
        row.more["peak_memory_bytes"] = memory.taken_bytes

    def take(self, console: Any) -> None:
        """Add one measurement."""
        clock = self._clock(max(1, round(self._seconds / self._step_s)), console)
        made = clock.row(self.row.name, self._step, warm_up=1)
        self.row.add(made.rates[0], made.cores[0])
        alone = device_ms(self._step, clock) if self._device.type == "cuda" else None
        for name, figure in {**made.more, "device_ms": alone}.items():
            if name in self._ms and figure is not None:
                self._ms[name].append(figure)
                self.row.more[name] = statistics.median(self._ms[name])
        self.row.more["least_bytes"] = self._least_bytes
        self.row.more["gb_per_s"] = self._least_bytes / self.row.more["ms_p50"] / 1e6

    def _clock(self, steps: int, console: Any) -> Clock:
        return Clock(self._device, self._batch, steps, 1, console)


class _Memory:
    """The peak of memory within, beyond what was taken before: of the GPU, or of this process on a CPU."""

    def __init__(self, device: torch.device, foreign: bool):
        """`foreign`: it is taken past PyTorch, so that all of the GPU's counts, as it is at the end."""
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


def device_ms(step: Step, clock: Clock) -> float | None:
    """Milliseconds a batch that the device works when all launches are queued before it starts: what a step beside it would feel.

    None for those that wait for the device, or launch so slowly or so much that the queue runs dry or full.
    """
    sleep = getattr(torch.cuda, "_sleep", None)
    clock.wait()
    began = time.perf_counter()
    for _ in range(QUEUED):
        step()
    launch_s = time.perf_counter() - began
    clock.wait()
    if sleep is None or launch_s > LONGEST_LAUNCH_S:
        return None
    for _ in range(2):  # the first time, pinned memory has to be taken for so many batches at once
        sleep(int(2 * launch_s * CLOCK_HZ))
        first = clock.mark()
        for _ in range(QUEUED):
            step()
        asleep = not first.query()  # all launches were there before the first began
        last = clock.mark()
        clock.wait()
        if asleep:
            return clock.between_ms(first, last) / QUEUED
    return None
