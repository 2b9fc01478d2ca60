"""The order in which the rows of a report are measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from fastssl.bench.report import Row

T = TypeVar("T")


def take_turns(
    turns: Iterable[int], items: Sequence[T], rows: Sequence[Row], measure: Callable[[int, T, Row], object]
) -> None:
    """Measure every row once a turn, so that other work on the machine affects all rows alike; skip rows that have failed.

    Args:
        items: what each of `rows` measures.
        measure: called with the number of the turn, the item and its row.
    """
    for turn in turns:
        for item, row in zip(items, rows, strict=True):
            if not row.error:
                measure(turn, item, row)
