"""How many processors this process may use."""

from __future__ import annotations

import os
from pathlib import Path

from shards.control_groups import MOUNTED, cpu_quota


def cpu_cores() -> int:
    """The cores that this process may run on (its affinity), whatever share of their time it gets."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_cpus(root: Path = MOUNTED) -> int:
    """The number of threads or processes that can be at work at once: `cpu_cores`, but not more than a control group's quota, rounded.

    More than that stall each other: the system stops all of them for the rest of the period once the quota is used up.
    """
    cores, quota = cpu_cores(), cpu_quota(root)
    return cores if quota is None else max(1, min(cores, round(quota)))
