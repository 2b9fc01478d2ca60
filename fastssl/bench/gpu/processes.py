"""Jobs as groups of processes, side by side and one after the other, all of which have ended before a given moment."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastssl.bench.gpu.stages import CheckJob

TOO_LONG, NO_TIME = 124, 125
LEAST_S = 15.0  # that a job is begun with
EVERY_S = 0.05
TERM_S, KILL_S = 3.0, 5.0  # for a group to end in, asked and forced


@dataclass(frozen=True)
class Ended:
    """How a job has ended."""

    job: CheckJob
    code: int
    """Exit code; -N by signal N; TOO_LONG; NO_TIME where it was not begun."""
    seconds: float

    @property
    def failed(self) -> str:
        """How it failed, or an empty text."""
        if self.code == 0 or (self.job.module == "pytest" and self.code == 5):  # 5: there was no test to run
            return ""
        known = {TOO_LONG: "took too long", NO_TIME: "not begun: no time was left"}
        return known.get(self.code, f"signal {-self.code}" if self.code < 0 else f"exit code {self.code}")


class Processes:
    """Starts jobs, and ends each with all that it has started."""

    def __init__(self, logs: Path, root: Path, until: float, more_env: Mapping[str, str]):
        """Prepare.

        Args:
            logs: folder for what each job prints, NAME.log.
            root: folder that they run in.
            until: moment of `time.monotonic` at which the last has ended.
            more_env: environment variables beside this process's own.
        """
        self._logs, self._root, self._until = logs, root, until
        path = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
        # A crash of native code then leaves its traceback in the log.
        own = {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", "PYTHONPATH": os.pathsep.join(path)}
        self._env = {**os.environ, **own, **more_env}

    def left_s(self) -> float:
        """Seconds until everything has to have ended."""
        return self._until - time.monotonic()

    def run(
        self, lanes: Sequence[Sequence[CheckJob]], limit_s: float, told: Callable[[Ended], None]
    ) -> list[Ended]:
        """Run lanes side by side, the jobs of each one after the other, for `limit_s` at most; `told` is called as each ends."""
        end = min(time.monotonic() + limit_s, self._until)
        waiting, running, ended = [list(lane) for lane in lanes], {}, []

        def over(job: CheckJob, code: int, began: float) -> None:
            ended.append(Ended(job, code, time.monotonic() - began))
            told(ended[-1])

        try:
            while any(waiting) or running:
                for number, lane in enumerate(waiting):
                    if lane and number not in running:
                        job, now = lane.pop(0), time.monotonic()
                        if end - now < LEAST_S:
                            over(job, NO_TIME, now)
                        else:
                            running[number] = (job, self._start(job), now)
                for number, (job, process, began) in list(running.items()):
                    code = process.poll()
                    if code is None and time.monotonic() >= end:
                        code = TOO_LONG
                    if code is not None:
                        end_group(process)
                        del running[number]
                        over(job, code, began)
                time.sleep(EVERY_S)
        finally:
            for _, process, _ in running.values():
                end_group(process)
        return ended

    def _start(self, job: CheckJob) -> subprocess.Popen:
        with open(self._logs / f"{job.name}.log", "wb") as log:
            log.write(f"$ {job.words}\n".encode())
            log.flush()
            command = [sys.executable, "-m", job.module, *job.argv]
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._env,
                cwd=self._root,
                start_new_session=True,
            )


def end_group(process: subprocess.Popen) -> None:
    """End a process that leads a group, and what is left of the group where it has ended already."""
    for kind, limit_s in ((signal.SIGTERM, TERM_S), (signal.SIGKILL, KILL_S)):
        try:
            os.killpg(process.pid, kind)
        except (ProcessLookupError, PermissionError):  # none is left
            break
        began = time.monotonic()
        while time.monotonic() - began < limit_s and _lives(process):
            time.sleep(EVERY_S)
        if not _lives(process):
            break
    process.poll()


def _lives(process: subprocess.Popen) -> bool:
    """Whether one of the group still runs; one that has ended and is not collected by its parent counts as ended."""
    process.poll()
    try:
        os.killpg(process.pid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return (
        any(_group(entry) == process.pid for entry in Path("/proc").glob("[0-9]*/stat"))
        if Path("/proc/self/stat").exists()
        else process.returncode is None
    )


def _group(stat: Path) -> int | None:
    """The process group in a file /proc/PID/stat; None for zombies and those that have just gone."""
    try:
        state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
    except (OSError, ValueError):
        return None
    return None if state == "Z" else int(group)


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Within, the signals that ask a process to end raise SystemExit, so that it ends its jobs first."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    kinds = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(kind, leave) for kind in kinds]
    try:
        yield
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)
