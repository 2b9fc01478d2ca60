"""Run a function in several processes that talk over gloo, and report every rank's result or traceback."""

import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from tests.needs import HANGS_S


class RankError(AssertionError):
    """A rank raised, died or did not answer in time; the message holds every traceback that came back."""


def run_ranks(
    function: Callable[..., Any], *args: Any, world: int = 2, timeout_s: float = HANGS_S
) -> list[Any]:
    """Call function(Dist, *args) on each of `world` new processes and return the results in rank order.

    `function` must be importable (defined at the top of its module). Each process has joined a gloo group
    through fastssl.core.distributed.setup and runs on one thread. Raises RankError when a rank fails, and when not
    all have answered after `timeout_s`. No process outlives the call.
    """
    port = _free_port()
    spawn = multiprocessing.get_context("spawn")
    readers: list[Connection] = []
    processes = []
    for rank in range(world):
        reader, writer = spawn.Pipe(duplex=False)
        process = spawn.Process(
            target=_rank_main, args=(function, args, rank, world, port, timeout_s, writer), daemon=True
        )
        process.start()
        writer.close()  # so that a rank that dies without a word reads as the end of the pipe
        readers.append(reader)
        processes.append(process)
    try:
        return _collect(readers, timeout_s)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _collect(readers: list[Connection], timeout_s: float) -> list[Any]:
    """The results, or a RankError. After a failure the other ranks get 2 s: they may wait for the failed
    one."""
    deadline = time.monotonic() + timeout_s
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    while len(results) + len(failures) < len(readers):
        waiting = {readers[r]: r for r in range(len(readers)) if r not in results and r not in failures}
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for reader in ready:
            assert isinstance(reader, Connection)
            rank = waiting[reader]
            payload: Any
            try:
                succeeded, payload = reader.recv()
            except EOFError:
                succeeded, payload = False, "died without a traceback"
            if succeeded:
                results[rank] = pickle.loads(payload)
            else:
                failures[rank] = payload
                deadline = min(deadline, time.monotonic() + 2)
    if failures:
        raise RankError("\n".join(f"rank {rank}: {text}" for rank, text in sorted(failures.items())))
    silent = [rank for rank in range(len(readers)) if rank not in results]
    if silent:
        raise RankError(f"no answer from ranks {silent} within {timeout_s:g} s")
    return [results[rank] for rank in range(len(readers))]


def _rank_main(
    function: Callable[..., Any],
    args: tuple,
    rank: int,
    world: int,
    port: int,
    timeout_s: float,
    writer: Connection,
) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
    )
    try:
        import torch

        from fastssl.core.distributed import barrier, cleanup, setup

        torch.set_num_threads(1)
        here = setup("cpu", timeout_s=timeout_s)
        # A function may leave the group to join another, which must not break one that is still connecting.
        barrier()
        try:
            # Pickled by value: tensors sent as shared memory would vanish with this process.
            payload = pickle.dumps(function(here, *args))
        finally:
            cleanup()
        writer.send((True, payload))
    except BaseException:
        writer.send((False, traceback.format_exc()))
