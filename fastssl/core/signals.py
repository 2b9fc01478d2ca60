"""Signals that ask a run to stop after the current step (within eight steps with several processes).

SIGUSR1 is what Slurm sends before a job's time ends, with `sbatch --signal=USR1@120`.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType

# torchrun forwards a signal that the scheduler or the terminal has also sent to its workers: that is one request, not two.
GRACE_S = 1.0


class StopRequest:
    """A context in which SIGINT, SIGTERM and SIGUSR1 set `signal` instead of ending the process.

    A second SIGINT or SIGTERM ends it at once. The SIGTERM that follows Slurm's warning does not count: a save may be in progress.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._noted_s = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        # Python allows handlers in the main thread only.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self.signal = self.signal or number
        elif self.signal in (0, signal.SIGUSR1):
            self.signal, self._noted_s = number, time.monotonic()
        elif time.monotonic() - self._noted_s > GRACE_S:
            self._restore()
            os.kill(os.getpid(), number)

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
