"""Keep a benchmark going when one measurement fails: its row holds the error, and the others are measured."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from fastssl.bench.report import Row, error_line
from shards.errors import UserError

T = TypeVar("T")

ABSENT = (UserError, NotImplementedError, ImportError)
"""Errors that mean 'cannot run here'; any other is a failure, for which the command exits with code 1."""


class Guard:
    """Run the measurements of one process.

    After a CUDA error other than a lack of memory the device no longer works in the process: later rows are not tried, and say so.
    """

    def __init__(self, device: Any, no_memory: str):
        """`device`: a torch.device or its name; `no_memory`: the error of a row that lacks memory, with the way out."""
        self._device, self._no_memory = str(device), no_memory
        self.lost = ""
        """Reason why nothing more can be measured in this process; empty while the device works."""

    def run(self, rows: Iterable[Row], measure: Callable[[], T]) -> T | None:
        """Return the result of `measure`; if it fails, write the reason into each of `rows` and return None.

        The traceback of a failure goes to standard error.
        """
        if self.lost:
            for row in rows:
                row.fail(self.lost, failure=True)
            return None
        try:
            return measure()
        except Exception as error:
            # Others' code fails in its own ways, and a failure must stay in the table.
            failure = not isinstance(error, ABSENT)
            if failure:
                traceback.print_exc()
            told = self._told(error)
        # The traceback kept the failed measurement's tensors alive until here.
        broken = self._free() if failure else ""
        names = []
        for row in rows:
            row.fail(told, failure=failure)
            names.append(row.name)
        if broken:
            self.lost = (
                f"not tried: after '{names[0] if names else 'a measurement'}' the device no longer works in this process ({broken}); "
                "measure this in another one"
            )
        return None

    def _told(self, error: Exception) -> str:
        if isinstance(error, UserError):
            return str(error)
        if out_of_memory(error):
            return f"{self._no_memory} ({error_line(error)})"
        return error_line(error)

    def _free(self) -> str:
        """Free what a failure has left on the GPU; return why the GPU no longer works, or an empty text."""
        import torch

        gc.collect()
        if not self._device.startswith("cuda"):
            return ""
        try:
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()
            torch.ones(1, device=self._device).item()
        except RuntimeError as error:
            return error_line(error)
        return ""


def out_of_memory(error: Exception) -> bool:
    """Return whether an error is a lack of memory, of the device or the host."""
    from fastssl.core.out_of_memory import is_out_of_memory

    return isinstance(error, MemoryError) or is_out_of_memory(error)


def exit_code(rows: Iterable[Row], *, stopped: bool = False) -> int:
    """Return 130 if Ctrl-C stopped the measurements, 1 if that of a row failed, 0 if all rows ran or cannot run here."""
    return 130 if stopped else int(any(row.failure for row in rows))
