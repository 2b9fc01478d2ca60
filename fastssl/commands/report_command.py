"""`fastssl report RUN [RUN ...] --out report.png`: draw the curves of runs from their metrics.jsonl."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from shards.command_line import parse
from shards.errors import UserError
from shards.storage.atomic_files import atomic_write, check_output

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

Rows = list[dict[str, Any]]


def _nothing(rows: Rows) -> dict[str, float]:
    return {}


def _one_is_chance(rows: Rows) -> dict[str, float]:
    return {"chance": 1.0}


def _one_key_of_n(rows: Rows) -> dict[str, float]:
    """`ce_norm` is ce / ln N."""
    log_n = next((row["ce"] / row["ce_norm"] for row in rows if row.get("ce") and row.get("ce_norm")), None)
    # A whole number, whatever the digits of the log.
    return {} if log_n is None else {"chance": 1 / round(math.exp(log_n))}


def _row_of_step_0(metric: str) -> Callable[[Rows], dict[str, float]]:
    def lines(rows: Rows) -> dict[str, float]:
        first = next((row for row in rows if row.get("step") == 0), {})
        found = {"chance": first.get("knn_chance"), "untrained": first.get(metric)}
        return {name: value for name, value in found.items() if value is not None}

    return lines


@dataclass(frozen=True)
class Panel:
    """How one metric is drawn."""

    title: str
    hint: str = ""
    percent: bool = False
    """Whether the metric is a share of 1, told in per cent."""
    least_top: float = 0.0
    """The axis reaches at least this, so that small changes look small."""
    lines: Callable[[Rows], dict[str, float]] = _nothing
    """Return the heights of horizontal lines by name, from the rows of a run."""


PANELS = {
    "loss": Panel("loss"),
    "ce_norm": Panel("cross-entropy / ln N", "it falls from chance", least_top=1.1, lines=_one_is_chance),
    "acc": Panel("contrastive accuracy", "queries that find their key", True, 0.1, _one_key_of_n),
    "knn_accuracy": Panel(
        "kNN accuracy", "labels that training never sees", True, 0.1, _row_of_step_0("knn_accuracy")
    ),
    "linear_accuracy": Panel(
        "accuracy of a linear classifier",
        "labels that training never sees",
        True,
        0.1,
        _row_of_step_0("linear_accuracy"),
    ),
    "feature_std": Panel("spread of the features", "a fall to 0 is collapse", least_top=1.1),
    "rank_me": Panel("rank of the features (RankMe)", "a fall is collapse"),
    "grad_norm": Panel("norm of the gradient", "before clipping"),
    "teacher_distance": Panel("distance of teacher and student", "share of the student's length", True, 0.01),
    "lr": Panel("learning rate"),
    "images_per_s": Panel("images/s"),
    "data_wait": Panel("waiting for data", "share of the time; near 0 is good", True, 0.2),
    "stand_ins": Panel("samples replaced by others", "they did not decode; per line of the log", least_top=1),
    "skipped": Panel("steps skipped", "not finite", least_top=1),
}
# Drawn only where there were some.
FAULTS = ("stand_ins", "skipped")
COLUMNS = 3
# Of runs in turn: the first wide and pale, those over it thinner and broken, so that equal curves are seen as several.
STYLES = ("-", (0, (4, 2.5)), (0, (1, 1.6)), (0, (6, 2, 1, 2)))


@dataclass(frozen=True)
class RunReport:
    """Draw the curves of runs in one PNG: whether they learn or collapse, and how fast they are."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Run folders (train.out)."""
    out: Annotated[str, tyro.conf.arg(metavar="FILE.png")] = "report.png"
    """PNG file to write."""


def run(argv: list[str]) -> int:
    """Run the command."""
    args = parse(RunReport, "fastssl report", argv)
    if not args.runs:
        raise UserError("Name at least one run folder: fastssl report RUN --out report.png")
    check_output(args.out, "--out")
    print(draw(args.runs, Path(args.out)))
    return 0


def read_metrics(run: str | Path) -> Rows:
    """Return the rows of a run's metrics.jsonl without an incomplete last line; raise UserError where there are none."""
    path = Path(run) / "metrics.jsonl"
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        raise UserError(f"'{run}' has no metrics.jsonl: give the folder of a run (its train.out).") from None
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    if not rows:
        raise UserError(f"'{path}' is empty: the run has not logged a step yet.")
    return rows


def draw(runs: tuple[str, ...], out: Path) -> Path:
    """Draw one panel per metric with one line per run against the epoch, and return `out`."""
    figure = curves({name: read_metrics(name) for name in runs})
    atomic_write(out, lambda file: figure.savefig(file, format="png", dpi=110))
    return out


