"""`fastssl bench shard`: images per second from JPEG files to shards, ours and others', beside just decoding the same files."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from fastssl.bench.conversion.writers import Task, Turn, litdata, only, ours, proof, smaller, webdataset
from fastssl.bench.report import Row, Stopwatch, brief, busy, machine, tell_failures, write_report
from shards.errors import UserError, check_least
from shards.storage.atomic_files import check_output

SUFFIXES = (".jpg", ".jpeg")


@dataclass(frozen=True)
class BenchShard:
    """Measure how fast JPEG files become shards: our converter, webdataset's ShardWriter and litdata's optimize, on the same files.

    Beside them stands the least that a proof needs, decoding each file, and decoding, scaling and encoding it. All are read once
    beforehand: a warm page cache.
    """

    source: Annotated[str, tyro.conf.Positional]
    """Folder of JPEG files; all of them must be clean."""
    images: int = 10_000
    """Images a turn; where the folder holds fewer, they are taken several times under other names."""
    workers: int = 0
    """Processes of each; 0: one per core."""
    repeats: int = 3
    """Turns of each that are measured, after one that is not."""
    out: str = ""
    """Folder for what is written, and removed again; empty: the system's for temporary files."""
    peers: bool = True
    """Measure the others too."""
    json: str = ""
    """File for the results."""


@dataclass(frozen=True)
class MeasuredWriter:
    """One row of the report. `base`: the row whose work is the least that this one must do; `deed`: one of writers.DEEDS."""

    name: str
    run: Callable[[Task, Path, str], Turn | None]
    deed: str
    base: str
    note: str
    is_peer: bool = False


WRITERS = [
    MeasuredWriter("decode", only, "proof", "", "simplejpeg (libjpeg-turbo) on every file, nothing written"),
    MeasuredWriter(
        "fastssl keep",
        ours,
        "proof",
        "decode",
        "`fastssl shard`: every coefficient read (docs/shard_format.md), bytes kept; with checksums, statistics, duplicates",
    ),
    MeasuredWriter(
        "webdataset", webdataset, "read", "decode", "ShardWriter: no proof, no checksums, no statistics", True
    ),
    MeasuredWriter(
        "webdataset + proof", webdataset, "proof", "decode", "the same, each file decoded first", True
    ),
    MeasuredWriter("litdata", litdata, "read", "decode", "optimize: no proof, no checksums", True),
    MeasuredWriter("litdata + proof", litdata, "proof", "decode", "the same, each file decoded first", True),
    MeasuredWriter(
        "decode + encode", only, "smaller", "", "decoded, scaled to a short side of 256, encoded (quality 95)"
    ),
    MeasuredWriter(
        "fastssl re-encode", ours, "smaller", "decode + encode", "`fastssl shard --short-side 256`"
    ),
    MeasuredWriter(
        "webdataset re-encode", webdataset, "smaller", "decode + encode", "ShardWriter of the same", True
    ),
    MeasuredWriter("litdata re-encode", litdata, "smaller", "decode + encode", "optimize of the same", True),
]


def run(argv: list[str]) -> int:
    """Run the sub-command."""
    args = tyro.cli(BenchShard, prog="fastssl bench shard", args=argv, config=(tyro.conf.FlagConversionOff,))
    if args.json:
        check_output(args.json, "--json")
    check_least(args, images=1, workers=0, repeats=1)
    if args.out and not Path(args.out).is_dir():
        raise UserError(f"there is no folder '{args.out}' for --out: make it first.")
    from rich.console import Console

    from shards.cpus import available_cpus

    writers = [writer for writer in WRITERS if args.peers or not writer.is_peer]
    rows = [Row(writer.name, note=writer.note) for writer in writers]
    workers, where, console = args.workers or available_cpus(), machine(), Console(highlight=False)
    with tempfile.TemporaryDirectory(dir=args.out or None, prefix="fastssl-bench-") as scratch:
        folder, files, num_bytes = _gather(Path(args.source), Path(scratch) / "images", args.images)
        context = multiprocessing.get_context("spawn")
        with context.Pool(workers, initializer=_prepare, initargs=([str(folder / files[0])],)) as pool:
            task = Task(folder, files, workers, pool)
            with console.status("") as status:
                # In turns, so that other work on the machine falls on all of them alike.
                for turn in range(args.repeats + 1):
                    for writer, row in zip(writers, rows, strict=True):
                        when = f"{turn} of {args.repeats}" if turn else "warming up"
                        status.update(f"{writer.name}, {when}")
                        if not row.error:
                            measure(writer, task, Path(scratch), row, keep=turn > 0)
    by_name = {row.name: row for row in rows}
    for writer, row in zip(writers, rows, strict=True):
        row.compare(by_name.get(writer.base))
        if writer.base:  # the clock of CPU time ticks 100 times a second: 0 after little work
            base = by_name[writer.base].core_ms
            row.more["cpu_ratio"] = base / row.core_ms if base and row.core_ms else None
    _show(console, rows, where, args, workers, num_bytes / len(files))
    if args.json:
        settings = dataclasses.asdict(args) | {
            "source": Path(args.source).name,
            "workers": workers,
            "bytes_per_image": num_bytes / len(files),
            "page_cache": "warm",
        }
        del settings["json"], settings["out"]
        write_report(args.json, "shard", where, settings, rows)
        console.print(f"[dim]Written to {args.json}[/]")
    return 0


