"""`fastssl verify SHARDS`: check every byte, and name the samples that are damaged."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from shards.command_line import parse
from shards.terminal import print_wrapped, shown

if TYPE_CHECKING:  # imported where used: `fastssl --help` reads this file too
    from collections.abc import Iterator

    from rich.console import Console

    from shards.checking.damage import Damage
    from shards.checking.repair import Repair
    from shards.checking.verify import VerifyResult
    from shards.sources.source import Source

_SHOWN = 40
_SHOWN_PER_FILE = 8


@dataclass(frozen=True)
class Verify:
    """Check shards: every byte of every file against its SHA-256.

    Names each damaged sample and its damaged part. Exit code 0: nothing is damaged, or all was repaired; 1: something is damaged.

    --repair makes damaged shards again, byte for byte, from the images: give --source SOURCE and with it the options that
    `fastssl shard` had, such as --masks or --tile. What cannot be made with the same bytes stays as it is.
    """

    shards: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SHARDS")]
    """The folder that `fastssl shard` made; a path or a URL."""
    fast: bool = False
    """Look at names and lengths only; takes no time."""
    decode: bool = False
    """Decode every image and mask, too."""
    workers: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Number of worker processes; 0: work in this process. None: one per CPU."""
    repair: bool = False
    """Repair what is damaged, and remove what killed runs left. Without --source: only indexes and checksums."""
    source: Annotated[str, tyro.conf.arg(metavar="SOURCE")] = ""
    """With --repair: the source that the shards were made from, at its present place."""
    json: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """Write all findings to this file, too."""


