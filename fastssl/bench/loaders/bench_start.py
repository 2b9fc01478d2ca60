"""`fastssl bench start SHARDS`: the time of a fresh process to its first batch, on a data set of any size."""

from __future__ import annotations

import dataclasses
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from fastssl.bench.fresh import in_fresh_process
from fastssl.bench.guard import exit_code
from fastssl.bench.loaders.first_batch import STAGES, first_batch
from fastssl.bench.report import busy, machine, write_report
from fastssl.bench.screen import Stoppable, say, say_written
from pipelines.engines.engine_table import EngineName
from shards.command_line import File, Name, Shards, parse
from shards.errors import UserError, check_least
from shards.storage.atomic_files import check_output
from shards.terminal import print_wrapped

if TYPE_CHECKING:
    from rich.console import Console

ALL = "all"


@dataclass(frozen=True)
class BenchStart:
    """Measure the time from the start of a process to its first batch of views, on a data set of any number of samples.

    The data set has the images of SHARDS and a table of --samples rows, drawn from theirs. Each turn is a process of its own. A first
    turn, which does not count, warms up the page cache, compiled kernels and bytecode.
    """

    shards: Annotated[Shards, tyro.conf.Positional]
    """Folder of shards, on this machine."""
    samples: int = 1_000_000
    """Samples of the data set."""
    recipe: Name = "moco_v3"
    """Name of a preset."""
    size: int = 224
    """Side of the views in pixels."""
    batch: int = 64
    """Images in the batch."""
    threads: int = 0
    """Threads that make the batch; 0: one per core."""
    engine: EngineName = "fused"
    """Engine that makes the views."""
    repeats: int = 3
    """Number of turns that count."""
    json: File = ""
    """JSON file for the results."""


def run(argv: list[str]) -> int:
    """Run the sub-command."""
    args = parse(BenchStart, "fastssl bench start", argv)
    if args.json:
        check_output(args.json, "--json")
    _check(args)
    from rich.console import Console
    from rich.table import Table

    where, console = machine(), Console(highlight=False)
    with console.status(f"a data set of {args.samples:,} samples") as status:
        found = measure(args, console, status.update)
    if not found:
        return exit_code([], stopped=True)
    turns, stopped = found.pop("turns"), found.pop("stopped")
    title = f"first batch of {args.samples:,} samples"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column(style="bold")
    for name in ("seconds", "spread", "CPU seconds"):
        table.add_column(name, justify="right")
    for name in (*STAGES, ALL):
        stage = found[name]
        low, high = stage["spread"]
        table.add_row(name, f"{stage['seconds']:.2f}", f"{low:.2f}-{high:.2f}", f"{stage['cpu_s']:.2f}")
    console.print(table)
    say(
        console,
        f"{found['peak_bytes'] / 1e6:,.0f} MB at most. Median of {turns}, caches warm. {where['cpu']}, {where['cores']} "
        f"cores{busy(where)}.",
    )
    if sys.dont_write_bytecode:
        print_wrapped(
            console,
            "Python stores no bytecode here (PYTHONDONTWRITEBYTECODE is set), so every import compiles.",
            "yellow",
        )
    if args.json:
        write_report(
            args.json, "start", where, dataclasses.asdict(args), [], complete=not stopped, start=found
        )
    say_written(console, args.json)
    return exit_code([], stopped=stopped)


def measure(args: BenchStart, console: Console, tell: Any = lambda line: None) -> dict[str, Any]:
    """Return of each stage and `all` median `seconds`, their `spread` [least, greatest] and median `cpu_s`; and `peak_bytes`.

    Each turn is printed when it ends. After Ctrl-C the result is that of the finished turns, which `turns` counts; empty for none.
    """
    how = (args.recipe, args.size, args.batch, args.threads, args.engine)
    turns = []
    with Stoppable(console) as measuring, tempfile.TemporaryDirectory(prefix="fastssl-bench-") as folder:
        grow(Path(args.shards), Path(folder), args.samples)
        for turn in range(args.repeats + 1):
            tell(f"turn {turn} of {args.repeats}" if turn else "warming up")
            try:
                turns.append(in_fresh_process(first_batch, time.monotonic(), folder, *how))
            except ChildProcessError as error:
                raise UserError(f"The measured process {error}: its own messages stand above.") from None
            stages = turns[-1]["stages"]
            stages[ALL] = [sum(values) for values in zip(*stages.values(), strict=True)]
            if turn:
                print_wrapped(console, f"turn {turn} of {args.repeats}: {stages[ALL][0]:.2f} s")
    stages = [turn["stages"] for turn in turns[1:]]
    if not stages:
        return {}
    found: dict[str, Any] = {"turns": len(stages), "stopped": measuring.stopped}
    for name in (*STAGES, ALL):
        seconds, cpu = zip(*(turn[name] for turn in stages), strict=True)
        found[name] = {
            "seconds": statistics.median(seconds),
            "spread": [min(seconds), max(seconds)],
            "cpu_s": statistics.median(cpu),
        }
    return found | {"peak_bytes": max(turn["peak_bytes"] for turn in turns)}


def grow(shards: Path, dest: Path, num_samples: int) -> None:
    """Fill `dest` with a data set of `num_samples`: links to the tars of `shards`, and a table of rows drawn from theirs."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from shards.format.columns import read_columns
    from shards.format.layout import TABLE, Manifest

    manifest = Manifest.load(shards)
    rows = read_columns(shards / TABLE)
    drawn = np.random.default_rng(0).integers(rows.num_rows, size=num_samples)
    table = rows.take(pa.array(drawn))
    table = table.set_column(0, "sample_id", pa.array(np.arange(num_samples)))
    pq.write_table(table, dest / TABLE, compression="zstd")
    for shard in manifest.shards:
        (dest / shard.name).symlink_to((shards / shard.name).resolve())
    dataclasses.replace(manifest, num_samples=num_samples).save(dest)


def _check(args: BenchStart) -> None:
    from pipelines.augment.recipe import get_recipe
    from shards.dataset.shard_set import ShardSet
    from shards.storage.opening import open_place

    check_least(args, size=1, batch=1, threads=0, repeats=1)
    if args.samples < args.batch:
        raise UserError(
            f"--samples is {args.samples}, but it must be at least one batch (--batch {args.batch})."
        )
    get_recipe(args.recipe)
    if open_place(args.shards).local is None:
        raise UserError(
            f"'{args.shards}' is not on this machine: give a folder, such as a copy of a few of its shards."
        )
    ShardSet.open(args.shards)
