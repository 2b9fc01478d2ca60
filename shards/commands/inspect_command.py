"""`fastssl inspect SHARDS`: counts, classes, sizes, channels, bytes, duplicates and quarantine as tables, and one picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from shards.command_line import parse
from shards.terminal import print_wrapped, shown
from shards.units import human_size

if TYPE_CHECKING:  # imported where used: `fastssl --help` reads this file too
    from rich.console import Console

    from shards.overview.summary import Overview
    from shards.storage.place import Place

_SHOWN = 8
MAX_SAMPLES = 128


@dataclass(frozen=True)
class Inspect:
    """Show what shards hold: counts, classes, sizes, formats, channel statistics, duplicates, what was refused.

    With --out, a picture too: samples drawn at random with their labels and masks (--no-masks: without), above histograms.
    """

    shards: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SHARDS")]
    """The folder that `fastssl shard` made."""
    out: Annotated[str, tyro.conf.arg(metavar="FILE.png")] = ""
    """Draw the picture to this file."""
    samples: Annotated[int, tyro.conf.arg(metavar="N")] = 32
    """Samples in the picture, 1 to 128."""
    seed: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """Which samples are drawn."""
    masks: bool = True
    """Draw the masks of samples that have one."""


def run(argv: Sequence[str] | None = None) -> None:
    """Parse the arguments after `fastssl inspect` and run it. UserError passes."""
    inspect_command(parse(Inspect, "fastssl inspect", argv))


def inspect_command(args: Inspect) -> None:
    """Print the tables, and draw the picture where one is wanted."""
    from rich.console import Console

    from shards.errors import UserError
    from shards.overview.contact_sheet import draw_overview
    from shards.overview.summary import inspect
    from shards.storage.atomic_files import atomic_write, check_output
    from shards.storage.opening import open_place

    if not 1 <= args.samples <= MAX_SAMPLES:
        raise UserError(f"--samples is {args.samples}, but it must be between 1 and {MAX_SAMPLES}.")
    if args.out:
        if not args.out.lower().endswith(".png"):
            raise UserError(f"--out '{args.out}' must end in .png: a PNG is drawn.")
        check_output(args.out, "--out")
    place = open_place(args.shards)
    overview = inspect(place)
    console = Console(highlight=False, soft_wrap=True)
    _print(console, place, overview)
    if args.out:
        atomic_write(
            args.out, lambda file: draw_overview(place, overview, args.samples, args.seed, file, args.masks)
        )
        print_wrapped(console, f"Drawn: {args.out}")


def _print(console: Console, place: Place, overview: Overview) -> None:
    from shards.commands.shard_command import reasons
    from shards.overview.label_conflicts import label_conflicts
    from shards.overview.summary import PERCENTILES

    manifest = overview.manifest
    facts = [
        ("samples", f"{manifest.num_samples:,}"),
        ("shards", f"{len(manifest.shards):,}, {human_size(manifest.bytes)}"),
        ("source", f"{manifest.source} ({manifest.kind}), seed {manifest.seed}"),
        *(
            (
                "appended",
                f"{part.source} ({part.kind}), seed {part.seed}, from sample {part.num_samples_before:,} on",
            )
            for part in manifest.appended
        ),
        ("classes", _classes_line(overview)),
        ("masks", f"{manifest.num_masks:,}" if manifest.num_masks else "none"),
        ("groups", f"{overview.num_groups:,}" if overview.num_groups else "none"),
        ("duplicates", _duplicates_line(overview)),
        ("quarantined", f"{manifest.num_quarantined:,}" if manifest.num_quarantined else "none"),
    ]
    _table(console, place.url, None, facts)
    heads = [
        "",
        *("min" if p == 0 else "max" if p == 100 else "median" if p == 50 else f"{p} %" for p in PERCENTILES),
    ]
    _table(
        console,
        "Sizes",
        heads,
        [
            (name, *(_size(name, value) for value in values))
            for name, values in overview.percentiles().items()
        ],
        gap=1,
    )
    formats = [
        (ext, f"{channels}", dtype, f"{count:,}", _share(count, manifest.num_samples))
        for (ext, channels, dtype), count in overview.formats.most_common()
    ]
    _table(console, "Formats", ["format", "channels", "type", "samples", "share"], formats)
    ways = [
        (how, f"{n:,}", _share(n, manifest.num_samples)) for how, n in overview.stored.most_common(_SHOWN)
    ]
    _table(console, "Stored", ["how", "samples", "share"], ways)
    if manifest.classes:
        _table(console, *_classes(overview))
    if text := label_conflicts(place, manifest):
        print_wrapped(console, f"Warning: {text}\n", "yellow")
    if manifest.num_masks:
        _masks(console, place, overview)
    _table(console, *_channels(overview), gap=1)
    if overview.extra:
        columns = [(name, kind, f"{nulls:,}", values) for name, kind, nulls, values in overview.extra]
        _table(console, "Further columns", ["column", "type", "empty", "values"], columns)
    if manifest.num_quarantined:
        refused = [(reason, f"{count:,}") for reason, count in reasons(place).most_common(_SHOWN)]
        _table(console, "Quarantined", ["reason", "images"], refused)


def _classes_line(overview: Overview) -> str:
    classes, unlabelled = len(overview.manifest.classes), int((overview.labels < 0).sum())
    if not classes:
        return "none: no labels"
    return f"{classes:,}" + (
        f", {unlabelled:,} {'sample' if unlabelled == 1 else 'samples'} without" if unlabelled else ""
    )


def _duplicates_line(overview: Overview) -> str:
    from shards.commands.shard_command import fate

    manifest = overview.manifest
    count, done = manifest.num_duplicates, fate(manifest, overview.num_duplicates)
    if manifest.dedupe == "keep":
        return "not looked for (--dedupe keep)" + (f"; of appended images {count:,}, {done}" if count else "")
    return f"{count:,} with the pixels of an earlier image, {done}" if count else "none"


def _classes(overview: Overview) -> tuple[str, list[str], list[tuple[str, ...]]]:
    counts, names = overview.class_counts(), overview.manifest.classes
    order = sorted(range(len(names)), key=lambda label: (-counts[label], names[label]))
    shown = order if len(order) <= 2 * _SHOWN else [*order[:_SHOWN], -1, *order[-_SHOWN:]]
    rows = [
        ("...", f"{len(order) - 2 * _SHOWN:,} more", "")
        if label < 0
        else (names[label], f"{counts[label]:,}", _share(int(counts[label]), len(overview.labels)))
        for label in shown
    ]
    return "Classes, from the largest", ["class", "samples", "share"], rows


def _masks(console: Console, place: Place, overview: Overview) -> None:
    """The share of each class in the masks, from a few hundred of them."""
    from shards.overview.mask_overlay import class_name
    from shards.overview.mask_shares import mask_shares

    found = mask_shares(place, overview.manifest)
    order = sorted(found.shares, key=lambda index: (-found.shares[index], index))
    rows = [(class_name(index), f"{100 * found.shares[index]:.2f} %") for index in order[: 2 * _SHOWN]]
    if len(order) > len(rows):
        rows.append(("...", f"{len(order) - len(rows):,} more"))
    if rows:
        read = (
            ""
            if found.num_read == found.num_masks
            else f" of {found.num_read:,} of {found.num_masks:,} masks"
        )
        _table(console, f"Pixels of the masks{read}, by class", ["class", "share"], rows)
    for text in found.warnings():
        print_wrapped(console, f"Warning: {text}", "yellow")


def _channels(overview: Overview) -> tuple[str, list[str], list[tuple[str, ...]]]:
    """The manifest's statistics in the values that are stored, a line a channel."""
    from shards.images.channel_statistics import PERCENTILES

    rows = []
    for kind, about in overview.pixel_values().items():
        for channel, (mean, std) in enumerate(zip(about["mean"], about["std"], strict=True)):
            shares = [about[f"p{percent}"][channel] for percent in PERCENTILES]
            numbers = map(_number, (mean, std, *shares))
            rows.append((kind if channel == 0 else "", f"{channel + 1}", *numbers))
    heads = ["", "ch.", "mean", "std", *(f"{percent} %" for percent in PERCENTILES)]
    return "Pixel values, as stored", heads, rows


