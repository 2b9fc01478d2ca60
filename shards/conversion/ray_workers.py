"""Makes shards as tasks of an existing Ray cluster: one task a shard, made again elsewhere when its node dies.

A shard is a pure function of plan and number and appears whole or not at all, so a task that runs twice, even at the same time, does
no harm. Only counts travel: every node reads SOURCE and writes DEST itself, under the same path or URL.
"""

from __future__ import annotations

import contextlib
import logging
import platform
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from shards.conversion.shard_maker import Maker
from shards.conversion.shard_plan import read_plan
from shards.conversion.workers import INTERVAL_S, Count, Ticker
from shards.errors import UserError
from shards.format.layout import PLAN
from shards.images.pixels import BadImage

RETRIES = 5  # of a shard whose worker or node died
REPORT_S = 1.0  # between the counts that a task sends
ANSWER_S = 10.0  # for the cluster's head, and for the tasks to end after an interrupt
LOOK_S = 5.0  # between looks at the number of CPUs, which may grow and shrink
_PROBED = 64  # images, in search of one that is good

# Of (SOURCE's kind and name, DEST, settings): what this process has found reachable from its node.
_reached: set[tuple[str, ...]] = set()


@dataclass(frozen=True)
class ShardJob:
    """What every task needs. `probe`: an entry of the source that can be read where the command was given; None: none is good."""

    maker: Maker
    probe: dict[str, Any] | None


