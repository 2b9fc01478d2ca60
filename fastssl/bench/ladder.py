"""`fastssl bench CONFIG`: the ladder from bytes to a training step, and what bounds it."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shards.errors import UserError, check_least
from shards.storage.atomic_files import check_output

if TYPE_CHECKING:
    import torch

    from fastssl.bench.hardware import Peak
    from fastssl.bench.parts import Clock, Trainee
    from fastssl.bench.report import Row
    from fastssl.pretraining.run_config import Resolved

USAGE = """usage: fastssl bench CONFIG [--data.shards DIR] [--quick] [--json FILE] [--section.key value ...]

Measure a configuration rung by rung on this machine, in one process: read, decode, to device, augment, student, teacher, EMA and
optimiser, the full step on synthetic views, the step with augmentation, and end to end; then name the bottleneck and the switch to
try. train.batch is what this one device gets. Without --data.shards only the step is measured.
  --quick      few steps, no comparisons: half a minute instead of minutes
  --steps      steps of one measurement (20)
  --repeats    measurements of each rung (3)
  --json       file for the results"""

EAGER, COMPILED = "full step, eager", "full step, compiled"
EMA, EMA_LOOP = "EMA", "EMA as a Python loop"


@dataclass(frozen=True)
class Ladder:
    """What was measured."""

    rows: dict[str, Row]
    """The rungs, and below them what ours is compared with."""
    contention: float | None
    """Time of a step beside the loader / alone."""
    compiled: bool
    can_compile: bool


def run(argv: list[str]) -> int:
    """Run the command."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if argv[0].startswith("-"):
        raise UserError(f"Give the configuration file first: fastssl bench CONFIG {' '.join(argv)}")
    parser = argparse.ArgumentParser("fastssl bench CONFIG", usage=USAGE, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--json", default="")
    args, overrides = parser.parse_known_args(argv[1:])
    steps, repeats = args.steps or (4 if args.quick else 20), args.repeats or (1 if args.quick else 3)
    check_least(args, steps=1, repeats=1)
    if args.json:
        check_output(args.json, "--json")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("bench measures one process: start it without torchrun.")

    from fastssl.pretraining import run_config

    report(run_config.load(argv[0], overrides), steps, repeats, args.json, compare=not args.quick)
    return 0


def report(resolved: Resolved, steps: int, repeats: int, json_path: str, *, compare: bool) -> None:
    """Measure, show and write. UserError where the batch does not fit in the memory of the device."""
    from rich.console import Console

    from fastssl.bench.hardware import peak
    from fastssl.bench.ladder_table import show
    from fastssl.bench.parts import Clock, build
    from fastssl.bench.report import machine, write_report
    from fastssl.bench.verdict import judge
    from fastssl.core.distributed import choose_device
    from fastssl.core.memory import is_out_of_memory, reason
    from fastssl.pretraining.build import follow_shards

    if resolved.config.data.shards:
        resolved = follow_shards(resolved, resolved.config.data.open())
    train = resolved.config.train
    device = choose_device(train.device)
    where = machine(device)
    console = Console(highlight=False)
    clock = Clock(device, train.batch, steps, repeats, console)
    try:
        trainee = build(resolved, device)
        ladder = measure(resolved, trainee, clock, compare=compare)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"A batch of {train.batch} does not fit in the memory of {where['gpu']}{reason(error)}: lower --train.batch to what one "
            "device gets, or set --train.micro-batch auto."
        ) from error
    top = peak(device, trainee.dtype)
    rates = {name: row.images_per_s for name, row in ladder.rows.items()}
    verdict = judge(rates, switches(resolved, trainee, ladder), ladder.contention)
    annotate(ladder.rows, trainee, top)
    facts = {
        "dtype": str(trainee.dtype).removeprefix("torch."),
        "compiled": ladder.compiled,
        "chunk": trainee.chunk,
        "flops_per_image": trainee.flops,
        "unfused_bytes_per_step": trainee.traffic(trainee.batch),
    }
    del trainee
    if compare:
        add_peers(resolved, clock, ladder.rows)
    show(console, resolved, ladder, verdict, where, facts, top, steps, repeats)
    if json_path:
        settings = {
            "config": resolved.tree(),
            "device": str(device),
            "steps": steps,
            "repeats": repeats,
            **facts,
        }
        more = {
            "peak": dataclasses.asdict(top),
            "verdict": dataclasses.asdict(verdict),
            "conclusion": verdict.sentence,
        }
        write_report(json_path, "ladder", where, settings, list(ladder.rows.values()), **more)
        console.print(f"[dim]Written to {json_path}[/]")