def run(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments after `fastssl verify` and run it; return the exit code. UserError passes."""
    args, source_options = parse(
        Verify,
        "fastssl verify",
        argv,
        config=(tyro.conf.FlagCreatePairsOff,),
        return_unknown_args=True,
    )
    return verify_command(args, source_options)


def verify_command(args: Verify, source_options: Sequence[str] = ()) -> int:
    """Check one folder, and mend it where that is wanted; 0 where all is well, 1 where something stays damaged.

    source_options: those of `fastssl shard` that say how to read `args.source`.
    """
    from rich.console import Console

    from shards.checking.repair import check_repairable, repair
    from shards.checking.verify import verify
    from shards.errors import UserError, nearest
    from shards.format.layout import LABELS, SPLITS
    from shards.storage.atomic_files import atomic_write, check_output
    from shards.storage.opening import open_place

    if args.fast and args.decode:
        raise UserError("--fast looks at lengths only and --decode at every pixel: choose one.")
    if args.workers is not None and args.workers < 0:
        raise UserError(f"The number of workers must be 0 or more, got {args.workers}.")
    if args.source and not args.repair:
        raise UserError("--source goes with --repair.")
    if source_options and not args.source:
        known = (f"--{name.replace('_', '-')}" for name in vars(args))
        raise UserError(f"There is no option '{source_options[0]}'.{nearest(source_options[0], known)}")
    if args.json:
        check_output(args.json, "--json")
    console = Console(highlight=False, soft_wrap=True)
    place = open_place(args.shards)
    if args.repair:
        check_repairable(place)  # before all is read
    source = _open_source(args, source_options) if args.source else None
    level = "fast" if args.fast else "decode" if args.decode else "hash"
    with _bar(console, "Decoding" if args.decode else "Reading") as progress:
        verdict = verify(place, level=level, workers=args.workers, progress=progress)
    told = {"folder": args.shards} | verdict.to_json()
    _print(console, args.shards, verdict)
    still_damaged = verdict.damaged
    if not args.repair and any(
        not finding.harmless and finding.file not in (SPLITS, LABELS) for finding in verdict.findings
    ):
        way_out = "with the options that `fastssl shard` had, makes the damaged files again."
        print_wrapped(
            console, f"fastssl verify {shlex.quote(args.shards)} --repair --source SOURCE, {way_out}"
        )
    if args.repair and verdict.findings:
        with _bar(console, "Making again", "images") as progress:
            done = repair(place, verdict, source, workers=args.workers, progress=progress)
        told |= {"mended": done.mended, "failed": [asdict(finding) for finding in done.failed]}
        _print_repair(console, args.shards, done)
        still_damaged = bool(done.failed)
    if args.json:
        atomic_write(args.json, (json.dumps(told, indent=1, ensure_ascii=False) + "\n").encode())
    return 1 if still_damaged else 0


def _open_source(args: Verify, options: Sequence[str]) -> Source:
    """The source that the shards were made of, by the options of `fastssl shard`."""
    from shards.commands.shard_command import Shard
    from shards.sources.source_kinds import open_source

    words = [args.source, args.shards, *options]
    shard = parse(Shard, "fastssl shard", words, config=(tyro.conf.OmitArgPrefixes,))
    return open_source(shard.source, shard.options)


def _print_repair(console: Console, folder: str, done: Repair) -> None:
    for finding in done.failed:
        print_wrapped(console, f"{finding.file}: {finding.what}.", "red")
    if done.mended:
        names = ", ".join(done.mended[:_SHOWN_PER_FILE])
        more = (
            f" and {len(done.mended) - _SHOWN_PER_FILE:,} more" if len(done.mended) > _SHOWN_PER_FILE else ""
        )
        print_wrapped(console, f"Mended, byte for byte: {names}{more}.")
    if not done.failed:
        print_wrapped(console, f"{folder} is whole again.", "green")


@contextmanager
def _bar(console: Console, what: str, of: str = "bytes") -> Iterator[Callable[[int, int, int], None]]:
    """A bar of bytes or images; gives the function of (done, total, findings) that moves it. None without a terminal."""
    from rich import progress

    if not console.is_terminal:
        yield lambda *_: None
        return
    counts = (
        (progress.DownloadColumn(), progress.TransferSpeedColumn())
        if of == "bytes"
        else (progress.MofNCompleteColumn(), progress.TextColumn(of))
    )
    columns = (
        progress.TextColumn(what),
        progress.BarColumn(),
        *counts,
        progress.TimeRemainingColumn(compact=True),
        progress.TextColumn("[yellow]{task.fields[found]}"),
    )
    with progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None, found="")

        def show(done: int, total: int, findings: int) -> None:
            bar.update(task, completed=done, total=total, found=f"{findings:,} findings" if findings else "")

        yield show


def _print(console: Console, folder: str, verdict: VerifyResult) -> None:
    from shards.units import human_size, plural

    if verdict.findings:
        console.print(_table(verdict.findings))
        shown = sum(
            min(count, _SHOWN_PER_FILE) for count in Counter(f.file for f in verdict.findings).values()
        )
        hidden = len(verdict.findings) - min(shown, _SHOWN)
        if hidden:
            print_wrapped(console, f"... and {hidden:,} more; --json FILE lists them all.")
    looked = {
        "fast": "names and lengths are right (--fast reads no bytes)",
        "hash": "every byte is as it was written",
        "decode": "every byte is as it was written, and every image decodes",
    }[verdict.level]
    about = f"{plural(verdict.num_samples, 'sample')} in {plural(verdict.num_shards, 'shard')}, {human_size(verdict.num_bytes)}"
    speed = f"{verdict.duration_s:,.1f} s"
    if verdict.damaged:
        files = {finding.file for finding in verdict.findings if not finding.harmless}
        samples = {finding.sample_id for finding in verdict.findings if finding.sample_id is not None}
        hurt = f", {len(samples):,} sample{'' if len(samples) == 1 else 's'}" if samples else ""
        noun = "file" if len(files) == 1 else "files"
        text = f"{folder} is DAMAGED: {len(files):,} {noun}{hurt} of {about} ({speed})."
        print_wrapped(console, text, "red")
    else:
        print_wrapped(console, f"{folder} is whole: {looked}. {about} ({speed}).", "green")


def _table(findings: list[Damage]):
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Findings", title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("file", no_wrap=True)
    table.add_column("at byte", justify="right", no_wrap=True)
    table.add_column("sample", overflow="fold")
    table.add_column("what", overflow="fold", ratio=1)
    seen: Counter[str] = Counter()
    for finding in findings:
        seen[finding.file] += 1
        if seen[finding.file] > _SHOWN_PER_FILE or table.row_count >= _SHOWN:
            continue
        number = "" if finding.sample_id is None else f"{finding.sample_id} "
        member = f"{finding.member}: " if finding.member else ""
        cells = (
            finding.file,
            "" if finding.offset is None else f"{finding.offset:,}",
            f"{number}{finding.source or finding.key or ''}",
            f"{member}{finding.what}",
        )
        table.add_row(*(Text(shown(cell)) for cell in cells), style="dim" if finding.harmless else "")
    return table