def _size(name: str, value: float) -> str:
    if name == "bytes":
        return human_size(value)
    return f"{value:,.2f}" if "/" in name else f"{value:,.0f}"


def _number(value: float | None) -> str:
    """Three digits, or all before the point; below 0.01 four behind it, so that nine of them stand in 80 columns."""
    if value is None:
        return ""
    if abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e6 else f"{value:.1e}"
    return f"{value:.4f}" if 0.0001 <= abs(value) < 0.01 else f"{value:.3g}"


def _share(count: int, total: int) -> str:
    return f"{100 * count / total:.1f} %"


def _table(
    console: Console, title: str, heads: list[str] | None, rows: Iterable[tuple[str, ...]], gap: int = 2
) -> None:
    from rich.table import Table
    from rich.text import Text

    rows = list(rows)
    table = Table(
        title=Text(title, style="bold"),
        title_justify="left",
        show_header=bool(heads),
        box=None,
        padding=(0, gap, 0, 0),
    )
    for number, head in enumerate(heads or [""] * len(rows[0])):
        right = bool(heads) and all(row[number][:1].isdigit() or row[number][:1] in ("", "-") for row in rows)
        table.add_column(
            head, justify="right" if right else "left", overflow="fold", style="cyan" if number == 0 else ""
        )
    for row in rows:
        table.add_row(*(Text(shown(cell)) for cell in row))
    console.print(table)
    console.print()
