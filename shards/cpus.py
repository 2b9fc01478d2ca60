"""How many processors this process may use."""

from __future__ import annotations

import os
from pathlib import Path

CONTROL_GROUPS = Path("/sys/fs/cgroup")


def cpu_quota(root: Path = CONTROL_GROUPS) -> float | None:
    """Cores' worth of CPU time that the control groups mounted at `root` allow (version 2 or 1); None for no limit."""
    if text := _read(root / "cpu.max"):
        quota, _, period = text.partition(" ")
        return None if quota == "max" else int(quota) / int(period)
    quota, period = _read(root / "cpu/cpu.cfs_quota_us"), _read(root / "cpu/cpu.cfs_period_us")
    return int(quota) / int(period) if quota and period and int(quota) > 0 else None


def cpu_cores() -> int:
    """The cores that this process may run on (its affinity), whatever share of their time it gets."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_cpus(root: Path = CONTROL_GROUPS) -> int:
    """The number of threads or processes that can be at work at once: `cpu_cores`, but not more than a control group's quota, rounded.

    More than that stall each other: the system stops all of them for the rest of the period once the quota is used up.
    """
    cores, quota = cpu_cores(), cpu_quota(root)
    return cores if quota is None else max(1, min(cores, round(quota)))


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
