"""The rows of the ladder and their measurement, each by itself, so that a row that fails loses no other."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastssl.bench.guard import Guard
from fastssl.bench.hardware import Peak
from fastssl.bench.ladder.data_rungs import data_rows, loader_views, open_work, resident_views
from fastssl.bench.ladder.kernel_times import profiled_row
from fastssl.bench.ladder.step_peers import STEP_PEERS, ema_loop, ema_pairs
from fastssl.bench.ladder.step_rungs import MIDWAY, Trainee, step_rows, step_views
from fastssl.bench.ladder.verdict import (
    AUGMENT,
    COMPILED,
    DECODE,
    EAGER,
    END_TO_END,
    FULL,
    FULL_AUGMENT,
    KERNELS,
    LOADER,
    READ,
    RUNGS,
    STUDENT,
    TEACHER,
    TO_DEVICE,
    UPDATE,
)
from fastssl.bench.report import Row
from fastssl.bench.screen import say_row
from fastssl.bench.step_timer import StepTimer
from fastssl.pretraining.build import compile_blocks, has_compiler
from fastssl.pretraining.run_config import Resolved

EMA, EMA_LOOP = "EMA", "EMA as a Python loop"


@dataclass(frozen=True)
class Ending:
    """The loader's and the end-to-end row with some settings of the section `data`."""

    words: str
    """Appended to the names of the two rows."""
    changes: Mapping[str, Any]

    @property
    def names(self) -> tuple[str, str]:
        """The names of the loader's row and of the end-to-end row."""
        return f"{LOADER}{self.words}", f"{END_TO_END}{self.words}"


ENDINGS = {
    "end": Ending("", {}),
    "end_gpu": Ending(", views on the GPU", {"augment_on": "gpu"}),
    "end_decode": Ending(", decoded on the GPU", {"augment_on": "gpu", "decode": "gpu"}),
    "end_one_stream": Ending(", on the step's stream", {"side_stream": False}),
}
# The names that --rows takes, in the order of measuring: the most informative first.
GROUPS = {
    "full": "the full step on synthetic views",
    "kernels": "the full step's time on the device by kind of kernel",
    "end": "the loader alone, and end to end",
    "end_gpu": "both with --data.augment-on gpu",
    "end_decode": "both with --data.augment-on gpu and --data.decode gpu",
    "end_one_stream": "both with --data.side-stream False",
    "augment": "the full step, with views from decoded images",
    "parts": "student, teacher, EMA + optimizer",
    "data": "read, decode, to device, augment",
    "ema": "the EMA, and the EMA as a Python loop",
    "compile": "the full step, eager where the run compiles it, or compiled",
    "plain": "a step as in MoCo v3's code, one with newer PyTorch",
    "lightly": "a step built from lightly's blocks",
}
WITH_SHARDS = frozenset({*ENDINGS, "augment", "data"})
QUICK = frozenset({"full", "end", "augment", "parts", "data"})
_OF_A_STEP = (FULL, FULL_AUGMENT, EAGER, COMPILED, *(ending.names[1] for ending in ENDINGS.values()))


def usual_groups(resolved: Resolved, device: torch.device) -> list[str]:
    """Return the groups of `--rows all`: those that make sense with the shards, the device and the run's settings."""
    data = resolved.config.data

    def makes_sense(name: str) -> bool:
        if name in WITH_SHARDS and not data.shards:
            return False
        if name == "end" or name not in ENDINGS:
            return True
        # Not on a CPU, where they cannot run, nor with the run's own settings, which "end" measures.
        changes = ENDINGS[name].changes
        return device.type == "cuda" and any(getattr(data, key) != value for key, value in changes.items())

    return [name for name in GROUPS if makes_sense(name)]


Measures = Mapping[str, Callable[[], Row]]
"""Functions that measure rows, by the rows' names."""


