"""Output that cannot be written ends no run: a reader that is gone, a closed terminal, a full disk, letters it does not know."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any


class UnfailingStream:
    """A text stream that drops what cannot be written to the one it stands for, and writes unknown letters as escapes."""

    def __init__(self, stream: Any) -> None:
        """Stand for `stream`, an open text file; None, as where a process has no output, takes nothing."""
        self._stream = stream
        self.failed = False
        """Whether something was dropped."""

    def write(self, text: str) -> int:
        """Write as much as can be written."""
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            known = self._stream.encoding or "ascii"
            self.write(text.encode(known, "backslashreplace").decode(known))
        # A closed file raises ValueError, no file at all AttributeError.
        except (OSError, ValueError, AttributeError):
            self.failed = True
        return len(text)

    def flush(self) -> None:
        """Flush what can be."""
        try:
            self._stream.flush()
        except (OSError, ValueError, AttributeError):
            self.failed = True

    def isatty(self) -> bool:
        """Return whether it is a terminal, also one that is gone."""
        try:
            return self._stream.isatty()
        except (ValueError, AttributeError):
            return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def unfailing_output(*, ends_process: bool = False) -> Iterator[None]:
    """Let standard output and standard error fail nobody inside the context.

    Args:
        ends_process: the process ends after it: what is left in the buffers of a stream that has failed is thrown away, since Python
            would fail to write it on its way out.
    """
    before = sys.stdout, sys.stderr
    ours = [stream if isinstance(stream, UnfailingStream) else UnfailingStream(stream) for stream in before]
    sys.stdout, sys.stderr = ours  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        for stream in ours:
            stream.flush()
            if stream.failed and ends_process:
                with contextlib.suppress(OSError, ValueError, AttributeError):
                    nothing = os.open(os.devnull, os.O_WRONLY)
                    os.dup2(nothing, stream.fileno())
                    os.close(nothing)
        sys.stdout, sys.stderr = before
