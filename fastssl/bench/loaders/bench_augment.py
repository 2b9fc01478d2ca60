"""`fastssl bench augment`: the time from decoded images to the views of a batch, ours and others', on a GPU or a CPU."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from fastssl.bench.guard import exit_code
from fastssl.bench.report import Row, brief, busy, figure, machine, turns_told, write_measured
from fastssl.bench.screen import Stoppable, make_table, say_written, show
from shards.command_line import File, Name, Names, parse
from shards.errors import UserError, check_least
from shards.storage.atomic_files import check_output

if TYPE_CHECKING:
    import torch

    from fastssl.bench.loaders.augmenters import Decoded


@dataclass(frozen=True)
class BenchAugment:
    """Measure the time from decoded images to the views of a batch: our kernels, and other libraries on the same images.

    Reading and decoding do not count. A source image counts once, however many views are made of it. An engine that fails has the
    reason in its row; the others are measured all the same, and the exit code is 1.
    """

    shards: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[SHARDS]")] = ""
    """Folder of shards with the images; empty: generated pictures of ImageNet's sizes."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device that holds the decoded images and makes the views."""
    recipe: Name = "moco_v3"
    """Name of a preset."""
    size: int = 224
    """Side of the views in pixels."""
    batch: int = 256
    """Images a batch."""
    images: int = 0
    """Number of images, used again and again; 0: two batches, so that no image is still in a cache when it is used again."""
    threads: int = 0
    """Threads of the engines that work on the CPU; 0: one per core."""
    repeats: int = 3
    """Times each engine is measured, in turns."""
    seconds: float = 2.0
    """Shortest length of a measurement, in seconds."""
    engines: Names = "all"
    """Engines to measure: all that run on the device, or names with commas: triton, torch, fused, kornia, kornia-modules, dali-graph,
    torchvision-v2."""
    json: File = ""
    """JSON file for the results, a list with a row for each engine; rewritten after each measurement."""


def run(argv: list[str]) -> int:
    """Run the sub-command."""
    args = parse(BenchAugment, "fastssl bench augment", argv)
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

    rows = [Row(each.name, each.fidelity, note=each.note) for each in chosen]

    def save(*, complete: bool = False) -> None:
        if args.json:
            write_measured(args.json, where, settings, rows, complete=complete)

    before = torch.get_num_threads()
    torch.set_num_threads(work.threads)
    try:
        with Stoppable(console) as measuring:
            measure(chosen, rows, work, args.repeats, args.seconds, console, save)
    finally:
        torch.set_num_threads(before)
    save(complete=not measuring.stopped)
    _show(console, rows, work, where, args)
    say_written(console, args.json)
    return exit_code(rows, stopped=measuring.stopped)


def _check(args: BenchAugment) -> None:
    check_least(args, size=1, batch=1, images=0, threads=0, repeats=1)
    if args.seconds <= 0:
        raise UserError(f"--seconds is {args.seconds:g}, but it must be greater than 0.")
    if args.images and args.images < args.batch:
        raise UserError(
            f"--images is {args.images}, fewer than one batch of {args.batch}: raise it, or lower --batch."
        )


def _open(args: BenchAugment, device: torch.device) -> Decoded:
    """Return the decoded images and how to use them.

    Raises:
        UserError: the shards hold fewer images than a batch, or images that are not 8-bit of 1 or 3 channels.
    """
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
                f"`bench augment` measures 8-bit images of 1 or 3 channels, and '{args.shards}' has {', '.join(kinds)} images of "
                f"{', '.join(map(str, channels))} channels: give other shards, or none."
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
    from fastssl.bench.loaders.augment_turns import least_bytes
    from shards.units import human_size

    recipe, on_gpu = work.recipe, work.device.type == "cuda"
    width, height = (statistics.median_low(side.tolist()) for side in work.sides())
    title = (
        f"{work.batch} decoded images of {width} x {height} into {recipe.total_views} views each of {recipe.size} px, recipe "
        f"{args.recipe}"
    )
    figures = ("ms a\nbatch", "device\nms", "images\nper s", "spread", "ours\nis x", "GB/s", "GB")
    figures = [name for name in figures if on_gpu or not name.startswith("device")]
    table = make_table(title, "engine", figures, "fidelity")
    for row in rows:
        if row.images_per_s is None:
            table.add_row(row.name, *[""] * len(figures), row.why_not)
            continue
        more = row.more
        device = [figure(more.get("device_ms"))] if on_gpu else []
        table.add_row(
            row.name,
            figure(more["ms_p50"]),
            *device,
            brief(row.images_per_s),
            row.spread(),
            *map(figure, (more.get("ours_over_this"), more["gb_per_s"], more["peak_memory_bytes"] / 1e9)),
            row.fidelity,
        )
    alone = " device ms: the GPU's work alone, all launches queued before it." if on_gpu else ""
    least = human_size(least_bytes(work))
    show(
        console,
        table,
        rows,
        f"{where['gpu'] or where['cpu']}, {where['cores']} cores{busy(where)}; {work.threads} threads; median and spread of "
        f"{turns_told(rows)} of {args.seconds:g} s after warm-up. The time includes draws, but not decoding.{alone} GB/s: counts "
        f"{least} a batch, to read each crop box and to write each float32 view once. GB: peak memory since its start"
        f"{'' if on_gpu else ', without what an earlier row has left free'}. The fidelity of our engines is measured: exact is "
        "within half a gray level of PIL on average, close within two.",
    )
