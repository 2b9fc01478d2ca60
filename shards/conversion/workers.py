"""Runs one function for many shard numbers, in this process or in several, and count images done."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from types import ModuleType

from shards.errors import UserError

INTERVAL_S = 0.1
# Importing it takes a worker half a second, or as long as converting a thousand images.
_IMPORTS = ["shards.conversion.shard_maker"]
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_KEPT_BYTES = 32 * 2**20  # the most that glibc takes for the latter
Count = Callable[[int, int], None]  # (images done, of these quarantined), each since the last call
Make = Callable[[int, Count], None]  # makes one shard


class Ticker:
    """Adds up counts and passes the totals on at most once in `interval_s`."""

    def __init__(self, show: Callable[[int, int], None], interval_s: float = INTERVAL_S):
        self._show = show
        self._interval_s = interval_s
        self._done = self._quarantined = 0
        self._next_s = 0.0

    def add(self, done: int, quarantined: int) -> None:
        self._done += done
        self._quarantined += quarantined
        if time.monotonic() >= self._next_s:
            self.flush()

    def flush(self) -> None:
        self._show(self._done, self._quarantined)
        self._next_s = time.monotonic() + self._interval_s


def run_here(make: Make, todo: Sequence[int], show: Callable[[int, int], None]) -> None:
    """Make the shards one after another in this process; `show` gets the totals of images, quarantined."""
    ticker = Ticker(show)
    for shard in todo:
        make(shard, ticker.add)
    ticker.flush()


def run_in_processes(
    make: Make, todo: Sequence[int], num_workers: int, show: Callable[[int, int], None]
) -> None:
    """Make the shards in `num_workers` processes; `make` must be picklable.

    An error in one stops them all and is raised here; so does an interrupt. Should this process be killed,
    the workers find their pipe closed at their next count and end by themselves.
    """
    context = _context()
    environ = dict(os.environ)
    # What a script defines itself, such as a source, is found in the script alone.
    hidden = b"__main__" not in ForkingPickler.dumps(make)
    waiting = deque(todo)
    workers = {}
    counts = {}
    ticker = Ticker(lambda *_: show(*map(sum, zip(*counts.values(), strict=True))))
    try:
        for _ in range(min(num_workers, len(todo))):
            ours, theirs = context.Pipe()
            worker = context.Process(target=_work, args=(theirs, make, environ), daemon=True)
            with _without_script() if hidden else contextlib.nullcontext():
                _start(worker)
            theirs.close()
            workers[ours] = worker
            counts[ours] = (0, 0)
            ours.send(waiting.popleft())
        busy = set(workers)
        while busy:
            for pipe in wait(list(busy), timeout=INTERVAL_S):
                assert isinstance(pipe, Connection)
                kind, *content = _receive(pipe, workers[pipe])
                if kind == "count":
                    counts[pipe] = content
                elif kind == "done":
                    pipe.send(waiting.popleft() if waiting else None)
                elif kind == "end":
                    busy.discard(pipe)
                elif kind == "user error":
                    raise UserError(*content)
                else:
                    raise RuntimeError(f"a worker failed:\n{content[0]}")
            ticker.add(0, 0)
        ticker.flush()
    finally:
        for pipe, worker in workers.items():
            # One that is about to wait for work may miss the signal, and then ends by the closed pipe.
            pipe.close()
            worker.terminate()
        for worker in workers.values():
            worker.join()


def warm_up() -> None:
    """Start the process that workers will be copies of, so that it imports what they need while this one does other things."""
    if _context().get_start_method() == "forkserver":
        without_interrupts(forkserver.ensure_running)


def _context() -> ForkServerContext | SpawnContext:
    # Not a copy of this process: it may have threads that hold locks.
    if not sys.platform.startswith("linux"):
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTS)
    return context


def _start(worker: BaseProcess) -> None:
    resource_tracker.ensure_running()  # at its first start it would unblock the signal
    without_interrupts(worker.start)


@contextlib.contextmanager
def _without_script() -> Iterator[None]:
    """Hide the user's script from workers that start inside: they would run it again, with the conversion in it."""
    script, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


def without_interrupts(start: Callable[[], None]) -> None:
    """Start a process that no Ctrl-C reaches: it goes to all processes of a terminal, and the parent alone answers it.

    The child inherits the blocked signal, so that not even one that is still importing prints a traceback; its parent must end it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _receive(pipe: Connection, worker: BaseProcess) -> tuple:
    try:
        return pipe.recv()
    except (EOFError, ConnectionResetError):
        worker.join()
        raise UserError(
            f"A worker process was stopped from outside (exit code {worker.exitcode}); if memory ran out, "
            "use fewer workers. The same command goes on from what is finished."
        ) from None


def _keep_memory() -> None:
    """Have the C library keep what is freed: given back after each image, it would have to be taken again, page by page."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt  # of glibc alone
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def _work(pipe: Connection, make: Make, environ: dict[str, str]) -> None:
    os.environ.clear()  # what it was when the process began that this one is a copy of
    os.environ.update(environ)
    _keep_memory()
    # Asked to end, leave as by an error, so that the unfinished file is removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    ticker = Ticker(lambda done, quarantined: pipe.send(("count", done, quarantined)))
    try:
        while (shard := pipe.recv()) is not None:
            make(shard, ticker.add)
            ticker.flush()
            pipe.send(("done",))
        pipe.send(("end",))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except Exception as error:
        known = isinstance(error, UserError)
        with contextlib.suppress(OSError):  # the parent may have gone meanwhile
            pipe.send(("user error", str(error)) if known else ("error", traceback.format_exc()))
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
