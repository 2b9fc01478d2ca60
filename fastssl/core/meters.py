"""Meters and the log of a run: means kept on the device, rates, metrics.jsonl, and the progress display."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from fastssl.core.distributed import mean_over_ranks, rank, world
from shards.errors import UserError
from shards.storage.atomic_files import atomic_write
from shards.terminal import print_wrapped
from shards.units import human_time


class Meters:
    """Means of metrics since the last log step. Adding never waits for the device; reading does."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._count: torch.Tensor | int = 0
        self._replaced = 0
        self._started_s, self._wait_s = time.perf_counter(), 0.0

    def start(self) -> None:
        """Measure time from now on: what was before, such as building the model, is not of the first row."""
        self._started_s, self._wait_s = time.perf_counter(), 0.0

    def add(
        self,
        metrics: dict[str, torch.Tensor],
        wait_s: float,
        applied: torch.Tensor | bool = True,
        replaced: int = 0,
    ) -> None:
        """Add one step.

        Args:
            metrics: scalars on the device.
            wait_s: seconds that the step waited for data.
            applied: whether the optimizer has stepped, the same on every rank, on the device; means leave out a step that was not.
            replaced: samples of the step that others replaced because they did not decode.
        """
        for name, value in metrics.items():
            value = value.detach().float()
            if isinstance(applied, torch.Tensor):
                value = torch.where(applied, value, 0.0)
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
        self._count = self._count + (applied if isinstance(applied, torch.Tensor) else int(applied))
        self._wait_s += wait_s
        self._replaced += replaced

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time inside, such as an evaluation or a save, from images/s and from the share of waiting."""
        began_s = time.perf_counter()
        yield
        self._started_s += time.perf_counter() - began_s

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs to report the same means. All ranks call it, and hold the means over ranks afterwards.

        So a run on any number of ranks continues from one file.
        """
        self._sums, self._replaced = self._over_ranks()
        if rank():
            # The first rank has counted all of them.
            self._replaced = 0
        return {
            "sums": {k: v.cpu() for k, v in self._sums.items()},
            "count": int(self._count),
            "replaced": self._replaced,
        }

    def restore(self, state: dict[str, Any], device: torch.device) -> None:
        """Continue from the result of `state`. Times start again at 0."""
        self._sums = {k: v.to(device) for k, v in state["sums"].items()}
        self._count, self._replaced = state["count"], 0 if rank() else state.get("replaced", 0)
        self.start()

    def read(self, images_per_step: int, steps_timed: int) -> dict[str, float]:
        """Return the values since the last reading and reset; every rank calls it.

        Means over steps and ranks (none where no step was applied), images/s over all ranks, the share of time spent waiting for
        data in [0, 1], and the number of samples that others replaced.
        """
        sums, replaced = self._over_ranks()
        # The only wait for the device.
        values = {k: float(v / self._count) for k, v in sums.items()}
        values = {k: v for k, v in values.items() if math.isfinite(v)}
        seconds = max(1e-9, time.perf_counter() - self._started_s)
        values["images_per_s"] = images_per_step * steps_timed / seconds
        values["data_wait"] = min(1.0, self._wait_s / seconds)
        values["stand_ins"] = replaced
        self._sums, self._count, self._replaced = {}, 0, 0
        self.start()
        return values

    def _over_ranks(self) -> tuple[dict[str, torch.Tensor], int]:
        """Return the means over ranks of the sums, and the number of replaced samples on all of them."""
        if world() == 1:
            return dict(self._sums), self._replaced
        # No step since the last reading, on any rank.
        if not self._sums:
            return {}, self._replaced
        like = next(iter(self._sums.values()))
        means = mean_over_ranks({**self._sums, "": torch.full_like(like, self._replaced)})
        return means, round(float(means.pop("")) * world())