def measure(resolved: Resolved, trainee: Trainee, clock: Clock, *, compare: bool) -> Ladder:
    """All rungs, and with `compare` the ratios of the compiled step to the eager one and of our average to a loop."""
    from fastssl.bench.data_rungs import data_rows, open_work
    from fastssl.bench.parts import step_rows, step_views
    from fastssl.bench.verdict import FULL, RUNGS
    from fastssl.pretraining.build import compile_blocks, has_compiler

    train, rows = resolved.config.train, {}
    can_compile = has_compiler(trainee.device)
    if resolved.config.data.shards:
        work = open_work(resolved)
        rows |= data_rows(resolved, work, clock)
    synthetic = step_views(resolved, trainee)
    momentum = trainee.method.teacher_momentum(0.5)

    def full() -> None:
        trainee.step.gradients(synthetic)
        trainee.step.update(momentum)

    extra = {}
    if compare:
        extra |= _average_rows(trainee, clock)
        if train.compile and can_compile:
            extra[EAGER] = clock.row(EAGER, full)
    compiled = compile_blocks(trainee.method, trainee.device) if train.compile else False
    rows |= step_rows(resolved, trainee, clock)
    rows[FULL] = clock.row(FULL, full)
    contention = None
    if resolved.config.data.shards:
        contention = _beside(resolved, trainee, clock, rows)
    if compare and not compiled and can_compile:
        compile_blocks(trainee.method, trainee.device)
        extra[COMPILED] = clock.row(COMPILED, full)
        extra[COMPILED].compare(rows[FULL])
    elif EAGER in extra:
        rows[FULL].compare(extra[EAGER])
    ordered = {name: rows[name] for name in RUNGS if name in rows}
    return Ladder(ordered | extra, contention, compiled, can_compile)


def _average_rows(trainee: Trainee, clock: Clock) -> dict[str, Row]:
    from fastssl.bench.step_peers import ema_loop, ema_pairs

    pairs = ema_pairs(trainee.method)
    rows = {
        EMA: clock.row(EMA, lambda: trainee.method.update_teacher(0.99)),
        EMA_LOOP: clock.row(EMA_LOOP, lambda: ema_loop(pairs, 0.99)),
    }
    rows[EMA].compare(rows[EMA_LOOP])
    return rows


def _beside(resolved: Resolved, trainee: Trainee, clock: Clock, rows: dict[str, Row]) -> float | None:
    """Add the loader alone, the step with augmentation and end to end; returns how much longer a step takes beside the loader."""
    from fastssl.bench.data_rungs import loader_views, open_work, resident_views
    from fastssl.bench.report import Row
    from fastssl.bench.verdict import END_TO_END, FULL, FULL_AUGMENT, LOADER

    momentum, spans = trainee.method.teacher_momentum(0.5), []

    def full(images: Sequence[torch.Tensor]) -> None:
        began = clock.mark()
        trainee.step.gradients(images)
        trainee.step.update(momentum)
        spans.append((began, clock.mark()))

    try:
        work = open_work(resolved)
        with contextlib.closing(resident_views(resolved, work, clock.device, trainee.in_chunks)) as made:
            rows[FULL_AUGMENT] = clock.row(FULL_AUGMENT, lambda: full(next(made)))
    except NotImplementedError as fault:
        rows[FULL_AUGMENT] = Row(FULL_AUGMENT, error=str(fault))
    with contextlib.closing(loader_views(resolved, clock.device, trainee.in_chunks)) as batches:  # pyright: ignore[reportArgumentType]
        rows[LOADER] = clock.row(LOADER, lambda: next(batches))
        spans.clear()
        rows[END_TO_END] = clock.row(END_TO_END, lambda: full(next(batches)))
    beside_ms = statistics.median(clock.between_ms(a, b) for a, b in spans[-clock.steps * clock.repeats :])
    return beside_ms / rows[FULL].more["ms_p50"]


