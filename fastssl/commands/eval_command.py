"""`fastssl eval knn CHECKPOINT --shards LABELLED`: the command around `fastssl.evaluate_knn`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from shards.command_line import File, Name, SeveralShards, parse
from shards.errors import UserError, nearest
from shards.storage.atomic_files import atomic_write, check_output
from shards.terminal import print_wrapped, shown

TESTS = ("knn",)


@dataclass(frozen=True)
class EvalKNN:
    """Classify labelled images by their nearest neighbours in feature space (DINO's weighted kNN, T = 0.07).

    Raw pixels and the same backbone before training are measured, too: what the checkpoint has learned is the difference.
    """

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A .pt file, or the folder of a run (its newest checkpoint is taken)."""
    shards: SeveralShards
    """Labelled shards whose samples vote; of several folders the classes are joined by name."""
    test_shards: SeveralShards = ()
    """Labelled shards to classify. None: each sample of --shards is classified by all the others (leave one out) or, where the shards
    know groups, such as scenes, by those of other groups."""
    split: Name = ""
    """Split of --shards whose samples vote (`fastssl split`), such as train or labelled-0.01; empty: all."""
    test_split: Name = ""
    """Split to classify, such as val: of --test-shards, or where there are none of --shards."""
    ks: tuple[int, ...] = (10, 20, 100, 200)
    """Numbers of neighbours; clamped to the number there are."""
    max_samples: int = 0
    """Samples used of each shard set; 0: all."""
    baselines: bool = True
    """Also measure raw pixels and the untrained backbone."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""
    json: File = ""
    """Also write the results to this JSON file."""


def run(argv: list[str]) -> int:
    """Run the command."""
    if argv and argv[0] in ("-h", "--help"):
        print(
            "usage: fastssl eval knn CHECKPOINT --shards SHARDS [options]\n\n"
            "`fastssl eval knn --help` explains the options."
        )
        return 0
    if not argv:
        raise UserError(
            "Give the test and what to test: fastssl eval knn CHECKPOINT --shards LABELLED (fastssl eval --help)."
        )
    if argv[0] not in TESTS:
        raise UserError(f"There is no test '{argv[0]}'.{nearest(argv[0], TESTS)}")
    args = parse(EvalKNN, "fastssl eval knn", argv[1:], config=(tyro.conf.FlagConversionOff,))
    if args.json:
        check_output(args.json, "--json")
    if not args.shards:
        raise UserError("--shards names no folder: give the labelled shards whose samples vote.")
    from fastssl.core.checkpoint import find_checkpoint

    checkpoint = find_checkpoint(Path(args.checkpoint))
    from rich.console import Console
    from rich.progress import Progress

    with Progress(transient=True) as bar:
        task = bar.add_task("")

        def progress(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        from fastssl.commands.evaluate_checkpoint import evaluate_knn
        from shards.splits.split_table import open_mix

        test = args.test_shards or (args.shards if args.test_split else ())
        report = evaluate_knn(
            checkpoint,
            open_mix(args.shards, args.split),
            open_mix(test, args.test_split) if test else None,
            ks=args.ks,
            max_samples=args.max_samples,
            baselines=args.baselines,
            device=args.device,
            progress=progress,
        )
    print_knn(report, Console(highlight=False))
    if args.json:
        atomic_write(args.json, (json.dumps(report, indent=1) + "\n").encode())
    return 0


def print_knn(report: dict[str, Any], console: Any) -> None:
    """Print the report of `evaluate_knn` as two tables: by number of neighbours, and by class."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"kNN accuracy, {report['queries']}", title_justify="left")
    table.add_column("features")
    ks = list(report["rows"][0]["accuracy"])
    for k in ks:
        table.add_column(f"k = {k}", justify="right")
    for row in report["rows"]:
        table.add_row(row["features"], *(f"{row['accuracy'][k]:.1%}" for k in ks))
    console.print(table)

    listed = report["classes"][:30]
    by_class = Table(title=f"By class, k = {report['rows'][0]['per_class_k']}", title_justify="left")
    by_class.add_column("class")
    for row in report["rows"]:
        by_class.add_column(row["features"].split(", ")[-1], justify="right")
    for name in listed:
        shares = (row["per_class"][name] for row in report["rows"])
        by_class.add_row(Text(shown(name)), *("-" if share is None else f"{share:.1%}" for share in shares))
    console.print(by_class)
    if len(listed) < len(report["classes"]):
        print_wrapped(
            console, f"{len(report['classes']) - len(listed)} more classes: --json writes them all."
        )
