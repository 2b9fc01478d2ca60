"""`fastssl shard SOURCE DEST`: converts images to shards, with progress and a closing summary."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from shards.command_line import parse
from shards.errors import UserError
from shards.images.policy import Policy
from shards.sources.source_options import SourceOptions
from shards.terminal import print_wrapped, shown
from shards.units import human_size, plural

if TYPE_CHECKING:  # imported where used: `fastssl --help` reads this file too
    from rich.console import Console

    from shards.format.layout import Manifest
    from shards.sources.source import Source
    from shards.storage.place import Place

_SHOWN_REASONS = 5
_LOOKED_AT = 1000  # files of DEST, to see whether it holds images


@dataclass(frozen=True)
class Shard:
    """Convert images to WebDataset shards.

    In a folder of images the folders directly below it become class labels, which pretraining does not need; docs/sources.md describes
    lists, tars and rasters. Every image is decoded once as a proof;
    broken ones are set aside and listed in DEST/quarantine.jsonl. The same command again finishes an interrupted conversion, with the
    same bytes.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A folder with images in it and below; a list (.csv, .tsv, .parquet); .parquet with the images inside; with --tile rasters; a
    .tar, 'x-*.tar' or a folder of tars; a finished shard folder. A path or a URL."""
    dest: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DEST")]
    """The folder for the shards: new, empty, or one to go on with."""
    seed: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """Decides the order of the samples in the shards."""
    workers: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Number of worker processes; 0: work in this process. None: one per CPU. With --engine ray: shards at a time, by default
    two per CPU."""
    engine: Literal["local", "ray"] = "local"
    """Where shards are made: in processes of this machine, or on all nodes of a running Ray cluster."""
    ray_address: Annotated[str, tyro.conf.arg(metavar="auto|HOST:PORT")] = "auto"
    """The Ray cluster; auto: the one that this machine is a node of."""
    samples_per_shard: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Images in one shard. None: 64 shards of 128 to 4096 images each."""
    dedupe: Literal["mark", "drop", "keep"] = "mark"
    """Images whose pixels equal those of an earlier one: marked in the sample table, left out, or kept unmarked."""
    policy: Policy = field(default_factory=Policy)
    options: Annotated[SourceOptions, tyro.conf.arg(name="")] = field(default_factory=SourceOptions)
    part: Annotated[str, tyro.conf.arg(metavar="I/N")] = ""
    """I/N: make every N-th shard, from the I-th on, and do not merge; for job arrays. The command without --part merges."""
    append: bool = False
    """Add the images to the finished shards in DEST, in new shards behind them. Ids of samples and numbers of classes stay."""


def run(argv: Sequence[str] | None = None) -> None:
    """Parse the arguments after `fastssl shard` and run it; UserError passes, Ctrl-C exits with 130."""
    paths = list(itertools.takewhile(lambda word: not word.startswith("-"), argv or ()))
    if len(paths) > 2:
        raise UserError(
            f"There are {len(paths)} paths, not SOURCE and DEST only. Put a pattern in quotes, so that the shell leaves it; of images "
            f"give the folder, '{os.path.dirname(paths[0]) or '.'}'."
        )
    args = parse(Shard, "fastssl shard", argv, config=(tyro.conf.OmitArgPrefixes,))
    try:
        shard(args)
    except KeyboardInterrupt:
        print("\nStopped. What is finished is kept; the same command goes on from there.")
        raise SystemExit(130) from None


def shard(args: Shard) -> None:
    """Run one conversion with progress on the screen."""
    try:
        _shard(args)
    except UserError as error:
        if not _swapped(args):
            raise
        raise UserError(
            f"{error} '{args.dest}' holds images: were SOURCE and DEST swapped? fastssl shard {shlex.quote(args.dest)} "
            f"{shlex.quote(args.source)}"
        ) from error


def _swapped(args: Shard) -> bool:
    """Whether DEST looks like a source and SOURCE like none, or like shards."""
    from shards.sources.file_set import IMAGE_SUFFIXES
    from shards.sources.shard_folder import is_shard_folder
    from shards.storage.opening import open_place

    source, dest = args.source, args.dest
    if "://" in source + dest or os.path.isfile(source) or not os.path.isdir(dest):
        return False
    if os.path.isdir(source) and os.listdir(source) and not is_shard_folder(open_place(source)):
        return False
    if is_shard_folder(open_place(dest)):
        return False
    names = itertools.islice(open_place(dest).walk(), _LOOKED_AT)
    return any(name.lower().endswith(IMAGE_SUFFIXES) for name, _ in names)


def _shard(args: Shard) -> None:
    from rich.console import Console

    from shards.commands.progress import ConversionScreen
    from shards.conversion.convert import Part, convert
    from shards.format.layout import MANIFEST, SPLITS, Manifest
    from shards.sources.source_kinds import open_source
    from shards.storage.opening import open_place

    console = Console(highlight=False, soft_wrap=True)
    dest = open_place(args.dest)
    source = open_source(args.source, args.options)
    part = Part.parse(args.part) if args.part else None
    if args.engine != "ray" and args.ray_address != "auto":
        raise UserError(f"--ray-address {args.ray_address} goes with --engine ray.")
    before = Manifest.load(dest) if dest.exists(MANIFEST) else None
    start_s = time.monotonic()
    with ConversionScreen(console, args.source, args.policy) as screen:
        manifest = convert(
            source,
            dest,
            seed=args.seed,
            workers=args.workers,
            samples_per_shard=args.samples_per_shard,
            policy=args.policy,
            dedupe=args.dedupe,
            part=part,
            append=args.append,
            ray_address=args.ray_address if args.engine == "ray" else None,
            report=screen,
        )
    if manifest is None:
        print_wrapped(
            console,
            f"Part {args.part} is done. When all parts are, the same command without --part merges them.",
        )
    elif screen.num_shards == 0 and before == manifest:
        found = f"{plural(manifest.num_samples, source.noun)} in {plural(len(manifest.shards), 'shard')}"
        print_wrapped(console, f"{args.dest} is complete: {found}. Nothing to do.")
    else:
        _print_summary(console, dest, manifest, source, screen.num_converted, time.monotonic() - start_s)
        if args.append and dest.exists(SPLITS):
            again = f"`fastssl split {shlex.quote(args.dest)} ... --overwrite` divides all of them."
            print_wrapped(console, f"The new images are in no split yet: {again}")
    if manifest is not None:
        console.print(f"next: fastssl inspect {shlex.quote(args.dest)} --out overview.png", markup=False)
        console.print(f"      fastssl pretrain --data.shards {shlex.quote(args.dest)}", markup=False)


def _print_summary(
    console: Console, dest: Place, manifest: Manifest, source: Source, num_converted: int, duration_s: float
) -> None:
    from rich.table import Table
    from rich.text import Text

    from shards.format import layout
    from shards.overview.label_conflicts import label_conflicts
    from shards.overview.mask_shares import mask_shares

    noun = source.noun
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column()
    table.add_row(f"{noun}s", f"{manifest.num_samples:,}")
    if manifest.dtypes != ["uint8"] or not set(manifest.channels) <= {1, 3}:
        table.add_row("channels", f"{', '.join(map(str, manifest.channels))} of {', '.join(manifest.dtypes)}")
    labelled, num_marked = _labels(dest)
    partly = f", {labelled:,} of {manifest.num_samples:,} labelled" if labelled < manifest.num_samples else ""
    table.add_row("classes", f"{len(manifest.classes):,}{partly}" if manifest.classes else "none: no labels")
    if manifest.num_masks:
        table.add_row("masks", f"{manifest.num_masks:,}")
    table.add_row("shards", f"{len(manifest.shards):,}")
    table.add_row("size", human_size(manifest.bytes))
    for name, count in changes(dest).most_common(_SHOWN_REASONS):
        table.add_row(Text(name.partition(":")[0]), Text(f"{count:,}:{name.partition(':')[2]}"))
    if manifest.num_duplicates:
        table.add_row("duplicates", f"{manifest.num_duplicates:,}, {fate(manifest, num_marked)}")
    table.add_row("quarantined", f"{manifest.num_quarantined:,}" if manifest.num_quarantined else "none")
    for reason, count in reasons(dest).most_common(_SHOWN_REASONS):
        table.add_row("", Text(shown(f"{count:,}: {reason}")))
    if left_out := source.left_out():
        table.add_row("left out", Text(shown(left_out)))
    speed = f", {num_converted / max(duration_s, 1e-9):,.0f} {noun}s/s" if num_converted else ""
    table.add_row("time", f"{duration_s:,.1f} s{speed}")
    # Paths stand outside of the table, which would cut them.
    console.print(dest.url, style="bold", markup=False)
    console.print(table)
    if text := label_conflicts(dest, manifest):
        print_wrapped(console, f"Warning: {text}", "yellow")
    for text in mask_shares(dest, manifest).warnings():
        print_wrapped(console, f"Warning: {text}", "yellow")
    if manifest.num_quarantined:
        print_wrapped(console, f"Quarantined {noun}s are listed in {dest / layout.QUARANTINE}")


def fate(manifest: Manifest, num_marked: int) -> str:
    """Return what became of the duplicates, of which appended ones may be left out where earlier ones are marked."""
    num_dropped = manifest.num_duplicates - num_marked
    if num_marked and num_dropped:
        return f"{num_marked:,} marked and {num_dropped:,} left out"
    return "left out" if num_dropped else "marked in the table"


def _labels(dest: Place) -> tuple[int, int]:
    """How many samples have a label, and how many are marked as duplicates."""
    from shards.format.columns import read_columns
    from shards.format.layout import TABLE

    with dest.open(TABLE) as file:
        table = read_columns(file, ["label", "duplicate_of"])
    return tuple(len(column) - column.null_count for column in table.columns)


def changes(dest: Place) -> Counter[str]:
    """How many images were stored in which way, other than plainly kept, by the words of the table's `stored`."""
    from shards.format.columns import read_columns
    from shards.format.layout import TABLE

    with dest.open(TABLE) as file:
        counts = read_columns(file, ["stored"])["stored"].value_counts().to_pylist()
    return Counter({row["values"]: row["counts"] for row in counts if row["values"] != "kept"})


def reasons(dest: Place) -> Counter[str]:
    """How many images were refused for which reason; what stands in brackets and the numbers differ for each and are left out."""
    from shards.conversion.merge import quarantine

    return Counter(
        re.sub(r"\s*\([^)]*\)|\d+ x \d+ |'[^']*' ", "", bad["reason"]).strip() for bad in quarantine(dest)
    )
