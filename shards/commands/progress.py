"""What a conversion shows on a terminal, and in a log file where there is none."""

from __future__ import annotations

import shlex
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from shards.conversion.convert import ProgressReport
from shards.conversion.shard_plan import Plan
from shards.conversion.size_estimate import estimate
from shards.images.policy import Policy
from shards.sources.file_set import looks_like_splits
from shards.sources.source import Source
from shards.terminal import print_wrapped
from shards.units import human_size, plural

PLAIN_INTERVAL_S = 30.0
_SHOWN = 3


class ConversionScreen(ProgressReport):
    """Progress of one conversion; a context manager. `num_shards`: -1 until the plan stands, then how many were to be made."""

    def __init__(self, console: Console, source: str, policy: Policy):
        self.num_shards = -1
        self.num_converted = 0
        self._console = console
        self._source = source
        self._policy = policy
        self._noun = "image"
        self._first: int | None = None
        self._next_s = time.monotonic() + PLAIN_INTERVAL_S
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("[yellow]{task.fields[quarantined]}"),
        )
        self._bar = Progress(*columns, console=console, transient=True) if console.is_terminal else None
        self._task: Any = None

    def __enter__(self) -> ConversionScreen:
        if self._bar:
            self._task = self._bar.add_task("Listing", total=None, speed="", quarantined="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def listed(self, num_images: int) -> None:
        if self._bar:
            self._bar.update(self._task, completed=num_images)
        else:
            self._plain(f"{plural(num_images, self._noun)} found so far")

    def planned(self, plan: Plan, source: Source, todo: int) -> None:
        if self.num_shards >= 0:  # a second round, without the duplicates
            self._first = None
            return
        self.num_shards, self._noun = todo, source.noun
        classes = plan.classes
        labels = f" in {plural(len(classes), 'class', 'classes')}" if classes else ""
        self.say(f"Found {plural(plan.settings.num_images, source.noun)}{labels} in {self._source}")
        if source.kind == "folder" and looks_like_splits(classes):
            self._warn(
                f"the folders {', '.join(classes)} look like splits, but are taken as classes. To keep them apart, convert each: "
                f"fastssl shard {shlex.quote(self._source.rstrip('/') + '/' + classes[0])} ..."
            )
        if numbers := renumbered(classes):
            self.say(numbers)
        for text in source.describe():
            self.say(text)
        for text in source.warnings():
            self._warn(text)
        if todo:
            for text in self._policy.describe():
                self.say(text)
            self._say_cost(plan, source, todo)

    def _say_cost(self, plan: Plan, source: Source, todo: int) -> None:
        cost = estimate(source, plan, self._policy, todo)
        free = "" if cost.free is None else f", {human_size(cost.free)} are free"
        sizes = f"{human_size(cost.num_bytes)} (the images: {human_size(plan.num_bytes)}){free}"
        self.say(f"{plural(todo, 'shard')} will take about {sizes}")
        if cost.free is not None and cost.num_bytes > cost.free:
            self._warn(
                "that does not fit: make room, choose another DEST, or store less (--short-side, --store jpeg --quality 90)."
            )

    def progress(self, done: int, total: int, quarantined: int) -> None:
        if self._first is None:
            self._first = done
        self.num_converted = done - self._first
        refused = f"{quarantined:,} quarantined" if quarantined else ""
        if self._bar:
            speed = self._bar.tasks[0].speed
            self._bar.update(
                self._task,
                description="Converting",
                completed=done,
                total=total,
                speed=f"{speed:,.0f} {self._noun}s/s" if speed else "",
                quarantined=refused,
            )
        else:
            self._plain(f"{done:,} of {plural(total, self._noun)}, {quarantined:,} quarantined")

    def say(self, text: str) -> None:
        print_wrapped(self._console, text)

    def _warn(self, text: str) -> None:
        print_wrapped(self._console, f"Warning: {text}", "yellow")

    def _plain(self, text: str) -> None:
        if time.monotonic() >= self._next_s:
            self.say(text)
            self._next_s = time.monotonic() + PLAIN_INTERVAL_S


def renumbered(classes: list[str]) -> str:
    """A sentence where the names of classes are numbers, and others than those that the shards give them; else ""."""
    if not all(name.lstrip("-").isdecimal() for name in classes):
        return ""
    changed = [(name, number) for number, name in enumerate(classes) if name != str(number)]
    if not changed:
        return ""
    shown = ", ".join(f"'{name}' is {number}" for name, number in changed[:_SHOWN]) + (
        ", ..." if len(changed) > _SHOWN else ""
    )
    return f"Classes get numbers from 0 on, in .cls and the tables: {shown}. Their names stay, in manifest.json and each JSON."
