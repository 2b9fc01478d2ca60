"""`fastssl shard SOURCE DEST`: converts a folder of images, with progress and a closing summary."""

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:  # imported where used: `fastssl --help` reads this file too
    from rich.console import Console

    from shards.layout import Manifest

PLAIN_INTERVAL_S = 30.0
_SHOWN_REASONS = 5


def shard(
    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")],
    dest: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DEST")],
    seed: Annotated[int, tyro.conf.arg(metavar="N")] = 0,
    workers: Annotated[int | None, tyro.conf.arg(metavar="N")] = None,
    samples_per_shard: Annotated[int | None, tyro.conf.arg(metavar="N")] = None,
) -> None:
    """Convert a folder of images to WebDataset shards.

    Every image is decoded once as a proof. Clean JPEG, PNG and WebP files are stored unchanged; rotated,
    CMYK, palette and transparent ones are re-encoded; broken ones are set aside and listed in
    DEST/quarantine.jsonl. Folders directly below SOURCE become class labels, which pretraining does not
    need. The same command again finishes an interrupted conversion, with the same bytes.

    Args:
        source: The folder with the images; subfolders are searched too.
        dest: The folder for the shards: new, empty, or one to go on with.
        seed: Decides the order of the samples in the shards.
        workers: Processes to use; 0 for none beside this one. None: one a CPU.
        samples_per_shard: Images in one shard. None: 64 shards of 128 to 4096 images each.
    """
    from rich.console import Console

    from shards.convert import check_apart, convert
    from shards.sources import looks_like_splits, scan_folder

    console = Console(highlight=False, soft_wrap=True)
    check_apart(source, dest)
    sources = scan_folder(source)
    labels = f" in {len(sources.classes):,} class folders" if sources.classes else ""
    console.print(f"Found {len(sources):,} images{labels} below {source}", markup=False)
    if looks_like_splits(sources.classes):
        console.print(
            f"Warning: the folders {', '.join(sources.classes)} look like splits, but are taken as classes. "
            f"To keep them apart, convert each alone: fastssl shard {source / sources.classes[0]} ...",
            style="yellow",
            markup=False,
        )
    start_s = time.monotonic()
    with _progress(console, len(sources)) as progress:
        manifest = convert(
            source,
            dest,
            seed=seed,
            workers=workers,
            samples_per_shard=samples_per_shard,
            progress=progress.show,
            sources=sources,
        )
    if progress.first is None:
        console.print(
            f"{dest} is complete: {manifest.num_samples:,} images in {len(manifest.shards):,} shards. "
            "Nothing to do.",
            markup=False,
        )
        return
    _print_summary(console, dest, manifest, progress.num_converted, time.monotonic() - start_s)


def run(argv: Sequence[str] | None = None) -> None:
    """Parses the arguments after `fastssl shard` and runs it; UserError passes, Ctrl-C exits with 130."""
    try:
        tyro.cli(shard, prog="fastssl shard", args=argv)
    except KeyboardInterrupt:
        print("\nStopped. What is finished is kept; the same command goes on from there.")
        raise SystemExit(130) from None


class _Shown:
    """Remembers the first and last counts, so that a resumed run's speed counts its own images only."""

    def __init__(self, update: Callable[[int, int], None]):
        self.first: int | None = None
        self.last = 0
        self._update = update

    def show(self, done: int, total: int, quarantined: int) -> None:
        if self.first is None:
            self.first = done
        self.last = done
        self._update(done, quarantined)

    @property
    def num_converted(self) -> int:
        return self.last - (self.first or 0)


@contextmanager
def _progress(console: "Console", total: int) -> Iterator[_Shown]:
    if not console.is_terminal:
        yield _Shown(_plain_lines(console, total))
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("Converting"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(compact=True),
        TextColumn("[yellow]{task.fields[quarantined]}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total, speed="", quarantined="")

        def update(done: int, quarantined: int) -> None:
            speed = bar.tasks[0].speed
            bar.update(
                task,
                completed=done,
                speed=f"{speed:,.0f} images/s" if speed else "",
                quarantined=f"{quarantined:,} quarantined" if quarantined else "",
            )

        yield _Shown(update)


def _plain_lines(console: "Console", total: int) -> Callable[[int, int], None]:
    next_s = time.monotonic() + PLAIN_INTERVAL_S

    def update(done: int, quarantined: int) -> None:
        nonlocal next_s
        if time.monotonic() >= next_s:
            console.print(f"{done:,} of {total:,} images, {quarantined:,} quarantined")
            next_s = time.monotonic() + PLAIN_INTERVAL_S

    return update


def _print_summary(
    console: "Console", dest: Path, manifest: "Manifest", num_converted: int, duration_s: float
) -> None:
    from rich.table import Table
    from rich.text import Text

    from shards import layout

    table = Table(
        title=Text(str(dest)), title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0)
    )
    table.add_column(style="bold")
    table.add_column()
    table.add_row("images", f"{manifest.num_samples:,}")
    table.add_row("classes", f"{len(manifest.classes):,}" if manifest.classes else "none: no labels")
    table.add_row("shards", f"{len(manifest.shards):,}")
    table.add_row("size", _size(manifest.bytes))
    for name, count in _changes(dest).most_common(_SHOWN_REASONS):
        table.add_row(Text(name.partition(":")[0]), Text(f"{count:,}:{name.partition(':')[2]}"))
    table.add_row("quarantined", f"{manifest.num_quarantined:,}" if manifest.num_quarantined else "none")
    for reason, count in _reasons(dest).most_common(_SHOWN_REASONS):
        table.add_row("", Text(f"{count:,}: {reason}"))
    if manifest.num_quarantined:
        table.add_row("", Text(f"listed in {dest / layout.QUARANTINE}"))
    speed = num_converted / max(duration_s, 1e-9)
    table.add_row("time", f"{duration_s:,.1f} s, {speed:,.0f} images/s")
    console.print(table)


def _changes(dest: Path) -> Counter[str]:
    import pyarrow.parquet as pq

    from shards.layout import TABLE

    counts = pq.read_table(dest / TABLE, columns=["stored"])["stored"].value_counts().to_pylist()
    return Counter({row["values"]: row["counts"] for row in counts if row["values"] != "kept"})


def _reasons(dest: Path) -> Counter[str]:
    import json

    from shards.layout import QUARANTINE

    with open(dest / QUARANTINE, encoding="utf-8") as lines:
        # What stands in brackets and the numbers are different for each image.
        return Counter(
            re.sub(r"\s*\([^)]*\)|\d+ x \d+ ", "", json.loads(line)["reason"]).strip() for line in lines
        )


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:,.0f} {unit}" if unit == "B" else f"{num_bytes:,.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.1f} TB"
