"""`fastssl bench step`: a training step, part by part, on synthetic views, and with the loader where shards are given."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from fastssl.bench.report import Row, brief, busy, machine, tell_failures, write_report
from shards.errors import UserError
from shards.files import check_output

if TYPE_CHECKING:
    from fastssl.bench.parts import Trainee
    from fastssl.config import Resolved

USAGE = """usage: fastssl bench step CONFIG [--steps 20] [--repeats 3] [--json FILE] [--section.key value ...]

Measure a training step of a configuration on synthetic views, in one process: train.batch is what this one device gets.
With --data.shards DIR the loader is measured too, alone and with the step.
  --steps      steps of one measurement
  --repeats    measurements of each part
  --json       file for the results"""


def run(argv: list[str]) -> int:
    """Run the sub-command."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if argv[0].startswith("-"):
        raise UserError(f"Give the configuration file first: fastssl bench step CONFIG {' '.join(argv)}")
    parser = argparse.ArgumentParser("fastssl bench step CONFIG", usage=USAGE, allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", default="")
    args, overrides = parser.parse_known_args(argv[1:])
    for name in ("steps", "repeats"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}, but it must be at least 1.")
    if args.json:
        check_output(args.json, "--json")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("bench step measures one process: start it without torchrun.")

    from fastssl import config

    report(config.load(argv[0], overrides), args.steps, args.repeats, args.json)
    return 0


def report(resolved: Resolved, steps: int, repeats: int, json_path: str) -> None:
    """Measure, show and write. UserError where the batch does not fit in the memory of the device."""
    import torch
    from rich.console import Console

    from fastssl.bench.parts import FULL, PLAIN, Clock, build, measure, plain_row, utilisation
    from fastssl.distributed import choose_device

    train = resolved.config.train
    device = choose_device(train.device)
    where = machine(device)
    console = Console(highlight=False)
    clock = Clock(device, train.batch, steps, repeats, console)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        trainee = build(resolved, device)
        rows = measure(resolved, trainee, clock)
    except torch.OutOfMemoryError as fault:
        raise UserError(
            f"A batch of {train.batch} does not fit in the memory of {where['gpu']}: lower --train.batch to what one device gets."
        ) from fault
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    facts = {"bf16": trainee.bf16, "compiled": trainee.compiled, "forward_flops": trainee.forward_flops}
    closing = conclusion(resolved, trainee, rows)
    full = rows[FULL].images_per_s or 0.0
    mfu = utilisation(full, trainee.forward_flops, where["gpu"] if trainee.bf16 else None)
    del trainee  # the peer gets the whole memory, too
    rows[PLAIN] = plain_row(resolved, clock)
    rows[FULL].compare(rows[PLAIN])
    _show(console, resolved, rows, where, facts, memory, mfu, steps, repeats)
    console.print(closing, markup=False)
    if json_path:
        settings = {
            "config": resolved.tree(),
            "device": str(device),
            "steps": steps,
            "repeats": repeats,
            **facts,
        }
        write_report(
            json_path,
            "step",
            where,
            settings,
            list(rows.values()),
            peak_memory_bytes=memory,
            mfu=mfu,
            conclusion=closing,
        )
        console.print(f"[dim]Written to {json_path}[/]")


def conclusion(resolved: Resolved, trainee: Trainee, rows: dict[str, Row]) -> str:
    """One sentence: what bounds the run, by how much, and the switch to try."""
    from fastssl.bench.parts import END_TO_END, FULL, LOADER

    step, loader, whole = (
        rows[name].images_per_s if name in rows else None for name in (FULL, LOADER, END_TO_END)
    )
    assert step
    if loader is None or whole is None:
        return (
            f"The step makes {brief(step)} images/s; {step_advice(resolved, trainee, rows)}. Give --data.shards to learn whether the "
            "loader keeps up."
        )
    # On a CPU both share the cores, so their times add up; beside a GPU the slower one decides.
    ideal = 1 / (1 / step + 1 / loader) if trainee.device.type == "cpu" else min(step, loader)
    slower, least, most = ("loader", loader, step) if loader < step else ("step", step, loader)
    other = "step" if slower == "loader" else "loader"
    advice = loader_advice(resolved) if slower == "loader" else step_advice(resolved, trainee, rows)
    return (
        f"The {slower} is the bottleneck ({brief(least)} images/s, the {other} makes {brief(most)}); together {brief(whole)}, "
        f"{whole / ideal:.0%} of what these two allow. {advice[0].upper()}{advice[1:]}."
    )


def loader_advice(resolved: Resolved) -> str:
    """The switch that makes the loader of this run faster."""
    from pipelines.loader import default_threads

    data, cores = resolved.config.data, default_threads()
    if data.engine != "fused":
        return "try --data.engine fused"
    if 0 < data.threads < cores:
        return f"try --data.threads {cores}"
    return f"all {cores} cores are in use: try more cores, smaller stored images, or a smaller --recipe.size"


def step_advice(resolved: Resolved, trainee: Trainee, rows: dict[str, Row]) -> str:
    """The switch that makes the step of this run faster."""
    from fastssl.bench.parts import FULL, UPDATE
    from fastssl.build import has_compiler, use_bf16
    from fastssl.methods.parts import depends_on_batch

    train = resolved.config.train
    if not trainee.bf16 and use_bf16("auto", trainee.device):
        return "try --train.precision bf16"
    if not train.compile and has_compiler(trainee.device):
        return "try --train.compile True"
    if not train.channels_last and depends_on_batch(trainee.method.backbone):
        return "try --train.channels_last True"
    if train.checkpointing != "none":
        return "try --train.checkpointing none, if the memory allows"
    share = rows[UPDATE].more["ms_median"] / rows[FULL].more["ms_median"]
    if share > 0.2:
        return f"optimiser and EMA take {share:.0%} of it: try a larger --train.batch"
    return "every switch is on: try a smaller --model.backbone or --recipe.size, or more devices"


def _show(
    console: Any,
    resolved: Resolved,
    rows: dict[str, Row],
    where: dict[str, Any],
    facts: dict[str, Any],
    memory: int | None,
    mfu: float | None,
    steps: int,
    repeats: int,
) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    cfg = resolved.config
    kind = f"{'bf16' if facts['bf16'] else 'fp32'}{', compiled' if facts['compiled'] else ''}"
    title = (
        f"{resolved.method_name} {cfg.model.backbone}, {cfg.recipe.size} px, batch {cfg.train.batch}, {kind}"
    )
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("part", no_wrap=True)
    for name in ("images/s", "spread", "ms", "p95", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows.values():
        if row.images_per_s is None:
            table.add_row(row.name, "failed", "", "", "", "")
            continue
        times = [f"{row.more[key]:,.{3 if row.more[key] < 10 else 0}f}" for key in ("ms_median", "ms_p95")]
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        table.add_row(row.name, brief(row.images_per_s), row.spread(), *times, ratio)
    console.print(table)
    tell_failures(console, rows.values())
    console.print(
        f"{where['gpu'] or where['cpu']}, {where['cores']} cores{busy(where)}; median and spread of {repeats} x {steps} steps after "
        "warm-up. ratio: of the full step to the plain eager one, both on synthetic views; of EMA to the loop.",
        style="dim",
        markup=False,
    )
    for row in rows.values():
        if row.note:
            console.print(f"{row.name}: {row.note}.", style="dim", markup=False)
    if memory is not None:
        console.print(f"Peak GPU memory {memory / 2**30:.1f} GiB.", style="dim")
    if mfu is not None:
        console.print(f"MFU {mfu:.1%} in the full step, counting 8 forwards an image.", style="dim")
