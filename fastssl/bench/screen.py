"""What the tables of `fastssl bench` on the screen share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from fastssl.bench.report import Row

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def make_table(title: str, first: str, figures: Iterable[str], last: str = "") -> Table:
    """Return a table whose first column holds names, followed by columns of figures and, if named, a last column of text."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True)
    for name in figures:
        table.add_column(name, justify="right", no_wrap=True)
    if last:
        table.add_column(last, no_wrap=True)
    return table


def show(console: Console, table: Table, rows: Sequence[Row], explanation: str) -> None:
    """Print the table, why some rows have no figure, what the columns mean, and the numbered notes of the rows."""
    console.print(table)
    show_failures(console, rows)
    say(console, explanation)
    for number, row in enumerate(rows, 1):
        say(console, f"{number} {row.note}.")


def show_failures(console: Console, rows: Iterable[Row]) -> None:
    """Print why each row without a figure has none."""
    for row in rows:
        if row.error:
            console.print(f"{row.name} could not be measured: {row.error}", style="yellow", markup=False)


def say(console: Console, text: str) -> None:
    """Print a line of small print."""
    console.print(text, style="dim", markup=False)


def say_written(console: Console, path: str) -> None:
    """Say where the results are, if they were written to a file."""
    if path:
        console.print(f"[dim]Written to {path}[/]")
