"""`fastssl bench parts`: where the time of an image goes on the CPU, from the shard to finished views, kernel by kernel."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from fastssl.bench.guard import exit_code
from fastssl.bench.report import busy, machine, write_report
from fastssl.bench.screen import Stoppable, say, say_written
from shards.command_line import File, Folder, parse
from shards.errors import UserError, check_least
from shards.storage.atomic_files import check_output

if TYPE_CHECKING:
    import numpy as np

    from pipelines.augment.recipe import Recipe
    from shards.dataset.shard_set import ShardSet

PARTS = (
    "read",
    "decode",
    "crop",
    "brightness",
    "contrast",
    "saturation",
    "hue",
    "gray",
    "blur",
    "solarise",
    "flips, noise, normalising",
)
ONE_CALL, LOADER, REST = (
    "an image in one call",
    "the loader in one thread",
    "order, draws, threads, hand-over",
)


@dataclass(frozen=True)
class BenchParts:
    """Measure where the time of an image goes in the engine fused on the CPU: each of its kernels by itself, in one thread.

    The kernels of a view run one by one on the draws of the recipe. Beside them stand the same image in one call and the loader in one
    thread, whose further time is order, draws, threads and the hand-over of batches. NUMBA_CPU_NAME and NUMBA_CPU_FEATURES choose
    other instructions, such as those of a processor without AVX-512 (docs/benchmarks.md).
    """

    shards: Annotated[Folder, tyro.conf.Positional]
    """Folder of shards with 8-bit images of three channels."""
    recipe: str = "moco_v3"
    """Name of a preset."""
    size: int = 224
    """Side of the views in pixels."""
    images: int = 256
    """Images a turn."""
    repeats: int = 5
    """Turns, after one to warm up."""
    json: File = ""
    """JSON file for the results."""


def run(argv: list[str]) -> int:
    """Run the sub-command."""
    args = parse(BenchParts, "fastssl bench parts", argv)
    if args.json:
        check_output(args.json, "--json")
    check_least(args, size=1, images=1, repeats=1)
    import torch
    from rich.console import Console

    from pipelines.augment.recipe import get_recipe
    from pipelines.kernel_cache import numba
    from shards.dataset.shard_set import ShardSet

    torch.set_num_threads(1)
    recipe, shards = dataclasses.replace(get_recipe(args.recipe), size=args.size), ShardSet.open(args.shards)
    manifest = shards.manifest
    if manifest.dtypes != ["uint8"] or manifest.channels != [3] or len(recipe.mean) != 3:
        raise UserError(
            f"bench parts measures 8-bit images of 3 channels, and '{args.shards}' holds {', '.join(manifest.dtypes)} of "
            f"{', '.join(map(str, manifest.channels))}: give other shards."
        )
    where, console, turns = machine(), Console(highlight=False), []
    with Stoppable(console) as measuring, console.status("") as status:
        for number in range(args.repeats + 1):
            status.update(f"turn {number} of {args.repeats}" if number else "warming up")
            found = measure(shards, recipe, args.images)
            turns += [found] if number else []
    if not turns:
        say(console, "No turn was measured.")
        return exit_code([], stopped=True)
    target = numba.core.codegen.get_host_cpu_features() if not numba.config.CPU_NAME else ""
    cpu = numba.config.CPU_NAME or ("with AVX-512" if "+avx512f" in target else "without AVX-512")
    rows = to_rows(turns)
    _show(console, rows, f"{where['cpu']}, kernels compiled {cpu}{busy(where)}", args, len(turns))
    if args.json:
        settings = dataclasses.asdict(args) | {"kernels": cpu}
        del settings["json"]
        write_report(args.json, "parts", where, settings, [], complete=not measuring.stopped, parts=rows)
    say_written(console, args.json)
    return exit_code([], stopped=measuring.stopped)


def measure(shards: ShardSet, recipe: Recipe, count: int) -> dict[str, float]:
    """Return the milliseconds that an image takes in each of `PARTS`, in one call and in the loader, as a mean of `count` images."""
    import numpy as np

    from pipelines.augment.draws import draw
    from pipelines.engines.fused_engine import FusedEngine

    engine = FusedEngine(recipe)
    spent: dict[str, float] = dict.fromkeys((*PARTS, ONE_CALL), 0.0)
    ids = np.resize(shards.ids, count)
    draws = draw(recipe, 0, 0, ids, shards.widths[ids], shards.heights[ids])
    out = [np.empty((3, recipe.side(v), recipe.side(v)), np.float32) for v in range(len(draws))]
    for i, sample_id in enumerate(ids):
        of_image = np.ascontiguousarray(draws[:, i])
        began = time.perf_counter()
        data = shards.read(int(sample_id))
        spent["read"] += time.perf_counter() - began
        began = time.perf_counter()
        pixels = engine.decode(data)
        spent["decode"] += time.perf_counter() - began
        for number, view in enumerate(out):
            for name, seconds in _one_view(pixels, of_image, number, recipe, view):
                spent[name] += seconds
        began = time.perf_counter()
        engine(shards.read(int(sample_id)), of_image, out)
        spent[ONE_CALL] += time.perf_counter() - began
    found = {name: 1e3 * seconds / count for name, seconds in spent.items()}
    return found | {LOADER: _loader(shards, recipe, count)}


def _one_view(
    pixels: np.ndarray, draws: np.ndarray, number: int, recipe: Recipe, out: np.ndarray
) -> Iterable[tuple[str, float]]:
    """Make a view kernel by kernel; yield the name and the seconds of each."""
    import numpy as np

    from pipelines.augment.noise import noise_table
    from pipelines.cpu_kernels import colour, crop

    one, size = draws[number], out.shape[1]
    height, width = pixels.shape[:2]
    scratch = np.empty(crop.scratch_bytes(height, width, size), np.uint8)
    view, spare = np.empty((3, size, size), np.uint8), np.empty((2, size, size), np.uint8)
    box = [int(one[name]) for name in ("top", "left", "height", "width")]
    steps: list[tuple[str, Callable[..., Any], tuple[Any, ...]]] = [
        ("crop", crop.resize, (pixels, *box, recipe.interpolation == "bicubic", scratch, view))
    ]
    for part in one["order"] if one["jitter"] else ():
        name = ("brightness", "contrast", "saturation", "hue")[part]
        steps.append((name, getattr(colour, f"adjust_{name}"), (view, one[name])))
    if one["gray"]:
        steps.append(("gray", colour.to_gray, (view,)))
    if one["sigma"] > 0:
        steps.append(("blur", colour.gaussian_blur, (view, one["sigma"], spare)))
    if one["solarize"]:
        steps.append(("solarise", colour.solarize, (view,)))
    std = np.array(recipe.std, np.float32)
    bias, fill = -np.array(recipe.mean, np.float32) / std, np.array(recipe.erased(), np.float32)
    rest = (one, np.float32(1) / np.float32(255), 1 / std, bias, fill, noise_table(), out)
    steps.append((PARTS[-1], colour.finish, (view, *rest)))
    for name, kernel, given in steps:
        began = time.perf_counter()
        kernel(*given)
        yield name, time.perf_counter() - began


def _loader(shards: ShardSet, recipe: Recipe, count: int) -> float:
    """Return the milliseconds an image of the loader in one thread, on average over `count` images or a little more."""
    from pipelines.loading.loader import open_loader

    batch = min(64, len(shards))
    loader = open_loader(shards, recipe, batch=batch, threads=1, reuse_memory=True)
    num_batches = -(-count // batch)
    with closing(loader.steps(0, num_batches + 2)) as batches:
        # Two are made ahead before the first is given.
        next(batches), next(batches)
        began = time.perf_counter()
        for _ in range(num_batches):
            next(batches, None)
        return 1e3 * (time.perf_counter() - began) / (num_batches * batch)


def to_rows(turns: list[dict[str, float]]) -> list[dict[str, Any]]:
    """Return a row for each part, the rest of the loader, the one call and the loader: name, median ms, their spread and share."""
    for turn in turns:
        turn[REST] = turn[LOADER] - sum(turn[name] for name in PARTS)
    whole = statistics.median(turn[LOADER] for turn in turns)
    rows = []
    for name in (*PARTS, REST, LOADER, ONE_CALL):
        values = [turn[name] for turn in turns]
        ms = statistics.median(values)
        rows.append({"name": name, "ms": ms, "spread": [min(values), max(values)], "share": ms / whole})
    return rows


def _show(console: Any, rows: list[dict[str, Any]], about: str, args: BenchParts, num_turns: int) -> None:
    from rich.table import Table

    title = f"an image with recipe {args.recipe} at {args.size} px, one thread"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column(style="bold")
    for name in ("ms", "spread", "of the loader"):
        table.add_column(name, justify="right")
    for row in rows:
        low, high = row["spread"]
        table.add_row(row["name"], f"{row['ms']:.3f}", f"{low:.3f}-{high:.3f}", f"{row['share']:.1%}")
    console.print(table)
    say(
        console,
        f"{about}; median and spread of {num_turns} turns of {args.images:,} images. A row is the time that all views of an image "
        "spend in an operation, which only some of them meet.",
    )
