"""`fastssl doctor [SHARDS]`: what stands in the way of training here, and the way out of each."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    from rich.console import Console

    from fastssl.doctor.finding import Finding


@dataclass(frozen=True)
class Doctor:
    """Check this machine for training: driver, GPUs, packages with known faults, compiler, limits, disks, clock; and a data set.

    Exit code 1 where something is bad, which will fail or give wrong results; 0 where all is well or to be looked at.
    """

    shards: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[SHARDS]")] = ""
    """A folder of shards to look at, too; images are not read (`fastssl shard` again mends what is broken)."""
    out: str = "."
    """Where runs will be written: its disk is looked at."""
    json: str = ""
    """File for facts and findings."""


def run(argv: list[str]) -> int:
    """Run the command."""
    args = tyro.cli(Doctor, prog="fastssl doctor", args=argv)
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


def _show(console: Console, findings: list[Finding]) -> None:
    from rich.table import Table
    from rich.text import Text

    styles = {"ok": "green", "warn": "yellow", "bad": "bold red"}
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")  # addresses stay whole
    for finding in findings:
        told = Text(finding.found)
        if finding.way_out:
            told.append(f"\n-> {finding.way_out}", style="bold" if finding.level == "bad" else "")
        table.add_row(Text(finding.level, style=styles[finding.level]), finding.check, told)
    console.print(table)
    count = {level: sum(f.level == level for f in findings) for level in ("bad", "warn")}
    if count["bad"]:
        console.print(f"{count['bad']} bad, {count['warn']} to look at.", style="bold red")
    else:
        console.print(
            f"Nothing bad, {count['warn']} to look at." if count["warn"] else "All is well.", style="green"
        )