def curves(runs: Mapping[str, Rows]) -> Figure:
    """Return the figure of the rows of some runs, by folder: a panel a metric, in the order of PANELS.

    Every axis starts at 0 and shows all epochs; the legend of a panel gives the last values and the lines to compare with.
    """
    from matplotlib.figure import Figure

    told = {
        name
        for rows in runs.values()
        for row in rows
        for name, value in row.items()
        if value or name not in FAULTS
    }
    shown = [name for name in PANELS if name in told]
    lines = -(-len(shown) // COLUMNS)
    head = 0.6 + 0.22 * -(-len(runs) // 2)
    height = 2.9 * lines + head
    figure = Figure(figsize=(4.4 * COLUMNS, height))
    axes = list(figure.subplots(lines, COLUMNS, squeeze=False).flat)
    for axis, metric in zip(axes, shown, strict=False):
        _panel(axis, metric, list(runs.values()))
    for axis in axes[len(shown) :]:
        axis.set_axis_off()
    figure.tight_layout(rect=(0, 0, 1, 1 - head / height))
    names = _names(runs)
    title = _short(("Run " if len(runs) == 1 else "Runs ") + ", ".join(names), 100, at_end=True)
    figure.text(0.015, 1 - 0.26 / height, title, fontsize=14, weight="bold", va="center")
    figure.legend(
        [_line(number, len(runs)) for number in range(len(runs))],
        [
            _short(f"{name}: epoch {rows[-1].get('epoch', 0):g}, step {rows[-1].get('step', 0):,}", 80)
            for name, rows in zip(names, runs.values(), strict=True)
        ],
        loc="upper left",
        bbox_to_anchor=(0.008, 1 - 0.4 / height),
        ncols=min(2, len(runs)),
        fontsize=9,
        frameon=False,
        handlelength=4,
    )
    return figure


def _line(number: int, of: int, points: int = 100) -> Line2D:
    """Return the line of run `number` of so many, without points on it yet."""
    from matplotlib.lines import Line2D

    return Line2D(
        [],
        [],
        color=f"C{number % 10}",
        linestyle=STYLES[number % len(STYLES)],
        linewidth=1.6 if of == 1 else max(1.5, 4.0 - 1.2 * number),
        alpha=0.5 if of > 1 and number == 0 else 1.0,
        marker="o" if points < 40 else None,
        markersize=3 if of == 1 else max(2.5, 7 - 2 * number),
    )


def _panel(axis: Axes, metric: str, runs: list[Rows]) -> None:
    """Draw a metric: a line a run with its last value, the lines to compare with, an axis from 0."""
    from matplotlib.ticker import FuncFormatter

    panel = PANELS[metric]
    # The runs that share a horizontal line, by its name and height.
    levels: dict[tuple[str, float], list[int]] = {}
    for number, rows in enumerate(runs):
        points = [(row["epoch"], row[metric]) for row in rows if metric in row]
        if points:
            line = _line(number, len(runs), len(points))
            line.set_data(*zip(*points, strict=True))
            line.set_label("last " + _told(points[-1][1], panel))
            axis.add_line(line)
            for name, value in panel.lines(rows).items():
                levels.setdefault((name, value), []).append(number)
    for (name, value), of in levels.items():
        axis.axhline(
            value,
            color=f"C{of[0] % 10}" if len(of) == 1 < len(runs) else "0.35",
            linestyle="--" if name == "untrained" else ":",
            linewidth=1.1,
            label=f"{name} {_told(value, panel)}",
        )
    drawn = [row[metric] for rows in runs for row in rows if metric in row] + [value for _, value in levels]
    axis.set_ylim(min(0.0, *drawn), max(1.08 * max(drawn), panel.least_top, 1e-12))
    axis.set_xlim(0, max(row.get("epoch", 0) for rows in runs for row in rows) or 1)
    axis.set_title(f"{panel.title}\n{panel.hint}" if panel.hint else panel.title, fontsize=9)
    axis.set_xlabel("epoch", fontsize=8)
    axis.tick_params(labelsize=8)
    if panel.percent:
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    axis.grid(alpha=0.25)
    axis.legend(fontsize=7, handlelength=3, framealpha=0.7)


def _told(value: float, panel: Panel) -> str:
    return f"{100 * value:.1f} %" if panel.percent else f"{value:,.4g}"


def _names(runs: Iterable[str]) -> list[str]:
    """Return the names of the folders, or the paths as they were given where two have one name."""
    last = [Path(run).resolve().name for run in runs]
    return [run if last.count(name) > 1 else name for run, name in zip(runs, last, strict=True)]


def _short(text: str, length: int, at_end: bool = False) -> str:
    """Return the text without what is too long: at its end, or at its start, since paths differ at their ends."""
    if len(text) > length:
        text = text[: length - 1] + "…" if at_end else "…" + text[1 - length :]
    # `$` would begin a formula.
    return text.replace("$", r"\$")
