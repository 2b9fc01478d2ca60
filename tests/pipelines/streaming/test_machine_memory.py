"""Memory that the ranks of a machine share: one copy, filled by all, and nothing of it left when they are killed."""

import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

from fastssl.core.distributed import Dist
from pipelines.augment.recipe import Recipe
from pipelines.engines.engine_table import make_engine
from pipelines.loading.loader import open_loader
from pipelines.streaming import cache, machine_memory
from pipelines.streaming.cache import DecodedCache, Samples, decoded_sizes, fill_ahead, open_samples
from pipelines.streaming.machine_memory import agree, shared_bytes
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError
from tests.gloo import run_ranks
from tests.needs import HANGS_S

SMALL = Recipe(size=16)
ROOT = Path(__file__).parents[3]


def shared_pss() -> int:
    """The bytes of the shared cache that count as this process's: each page divided by the processes that hold it."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line[0] in "0123456789abcdef":
            inside = "memfd:fastssl-cache" in line
        elif inside and line.startswith("Pss:"):
            total += int(line.split()[1]) * 1024
    return total


def fill_together(here: Dist, folder: Path) -> tuple:
    os.environ["LOCAL_WORLD_SIZE"] = str(here.world)
    shards, seen = ShardSet.open(folder), []
    decode = make_engine("fused", SMALL).decode
    samples = open_samples(shards, lambda data: (seen.append(1), decode(data))[1], 3, "ram")
    counts: list[tuple[int, int]] = []
    fill_ahead(samples, 2, lambda done, total: counts.append((done, total)))
    num_decoded = len(seen)
    pixels = [samples.pixels(i).copy() for i in range(shards.num_samples)]
    # All pages are in both processes when they are counted.
    dist.barrier()
    pss = shared_pss()
    dist.barrier()
    views = [
        view.clone()
        for batch in open_loader(
            shards, SMALL, batch=8, cache="ram", threads=1, rank=here.rank, world=2
        ).epoch(0)
        for view in batch.views
    ]
    assert type(samples) is DecodedCache
    return num_decoded, len(seen), pixels, pss, samples.num_bytes, counts[-1], views


def test_two_ranks_decode_each_image_once_and_hold_it_once(shard_set: ShardSet):
    first, second = run_ranks(fill_together, Path(shard_set.folder), timeout_s=HANGS_S)
    count = shard_set.num_samples
    # A part each, and nothing after it.
    assert first[0] + second[0] == count
    assert min(first[0], second[0]) == count // 2
    assert (first[1], second[1]) == (first[0], second[0])
    plain = Samples(shard_set, make_engine("fused", SMALL).decode, 3)
    for i in range(count):
        for rank in (first, second):
            np.testing.assert_array_equal(rank[2][i], plain.pixels(i))
    total = int(decoded_sizes(shard_set, 3).sum())
    assert first[4] == second[4] == total
    # Pixels and a byte an image, in whole pages.
    assert total <= first[3] + second[3] <= total + count + 2 * 4096
    assert first[5] == second[5] == (count, count)
    for rank, found in enumerate((first, second)):
        loader = open_loader(shard_set, SMALL, batch=8, threads=1, rank=rank, world=2)
        expected = [view.clone() for batch in loader.epoch(0) for view in batch.views]
        assert all((a == b).all() for a, b in zip(found[6], expected, strict=True))


def refuse(here: Dist, folder: Path) -> str:
    os.environ["LOCAL_WORLD_SIZE"] = str(here.world)
    # The machine's memory as the first rank sees it decides for both.
    cache.free_memory = lambda: 10 if here.rank == 0 else 10**12
    with pytest.raises(UserError) as raised:
        open_samples(ShardSet.open(folder), lambda data: np.empty(0), 3, "ram")
    return str(raised.value)


def test_all_ranks_refuse_together(shard_set: ShardSet):
    first, second = run_ranks(refuse, Path(shard_set.folder), timeout_s=HANGS_S)
    assert first == second
    assert "41 images" in first


def unshared(here: Dist, folder: Path, how: str) -> tuple[bool, int, int]:
    os.environ["LOCAL_WORLD_SIZE"] = str(here.world)
    if how == "unopened":
        real = os.open
        os.open = lambda path, *rest: real("/nowhere" if "/fd/" in str(path) else path, *rest)
    else:
        # In another container the number may be another program's.
        link = os.readlink
        os.readlink = lambda path, **how: "/a file" if "/proc/" in str(path) else link(path, **how)
    shards, decode = ShardSet.open(folder), make_engine("fused", SMALL).decode
    with pytest.warns(UserWarning, match="2 processes of this machine cannot share memory"):
        memory, shared = shared_bytes(10)
    with pytest.warns(UserWarning, match="each keeps a copy"):
        samples = open_samples(shards, decode, 3, "ram")
    memory[here.rank] = 7
    dist.barrier()
    fill_ahead(samples, 2)
    assert samples.held is not None
    return shared, int(memory.sum()), samples.held.num_held()


@pytest.mark.parametrize("how", ["unopened", "of another"])
def test_ranks_that_cannot_open_it_fill_memory_of_their_own(shard_set: ShardSet, how: str):
    assert run_ranks(unshared, Path(shard_set.folder), how, timeout_s=HANGS_S) == [(False, 7, 41)] * 2


def too_many_copies(here: Dist) -> str:
    os.environ["LOCAL_WORLD_SIZE"] = str(here.world)
    real = os.open
    # One process alone cannot open it.
    if here.rank:
        os.open = lambda path, *rest: real("/nowhere" if "/fd/" in str(path) else path, *rest)
    machine_memory.free_memory = lambda: 1500
    with pytest.raises(UserError) as raised:
        shared_bytes(1000)
    return str(raised.value)


def test_copies_that_do_not_fit_are_refused():
    first, second = run_ranks(too_many_copies)
    assert first == second
    assert "2 processes" in first
    assert "1.0 kB for each does not fit in the 1.5 kB" in first


def two_machines(here: Dist, folder: Path) -> tuple[bool, int, int]:
    """The second process is alone on its machine and cannot have such memory; the first could share with another."""
    os.environ["LOCAL_WORLD_SIZE"], os.environ["LOCAL_RANK"] = "1", "0"
    if here.rank:
        machine_memory._unnamed = lambda label, count: -1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        samples = open_samples(ShardSet.open(folder), make_engine("fused", SMALL).decode, 3, "ram")
    fill_ahead(samples, 2)
    # A meeting that only some had entered would break this one.
    sizes = [None] * here.world
    dist.all_gather_object(sizes, here.rank)
    assert samples.held is not None
    return samples.held.shared, samples.held.num_held(), sum(size for size in sizes if size is not None)


def test_machines_that_differ_meet_in_the_same_places(shard_set: ShardSet):
    assert run_ranks(two_machines, Path(shard_set.folder)) == [(False, 41, 1)] * 2


KILLED = """
import os, sys, time
from fastssl.core.distributed import setup
from pipelines.streaming.machine_memory import shared_bytes
setup("cpu")
memory, _ = shared_bytes(64 * 2**20)
memory[:] = 1
print("filled", flush=True)
time.sleep(600)
"""


def test_nothing_stays_of_ranks_that_are_killed(free_port: int):
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port),
        "PYTHONPATH": str(ROOT),
    }
    environment |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", KILLED],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for rank in ranks:
            assert rank.stdout is not None
            assert rank.stdout.readline() == "filled\n"
        # No name at any time, and no open file that a process started later would inherit.
        assert not [name for name in os.listdir("/dev/shm") if "fastssl" in name]
        for rank in ranks:
            files = [os.readlink(f"/proc/{rank.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{rank.pid}/fd")]
            # The map holds a file of its own.
            assert sum("fastssl-cache" in name for name in files) <= 1
            [label] = set(
                re.findall(r"memfd:(fastssl-cache-\w+)", Path(f"/proc/{rank.pid}/maps").read_text())
            )
    finally:
        for rank in ranks:
            rank.send_signal(signal.SIGKILL)
            rank.wait()
            assert rank.stdout is not None
            rank.stdout.close()
    assert not [path for path in Path("/proc").glob("[0-9]*/maps") if label in readable(path)]


def readable(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


@pytest.fixture
def free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_a_process_alone_agrees_with_itself():
    assert agree(lambda: 3) == 3
    with pytest.raises(UserError, match="no"):
        agree(lambda: (_ for _ in ()).throw(UserError("no")))
    memory, shared = shared_bytes(5)
    assert (memory.dtype, memory.tolist(), shared) == (np.uint8, [0] * 5, False)


def test_free_memory_keeps_to_the_control_group(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine_memory, "memory_left", lambda: 12345)
    assert machine_memory.free_memory() == 12345
    monkeypatch.setattr(machine_memory, "memory_left", lambda: -1)
    assert machine_memory.free_memory() == 0
