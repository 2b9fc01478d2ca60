"""`fastssl report RUN [RUN ...] --out report.png`: draw the curves of runs from their metrics.jsonl."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from shards.command_line import parse
from shards.errors import UserError
from shards.storage.atomic_files import atomic_write, check_output

# Metric: (title, how to read it).
PANELS = {
    "ce_norm": ("cross-entropy / ln N", "1 is chance"),
    "acc": ("contrastive accuracy", "share of queries that find their key"),
    "feature_std": ("spread of the features", "a fall to 0 is collapse"),
    "rank_me": ("rank of the features (RankMe)", "a fall is collapse"),
    "knn_accuracy": ("kNN accuracy", "labels that training never sees"),
    "linear_accuracy": ("accuracy of a linear classifier", "labels that training never sees"),
    "grad_norm": ("norm of the gradient", "before clipping"),
    "teacher_distance": ("distance of teacher and student", "share of the student's length"),
    "lr": ("learning rate", ""),
    "images_per_s": ("images/s", ""),
    "stand_ins": ("samples replaced by others", "they did not decode; per line of the log"),
    "skipped": ("steps skipped", "not finite"),
}
# Drawn only where there were some.
FAULTS = ("stand_ins", "skipped")


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


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
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
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    logs = {name: read_metrics(name) for name in runs}
    told = {
        name
        for rows in logs.values()
        for row in rows
        for name, value in row.items()
        if value or name not in FAULTS
    }
    shown = [name for name in PANELS if name in told]
    columns = 3
    lines = -(-len(shown) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(4 * columns, 2.9 * lines), squeeze=False)
    for axis, metric in zip(axes.flat, shown, strict=False):
        title, hint = PANELS[metric]
        for name, rows in logs.items():
            points = [(row["epoch"], row[metric]) for row in rows if metric in row]
            axis.plot(
                *zip(*points, strict=True), marker="o" if len(points) < 40 else None, markersize=3, label=name
            )
        axis.set_title(f"{title}\n{hint}" if hint else title, fontsize=9)
        axis.set_xlabel("epoch", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
    for axis in list(axes.flat)[len(shown) :]:
        axis.set_axis_off()
    if len(logs) > 1:
        axes.flat[0].legend(fontsize=7)
    figure.tight_layout()
    atomic_write(out, lambda file: figure.savefig(file, format="png", dpi=110))
    pyplot.close(figure)
    return out
