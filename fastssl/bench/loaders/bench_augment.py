"""`fastssl bench augment`: the time from decoded images to the views of a batch, ours and others', on a GPU or a CPU."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from fastssl.bench.guard import exit_code
from fastssl.bench.report import Row, brief, busy, machine, tell_failures, write_measured
from shards.errors import UserError, check_least
from shards.storage.atomic_files import check_output

if TYPE_CHECKING:
    import torch

    from fastssl.bench.loaders.augmenters import Decoded


@dataclass(frozen=True)
class BenchAugment:
    """Measure how fast decoded images become the views of a batch: our kernels, and others on the same images.

    Reading and decoding are not in it. A source image counts once, however many views are made of it. What fails says why in its row;
    the others go on, and the exit code is 1.
    """

    shards: Annotated[str, tyro.conf.Positional] = ""
    """Folder of shards to take images from; without it, generated pictures of ImageNet's sizes."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the views are made, and where the decoded images lie."""
    recipe: str = "moco_v3"
    """Name of a preset."""
    size: int = 224
    """Side of the views in pixels."""
    batch: int = 256
    """Images a batch."""
    images: int = 0
    """Images used, over and over; 0: two batches, so that none is still in a cache when its turn comes."""
    threads: int = 0
    """Threads of those that work on the CPU; 0: one per core."""
    repeats: int = 3
    """Times each is measured, in turns."""
    seconds: float = 2.0
    """Least length of one measurement."""
    engines: str = "all"
    """What to measure: all that the device can do, or names with commas: triton, torch, fused, kornia, kornia-modules, dali-graph,
    torchvision-v2."""
    json: str = ""
    """File for the results: a list with a row for each, written anew after each measurement."""


def run(argv: list[str]) -> int:
    """Run the sub-command."""
    args = tyro.cli(BenchAugment, prog="fastssl bench augment", args=argv)
    if args.json:
        check_output(args.json, "--json")
    _check(args)
    import torch
    from rich.console import Console

    from fastssl.bench.loaders.augment_turns import measure
    from fastssl.bench.loaders.augmenters import AUGMENTERS
    from fastssl.bench.loaders.bench_loader import choose
    from fastssl.core.distributed import choose_device

    device = choose_device(args.device)
    named = choose(args.engines, AUGMENTERS, "engine")
    chosen = [each for each in named if args.engines != "all" or device.type in each.devices]
    console, where = Console(highlight=False), machine(device)
    work = _open(args, device)
    settings = dataclasses.asdict(args) | {
        "recipe": dataclasses.asdict(work.recipe) | {"preset": args.recipe},
        "device": device.type,
        "threads": work.threads,
        "images": len(work.images),
    }

    def save(rows: list[Row]) -> None:
        if args.json:
            write_measured(args.json, where, settings, rows)

    before = torch.get_num_threads()
    torch.set_num_threads(work.threads)
    try:
        rows = measure(chosen, work, args.repeats, args.seconds, console, save)
    finally:
        torch.set_num_threads(before)
    _show(console, rows, work, where, args)
    if args.json:
        console.print(f"[dim]Written to {args.json}[/]")
    return exit_code(rows)


def _check(args: BenchAugment) -> None:
    check_least(args, size=1, batch=1, images=0, threads=0, repeats=1)
    if args.seconds <= 0:
        raise UserError(f"--seconds is {args.seconds:g}, but it must be above 0.")
    if args.images and args.images < args.batch:
        raise UserError(
            f"--images is {args.images}, fewer than one batch of {args.batch}: raise it, or lower --batch."
        )


