"""`fastssl bench fidelity`: how far each engine's views are from the per-image reference, operation by operation."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from fastssl.bench.guard import exit_code
from fastssl.bench.report import mark, versions, write_rows
from fastssl.bench.screen import Stoppable, make_table, say, say_written
from shards.command_line import File, Name, Names, Shards, parse
from shards.errors import UserError, check_least, nearest
from shards.storage.atomic_files import check_output
from shards.terminal import print_wrapped

if TYPE_CHECKING:
    from pipelines.previews.engine_fidelity import Difference


@dataclass(frozen=True)
class BenchFidelity:
    """Measure the difference of each engine's views to those of the reference (PIL and torchvision, one image at a time).

    Both get the same draws. Figures are mean absolute differences in levels of 0..255, over all pixels and channels.
    """

    shards: Annotated[Shards, tyro.conf.Positional]
    """Folder of shards of 8-bit images."""
    recipe: Name = "moco_v3"
    """Name of a preset, whose ranges are drawn from."""
    size: int = 224
    """Side of the views in pixels."""
    images: int = 64
    """Number of images of the shards; generated edge cases are measured as well."""
    engines: Names = "fused,dali,kornia"
    """Engines to measure, with commas."""
    json: File = ""
    """JSON file for the results: a list of rows."""


def run(argv: list[str]) -> int:
    """Run the sub-command."""
    args = parse(BenchFidelity, "fastssl bench fidelity", argv)
    if args.json:
        check_output(args.json, "--json")
    check_least(args, size=1, images=1)
    from rich.console import Console

    from pipelines.augment.recipe import get_recipe
    from pipelines.engines.engine_table import engine_names, refuse_deep
    from pipelines.previews.engine_fidelity import classify, encode, measure
    from pipelines.previews.pictures import edge_cases
    from shards.dataset.order import epoch_order
    from shards.dataset.shard_set import ShardSet

    engines = choose_engines(args.engines, engine_names())
    recipe = dataclasses.replace(get_recipe(args.recipe), size=args.size)
    shards = ShardSet.open(args.shards)
    refuse_deep("reference", shards)
    ids = epoch_order(shards.num_samples, 0, 0)[: args.images]
    sets = {
        f"{len(ids)} images": [bytes(shards.read(int(i))) for i in ids],
        "edge cases": [encode(pixels) for pixels in edge_cases().values()],
    }
    console = Console(highlight=False)
    rows: list[dict[str, Any]] = []
    failures: dict[str, str] = {}
    with Stoppable(console) as measuring:
        for engine in engines:
            with console.status(f"measuring {engine}"):
                for pictures, data in sets.items():
                    try:
                        made = measure(engine, recipe, data)
                    except UserError as error:
                        failures[engine] = str(error)
                        break
                    rows += [_row(engine, pictures, name, one, classify) for name, one in made.items()]
                    worst = max(made, key=lambda name: made[name].mean)
                    print_wrapped(
                        console, f"{engine}, {pictures}: at most {made[worst].mean:.3f} levels ({worst})"
                    )
    _show(console, rows, engines, list(sets), args)
    for engine, reason in failures.items():
        print_wrapped(console, f"{engine} was not measured: {reason}", "yellow")
    if args.json:
        about = {"recipe": args.recipe, "versions": versions()} | mark(not measuring.stopped)
        write_rows(args.json, [row | about for row in rows])
    say_written(console, args.json)
    return exit_code([], stopped=measuring.stopped)


def choose_engines(names: str, known: list[str]) -> list[str]:
    """Return the engines that `names` lists with commas; raise UserError for an unknown one."""
    chosen = list(dict.fromkeys(name.strip() for name in names.split(",")))
    for name in chosen:
        if name not in known:
            raise UserError(f"There is no engine called '{name}'.{nearest(name, known)}")
    return chosen


def _row(engine: str, pictures: str, operation: str, made: Difference, classify: Any) -> dict[str, Any]:
    return {
        "name": f"{engine}, {operation}, {pictures}",
        "engine": engine,
        "operation": operation,
        "pictures": pictures,
        "mean_levels": made.mean,
        "p99_levels": made.p99,
        "max_levels": made.most,
        "fidelity": classify(made.mean),
    }


def _show(console: Any, rows: list[dict[str, Any]], engines: list[str], sets: list[str], args: Any) -> None:
    title = f"Mean difference to the reference in levels of 0..255, recipe {args.recipe}, {args.size} px"
    table = make_table(
        title,
        "operation",
        ("\n".join([engine, *pictures.split(" ")]) for engine in engines for pictures in sets),
    )
    found = {(row["engine"], row["pictures"], row["operation"]): row["mean_levels"] for row in rows}
    for operation in dict.fromkeys(row["operation"] for row in rows):
        cells = [found.get((engine, pictures, operation)) for engine in engines for pictures in sets]
        table.add_row(operation, *("-" if cell is None else f"{cell:.3f}" for cell in cells))
    console.print(table)
    say(
        console,
        "Single operations act on pictures of the view's size. Half a level is the rounding to 8 bits.",
    )
