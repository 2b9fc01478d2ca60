"""`fastssl label SHARDS TABLE`: labels onto finished shards, in a table beside them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from shards.command_line import parse
from shards.terminal import wrapped
from shards.units import plural

if TYPE_CHECKING:  # imported where used: `fastssl --help` reads this file too
    from shards.conversion.labelling import Labelling


@dataclass(frozen=True)
class Label:
    """Label the samples of finished shards from a table, in SHARDS/labels.parquet; no tar is changed.

    A row names its sample by its key or its source, as in SHARDS/samples.parquet; the file name alone will do where only one sample
    has it. Labels are class names: known classes keep their number, new ones follow. Samples that the table does not name keep the
    label that they have. Two different labels for one sample are refused, and so is a key beside the source of another sample;
    nothing is written.
    """

    shards: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SHARDS")]
    """The folder that `fastssl shard` made."""
    table: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TABLE")]
    """The labels: .csv, .tsv or .parquet, one row a sample."""
    key_column: Annotated[str, tyro.conf.arg(metavar="NAME")] = ""
    """The column that names the samples by their keys. Without it and --source-column: a column 'key', 'source', 'path' or the
    like."""
    source_column: Annotated[str, tyro.conf.arg(metavar="NAME")] = ""
    """The column that names the samples by their sources, such as the path below the folder that was converted."""
    label_column: Annotated[str, tyro.conf.arg(metavar="NAME")] = ""
    """The column of the labels. Empty: 'label', 'class' or the like."""
    dry_run: bool = False
    """Say what would be done, and write nothing."""


def run(argv: Sequence[str] | None = None) -> None:
    """Parse the arguments after `fastssl label` and run it; UserError passes."""
    args = parse(Label, "fastssl label", argv, config=(tyro.conf.FlagCreatePairsOff,))
    from shards.conversion.labelling import label

    names = ("key_column", "source_column", "label_column", "dry_run")
    done = label(args.shards, args.table, **{name: getattr(args, name) for name in names})
    for line in sentences(args, done):
        print(wrapped(line, sys.stdout))


def sentences(args: Label, done: Labelling) -> list[str]:
    """What a table did, in a line for each thing that there is to say."""

    def some(names: list[str], count: int) -> str:
        return ", ".join(f"'{name}'" for name in names) + (" ..." if count > len(names) else "")

    verb = "would be labelled" if args.dry_run else "are labelled"
    lines = [
        f"{plural(done.labelled, 'sample')} of {args.shards} {verb} from {args.table}; {done.changed:,} change."
    ]
    if done.new_classes:
        lines.append(
            f"New classes: {len(done.new_classes):,}, {some(done.new_classes[:3], len(done.new_classes))}."
        )
    if done.unknown:
        lines.append(
            f"Names that are no sample's: {done.unknown:,}, {some(done.unknown_names, done.unknown)}. Refused images are in "
            "quarantine.jsonl."
        )
    if done.repeated:
        lines.append(f"Rows that repeat an earlier one: {done.repeated:,}.")
    if done.empty:
        lines.append(
            f"Rows without a label (an empty cell or NaN): {done.empty:,}; their samples keep what they have."
        )
    if done.without:
        lines.append(f"Samples without a label: {done.without:,}, {some(done.without_names, done.without)}.")
    return lines