@contextlib.contextmanager
def connect(address: str) -> Iterator[Cluster]:
    """A running cluster: at `auto` that of this machine (or RAY_ADDRESS), else at HOST:PORT. This process must be on one of its nodes.

    A program that has called `ray.init` keeps its connection. Raise UserError where Ray is not installed or no cluster answers.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError(f"--engine ray needs Ray on every node ({error}): pip install ray.") from error
    if ray.is_initialized():
        yield Cluster(ray)
        return
    found = address
    if address == "auto":
        from ray._private.services import canonicalize_bootstrap_address  # what ray.init calls, too

        try:
            found = canonicalize_bootstrap_address("auto") or "auto"
        except (OSError, ValueError) as error:
            raise _no_cluster(address, str(error)) from error
    _check_answers(found)  # a cluster that has ended leaves its address behind
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        raise _no_cluster(address, str(error)) from error
    try:
        yield Cluster(ray)
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Raise UserError at once where nothing listens at HOST:PORT; Ray itself would try for a minute."""
    if "://" in address:
        raise UserError(
            f"--ray-address '{address}' is not HOST:PORT; run the command on a node of the cluster, where --ray-address auto finds it."
        )
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdigit() and 0 < int(port) < 65536):
        if address in ("", "auto"):
            return
        raise UserError(f"--ray-address '{address}' is neither auto nor HOST:PORT, such as 10.0.0.5:6379.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_S).close()
    except OSError as error:
        raise _no_cluster(address, str(error)) from error


def _no_cluster(address: str, why: str) -> UserError:
    reason = " ".join(why.split()).rstrip(".")
    return UserError(
        f"No Ray cluster at --ray-address {address} ({reason}). Start one with `ray start --head`, then on each other node "
        "`ray start --address HOST:6379`, and run this command on one of them."
    )


class Cluster:
    """A connection to a Ray cluster."""

    def __init__(self, ray: Any):
        self._ray = ray

    def run(
        self, maker: Maker, todo: Sequence[int], num_at_once: int | None, show: Callable[[int, int], None]
    ) -> None:
        """Make the shards as tasks of one CPU each; `show` gets the totals of images, quarantined.

        `num_at_once` shards are given out at a time; None: twice the cluster's CPUs. An error in one stops them all and is raised
        here; so does an interrupt.
        """
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        ray = self._ray
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        board = ray.remote(num_cpus=0)(Board).options(scheduling_strategy=here).remote()
        make = ray.remote(num_cpus=1, max_retries=RETRIES)(make_shard)
        job = ray.put(ShardJob(maker, find_probe(maker, todo)))
        counts = _Counts(ray, board, show)
        waiting = deque(todo)
        running: dict[Any, int] = {}
        limit, look_s = num_at_once or 0, 0.0
        try:
            while waiting or running:
                if num_at_once is None and time.monotonic() >= look_s:
                    limit = max(2, 2 * int(ray.cluster_resources().get("CPU", 0)))
                    look_s = time.monotonic() + LOOK_S
                while waiting and len(running) < limit:
                    shard = waiting.popleft()
                    running[make.options(name=f"shard {shard}").remote(job, board, shard)] = shard
                ready, _ = ray.wait(list(running), timeout=INTERVAL_S)
                for task in ready:
                    kind, *content = self._result(task, running[task])
                    del running[task]
                    if kind == "user error":
                        raise UserError(*content)
                    counts.finish(*content)
                counts.show(running.values())
            counts.flush()
        finally:
            with contextlib.suppress(ray.exceptions.RayError):
                for task in running:
                    ray.cancel(task)  # as by Ctrl-C, so that the unfinished file is removed
                if running:
                    ray.wait(list(running), num_returns=len(running), timeout=ANSWER_S)
                ray.kill(board)

    def _result(self, task: Any, shard: int) -> tuple:
        ray = self._ray
        try:
            return ray.get(task)
        except ray.exceptions.RayTaskError as error:
            if "No module named" in str(error):
                missing = str(error).rpartition("No module named")[2].split("\n")[0].strip()
                raise UserError(
                    f"A node of the Ray cluster has no Python module {missing}: install the same fastssl-pretrain on every node."
                ) from error
            raise RuntimeError(f"shard {shard} failed in a task of Ray:\n{error}") from error
        except ray.exceptions.RayError as error:
            raise UserError(
                f"Shard {shard} could not be made on the Ray cluster ({type(error).__name__}); what dies with its worker or node is "
                f"tried again {RETRIES} times. If memory ran out, give out fewer at a time (--workers). The same command goes on from "
                "what is finished."
            ) from error


class Board:
    """An actor on which the running tasks note how far they are."""

    def __init__(self):
        self._counts: dict[int, tuple[int, int]] = {}

    def note(self, shard: int, done: int, quarantined: int) -> None:
        """Of a shard that is being made, for the second time perhaps: so many images are done, so many of these quarantined."""
        self._counts[shard] = (done, quarantined)

    def read(self, running: set[int]) -> dict[int, tuple[int, int]]:
        """The counts of those shards; all others are forgotten."""
        self._counts = {shard: count for shard, count in self._counts.items() if shard in running}
        return self._counts


class _Counts:
    """Adds what the board says of running shards to what is finished."""

    def __init__(self, ray: Any, board: Any, show: Callable[[int, int], None]):
        self._ray = ray
        self._board = board
        self._show = show
        self._finished = (0, 0)
        self._noted: dict[int, tuple[int, int]] = {}
        self._asked: Any = None
        self._next_s = 0.0

    def finish(self, done: int, quarantined: int) -> None:
        """A shard is made."""
        self._finished = (self._finished[0] + done, self._finished[1] + quarantined)

    def show(self, running: Any) -> None:
        """Pass the totals on; ask the board, and wait for no answer."""
        ray, shards = self._ray, set(running)
        if self._asked is not None and ray.wait([self._asked], timeout=0)[0]:
            # A board that died with its node is no fault of the shards: what is finished still counts.
            with contextlib.suppress(ray.exceptions.RayError):
                self._noted = ray.get(self._asked)
            self._asked = None
        if self._asked is None and time.monotonic() >= self._next_s:
            self._asked = self._board.read.remote(shards)
            self._next_s = time.monotonic() + REPORT_S
        noted = [count for shard, count in self._noted.items() if shard in shards]
        self._show(*map(sum, zip(self._finished, *noted, strict=True)))

    def flush(self) -> None:
        """Pass on what is finished."""
        self._show(*self._finished)


def make_shard(job: ShardJob, board: Any, shard: int) -> tuple:
    """The task: ("done", images, of these quarantined), or ("user error", text), which Ray would wrap and print as a traceback."""
    totals = [0, 0]

    def note(done: int, quarantined: int) -> None:
        totals[:] = done, quarantined
        board.note.remote(shard, done, quarantined)

    ticker = Ticker(note, REPORT_S)
    try:
        check_node(job)
        make: Callable[[int, Count], None] = job.maker
        make(shard, ticker.add)
    except UserError as error:
        return "user error", f"on node {node_name()}: {error}"
    ticker.flush()
    return "done", *totals


def find_probe(maker: Maker, todo: Sequence[int]) -> dict[str, Any] | None:
    """The first entry of the shards that can be read here, of a few."""
    rows = (row for shard in todo for row in maker.plan.rows(shard).to_pylist())
    for row in islice(rows, _PROBED):
        with contextlib.suppress(BadImage):
            maker.source.read(row)
            return row
    return None


def check_node(job: ShardJob) -> None:
    """Raise UserError where this node does not see the plan in DEST, or cannot read the probe; once a process.

    A disk that is not mounted here would otherwise quarantine every image.
    """
    maker, plan = job.maker, job.maker.plan
    key = (maker.source.kind, maker.source.name, maker.dest.url, plan.settings.sha256())
    if key in _reached:
        return
    way_out = "All nodes must reach it under the same path (a shared file system) or URL."
    try:
        same = read_plan(maker.dest).settings == plan.settings
    except FileNotFoundError:
        raise UserError(f"There is no '{maker.dest / PLAN}' here, DEST's plan. {way_out}") from None
    if not same:
        raise UserError(f"'{maker.dest / PLAN}' here is another conversion's. {way_out}")
    if job.probe is not None:
        try:
            maker.source.read(job.probe)
        except (BadImage, UserError) as error:
            raise UserError(
                f"'{job.probe['source']}' of SOURCE '{maker.source.name}' can be read where the command was given, but not here "
                f"({error}). {way_out}"
            ) from error
    _reached.add(key)


def node_name() -> str:
    """This machine's name and, where it has one, its address."""
    name = platform.node()
    try:
        return f"{name} ({socket.gethostbyname(name)})"
    except OSError:
        return name
