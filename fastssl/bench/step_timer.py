"""Timing work on a device: the timer of the ladder and of `bench augment`, the best of some runs, and the memory in use."""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastssl.bench.report import Row, Stopwatch


class StepTimer:
    """Time a function that does one step: warm-up, then `repeats` measurements of `steps` steps each."""

    def __init__(self, device: torch.device, batch: int, steps: int, repeats: int, console: Console):
        self.device, self.batch, self.console = device, batch, console
        self.steps, self.repeats = steps, repeats

    def row(self, name: str, step: Callable[[], Any], *, batch: int = 0, warm_up: int = 3) -> Row:
        """Return a row with the rate of each repeat, in images/s of wall time, and the times of single steps in ms.

        Steps are timed between CUDA events on a GPU, so that the host does not wait.

        Args:
            batch: images of one `step`, where that is not the timer's batch.
            warm_up: calls before the measurement: compiling, cuDNN's choice of algorithms, the allocator's first blocks.
        """
        row, times_ms = Row(name), []
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with self.console.status(f"measuring {name}"):
            began = time.perf_counter()
            for _ in range(warm_up):
                step()
            self.wait()
            warm_up_s = time.perf_counter() - began
            for _ in range(self.repeats):
                self.wait()
                watch, marks = Stopwatch(), [self.mark()]
                for _ in range(self.steps):
                    step()
                    marks.append(self.mark())
                self.wait()
                row.add((batch or self.batch) * self.steps / watch.wall_s(), watch.cores())
                times_ms += [self.between_ms(a, b) for a, b in itertools.pairwise(marks)]
        row.more = {
            "ms_p50": statistics.median(times_ms),
            "ms_p95": percentile(times_ms, 95),
            "memory_bytes": memory_bytes(self.device),
            "warm_up_s": warm_up_s,
        }
        return row

    def wait(self) -> None:
        """Wait until the device has finished all work."""
        synchronize(self.device)

    def mark(self) -> Any:
        """Return a point in time: a CUDA event on a GPU, seconds on a CPU."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between_ms(self, a: Any, b: Any) -> float:
        """Return the milliseconds from one mark to another; call `wait` before."""
        return a.elapsed_time(b) if self.device.type == "cuda" else 1000 * (b - a)


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished all work; return at once on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best_s(run: Callable[[], Any], device: torch.device, times: int) -> float:
    """Return the seconds of the fastest of some runs, each including the device's work."""
    best = float("inf")
    for _ in range(times):
        synchronize(device)
        began = time.perf_counter()
        run()
        synchronize(device)
        best = min(best, time.perf_counter() - began)
    return best


def percentile(values: list[float], share: int) -> float:
    """Return the smallest value that at least `share` per cent of the values do not exceed."""
    return sorted(values)[max(0, -(-share * len(values) // 100) - 1)]


def memory_bytes(device: torch.device) -> int:
    """Return the peak of GPU memory since the last reset, in bytes; on a CPU the memory that this process holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
