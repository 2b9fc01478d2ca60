"""The most memory that a process has taken so far."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # asked for in processes that measure what importing torch takes
    import torch


def peak_bytes() -> int:
    """Return the peak memory of this process in bytes, shared memory that it has touched included."""
    try:
        # Of this program alone: what getrusage tells may be that of the process that started it.
        lines = Path("/proc/self/status").read_text().splitlines()
        [peak] = [line for line in lines if line.startswith("VmHWM:")]
        return int(peak.split()[1]) * 1024
    except (OSError, ValueError):
        # A system without /proc.
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_memory(device: torch.device) -> dict[str, float]:
    """Return the peaks that a log holds, in bytes: `peak_memory_bytes` of the process and, on a GPU, `peak_gpu_memory_bytes` of its
    tensors."""
    found: dict[str, float] = {"peak_memory_bytes": peak_bytes()}
    if device.type == "cuda":
        import torch

        found["peak_gpu_memory_bytes"] = torch.cuda.max_memory_allocated(device)
    return found
