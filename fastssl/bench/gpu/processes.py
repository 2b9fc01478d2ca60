"""Run jobs as groups of processes, side by side and one after the other, all of them ended before a deadline."""

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
# A job is not begun with less time left than this.
LEAST_S = 15.0
EVERY_S = 0.05
# Time for a group to end after SIGTERM and after SIGKILL.
TERM_S, KILL_S = 3.0, 5.0


@dataclass(frozen=True)
class Ended:
    """The end of a job: exit code and seconds."""

    job: CheckJob
    code: int
    """Exit code; -N after signal N; TOO_LONG; NO_TIME if it was not begun."""
    seconds: float

    @property
    def failed(self) -> str:
        """How the job failed; empty if it did not."""
        # pytest exits with 5 if there was no test to run.
        if self.code == 0 or (self.job.module == "pytest" and self.code == 5):
            return ""
        known = {TOO_LONG: "took too long", NO_TIME: "not begun: no time was left"}
        return known.get(self.code, f"signal {-self.code}" if self.code < 0 else f"exit code {self.code}")


class Processes:
    """Start jobs, and end each with all processes that it has started."""

    def __init__(self, logs: Path, root: Path, until: float, more_env: Mapping[str, str]):
        """Prepare the environment of the jobs.

        Args:
            logs: folder for the output of each job, NAME.log.
            root: working folder of the jobs.
            until: deadline, in seconds of `time.monotonic`.
            more_env: environment variables in addition to this process's own.
        """
        self._logs, self._root, self._until = logs, root, until
        path = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
        # A crash of native code then leaves its traceback in the log.
        own = {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", "PYTHONPATH": os.pathsep.join(path)}
        self._env = {**os.environ, **own, **more_env}

    def left_s(self) -> float:
        """Return the seconds until the deadline."""
        return self._until - time.monotonic()

    def run(
        self, lanes: Sequence[Sequence[CheckJob]], limit_s: float, told: Callable[[Ended], None]
    ) -> list[Ended]:
        """Run lanes side by side, the jobs of a lane one after the other, for at most `limit_s`; call `told` as each ends."""
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
    """End a process that leads a group, with all processes of the group, even if the leader has ended already."""
    for kind, limit_s in ((signal.SIGTERM, TERM_S), (signal.SIGKILL, KILL_S)):
        try:
            os.killpg(process.pid, kind)
        except (ProcessLookupError, PermissionError):
            # No process is left.
            break
        began = time.monotonic()
        while time.monotonic() - began < limit_s and _lives(process):
            time.sleep(EVERY_S)
        if not _lives(process):
            break
    process.poll()


def _lives(process: subprocess.Popen) -> bool:
    """Return whether a process of the group still runs; a zombie counts as ended."""
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
    """Return the process group in a file /proc/PID/stat; None for zombies and processes that have just ended."""
    try:
        state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
    except (OSError, ValueError):
        return None
    return None if state == "Z" else int(group)


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise SystemExit inside the context, so that the process ends its jobs first."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    kinds = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(kind, leave) for kind in kinds]
    try:
        yield
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)
