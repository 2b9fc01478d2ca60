"""The clock that times every rung of the ladder, and what else is measured of a device."""

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


class Clock:
    """Times a function that does one step, always in the same way."""

    def __init__(self, device: torch.device, batch: int, steps: int, repeats: int, console: Console):
        self.device, self.batch, self.console = device, batch, console
        self.steps, self.repeats = steps, repeats

    def row(self, name: str, step: Callable[[], Any], *, batch: int = 0, warm_up: int = 3) -> Row:
        """Rates per repeat over wall time, and the times of single steps; between CUDA events, so that the host does not wait.

        Args:
            batch: images that `step` does, where it is not the clock's batch.
            warm_up: calls before: compiling, cuDNN's choice of algorithms, the allocator's first blocks.
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
        """Until the device has done all it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def mark(self) -> Any:
        """A point in time, of the device's work where there is one."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between_ms(self, a: Any, b: Any) -> float:
        """Milliseconds from one mark to another; after `wait`."""
        return a.elapsed_time(b) if self.device.type == "cuda" else 1000 * (b - a)


def percentile(values: list[float], share: int) -> float:
    """The least of the values that `share` per cent of them do not exceed."""
    return sorted(values)[max(0, -(-share * len(values) // 100) - 1)]


def memory_bytes(device: torch.device) -> int:
    """The GPU memory that was in use at most since the last reset; on a CPU what this process holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
