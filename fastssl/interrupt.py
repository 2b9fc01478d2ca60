"""Ctrl-C and SIGTERM ask a run to stop after the step at hand (several processes: within eight steps); a later one at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType

# torchrun passes on a signal that the scheduler or the terminal has sent to its workers as well: that is one request, not two.
GRACE_S = 1.0


class StopRequest:
    """A context in which SIGINT and SIGTERM set `signal` instead of ending the process; the second one does."""

    def __init__(self) -> None:
        self.signal = 0
        self._noted_s = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.signal:
            self.signal, self._noted_s = number, time.monotonic()
        elif time.monotonic() - self._noted_s > GRACE_S:
            self._restore()
            os.kill(os.getpid(), number)

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
