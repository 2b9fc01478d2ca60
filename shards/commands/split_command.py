"""`fastssl split SHARDS`: train, val, test and label fractions of one shard folder, as a table beside it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from shards.command_line import parse
from shards.errors import UserError
from shards.terminal import print_wrapped, shown

if TYPE_CHECKING:  # imported where used: the help reads this file too
    import numpy as np
    from rich.console import Console

    from shards.splits.split_rules import Division, SplitRule

_SHOWN_CLASSES = 20


@dataclass(frozen=True)
class Split:
    """Divide a shard folder into train, val, test and nested label fractions, in SHARDS/splits.parquet.

    Where an image goes is decided by a hash of the seed and its name, so it hardly moves when images are added. Images with the
    same pixels and images of one group always stay together. `fastssl pretrain ... --data.split train` and
    `fastssl eval knn ... --split train --test-split val` use what this makes.
    """

    shards: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SHARDS")]
    """The folder that `fastssl shard` made."""
    val: Annotated[float, tyro.conf.arg(metavar="SHARE")] = 0.0
    """Share of the images for val, such as 0.1."""
    test: Annotated[float, tyro.conf.arg(metavar="SHARE")] = 0.0
    """Share of the images for test. The rest is train."""
    labelled: Annotated[str, tyro.conf.arg(metavar="SHARES")] = ""
    """Shares of train's labelled images, with commas: 0.01,0.1 makes labelled-0.01 inside labelled-0.1, each class by its share and
    with at least one image."""
    group_by: Annotated[str, tyro.conf.arg(metavar="COLUMN|REGEX")] = ""
    """What must stay together, such as the tiles of a scene: a column of samples.parquet, or a regular expression on the names, whose
    part in round brackets names the group: '^(.+)_r[0-9]+_c[0-9]+'. Empty: the column 'group', where it has values; none: nothing."""
    stratify: Annotated[str, tyro.conf.arg(metavar="COLUMN")] = ""
    """Give val and test their share of each value of this column; label for the classes. A group counts by its most frequent value."""
    method: Literal["exact", "stable"] = "exact"
    """exact: as close to the shares as the groups allow; few images change sides when images are added. stable: no image ever does,
    because each group's name alone decides, and the shares are met on average."""
    by_list: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE")] = ()
    """Files with the names of images, a line each, instead of shares: train.txt makes the split train, dev=names.txt the split dev."""
    seed: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """Another seed, another division."""
    name: Annotated[str, tyro.conf.arg(metavar="NAME")] = "default"
    """Several divisions can lie side by side; the parts of one that is not the default are called NAME/train."""
    overwrite: bool = False
    """Put this division in the place of another one of the same name."""


def run(argv: Sequence[str] | None = None) -> None:
    """Parse the arguments after `fastssl split` and run it; UserError passes."""
    args = parse(Split, "fastssl split", argv)
    from rich.console import Console

    from shards.splits.split_rules import SplitRule
    from shards.splits.split_table import split
    from shards.storage.opening import open_place

    rule = SplitRule(
        val=args.val,
        test=args.test,
        labelled=_shares(args.labelled),
        group_by=args.group_by,
        stratify=args.stratify,
        exact=args.method == "exact",
        seed=args.seed,
        lists=args.by_list,
    )
    place = open_place(args.shards)
    made = split(place, rule, args.name, overwrite=args.overwrite)
    console = Console(highlight=False)
    _show(console, args, rule, made)


def _shares(text: str) -> tuple[float, ...]:
    """Shares with commas between them, `0.01,0.1` or `1%,10%`, ascending."""
    shares = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        try:
            shares.append(float(part.removesuffix("%")) / (100 if part.endswith("%") else 1))
        except ValueError:
            raise UserError(
                f"--labelled '{text}': '{part}' is no number; give shares with commas, such as 0.01,0.1."
            ) from None
    return tuple(sorted(shares))


def _show(console: Console, args: Split, rule: SplitRule, made: Division) -> None:
    import numpy as np
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from shards.format import layout
    from shards.format.label_table import read_labels
    from shards.format.layout import Manifest
    from shards.splits.split_rules import fraction_name
    from shards.splits.split_table import DEFAULT
    from shards.storage.opening import open_place

    place = open_place(args.shards)
    classes = read_labels(place, Manifest.load(place)).classes
    prefix = "" if args.name == DEFAULT else f"{args.name}/"
    parts: dict[str, np.ndarray] = {name: made.sides == i for i, name in enumerate(made.names)}
    parts = {name: inside for name, inside in parts.items() if inside.any()}
    if (made.sides < 0).any():
        parts["in none"] = made.sides < 0
    parts |= {fraction_name(share): made.fractions <= share for share in rule.labelled}
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for name in parts:
        table.add_column(Text(shown(name)), justify="right")
    table.add_row("images", *(f"{int(inside.sum()):,}" for inside in parts.values()), style="bold")
    groups = [len(np.unique(made.groups[inside])) for inside in parts.values()]
    table.add_row("groups", *(f"{num:,}" for num in groups))
    counts = [
        np.bincount(made.labels[inside & (made.labels >= 0)], minlength=len(classes))
        for inside in parts.values()
    ]
    for i, name in enumerate(classes[:_SHOWN_CLASSES]):
        table.add_row(Text(shown(name)), *(f"{count[i]:,}" for count in counts), style="dim")
    unlabelled = [int((inside & (made.labels < 0)).sum()) for inside in parts.values()]
    if classes and any(unlabelled):
        table.add_row("no label", *(f"{num:,}" for num in unlabelled), style="dim")
    # Above the table, whose title would break within a long path.
    where = place / layout.SPLITS + (f", {prefix}..." if prefix else "")
    console.print(where, style="italic", markup=False, soft_wrap=True)
    console.print(table)
    if len(classes) > _SHOWN_CLASSES:
        print_wrapped(console, f"{len(classes) - _SHOWN_CLASSES:,} more classes are not shown.")
    for note in made.notes:
        print_wrapped(console, note)
    if "train" in made.names:
        console.print(
            f"next: fastssl pretrain --data.shards {shlex.quote(args.shards)} --data.split {shlex.quote(prefix + 'train')}",
            markup=False,
            soft_wrap=True,
        )