def _open(args: BenchAugment, device: torch.device) -> Decoded:
    """The images. UserError where the shards hold fewer than a batch, or other images than 8-bit ones of 1 or 3 channels."""
    from fastssl.bench.loaders.augmenters import Decoded
    from pipelines.augment.recipe import get_recipe
    from pipelines.loading.loader import default_threads
    from pipelines.previews.pictures import photographs

    recipe = dataclasses.replace(get_recipe(args.recipe), size=args.size)
    count = args.images or 2 * args.batch
    if args.shards:
        from pipelines.kernels.decode import decode_rgb
        from shards.dataset.order import epoch_order
        from shards.dataset.shard_set import ShardSet

        shards = ShardSet.open(args.shards)
        kinds, channels = shards.manifest.dtypes, shards.manifest.channels
        if kinds != ["uint8"] or not set(channels) <= {1, 3}:
            raise UserError(
                f"bench augment measures 8-bit images of 1 or 3 channels, and '{args.shards}' has {', '.join(kinds)} images of "
                f"{', '.join(map(str, channels))} channels: name other shards, or none."
            )
        ids = epoch_order(shards.num_samples, 0, 0)[:count]
        if len(ids) < args.batch:
            raise UserError(
                f"'{args.shards}' has {len(ids)} images, fewer than one batch of {args.batch}: lower --batch to at most {len(ids)}."
            )
        images = [decode_rgb(shards.read(int(i))).permute(1, 2, 0).contiguous().numpy() for i in ids]
    else:
        few = photographs(min(count, 64))
        images = [few[i % len(few)] for i in range(count)]
    return Decoded(images, recipe, args.batch, device, args.threads or default_threads())


def _show(console: Any, rows: list[Row], work: Decoded, where: dict[str, Any], args: BenchAugment) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from fastssl.bench.loaders.augment_turns import least_bytes
    from shards.units import human_size

    recipe, on_gpu = work.recipe, work.device.type == "cuda"
    width, height = (statistics.median_low(side.tolist()) for side in work.sides())
    title = (
        f"{work.batch} decoded images of {width} x {height} into {recipe.total_views} views each of {recipe.size} px, recipe "
        f"{args.recipe}"
    )
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("engine", no_wrap=True)
    for name in ("ms a\nbatch", "device\nms", "images\nper s", "spread", "ours\nis x", "GB/s", "GB"):
        if on_gpu or not name.startswith("device"):
            table.add_column(name, justify="right", no_wrap=True)
    table.add_column("fidelity", no_wrap=True)
    notes = []
    for row in rows:
        notes.append(row.note)
        name = f"{row.name} [dim]{len(notes)}[/]"
        if row.images_per_s is None:
            table.add_row(name, "failed", *[""] * (6 if on_gpu else 5), row.fidelity)
            continue
        more = row.more
        device = [_figure(more.get("device_ms"))] if on_gpu else []
        table.add_row(
            name,
            _figure(more["ms_p50"]),
            *device,
            brief(row.images_per_s),
            row.spread(),
            "" if row.ratio is None else f"{more['ours_over_this']:.2f}",
            f"{more['gb_per_s']:,.{0 if on_gpu else 2}f}",
            f"{more['peak_memory_bytes'] / 1e9:.2f}",
            row.fidelity,
        )
    console.print(table)
    tell_failures(console, rows)
    alone = " device ms: the GPU's work alone, all launches queued before it." if on_gpu else ""
    least = human_size(least_bytes(work))
    console.print(
        f"{where['gpu'] or where['cpu']}, {where['cores']} cores{busy(where)}; {work.threads} threads; median and spread of "
        f"{args.repeats} turns of {args.seconds:g} s after warm-up. Draws are in the time, decoding is not.{alone} GB/s: of the "
        f"{least} a batch that it takes to read each crop box and to write each float32 view once. GB: peak memory from its opening "
        f"on{'' if on_gpu else ', less what an earlier one has left to it'}. Fidelity of ours is measured: exact is within half a "
        "grey level of PIL on average, close within two.",
        style="dim",
        markup=False,
    )
    for number, note in enumerate(notes, 1):
        console.print(f"{number} {note}.", style="dim", markup=False)


def _figure(value: float | None) -> str:
    return "" if value is None else brief(value)
