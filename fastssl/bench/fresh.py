"""Measure in a fresh process, which nothing else has warmed up or filled with memory."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from shards.conversion.workers import without_interrupts


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """Call `function` in a fresh process, which imports the function's module, and return its result.

    Raises:
        ChildProcessError: it ended without a result; the message is a clause, such as "ended with exit code 3".
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_send, args=(theirs, function, args))
    without_interrupts(process.start)
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        process.join()
        raise ChildProcessError(f"ended with exit code {process.exitcode}") from None
    except BaseException:
        process.kill()
        raise
    finally:
        process.join()


def _send(pipe: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    pipe.send(function(*args))