def measure(writer: MeasuredWriter, task: Task, scratch: Path, row: Row, *, keep: bool) -> None:
    """One turn of a writer, noted in its row where `keep`; what it wrote is removed. A peer's fault is noted, one of ours raised."""
    out = scratch / "out"
    out.mkdir()
    try:
        watch = Stopwatch()
        turn = writer.run(task, out, writer.deed)
        if turn is None:
            wall_s = watch.wall_s()
            turn = Turn(wall_s, watch.cores() * watch.wall_s())
        if keep:
            row.add(len(task.files) / turn.wall_s, turn.cpu_s / turn.wall_s)
    except Exception as fault:  # others' code fails in its own ways, and a loss must stay in the table
        if not writer.is_peer:
            raise
        row.fail(f"{type(fault).__name__}: {' '.join(str(fault).split())[:300]}")
    finally:
        shutil.rmtree(out)


def _gather(source: Path, folder: Path, num_images: int) -> tuple[Path, list[str], int]:
    """A folder of links to the JPEGs of `source`, in turn until there are enough: (folder, names in it, bytes). Reads each once."""
    found = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not found:
        raise UserError(f"'{source}' holds no JPEG files ({', '.join(SUFFIXES)}).")
    sizes = [len(path.read_bytes()) for path in found]
    files = []
    for number in range(num_images):
        path = found[number % len(found)]
        name = path.relative_to(source).with_suffix("")
        file = f"{name}-{number // len(found)}{path.suffix}"
        link = folder / file
        link.parent.mkdir(parents=True, exist_ok=True)
        os.symlink(path.resolve(), link)
        files.append(file)
    return folder, files, sum(sizes[number % len(found)] for number in range(num_images))


def _prepare(paths: list[str]) -> None:
    """In each process: import and use what the turns will use."""
    import contextlib

    with contextlib.suppress(ImportError):
        import webdataset  # noqa: F401
    for path in paths:
        proof(path)
        smaller(path)


def _show(
    console: Any, rows: list[Row], where: dict[str, Any], args: BenchShard, workers: int, num_bytes: float
) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    title = f"{args.images:,} JPEG files of {num_bytes / 1000:,.0f} kB, {workers} processes"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for name in ("images/s", "spread", "of its\nbase", "core ms", "of its\nbase"):
        table.add_column(name, justify="right", no_wrap=True)
    for number, row in enumerate(rows, 1):
        name = f"{row.name} [dim]{number}[/]"
        if row.images_per_s is None:
            table.add_row(name, "failed")
            continue
        ratio = "" if row.ratio is None else f"{row.ratio:.0%}"
        cpu_ratio = f"{row.more['cpu_ratio']:.0%}" if row.more.get("cpu_ratio") else ""
        table.add_row(name, brief(row.images_per_s), row.spread(), ratio, f"{row.core_ms:.2f}", cpu_ratio)
    console.print(table)
    tell_failures(console, rows)
    console.print(
        f"{where['cpu']}, {where['cores']} cores{busy(where)}; median and spread of {args.repeats} turns after one to warm up, page "
        "cache warm. Base: decode, or decode + encode; its processes run already, ours start within the time, as copies of one that "
        "has imported what they need (half a second, once). core ms: CPU time of all processes per image.",
        style="dim",
        markup=False,
    )
    for number, row in enumerate(rows, 1):
        console.print(f"{number} {row.note}.", style="dim", markup=False)
