"""The control groups that this process runs in, as Slurm, systemd and containers make them: how much memory and CPU time they allow.

Version 2 has one tree of groups, version 1 one for each controller (Linux's `admin-guide/cgroup-v2` and `cgroup-v1`).
"""

from __future__ import annotations

import contextlib
from pathlib import Path

MOUNTED = Path("/sys/fs/cgroup")
NO_LIMIT = 2**62
# limit, use, and what of `memory.stat` the system takes back when it is short; of version 2 and of version 1
_MEMORY = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def own_groups(controller: str, root: Path = MOUNTED, groups: str | None = None) -> list[Path]:
    """Return the folders of this process's groups and of those around them, any of which may set a limit; not each is there.

    Args:
        controller: cpu or memory, of version 1.
        root: where the groups are mounted.
        groups: what /proc/self/cgroup says, a line each: number, controllers, path; None: read it.
    """
    if groups is None:
        groups = _text(Path("/proc/self/cgroup"))
    # In a container the path may be one outside of it: its own group is then the root.
    tops = {root / controller: "", root: ""}
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            tops[root / controller if controllers else root] = path.lstrip("/")
    return [
        group
        for top, path in tops.items()
        for group in (top / path, *(top / path).parents)
        if group.is_relative_to(top)
    ]


def memory_limit(root: Path = MOUNTED, groups: str | None = None) -> int:
    """Return the bytes that the tightest of this process's groups allows; NO_LIMIT or more where none has a limit."""
    limits = [_number(group / files[0]) for group in own_groups("memory", root, groups) for files in _MEMORY]
    return min((limit for limit in limits if limit is not None), default=NO_LIMIT)


def memory_left(root: Path = MOUNTED, groups: str | None = None) -> int:
    """Return the bytes that the tightest of this process's groups leaves; NO_LIMIT or more where none has a limit.

    Files that were read and that nobody uses count as free.
    """
    least = NO_LIMIT
    for group in own_groups("memory", root, groups):
        for limit, use, idle in _MEMORY:
            allowed, used = _number(group / limit), _number(group / use)
            if allowed is not None and used is not None:
                stat = dict(row.split() for row in _text(group / "memory.stat").splitlines())
                least = min(least, allowed - used + int(stat.get(idle, 0)))
    return least


def cpu_quota(root: Path = MOUNTED, groups: str | None = None) -> float | None:
    """Return the cores' worth of CPU time that the tightest of this process's groups allows; None for no limit."""
    quotas = []
    for group in own_groups("cpu", root, groups):
        quota, _, period = _text(group / "cpu.max").partition(" ")
        if quota and quota != "max":
            quotas.append(int(quota) / int(period))
        allowed, of = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
        if allowed and of and allowed > 0:
            quotas.append(allowed / of)
    return min(quotas, default=None)


def _number(path: Path) -> int | None:
    with contextlib.suppress(ValueError):
        return int(_text(path))
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
