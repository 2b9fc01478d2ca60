"""One process of a run that `fastssl.commands.local_ranks` started: `fastssl pretrain`, whose errors go to that parent."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
import traceback

from fastssl.commands.local_ranks import CRASH, INTERRUPTED, USER_ERROR

# So that it fits in the socket's buffer.
MOST_CHARS = 20_000


def main(argv: list[str]) -> int:
    """Run `fastssl pretrain` and return its exit code; a failure is reported as one line of JSON, not printed.

    Args:
        argv: the number of the open socket to the parent, then the arguments of `fastssl pretrain`.
    """
    parent = socket.socket(fileno=int(argv[0]))
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    code, kind, text = _run(argv[1:])
    if kind:
        report = {"kind": kind, "text": text[-MOST_CHARS:], "time_s": time.monotonic()}
        parent.sendall(json.dumps(report).encode() + b"\n")
    return code


def _end_with(parent: socket.socket) -> None:
    """Wait until the parent is gone, which closes its end even if it was killed, and end this process."""
    try:
        parent.recv(1)
    finally:
        os.kill(os.getpid(), signal.SIGKILL)


def _run(argv: list[str]) -> tuple[int, str, str]:
    """Return exit code, kind and text of the failure; the latter are empty where there was none."""
    try:
        from fastssl.commands.pretrain_command import run
        from shards.errors import UserError

        try:
            return run(argv), "", ""
        except UserError as error:
            return 2, USER_ERROR, str(error)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT, INTERRUPTED, ""
    except BrokenPipeError:
        return 141, INTERRUPTED, ""
    except Exception:
        return 1, CRASH, traceback.format_exc()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
