"""Signals that ask a run to stop after the current step (within eight steps with several processes).

SIGUSR1 is what Slurm sends before a job's time ends, with `sbatch --signal=USR1@120`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# What a terminal sends when it is closed, such as by a lost connection: a run goes on, as under nohup.
HANG_UP = signal.SIGHUP
# torchrun, and `timeout`, forward a signal that the terminal or the scheduler has also sent to the workers: one request, not two.
GRACE_S = 1.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.2


class Requests:
    """Tell the second request to stop from the first. The SIGTERM that follows Slurm's warning is none: a save may be in progress."""

    def __init__(self) -> None:
        self.signal = 0
        """The signal that asked to stop; 0: none."""
        self._noted_s = 0.0

    def note(self, number: int) -> bool:
        """Note a signal of `STOPPING`, and return whether it is the second request, which ends the process at once."""
        if number == signal.SIGUSR1:
            self.signal = self.signal or number
        elif self.signal in (0, signal.SIGUSR1):
            self.signal, self._noted_s = number, time.monotonic()
        else:
            return time.monotonic() - self._noted_s > GRACE_S
        return False


class StopRequest:
    """A context in which SIGINT, SIGTERM and SIGUSR1 set `signal` instead of ending the process, and SIGHUP does nothing.

    A thread answers each at once, also while the main thread is inside a long operation, where Python runs no handlers.
    """

    exits = False
    """How a second SIGINT or SIGTERM ends a run. True, for the process of a command: at any moment, and without unwinding anything.
    False, for the caller's process: as if no context were there, so SIGINT raises KeyboardInterrupt after the operation at hand."""

    def __init__(self, say: Callable[[str], None] = lambda text: None, when: str = "after this step") -> None:
        """Prepare the context.

        Args:
            say: shows a line to the user; it is called in a thread.
            when: when the run will stop, as the line tells it.
        """
        self._say, self._when = say, when
        self._requests = Requests()
        self._before: dict[int, object] = {}
        self._close: Callable[[], None] = lambda: None

    @property
    def signal(self) -> int:
        """The signal that asked to stop; 0: none."""
        return self._requests.signal

    def __enter__(self) -> StopRequest:
        # Python allows handlers in the main thread only.
        if threading.current_thread() is threading.main_thread():
            self._watch()
            for number in STOPPING:
                self._before[number] = signal.signal(number, self._note)
            self._before[HANG_UP] = signal.signal(HANG_UP, signal.SIG_IGN)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
        self._close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._requests.note(number) and not self.exits:
            self._restore()
            os.kill(os.getpid(), number)

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _watch(self) -> None:
        """Let the C library's handler write each signal's number to a pipe, which a thread reads."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        thread = threading.Thread(target=self._answer, args=(reader,), name="signals", daemon=True)
        thread.start()

        def close() -> None:
            signal.set_wakeup_fd(before)
            os.close(writer)
            thread.join()

        self._close = close

    def _answer(self, reader: int) -> None:
        # Its own count: several signals of one kind are one for the main thread, if it was busy meanwhile.
        seen = Requests()
        with os.fdopen(reader, "rb", buffering=0) as pipe:
            while read := pipe.read(1):
                number, first = read[0], not seen.signal
                if number not in STOPPING:
                    continue
                if seen.note(number) and self.exits:
                    _exit(number)
                if first:
                    again = "" if number == signal.SIGUSR1 else "; again: at once, unsaved"
                    with contextlib.suppress(OSError):
                        self._say(f"Stopping {self._when}{again}")


def _exit(number: int) -> None:
    """End this process now, with the exit code of a shell for this signal, and leave the terminal as it was."""
    if sys.stdout is not None and sys.stdout.isatty():
        show_cursor()
    with contextlib.suppress(OSError):
        os.write(2, b"\nfastssl: interrupted.\n")
    os._exit(128 + number)


def show_cursor() -> None:
    """Show the terminal's cursor again, which a progress bar hides as long as it runs."""
    with contextlib.suppress(OSError):
        os.write(1, b"\x1b[?25h")
