"""`fastssl verify SHARDS`: is every byte still what the conversion wrote, and if not, which samples are hurt."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:  # imported where used: `fastssl --help` reads this file too
    from collections.abc import Iterator

    from rich.console import Console

    from shards.examine import Finding
    from shards.verify import Verdict

_SHOWN = 40
_SHOWN_PER_FILE = 8


@dataclass(frozen=True)
class Verify:
    """Check shards: every byte of every file against its SHA-256.

    Says which sample is damaged, and what of it. Exit code 0: all is well; 1: something is damaged.
    """

    shards: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SHARDS")]
    """The folder that `fastssl shard` made."""
    fast: bool = False
    """Look at names and lengths only; takes no time."""
    decode: bool = False
    """Decode every image and mask, too."""
    workers: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Processes to use; 0 for none beside this one. None: one a CPU."""
    json: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """Write all findings to this file, too."""


def run(argv: Sequence[str] | None = None) -> int:
    """Parses the arguments after `fastssl verify` and runs it; returns the exit code. UserError passes."""
    return verify_command(
        tyro.cli(Verify, prog="fastssl verify", args=argv, config=(tyro.conf.FlagCreatePairsOff,))
    )


def verify_command(args: Verify) -> int:
    """Checks one folder with progress on the screen; 0 where all is well, 1 where something is damaged."""
    from rich.console import Console

    from shards.errors import UserError
    from shards.files import atomic_write, check_output
    from shards.places import open_place
    from shards.verify import verify

    if args.fast and args.decode:
        raise UserError("--fast looks at lengths only and --decode at every pixel: choose one.")
    if args.workers is not None and args.workers < 0:
        raise UserError(f"the number of workers must be 0 or more, got {args.workers}.")
    if args.json:
        check_output(args.json, "--json")
    console = Console(highlight=False, soft_wrap=True)
    level = "fast" if args.fast else "decode" if args.decode else "hash"
    with _bar(console, "Decoding" if args.decode else "Reading") as progress:
        verdict = verify(open_place(args.shards), level=level, workers=args.workers, progress=progress)
    if args.json:
        text = json.dumps({"folder": args.shards} | verdict.to_json(), indent=1, ensure_ascii=False)
        atomic_write(args.json, (text + "\n").encode())
    _print(console, args.shards, verdict)
    return 1 if verdict.damaged else 0


@contextmanager
def _bar(console: Console, what: str) -> Iterator[Callable[[int, int, int], None]]:
    """A bar of bytes; gives the function of (done, total, findings) that moves it. None without a terminal."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.progress import TransferSpeedColumn as Speed

    if not console.is_terminal:
        yield lambda *_: None
        return
    found = TextColumn("[yellow]{task.fields[found]}")
    columns = (
        TextColumn(what),
        BarColumn(),
        DownloadColumn(),
        Speed(),
        TimeRemainingColumn(compact=True),
        found,
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None, found="")

        def show(done: int, total: int, findings: int) -> None:
            bar.update(task, completed=done, total=total, found=f"{findings:,} findings" if findings else "")

        yield show


def _print(console: Console, folder: str, verdict: Verdict) -> None:
    from shards.progress import human_size

    if verdict.findings:
        console.print(_table(verdict.findings))
        shown = sum(
            min(count, _SHOWN_PER_FILE) for count in Counter(f.file for f in verdict.findings).values()
        )
        hidden = len(verdict.findings) - min(shown, _SHOWN)
        if hidden:
            console.print(f"... and {hidden:,} more; --json FILE lists them all.", markup=False)
    looked = {
        "fast": "names and lengths are right (--fast reads no bytes)",
        "hash": "every byte is as it was written",
        "decode": "every byte is as it was written, and every image decodes",
    }[verdict.level]
    about = (
        f"{verdict.num_samples:,} samples in {verdict.num_shards:,} shards, {human_size(verdict.num_bytes)}"
    )
    speed = f"{verdict.duration_s:,.1f} s"
    if verdict.damaged:
        files = {finding.file for finding in verdict.findings if not finding.harmless}
        samples = {finding.sample_id for finding in verdict.findings if finding.sample_id is not None}
        hurt = f", {len(samples):,} sample{'' if len(samples) == 1 else 's'}" if samples else ""
        noun = "file" if len(files) == 1 else "files"
        text = f"{folder} is DAMAGED: {len(files):,} {noun}{hurt} of {about} ({speed})."
        console.print(text, style="red", markup=False)
    else:
        console.print(f"{folder} is whole: {looked}. {about} ({speed}).", style="green", markup=False)


def _table(findings: list[Finding]):
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
        table.add_row(*(Text(cell) for cell in cells), style="dim" if finding.harmless else "")
    return table
