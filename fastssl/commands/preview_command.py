"""`fastssl preview SHARDS --recipe NAME --out views.png`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from pipelines.engines.engine_table import EngineName, engine_names
from shards.command_line import Name, Names, SeveralShards, parse
from shards.errors import UserError, check_least, nearest
from shards.storage.atomic_files import check_output
from shards.units import plural

if TYPE_CHECKING:
    from pipelines.augment.recipe import Recipe

RECIPE_FLAG = "--recipe."


@dataclass(frozen=True)
class Preview:
    """Draw originals beside the views that training would see, as a PNG.

    --ops shows each operation of the recipe alone, with the value drawn; --engines shows how much engines differ. Boxes on the
    originals are the crops of the views framed in the same colour. Settings of the recipe are overridden as for pretrain:
    --recipe.crop-scale 0.2 1. Masks, if any, are drawn over originals and views.
    """

    shards: Annotated[SeveralShards, tyro.conf.Positional, tyro.conf.arg(help_behavior_hint="(required)")]
    """Folder of shards, or several, as in data.shards."""
    recipe: Name = ""
    """Name of a preset, or a configuration with a recipe, by name or file; without: moco_v3, or the recipe of --config."""
    config: Annotated[str, tyro.conf.arg(metavar="CONFIG")] = ""
    """Configuration whose views are shown, by name or file: --config laptop --recipe satellite shows what pretrain then sees."""
    out: Annotated[str, tyro.conf.arg(metavar="FILE.png")] = "views.png"
    """PNG file to write."""
    ops: bool = False
    """Show each operation alone instead of the views."""
    engines: Names = ""
    """Compare engines instead, each with the first one: names separated by commas, such as reference,fused,kornia."""
    rows: int = 6
    """Number of images."""
    epochs: int = 3
    """Number of epochs, each with views of its own."""
    size: int = 0
    """Side of the (global) views in pixels; 0: the recipe's."""
    cell: int = 144
    """Side of each picture on the sheet, in pixels."""
    seed: int = 0
    """Seed of the run, which decides what is drawn for each view."""
    samples: Annotated[str, tyro.conf.arg(metavar="IDS")] = ""
    """Ids of the images to show, separated by commas, such as 3,17; empty: --rows images chosen by --samples-seed."""
    samples_seed: int = 0
    """Which images are shown, whatever is drawn for them."""
    masks: bool = True
    """Draw masks over originals and views."""
    split: Name = ""
    """Split of the shards to show (`fastssl split`); empty: all."""
    engine: EngineName = "fused"
    """Engine that makes the views."""
    value_range: Literal["auto", "type", "percentiles"] = "auto"
    """See data.value_range."""
    bands: tuple[int, ...] = ()
    """Channels shown as red, green and blue, counted from 1; empty: the first three."""


def run(argv: list[str]) -> int:
    """Run the command."""
    rest, changes = _take_recipe_flags(argv)
    args = parse(Preview, "fastssl preview", rest)
    check_output(args.out, "--out")
    check_least(args, rows=1, epochs=1, size=0, cell=96, seed=0, samples_seed=0)
    compared = [name for name in args.engines.split(",") if name]
    for name in compared:
        if name not in engine_names():
            raise UserError(f"There is no engine called '{name}'.{nearest(name, engine_names())}")
    if args.engines and (len(compared) < 2 or args.ops):
        raise UserError(
            "--engines needs two or more names, such as reference,fused, and cannot be combined with --ops."
        )
    from pipelines.previews import preview_sheets
    from shards.splits.split_table import open_mix

    if not args.shards:
        raise UserError("No shards to draw: give SHARDS, the folder that `fastssl shard` made.")
    recipe = _recipe(args, changes)
    shards, out = open_mix(args.shards, args.split), Path(args.out)
    options = preview_sheets.SheetOptions(
        rows=args.rows,
        cell=args.cell,
        seed=args.seed,
        samples=_ids(args.samples),
        samples_seed=args.samples_seed,
        engine=args.engine,
        bands=args.bands,
        value_range=args.value_range,
        masks=args.masks,
        recipe_name=" ".join([args.recipe or args.config or "moco_v3", *changes]),
    )
    shown = plural(len(options.samples) or min(args.rows, len(shards)), "image")
    if compared:
        preview_sheets.engines_sheet(shards, recipe, out, compared, options)
        print(f"{shown} by {', '.join(compared)}: {out}")
    elif args.ops:
        preview_sheets.operations_sheet(shards, recipe, out, options)
        print(f"{shown}, each operation by itself: {out}")
    else:
        preview_sheets.contact_sheet(shards, recipe, out, options, epochs=args.epochs)
        local = f" and {recipe.local_views} at {recipe.local_size} px" if recipe.local_views else ""
        print(
            f"{shown}, {plural(args.epochs, 'epoch')} of {plural(recipe.num_views, 'view')} at {recipe.size} px{local}: {out}"
        )
    return 0


def _ids(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise UserError(
            f"--samples is '{text}', but it must be ids separated by commas, such as 3,17."
        ) from None


def _take_recipe_flags(argv: list[str]) -> tuple[list[str], list[str]]:
    """Return the arguments without and those with a name that begins with `--recipe.`, each with its values."""
    kept: list[str] = []
    taken: list[str] = []
    place = kept
    for token in argv:
        if token.startswith("--"):
            place = taken if token.startswith(RECIPE_FLAG) else kept
        place.append(token)
    return kept, taken


def _recipe(args: Preview, changes: list[str]) -> Recipe:
    from fastssl.pretraining.run_config import load

    named = ["--recipe", args.recipe] if args.recipe else []
    size = ["--recipe.size", str(args.size)] if args.size else []
    return load(args.config or None, [*named, *changes, *size]).config.recipe
