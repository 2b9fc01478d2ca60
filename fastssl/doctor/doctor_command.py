"""`fastssl doctor [SHARDS]`: report what will hinder training on this machine, and what to do about it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from shards.command_line import File, Folder, parse
from shards.terminal import print_wrapped

if TYPE_CHECKING:
    from rich.console import Console

    from fastssl.doctor.checks import Diagnosis


@dataclass(frozen=True)
class Doctor:
    """Check this machine for training: driver, GPUs, compiler, cores, memory, limits and disk; and a data set.

    The exit code is 1 where something is bad, which means that it will fail or give wrong results, and 0 otherwise.
    """

    shards: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[SHARDS]")] = ""
    """A folder of shards to check as well; images are not read (`fastssl verify` reads every byte)."""
    out: Folder = "."
    """Where runs will be written: the room on its disk is checked."""
    json: File = ""
    """Also write the facts and the findings to this JSON file."""


def run(argv: list[str]) -> int:
    """Run the command."""
    args = parse(Doctor, "fastssl doctor", argv)
    from rich.console import Console

    from fastssl.doctor.checks import examine
    from fastssl.doctor.facts import gather
    from shards.storage.atomic_files import atomic_write, check_output

    if args.json:
        check_output(args.json, "--json")
    facts = gather(args.shards, args.out)
    findings = examine(facts)
    _show(Console(highlight=False), findings)
    if args.json:
        report = {"findings": [dataclasses.asdict(f) for f in findings], "facts": dataclasses.asdict(facts)}
        atomic_write(args.json, (json.dumps(report, indent=2) + "\n").encode())
    return 1 if any(finding.level == "bad" for finding in findings) else 0


def _show(console: Console, findings: list[Diagnosis]) -> None:
    from rich.table import Table
    from rich.text import Text

    styles = {"ok": "green", "warn": "yellow", "bad": "bold red"}
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")  # addresses stay whole
    for finding in findings:
        text = Text(finding.found)
        if finding.way_out:
            text.append(f"\n-> {finding.way_out}", style="bold" if finding.level == "bad" else "")
        table.add_row(Text(finding.level, style=styles[finding.level]), finding.check, text)
    console.print(table)
    count = {level: sum(f.level == level for f in findings) for level in ("bad", "warn")}
    if count["bad"]:
        print_wrapped(console, f"{count['bad']} bad, {count['warn']} to look at.", "bold red")
    else:
        print_wrapped(
            console, f"Nothing bad, {count['warn']} to look at." if count["warn"] else "All is well.", "green"
        )