class Ladder:
    """Measure groups of rows of one run, and hold the results."""

    def __init__(
        self,
        resolved: Resolved,
        trainee: Trainee,
        timer: StepTimer,
        guard: Guard,
        top: Peak,
        save: Callable[[Ladder], None] = lambda ladder: None,
    ):
        """Compile the trainee, if the run does. `save` is called after each row."""
        self.resolved, self.trainee, self.timer = resolved, trainee, timer
        self.guard, self.top, self._save = guard, top, save
        self._rows: dict[str, Row] = {}
        self.can_compile = has_compiler(timer.device)
        self.compiled = resolved.config.train.compile and compile_blocks(trainee.method, timer.device)
        self._momentum = trainee.method.teacher_momentum(MIDWAY)
        # The names of a group's rows, and a function that returns their measures.
        self._groups: dict[str, tuple[tuple[str, ...], Callable[[], Measures]]] = {
            "full": ((FULL,), lambda: {FULL: lambda: self._full(FULL)}),
            "kernels": ((KERNELS,), lambda: {KERNELS: self._kernels}),
            "augment": ((FULL_AUGMENT,), lambda: {FULL_AUGMENT: self._full_augment}),
            "parts": ((STUDENT, TEACHER, UPDATE), lambda: step_rows(resolved, trainee, timer)),
            "data": (
                (READ, DECODE, TO_DEVICE, AUGMENT),
                lambda: data_rows(resolved, open_work(resolved), timer),
            ),
            "ema": ((EMA, EMA_LOOP), self._ema),
            "compile": ((EAGER if self.compiled else COMPILED,), self._other_kind),
        }

    @property
    def rows(self) -> dict[str, Row]:
        """The rows so far: the rungs from the bottom up, then the others in the order of measuring."""
        return {name: self._rows[name] for name in sorted(self._rows, key=_place)}

    @property
    def contention(self) -> float | None:
        """Time of a step beside the loader / alone; None if one of them was not measured."""
        whole = self._rows.get(END_TO_END)
        return whole.more.get("contention") if whole else None

    def measure(self, groups: list[str]) -> None:
        """Measure those of `groups` that concern the step and the data path, in their order; then free the trainee's memory."""
        for group in groups:
            if group in ENDINGS:
                self._end(ENDINGS[group])
            elif group in self._groups:
                names, open_measures = self._groups[group]
                failed = [Row(name) for name in names]
                measures = self.guard.run(failed, open_measures)
                if measures is None:
                    for row in failed:
                        self._add(row)
                else:
                    self.each(measures)
        self._groups.clear()
        self.trainee = dataclasses.replace(self.trainee, method=None, optimizer=None, step=None)  # pyright: ignore[reportArgumentType]

    def each(self, measures: Measures) -> None:
        """Measure rows one by one."""
        for name, make in measures.items():
            failed = Row(name)
            row = self.guard.run([failed], make)
            self._clear()
            self._add(row or failed)

    def _add(self, row: Row) -> None:
        self._rows[row.name] = row
        annotate(row, self.trainee, self.top)
        full = self._rows.get(FULL)
        if full is not None and full.rates and row.rates:
            if "step_ms" in row.more:
                row.more["contention"] = row.more["step_ms"] / full.more["ms_p50"]
            if row.name in STEP_PEERS:
                row.more["ours_over_this"] = statistics.median(full.rates) / statistics.median(row.rates)
            elif row.name == COMPILED:
                row.compare(full)
            elif row.name == EAGER:
                full.compare(row)
        if row.name == EMA_LOOP:
            self._rows[EMA].compare(row)
        say_row(self.timer.console, row)
        self._save(self)

    def _clear(self) -> None:
        """Drop the gradients that a row has left, for example a step that failed."""
        if self.trainee.optimizer is not None:
            self.trainee.optimizer.zero_grad(set_to_none=True)

    def _step(self, images: Sequence[torch.Tensor]) -> None:
        self.trainee.step.gradients(images)
        self.trainee.step.update(self._momentum)

    def _full(self, name: str) -> Row:
        synthetic = step_views(self.resolved, self.trainee)
        return self.timer.row(name, lambda: self._step(synthetic))

    def _kernels(self) -> Row:
        synthetic = step_views(self.resolved, self.trainee)
        return profiled_row(KERNELS, lambda: self._step(synthetic), self.timer)

    def _full_augment(self) -> Row:
        resolved, timer = self.resolved, self.timer
        work, in_chunks = open_work(resolved), self.trainee.in_chunks
        with contextlib.closing(resident_views(resolved, work, timer.device, in_chunks)) as made:
            return timer.row(FULL_AUGMENT, lambda: self._step(next(made)))

    def _ema(self) -> Measures:
        method, timer = self.trainee.method, self.timer
        pairs = ema_pairs(method)
        if not pairs:
            raise NotImplementedError(f"{self.resolved.method_name} has no teacher")
        return {
            EMA: lambda: timer.row(EMA, lambda: method.update_teacher(0.99)),
            EMA_LOOP: lambda: timer.row(EMA_LOOP, lambda: ema_loop(pairs, 0.99)),
        }

    def _other_kind(self) -> Measures:
        """Return the measure of the eager step if the run compiles it, else of the compiled step if there is a compiler."""

        def eager() -> Row:
            with torch.compiler.set_stance("force_eager"):
                return self._full(EAGER)

        def compiled() -> Row:
            compile_blocks(self.trainee.method, self.timer.device)
            return self._full(COMPILED)

        if self.compiled:
            return {EAGER: eager}
        return {COMPILED: compiled} if self.can_compile else {}

    def _end(self, ending: Ending) -> None:
        loader, whole = (Row(name) for name in ending.names)
        left = [loader, whole]
        timer, spans = self.timer, []

        def full(images: Sequence[torch.Tensor]) -> None:
            began = timer.mark()
            self._step(images)
            spans.append((began, timer.mark()))

        def measured() -> None:
            views = loader_views(self.resolved, timer.device, self.trainee.in_chunks, ending.changes)
            with contextlib.closing(views) as batches:
                made = timer.row(loader.name, lambda: next(batches))
                left.remove(loader)
                self._add(made)
                made = timer.row(whole.name, lambda: full(next(batches)))
                beside = spans[-timer.steps * timer.repeats :]
                made.more["step_ms"] = statistics.median(timer.between_ms(a, b) for a, b in beside)
                left.remove(whole)
                self._add(made)

        self.guard.run(left, measured)
        self._clear()
        for row in left:
            self._add(row)


def _place(name: str) -> int:
    return RUNGS.index(name) if name in RUNGS else len(RUNGS)


def annotate(row: Row, trainee: Trainee, top: Peak) -> None:
    """Add to a row of the step its MFU, without what is recomputed, and the TB/s that its operations would move unfused."""
    rate = row.images_per_s
    if not rate:
        return
    flops = {STUDENT: trainee.student_flops, TEACHER: trainee.teacher_flops} | dict.fromkeys(
        _OF_A_STEP, trainee.flops
    )
    if row.name in flops:
        row.more["mfu"] = rate * flops[row.name] / (top.tflops * 1e12)
    if row.name in _OF_A_STEP:
        row.more["tb_per_s"] = rate * trainee.traffic(trainee.batch) / trainee.batch / 1e12
    elif row.name == UPDATE:
        row.more["tb_per_s"] = rate / trainee.batch * trainee.update_bytes / 1e12
    elif row.name == TO_DEVICE:
        row.more["tb_per_s"] = rate / trainee.batch * row.more["bytes"] / 1e12
