"""Memory that the processes of one machine share, and how much of it there is."""

from __future__ import annotations

import contextlib
import mmap
import os
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch.distributed as dist

from shards.control_groups import memory_left
from shards.errors import UserError
from shards.units import human_size

T = TypeVar("T")


def local_ranks() -> tuple[int, int]:
    """Return this process's number and the number of processes that were started together on this machine: torchrun's environment.

    (0, 1) where they have not joined a process group: then they cannot share.
    """
    if not _joined():
        return 0, 1
    return int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _joined() -> bool:
    """Return whether other processes take part, on any machine. All of them then meet in the functions below, also the only one of a
    machine: what each decided by itself, another would wait for."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def agree(function: Callable[[], T]) -> T:
    """Let the first process of each machine call a function, and return its result, which must be picklable. Every rank calls this.

    A UserError of any of them is raised everywhere.
    """
    if not _joined():
        return function()
    number, _ = local_ranks()
    found: Any = None, None
    if number == 0:
        try:
            found = function(), None
        except UserError as error:
            found = None, error
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, found)
    for _, error in values:
        if error is not None:
            raise error
    return values[dist.get_rank() - number][0]


def wait_for_all() -> None:
    """Wait for every rank."""
    if _joined():
        dist.barrier()


def shared_bytes(count: int) -> tuple[np.ndarray, bool]:
    """Return zeros, uint8 (count,), and whether all processes of this machine write and read them. Every rank calls it.

    The memory is a file without a name, so that nothing of it stays whatever way the processes end, and a small /dev/shm (64 MB in a
    container) does not matter. It is taken page by page when written. Each process of the run has its own, with a
    warning, where one of them cannot open it, such as from another container.

    Raises:
        UserError: they cannot share, and as many copies are more than the machine's free memory.
    """
    number, ranks = local_ranks()
    if not _joined() or not count:
        return np.zeros(count, np.uint8), False
    # The first process of the machine makes it; the others find it at its open file.
    label = f"fastssl-cache-{uuid.uuid4().hex}"
    own = _unnamed(label, count) if number == 0 else -1
    label, place = agree(lambda: (label, f"/proc/{os.getpid()}/fd/{own}"))
    memory = None
    with contextlib.suppress(OSError, ValueError):
        # What is called so and is another's file must not be written to.
        if own >= 0 or label in os.readlink(place):
            file = own if own >= 0 else os.open(place, os.O_RDWR)
            memory = mmap.mmap(file, count)
            if own < 0:
                os.close(file)
    # No file is closed before all have opened it; and all share, or none does: a part of them would miss the others' work.
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, memory is not None)
    if own >= 0:
        os.close(own)
    if memory is None or not all(found):
        free = agree(free_memory)
        if ranks * count > free:
            raise UserError(
                f"The {ranks} processes of this machine cannot share memory, and a cache of {human_size(count)} for each does not "
                f"fit in the {human_size(free)} that are free: set --data.cache none."
            )
        warnings.warn(
            f"The {ranks} processes of this machine cannot share memory: each keeps a copy of what it caches.",
            stacklevel=2,
        )
        return np.zeros(count, np.uint8), False
    return np.frombuffer(memory, np.uint8), True


def _unnamed(label: str, count: int) -> int:
    """Return an open file of `count` zeros in memory; -1 where the system has none. `label`: for /proc."""
    try:
        file = os.memfd_create(label, os.MFD_CLOEXEC)
        os.ftruncate(file, count)
    except (AttributeError, OSError):
        return -1
    return file


def free_memory() -> int:
    """Return the bytes that this process may still take: what the system has available, within the limits of its control groups."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        [available] = [line for line in lines if line.startswith("MemAvailable:")]
        free = int(available.split()[1]) * 1024
    except (OSError, ValueError):
        if not hasattr(os, "sysconf"):
            # An unknown system: little enough for any.
            return 4 * 10**9
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return max(0, min(free, memory_left()))
