"""`fastssl pretrain --gpus all`: start, watch and end all processes of a run on this machine.

Each is `fastssl pretrain` in the environment that torchrun would give it. The first one has the terminal; the others' output is shown
only if one of them dies without a word. They are in sessions of their own, so that a Ctrl-C reaches them once, through this process.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import IO, Any

from fastssl.core.signals import HANG_UP, STOPPING, Requests, show_cursor
from shards.cpus import available_cpus
from shards.errors import UserError

VISIBLE = "CUDA_VISIBLE_DEVICES"
# Kinds of failures that a process reports.
USER_ERROR, CRASH, INTERRUPTED = "error", "crash", "interrupted"
EVERY_S = 0.05
# Time for the others to end by themselves after one has failed, and for all after a second Ctrl-C.
END_S = 5.0
# Lines of a dead process's output that are shown.
TAIL_LINES = 20


def take_processes(argv: list[str]) -> tuple[Sequence[dict[str, str]], list[str]]:
    """Take `--gpus` and `--processes` out of the arguments of `fastssl pretrain`.

    Returns:
        The environment of each process, beyond this one's (none: neither flag was given), and the other arguments.

    Raises:
        UserError: more GPUs than there are, a number that is none, or this process is one of several already.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--gpus", "--processes", "--train.device"):
        parser.add_argument(name, nargs="?", const="", dest=name)
    asked, rest = parser.parse_known_args(argv)
    gpus: str | None
    count: str | None
    gpus, count, device = vars(asked).values()
    if gpus is None and count is None:
        return (), argv
    if gpus is not None and count is not None:
        raise UserError("--gpus starts a process for each GPU: leave out --processes, which is for CPUs.")
    flag = "--gpus" if count is None else "--processes"
    if found := [name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name in os.environ]:
        raise UserError(
            f"{flag} starts all processes itself, but the environment sets {', '.join(found)}, as torchrun does: leave out {flag}, "
            "or start without torchrun."
        )
    if count is not None:
        if not count.isdecimal() or int(count) < 1:
            raise UserError(f"--processes is {count!r}, but it must be a number of at least 1.")
        world, own = int(count), {}
    else:
        if device == "cpu":
            raise UserError("--gpus asks for GPUs and --train.device for cpu: on a CPU, give --processes N.")
        import torch

        names = choose_gpus(gpus or "", torch.cuda.device_count(), os.environ.get(VISIBLE))
        world, own, device = len(names), {VISIBLE: ",".join(names)}, "cuda"
    if device is not None:
        rest += ["--train.device", device]
    own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    own |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    if "OMP_NUM_THREADS" not in os.environ:
        own["OMP_NUM_THREADS"] = str(max(1, available_cpus() // world))
    return [{**own, "RANK": str(i), "LOCAL_RANK": str(i)} for i in range(world)], rest


def choose_gpus(asked: str, found: int, visible: str | None) -> list[str]:
    """Return the chosen GPUs as CUDA_VISIBLE_DEVICES names them.

    Args:
        asked: `all`, a number of GPUs (the first ones), or a list of numbers such as `0,2`, counted among the visible ones.
        found: number of visible GPUs.
        visible: present value of CUDA_VISIBLE_DEVICES; None: all are visible.
    """
    names = visible.split(",")[:found] if visible else [str(i) for i in range(found)]
    limited = f" ({VISIBLE} is '{visible}')" if visible is not None else ""
    numbers = asked.split(",")
    if asked != "all" and not all(number.isdecimal() for number in numbers):
        raise UserError(f"--gpus is {asked!r}, but it must be all, a number of GPUs, or a list such as 0,1.")
    if asked == "all" and not found:
        raise UserError(f"--gpus all, but PyTorch finds no GPU{limited}: on a CPU, give --processes N.")
    if asked == "all":
        return names
    chosen = [int(number) for number in numbers] if len(numbers) > 1 else list(range(int(asked)))
    if not chosen:
        raise UserError(
            f"--gpus is 0, a number of GPUs, but it must be at least 1. GPU 0 alone: {VISIBLE}=0 --gpus 1."
        )
    if len(set(chosen)) < len(chosen):
        raise UserError(f"--gpus {asked} names a GPU twice, but each gets one process.")
    if max(chosen) >= found:
        what = f"GPU {max(chosen)}" if len(numbers) > 1 else f"{asked} GPUs"
        raise UserError(
            f"--gpus {asked} asks for {what}, but PyTorch finds {found}{limited}, counted from 0."
        )
    return [names[i] for i in chosen]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@dataclass
class _Rank:
    """One started process."""

    process: subprocess.Popen[bytes]
    pipe: socket.socket
    output: IO[bytes] | None
    """What it prints; None: it has the terminal."""
    report: dict[str, Any] = field(default_factory=dict)
    """What `fastssl.commands.rank` says of a failure."""
    killed: bool = False
    """Whether this process has killed it."""

    def poll(self) -> int | None:
        """Return the exit code, None while it runs, and read its report."""
        code = self.process.poll()
        if not self.report:
            try:
                read = self.pipe.recv(1 << 20, socket.MSG_PEEK)
            except (BlockingIOError, ConnectionResetError):
                read = b""
            if read.endswith(b"\n"):
                self.report = json.loads(read)
        return code

    @property
    def cause(self) -> tuple[int, float] | None:
        """How likely this process failed first: the least is the cause; None: it did not fail by itself."""
        code = self.process.returncode
        if not code or self.report.get("kind") == INTERRUPTED or (self.killed and not self.report):
            return None
        # What ends in an abort is often the others' answer to a failure that was reported.
        if code < 0 and code != -signal.SIGABRT and not self.report:
            return 0, 0.0
        if self.report:
            return 1, self.report["time_s"]
        # Exit codes of a run that was stopped, which has said so, are no failure.
        return None if code - 128 in STOPPING else (2, 0.0)

    def tail(self) -> str:
        """Return the last lines that it printed, each after a line break."""
        if self.output is None:
            return ""
        self.output.seek(max(0, self.output.seek(0, os.SEEK_END) - 2**16))
        lines = self.output.read().decode(errors="replace").splitlines()[-TAIL_LINES:]
        return "".join(f"\n{line}" for line in lines)


class _Ranks:
    """A context in which signals go to all processes, and after which none is left."""

    def __init__(self) -> None:
        self.ranks: list[_Rank] = []
        self.requests = Requests()
        self._deadline_s = float("inf")
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Ranks:
        for number in STOPPING:
            self._before[number] = signal.signal(number, self._forward)
        # The terminal is gone: the run goes on, as one of a single process does.
        self._before[HANG_UP] = signal.signal(HANG_UP, signal.SIG_IGN)
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()
        for rank in self.ranks:
            rank.pipe.close()
            if rank.output is not None:
                rank.output.close()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        if self.requests.note(number):
            self._limit()
        for rank in self.ranks:
            rank.process.send_signal(number)

    def _limit(self) -> None:
        self._deadline_s = min(self._deadline_s, time.monotonic() + END_S)

    def start(self, argv: Sequence[str], environment: dict[str, str]) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        # The first one writes to the terminal.
        output = tempfile.TemporaryFile() if self.ranks else None  # noqa: SIM115 (closed at the end of the context)
        # Look for modules where this process does.
        safe = [] if {"", os.getcwd()} & set(sys.path) else ["-P"]
        process = subprocess.Popen(
            [sys.executable, *safe, "-m", "fastssl.commands.rank", str(theirs.fileno()), *argv],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()
        self.ranks.append(_Rank(process, ours, output))
        if self.requests.signal:
            # It came while this one was started.
            process.send_signal(self.requests.signal)

    def wait(self) -> None:
        """Wait until all have ended, and see to it that they do once one has failed."""
        while any(code is None for code in [rank.poll() for rank in self.ranks]):
            if any(rank.report or rank.cause for rank in self.ranks):
                self._limit()
            if time.monotonic() >= self._deadline_s:
                self.kill()
            time.sleep(EVERY_S)

    def kill(self) -> None:
        for rank in self.ranks:
            if rank.poll() is None:
                rank.killed = True
                rank.process.kill()
                rank.process.wait()


def run(argv: Sequence[str], environments: Sequence[dict[str, str]]) -> int:
    """Run `fastssl pretrain` in several processes, show one error if there are any, and return its exit code.

    Args:
        argv: arguments of each process.
        environments: its environment, in the order of ranks, see `take_processes`.

    Raises:
        UserError: the one that the first failing process raised.
    """
    with _Ranks() as started:
        for environment in environments:
            # A Ctrl-C that came before does not reach those that are started now.
            if not started.requests.signal:
                started.start(argv, environment)
        if len(started.ranks) == len(environments):
            started.wait()
        started.kill()
        return _end(started.ranks, len(environments), started.requests.signal)


def _end(ranks: Sequence[_Rank], world: int, stopped_by: int) -> int:
    """Show how the run ended, if its first process has not, and return the exit code; `stopped_by`: the signal that it got, or 0."""
    codes = [rank.process.returncode for rank in ranks]
    if sys.stdout.isatty() and codes and codes[0] < 0:
        show_cursor()
    failed = [
        (rank.cause, i) for i, rank in enumerate(ranks) if rank.cause and not codes[i] == -stopped_by < 0
    ]
    if failed:
        number = min(failed)[1]
        return _tell(ranks[number], number, world)
    if not codes or codes[0] < 0 or (ranks[0].report and codes[0] == 128 + signal.SIGINT):
        print("fastssl: interrupted.", file=sys.stderr)
    return 128 + stopped_by if stopped_by and any(codes) else max(codes, default=0)


def _tell(rank: _Rank, number: int, world: int) -> int:
    """Print, or raise, how a process failed; return the exit code."""
    code, kind = rank.process.returncode, rank.report.get("kind")
    if kind == USER_ERROR:
        raise UserError(rank.report["text"])
    name = f"Process {number} of {world} (counted from 0)" if world > 1 else "The process of the run"
    if kind == CRASH:
        print(f"fastssl: {name} failed:\n{rank.report['text']}", end="", file=sys.stderr)
        return 1
    if number == 0 and code > 0:
        # It has the terminal, and has said why.
        return code
    how = f"ended with exit code {code}"
    if code < 0:
        memory = ", as the system does when memory runs out" if code == -signal.SIGKILL else ""
        how = f"was killed by {signal.Signals(-code).name}{memory}"
    others = ", and the others were ended" if world > 1 else ""
    print(
        f"fastssl: {name} {how}{others}: add --resume to continue from the last checkpoint.{rank.tail()}",
        file=sys.stderr,
    )
    return 128 - code if code < 0 else code
