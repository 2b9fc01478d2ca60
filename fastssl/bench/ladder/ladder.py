"""`fastssl bench CONFIG`: the ladder from bytes to a training step, and its bottleneck."""

from __future__ import annotations

import argparse
import dataclasses
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shards.errors import UserError, check_least
from shards.storage.atomic_files import check_output

if TYPE_CHECKING:
    import torch

    from fastssl.bench.ladder.step_rungs import Trainee
    from fastssl.bench.ladder.verdict import Switches, Verdict
    from fastssl.pretraining.run_config import Resolved

USAGE = """usage: fastssl bench CONFIG [--data.shards SHARDS] [--rows NAMES] [--quick]
                            [--json FILE] [--section.key value ...]

Measure each part of a run on this machine, in one process: the full step on
synthetic views, the loader and end to end, the step's parts, read, decode, to
device, augment. Then name the bottleneck and the setting to try. train.batch is
the batch of this one device. Without --data.shards only the step is measured.
A row that fails gives the reason, and the exit code is 1.
  --rows NAMES  rows to measure, names with commas, or all: those that this
                device and these shards allow (all)
{rows}
  --quick       few steps, no comparisons: half a minute instead of minutes
  --steps N     steps of one measurement (20)
  --repeats N   measurements of each row (3)
  --json FILE   file for the results, rewritten after each row"""


@dataclass(frozen=True)
class Options:
    """Options of the ladder's measurement."""

    steps: int = 20
    """Steps of one measurement."""
    repeats: int = 3
    """Measurements of each row."""
    rows: str = "all"
    """Names with commas of `ladder_rows.GROUPS`, or all."""
    quick: bool = False
    """Leave out comparisons, where `rows` is all."""
    json: str = ""
    """JSON file for the results; empty: none."""


def usage() -> str:
    """Return the text of `fastssl bench CONFIG --help`."""
    from fastssl.bench.ladder.ladder_rows import GROUPS

    rows = "\n".join(f"    {name:16}{text}" for name, text in GROUPS.items())
    return USAGE.format(rows=rows)