def annotate(rows: dict[str, Row], trainee: Trainee, top: Peak) -> None:
    """Add to each rung of the step its MFU, 8 forwards an image, and the TB/s that its operations would move unfused."""
    from fastssl.bench.parts import FORWARDS
    from fastssl.bench.verdict import END_TO_END, FULL, FULL_AUGMENT, STUDENT, TEACHER, TO_DEVICE, UPDATE

    forwards = {STUDENT: 6, TEACHER: 2} | dict.fromkeys(
        (FULL, FULL_AUGMENT, END_TO_END, EAGER, COMPILED), FORWARDS
    )
    for name, row in rows.items():
        rate = row.images_per_s
        if not rate:
            continue
        if name in forwards:
            row.more["mfu"] = rate * trainee.flops * forwards[name] / FORWARDS / (top.tflops * 1e12)
        if name in (FULL, FULL_AUGMENT, END_TO_END, EAGER, COMPILED):
            row.more["tb_per_s"] = rate * trainee.traffic(trainee.batch) / trainee.batch / 1e12
        elif name == UPDATE:
            row.more["tb_per_s"] = rate / trainee.batch * trainee.update_bytes / 1e12
        elif name == TO_DEVICE:
            row.more["tb_per_s"] = rate / trainee.batch * row.more["bytes"] / 1e12


def add_peers(resolved: Resolved, clock: Clock, rows: dict[str, Row]) -> None:
    """Measure others' steps and set the ratio of our fastest full step to the plain one."""
    from fastssl.bench.step_peers import peer_rows
    from fastssl.bench.verdict import FULL

    for row in peer_rows(resolved, clock):
        rows[row.name] = row
        if rows[FULL].rates and row.rates:
            row.more["ours_over_this"] = statistics.median(rows[FULL].rates) / statistics.median(row.rates)


def switches(resolved: Resolved, trainee: Trainee, ladder: Ladder) -> Any:
    """The settings that a verdict may advise to change, from the run's."""
    import torch

    from fastssl.bench.parts import is_cnn
    from fastssl.bench.verdict import Switches
    from fastssl.pretraining.build import compute_dtype
    from pipelines.loading.loader import default_threads
    from pipelines.streaming.cache import SHARE, decoded_sizes, free_memory

    data, train = resolved.config.data, resolved.config.train
    fits = False
    if data.shards:
        fits = int(decoded_sizes(data.open(), len(resolved.config.recipe.mean)).sum()) < SHARE * free_memory()
    return Switches(
        on_gpu=trainee.device.type == "cuda",
        engine=data.engine,
        augment_on=data.augment_on,
        cache=data.cache,
        threads=data.threads or default_threads(),
        cores=default_threads(),
        in_chunks=trainee.in_chunks,
        fits_in_ram=fits,
        half=trainee.dtype != torch.float32,
        half_is_fast=compute_dtype("auto", trainee.device) != torch.float32,
        compiled=ladder.compiled,
        can_compile=ladder.can_compile,
        channels_last=train.channels_last,
        is_cnn=is_cnn(trainee.method.backbone),
        checkpointing=train.checkpointing,
    )
