"""What the tables of `fastssl bench` on the screen share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from fastssl.bench.report import NOT_INSTALLED, Row, brief
from shards.terminal import print_wrapped

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
    """Print the table, why some rows have no figure, what the columns mean, and the notes of the rows."""
    console.print(table)
    show_failures(console, rows)
    say(console, explanation)
    for row in rows:
        say(console, f"{row.name}: {row.note}.")


def show_failures(console: Console, rows: Iterable[Row]) -> None:
    """Print why each row without a figure has none."""
    for row in rows:
        if row.error:
            print_wrapped(console, reason(row), "yellow")


def reason(row: Row) -> str:
    """Return a sentence about a row without a figure."""
    if row.why_not == NOT_INSTALLED:
        return f"{row.name} is {row.error}"
    return f"{row.name} {'failed' if row.failure else 'was not measured'}: {row.error}"


def say_row(console: Console, row: Row, turn: str = "") -> None:
    """Print the figure of a row, the newest one of its turns where `turn` is given, or the reason why it has none."""
    if row.error:
        print_wrapped(console, reason(row), "yellow")
    elif rate := row.rates[-1] if turn and row.rates else row.images_per_s:
        print_wrapped(console, f"{turn}{row.name}: {brief(rate)} images/s")


class Stoppable:
    """Measure in this context: Ctrl-C ends the measurements, and what there is of them is kept."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self.stopped = False

    def __enter__(self) -> Stoppable:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        self.stopped = kind is not None and issubclass(kind, KeyboardInterrupt)
        if self.stopped:
            print_wrapped(self._console, "Stopped. This was measured until then:")
        return self.stopped


def say(console: Console, text: str) -> None:
    """Print a line of small print."""
    print_wrapped(console, text, "dim")


def say_written(console: Console, path: str) -> None:
    """Say where the results are, if they were written to a file."""
    if path:
        say(console, f"Written to {path}")