def run(argv: list[str]) -> int:
    """Run the command."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if argv[0].startswith("-"):
        raise UserError(f"Give the configuration file first: fastssl bench CONFIG {' '.join(argv)}")
    parser = argparse.ArgumentParser(
        "fastssl bench CONFIG", usage="fastssl bench CONFIG [options]", allow_abbrev=False
    )
    parser.add_argument("--rows", default="all")
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
        raise UserError("`fastssl bench` measures one process: start it without torchrun.")

    from fastssl.pretraining import run_config

    options = Options(steps, repeats, args.rows, args.quick, args.json)
    return report(run_config.load(argv[0], overrides), options)


def report(resolved: Resolved, options: Options) -> int:
    """Measure, show and write a configuration's ladder; return 130 if Ctrl-C stopped it, 1 if a row failed, else 0.

    Raises:
        UserError: the model does not fit in the memory of the device, or the shards hold fewer images than a batch.
    """
    from rich.console import Console

    from fastssl.bench.guard import Guard, exit_code, out_of_memory
    from fastssl.bench.hardware import peak
    from fastssl.bench.ladder.ladder_rows import Ladder
    from fastssl.bench.ladder.ladder_table import show
    from fastssl.bench.ladder.step_peers import peer_rows
    from fastssl.bench.ladder.step_rungs import build
    from fastssl.bench.ladder.verdict import judge
    from fastssl.bench.report import machine, write_report
    from fastssl.bench.screen import Stoppable, say_written
    from fastssl.bench.step_timer import StepTimer
    from fastssl.core.distributed import choose_device
    from fastssl.core.out_of_memory import bracketed_cause
    from fastssl.pretraining.build import follow_shards

    if resolved.config.data.shards:
        resolved = follow_shards(resolved, resolved.config.data.open())
    train = resolved.config.train
    device = choose_device(train.device)
    groups = choose_groups(resolved, device, options)
    where = machine(device)
    console = Console(highlight=False)
    timer = StepTimer(device, train.batch, options.steps, options.repeats, console)
    advice = "lower --train.batch to what one device gets, or set --train.micro-batch auto"
    no_memory = f"a batch of {train.batch} does not fit in the memory of the device: {advice}"
    try:
        trainee = build(resolved, device)
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise UserError(
            f"{resolved.config.model.backbone} does not fit in the memory of {where['gpu'] or 'this machine'}"
            f"{bracketed_cause(error)}: {advice}."
        ) from error
    top = peak(device, trainee.dtype)
    facts = {
        "dtype": str(trainee.dtype).removeprefix("torch."),
        "chunk": trainee.chunk,
        "flops_per_image": trainee.flops,
        "unfused_bytes_per_step": trainee.traffic(trainee.batch),
    }
    settings = {
        "config": resolved.tree(),
        "device": str(device),
        "steps": options.steps,
        "repeats": options.repeats,
        **facts,
    }
    allowed = switches(resolved, trainee)

    def judged(ladder: Ladder) -> Verdict:
        rates = {name: row.images_per_s for name, row in ladder.rows.items()}
        kinds = {"compiled": ladder.compiled, "can_compile": ladder.can_compile}
        return judge(rates, dataclasses.replace(allowed, **kinds), ladder.contention)

    def save(ladder: Ladder, *, complete: bool = False) -> None:
        if options.json:
            verdict = judged(ladder)
            more = {
                "peak": dataclasses.asdict(top),
                "verdict": dataclasses.asdict(verdict),
                "conclusion": verdict.sentence,
            }
            known = settings | {"compiled": ladder.compiled}
            rows = list(ladder.rows.values())
            write_report(options.json, "ladder", where, known, rows, complete=complete, **more)

    ladder = Ladder(resolved, trainee, timer, Guard(device, no_memory), top, save)
    del trainee
    with Stoppable(console) as measuring:
        ladder.measure(groups)
        # Others' steps take longer.
        fewer = StepTimer(device, train.batch, max(1, options.steps // 2), options.repeats, console)
        ladder.each(peer_rows(resolved, fewer, groups))
    save(ladder, complete=not measuring.stopped)
    known = facts | {"compiled": ladder.compiled}
    show(console, ladder, judged(ladder), where, known)
    say_written(console, options.json)
    return exit_code(ladder.rows.values(), stopped=measuring.stopped)


def choose_groups(resolved: Resolved, device: torch.device, options: Options) -> list[str]:
    """Return the groups of rows to measure, in the order of measuring.

    Raises:
        UserError: a name is unknown; shards are needed and not given, or hold fewer images than a batch.
    """
    from fastssl.bench.ladder.data_rungs import open_work
    from fastssl.bench.ladder.ladder_rows import GROUPS, QUICK, WITH_SHARDS, usual_groups
    from fastssl.bench.loaders.bench_loader import choose

    if options.rows == "all":
        usual = usual_groups(resolved, device)
        chosen = [name for name in usual if name in QUICK or not options.quick]
    else:
        named = choose(options.rows, {name: name for name in GROUPS}, "row")
        chosen = [name for name in GROUPS if name in named]
    wanting = [name for name in chosen if name in WITH_SHARDS]
    if wanting and not resolved.config.data.shards:
        raise UserError(
            f"--rows {','.join(wanting)} needs images: give --data.shards, or leave these rows out."
        )
    if wanting:
        # Raises UserError, with both numbers, for fewer images than a batch.
        open_work(resolved)
    return chosen


def switches(resolved: Resolved, trainee: Trainee) -> Switches:
    """Return the run's settings that a verdict may advise to change; whether the step is compiled is set later."""
    import torch

    from fastssl.bench.installed import is_there
    from fastssl.bench.ladder.step_rungs import is_cnn
    from fastssl.bench.ladder.verdict import Switches
    from fastssl.pretraining.build import compute_dtype
    from pipelines.loading.loader import default_threads
    from pipelines.streaming.cache import SHARE, decoded_sizes, eight_bit, free_memory

    data, train, channels = resolved.config.data, resolved.config.train, len(resolved.config.recipe.mean)
    fits = can_decode = False
    if data.shards:
        shards = data.open()
        fits = int(decoded_sizes(shards, channels).sum()) < SHARE * free_memory()
        can_decode = (
            eight_bit(shards)
            and channels == 3
            and data.engine == "fused"
            and not trainee.in_chunks
            and is_there("nvidia.nvimgcodec")
        )
    return Switches(
        on_gpu=trainee.device.type == "cuda",
        has_shards=bool(data.shards),
        engine=data.engine,
        augment_on=data.augment_on,
        decode=data.decode,
        can_decode=can_decode,
        cache=data.cache,
        threads=data.threads or default_threads(),
        cores=default_threads(),
        in_chunks=trainee.in_chunks,
        fits_in_ram=fits,
        half=trainee.dtype != torch.float32,
        half_is_fast=compute_dtype("auto", trainee.device) != torch.float32,
        channels_last=train.channels_last,
        is_cnn=is_cnn(trainee.method.backbone),
        checkpointing=train.checkpointing,
    )