class MetricsLog:
    """metrics.jsonl: one JSON object a line; a resume cuts it back to the checkpoint's step.

    `last` is the newest row from before, empty where there was none; `highest` holds the highest value of each metric so far,
    without the rows of step 0, where nothing is trained. A run that starts at step 0 starts with an empty log.
    """

    def __init__(self, path: Path, resume_step: int):
        self._path = path
        self.last: dict[str, Any] = {}
        self.highest: dict[str, float] = {}
        if path.exists():
            # Lines after the checkpoint belong to steps that will be repeated; the last line may be incomplete.
            rows = [
                row
                for row in map(_parse, path.read_text().splitlines())
                if row and resume_step and row["step"] <= resume_step
            ]
            self.last = rows[-1] if rows else {}
            for row in rows:
                self._note(row)
            atomic_write(path, "".join(json.dumps(row) + "\n" for row in rows).encode())

    def write(self, row: dict[str, Any]) -> None:
        """Append a row, which must hold `step`; numbers keep six significant digits. Raise UserError for a full disk."""
        short = {k: six_digits(v) if isinstance(v, float) else v for k, v in row.items()}
        with self._told(), open(self._path, "a") as file:
            file.write(json.dumps(short) + "\n")
        self._note(short)

    def flush(self) -> None:
        """Flush the rows so far to the disk, so that they survive a loss of power."""
        with self._told(), open(self._path, "a") as file:
            os.fsync(file.fileno())

    def _note(self, row: dict[str, Any]) -> None:
        for name, value in row.items() if row["step"] else ():
            self.highest[name] = max(value, self.highest.get(name, value))

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"'{self._path}' cannot be written ({error.strerror}): make room or fix it, then continue with --resume."
            ) from error


def six_digits(value: float) -> float:
    """Return the value with the six significant digits that the log keeps."""
    return float(f"{value:.6g}")


def _parse(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) and "step" in row else None


SHOWN = {
    "loss": "loss {:.3f}",
    "ce_norm": "ce/lnN {:.3f}",
    "acc": "acc {:.0%}",
    "feature_std": "std {:.2f}",
    "images_per_s": "{:,.0f} img/s",
    "data_wait": "wait {:.0%}",
}
# Columns from which on all values fit beside the bar; in fewer columns it shows those of NARROW. A test draws the longest ones.
WIDE = 120
NARROW = ("ce_norm", "acc", "images_per_s")


class ProgressDisplay:
    """A progress bar in a terminal, a line every `QUIET_S` elsewhere; nothing if `show` is false, as on all ranks but 0."""

    # Seconds between lines, without a terminal.
    QUIET_S = 20.0

    def __init__(self, total_steps: int, done_steps: int, show: bool, task: str = "train"):
        """Prepare the display; `task` names the bar until the first metrics."""
        self.console = Console(quiet=not show, highlight=False)
        self._live = show and self.console.is_terminal
        self._total = total_steps
        self._done = done_steps
        self._began_s = 0.0
        # The first line comes at once.
        self._spoke_s = -self.QUIET_S
        self._bar = self._progress(TextColumn("{task.fields[status]}"))
        self._task = self._bar.add_task(task, total=total_steps, completed=done_steps, status="")

    def _progress(self, *more: ProgressColumn) -> Progress:
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=12 if self.console.width >= WIDE else 6),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            *more,
            console=self.console,
            disable=not self._live,
        )

    def __enter__(self) -> ProgressDisplay:
        self._began_s = time.perf_counter()
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def step(self, step: int) -> None:
        """Move the bar to `step`."""
        self._bar.update(self._task, completed=step)

    def log(self, step: int, epoch: int, epochs: int, values: dict[str, float]) -> None:
        """Show the newest metrics. Without a terminal: now and then, and after the last step, with the time that is left."""
        wide = self.console.width >= WIDE or not self._live
        # Of the two, a share of chance can be read without knowing the size of the batch.
        narrow = NARROW if "ce_norm" in values else ("loss", *NARROW)
        # A value may be missing: there are no means where every step was skipped.
        status = "  ".join(
            text.format(values[name])
            for name, text in SHOWN.items()
            if name in values and (wide or name in narrow)
        )
        self._bar.update(self._task, description=f"epoch {epoch + 1}/{epochs}", status=status)
        now_s = time.perf_counter()
        if not self._live and (step == self._total or now_s - self._spoke_s >= self.QUIET_S):
            self._spoke_s = now_s
            left_s = (now_s - self._began_s) / max(1, step - self._done) * (self._total - step)
            left = f"  {human_time(left_s)} left" if step < self._total else ""
            self.say(f"epoch {epoch + 1}/{epochs}  step {step}/{self._total}  {status}{left}")

    @contextmanager
    def counting(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """Give what shows a count before the first step: it takes what is done and the total."""
        bar = self._progress()
        task, spoke_s = bar.add_task(what), -self.QUIET_S

        def show(done: int, total: int) -> None:
            nonlocal spoke_s
            bar.update(task, completed=done, total=total)
            if not self._live and (done == total or time.perf_counter() - spoke_s >= self.QUIET_S):
                spoke_s = time.perf_counter()
                self.say(f"{what}: {done:,} of {total:,}")

        with bar:
            yield show

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        print_wrapped(self.console, text)
