"""The order in which the rows of a report are measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from fastssl.bench.report import Row
from fastssl.bench.screen import say_row

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")


def take_turns(
    turns: Sequence[int],
    items: Sequence[T],
    rows: Sequence[Row],
    measure: Callable[[int, T, Row], object],
    console: Console,
) -> None:
    """Measure every row once a turn, so that other work on the machine affects all rows alike; skip rows that have failed.

    Each figure is printed when it is known.

    Args:
        items: what each of `rows` measures.
        measure: called with the number of the turn, the item and its row.
    """
    for turn in turns:
        for item, row in zip(items, rows, strict=True):
            if not row.error:
                known = len(row.rates)
                measure(turn, item, row)
                if row.error or len(row.rates) > known:
                    say_row(console, row, f"{turn} of {turns[-1]}  ")
