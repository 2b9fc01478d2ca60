"""`fastssl bench plan`: time and memory of planning a conversion of millions of images, which need not exist."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastssl.bench.fresh import in_fresh_process
from fastssl.bench.report import busy, machine, write_report
from fastssl.bench.screen import say, say_written
from fastssl.core.peak_memory import peak_bytes
from shards.command_line import File, Folder, parse
from shards.errors import UserError, check_least
from shards.sources.source import BATCH_ROWS, Source, entry_batch
from shards.storage.atomic_files import check_output

if TYPE_CHECKING:
    import pyarrow as pa

NUM_CLASSES = 1000
# Size of an image, for the totals.
ABOUT_BYTES = 110_000


@dataclass(frozen=True)
class BenchPlan:
    """Measure planning a conversion of many images that exist by name only: list them, sort them in shuffled order, write the plan.

    The plan is made in a process of its own, whose peak memory is measured.
    """

    entries: int = 10_000_000
    """Images to plan for."""
    out: Folder = ""
    """Folder for the plan, which is removed afterwards; empty: the system's temporary folder."""
    json: File = ""
    """JSON file for the results."""


class Names(Source):
    """A source of image names in 1,000 classes, without content."""

    kind = "names"
    name = "names"

    def __init__(self, num_entries: int):
        self.num_entries = num_entries

    def entries(self) -> Iterator[pa.RecordBatch]:
        """See `Source.entries`."""
        for start in range(0, self.num_entries, BATCH_ROWS):
            numbers = range(start, min(start + BATCH_ROWS, self.num_entries))
            labels = [f"n{number % NUM_CLASSES:08d}" for number in numbers]
            names = [f"{label}/{label}_{number}.JPEG" for label, number in zip(labels, numbers, strict=True)]
            sizes = [ABOUT_BYTES + number % 1000 for number in numbers]
            yield entry_batch({"source": names, "bytes": sizes, "label": labels})


def run(argv: list[str]) -> int:
    """Run the sub-command."""
    args = parse(BenchPlan, "fastssl bench plan", argv)
    if args.json:
        check_output(args.json, "--json")
    check_least(args, entries=1)
    if args.out and not Path(args.out).is_dir():
        raise UserError(f"There is no folder '{args.out}' for --out: make it first.")
    from rich.console import Console
    from rich.table import Table

    where, console = machine(), Console(highlight=False)
    with console.status(f"planning {args.entries:,} images"):
        found = measure(args.entries, args.out)
    table = Table(title=f"{args.entries:,} images planned", title_justify="left", show_header=False, box=None)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_row("list, hash, spill", f"{found['survey_s']:,.1f} s")
    table.add_row("sort, write the plan", f"{found['write_s']:,.1f} s")
    table.add_row("CPU time", f"{found['cpu_s']:,.1f} s")
    table.add_row("peak memory", f"{found['peak_bytes'] / 1e6:,.0f} MB")
    table.add_row("of these before", f"{found['before_bytes'] / 1e6:,.0f} MB")
    table.add_row("plan.parquet", f"{found['plan_bytes'] / 1e6:,.0f} MB")
    table.add_row("shards", f"{found['num_shards']:,}")
    console.print(table)
    say(console, f"{where['cpu']}, {where['cores']} cores{busy(where)}.")
    if args.json:
        settings = {"entries": args.entries, "classes": NUM_CLASSES}
        write_report(args.json, "plan", where, settings, [], plan=found)
    say_written(console, args.json)
    return 0


def measure(num_entries: int, out: str = "", in_memory: int | None = None) -> dict[str, Any]:
    """Plan in a fresh process; return seconds, bytes of memory at the peak and before, size of the plan, number of shards.

    `in_memory`: number of entries above which sorting uses the disk, in place of `shards.conversion.listing.IN_MEMORY`.
    """
    with tempfile.TemporaryDirectory(dir=out or None, prefix="fastssl-bench-") as folder:
        try:
            return in_fresh_process(_plan, num_entries, folder, in_memory)
        except ChildProcessError as error:
            raise UserError(f"Planning {error}: if memory or disk ran out, lower --entries.") from None


def _plan(num_entries: int, folder: str, in_memory: int | None) -> dict[str, Any]:
    from shards.conversion import listing
    from shards.conversion.shard_plan import settings_for, write_plan
    from shards.format.layout import PLAN
    from shards.images.policy import Policy
    from shards.storage.opening import open_place

    if in_memory is not None:
        listing.IN_MEMORY = in_memory
    before, start_s, start_cpu_s = peak_bytes(), time.perf_counter(), time.process_time()
    place, source = open_place(folder), Names(num_entries)
    with listing.Survey(source, 0, place.local) as survey:
        survey_s = time.perf_counter() - start_s
        settings = settings_for(source, survey.listing, 0, None, Policy(), "mark")
        plan = write_plan(place, survey, settings)
    return {
        "survey_s": survey_s,
        "write_s": time.perf_counter() - start_s - survey_s,
        "cpu_s": time.process_time() - start_cpu_s,
        "before_bytes": before,
        "peak_bytes": peak_bytes(),
        "plan_bytes": (Path(folder) / PLAN).stat().st_size,
        "num_shards": plan.num_shards,
    }
