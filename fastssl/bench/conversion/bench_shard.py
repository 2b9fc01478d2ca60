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
from fastssl.bench.guard import exit_code
from fastssl.bench.report import Row, Stopwatch, brief, busy, error_line, machine, turns_told, write_report
from fastssl.bench.screen import Stoppable, make_table, say_written, show
from fastssl.bench.turns import take_turns
from shards.command_line import File, Folder, parse
from shards.errors import UserError, check_least
from shards.storage.atomic_files import check_output

SUFFIXES = (".jpg", ".jpeg")


@dataclass(frozen=True)
class BenchShard:
    """Measure images/s from JPEG files to shards: our converter, webdataset's ShardWriter and litdata's optimize, on the same files.

    For comparison it also measures decoding each file, the least that a proof needs, and decoding, scaling and encoding it. All files
    are read once before, so that the page cache is warm.
    """

    source: Annotated[Folder, tyro.conf.Positional]
    """Folder of JPEG files, all of them undamaged."""
    images: int = 10_000
    """Images a turn; if the folder holds fewer, they are used several times under other names."""
    workers: int = 0
    """Processes of each writer; 0: one per core."""
    repeats: int = 3
    """Times each writer is measured, after one turn to warm up."""
    out: Folder = ""
    """Folder for the output, which is removed afterwards; empty: the system's temporary folder."""
    peers: bool = True
    """Measure webdataset and litdata too."""
    json: File = ""
    """JSON file for the results."""


@dataclass(frozen=True)
class MeasuredWriter:
    """A row of the report. `base`: the row with the least work that this one must do; `deed`: one of writers.DEEDS."""

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
    args = parse(BenchShard, "fastssl bench shard", argv, config=(tyro.conf.FlagConversionOff,))
    if args.json:
        check_output(args.json, "--json")
    check_least(args, images=1, workers=0, repeats=1)
    if args.out and not Path(args.out).is_dir():
        raise UserError(f"There is no folder '{args.out}' for --out: make it first.")
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
            with Stoppable(console) as measuring, console.status("") as status:

                def turn(number: int, writer: MeasuredWriter, row: Row) -> None:
                    status.update(
                        f"{writer.name}, {f'{number} of {args.repeats}' if number else 'warming up'}"
                    )
                    measure(writer, task, Path(scratch), row, keep=number > 0)

                take_turns(range(args.repeats + 1), writers, rows, turn, console)
    by_name = {row.name: row for row in rows}
    for writer, row in zip(writers, rows, strict=True):
        row.compare(by_name.get(writer.base))
        # The clock of CPU time ticks 100 times a second: it may be 0 after little work.
        if writer.base:
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
        write_report(args.json, "shard", where, settings, rows, complete=not measuring.stopped)
    say_written(console, args.json)
    return exit_code(rows, stopped=measuring.stopped)


def measure(writer: MeasuredWriter, task: Task, scratch: Path, row: Row, *, keep: bool) -> None:
    """Run a writer once, add its rate to the row if `keep`, and remove its output; a peer's error goes into the row."""
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
    except Exception as error:
        # Others' code fails in its own ways, and a failure must stay in the table.
        if not writer.is_peer:
            raise
        row.fail(error_line(error))
    finally:
        shutil.rmtree(out)


def _gather(source: Path, folder: Path, num_images: int) -> tuple[Path, list[str], int]:
    """Fill a folder with links to the JPEGs of `source`, repeated until there are enough; return (folder, names in it, bytes).

    Each file is read once.
    """
    found = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not found:
        raise UserError(f"'{source}' holds no JPEG files ({', '.join(SUFFIXES)}): give a folder that does.")
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
    """Import and use, in each process, what the turns will use."""
    import contextlib
    import signal

    # Ctrl-C is for the process that measures, which ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(ImportError):
        import webdataset  # noqa: F401
    for path in paths:
        proof(path)
        smaller(path)


def _show(
    console: Any, rows: list[Row], where: dict[str, Any], args: BenchShard, workers: int, num_bytes: float
) -> None:
    title = f"{args.images:,} JPEG files of {num_bytes / 1000:,.0f} kB, {workers} processes"
    table = make_table(title, "", ("images/s", "spread", "of its\nbase", "core ms", "of its\nbase"))
    for row in rows:
        if row.images_per_s is None:
            table.add_row(row.name, row.why_not)
            continue
        ratio = "" if row.ratio is None else f"{row.ratio:.0%}"
        cpu_ratio = f"{row.more['cpu_ratio']:.0%}" if row.more.get("cpu_ratio") else ""
        table.add_row(row.name, brief(row.images_per_s), row.spread(), ratio, f"{row.core_ms:.2f}", cpu_ratio)
    show(
        console,
        table,
        rows,
        f"{where['cpu']}, {where['cores']} cores{busy(where)}; median and spread of {turns_told(rows)} after one to warm up, page "
        "cache warm. Base: decode, or decode + encode, whose processes run already; ours start within the measured time, as copies of "
        "one that has imported what they need (half a second, once). core ms: CPU time of all processes per image.",
    )
