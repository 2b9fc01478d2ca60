"""`fastssl preview SHARDS --recipe NAME --out views.png`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pipelines.engines import EngineName
from shards.errors import UserError
from shards.files import check_output


@dataclass(frozen=True)
class Preview:
    """Draw originals beside the views that training would see, as a PNG."""

    shards: Annotated[str, tyro.conf.Positional]
    """Folder of shards."""
    recipe: str = "moco_v3"
    """Name of a preset, or a configuration file whose recipe is to be shown."""
    out: str = "views.png"
    """PNG file to write."""
    rows: int = 6
    """Images shown."""
    epochs: int = 3
    """Epochs shown: each has its own views."""
    size: int = 0
    """Side of the views in pixels; 0 takes the recipe's."""
    seed: int = 0
    """The seed of the run to be previewed."""
    engine: EngineName = "fused"
    """What makes the views."""


def run(argv: list[str]) -> int:
    """Run the command."""
    args = tyro.cli(Preview, prog="fastssl preview", args=argv)
    check_output(args.out, "--out")
    for name, least in (("rows", 1), ("epochs", 1), ("size", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} is {getattr(args, name)}, but it must be at least {least}.")
    import dataclasses

    from pipelines.preview import contact_sheet
    from pipelines.recipe import get_recipe
    from shards.read import ShardSet

    if args.recipe.endswith((".yaml", ".yml")):
        from fastssl.config import load

        recipe = load(args.recipe).config.recipe
    else:
        recipe = get_recipe(args.recipe)
    if args.size:
        recipe = dataclasses.replace(recipe, size=args.size)
    shards = ShardSet.open(args.shards)
    path = contact_sheet(
        shards, recipe, Path(args.out), rows=args.rows, epochs=args.epochs, seed=args.seed, engine=args.engine
    )
    print(
        f"{min(args.rows, shards.num_samples)} images, {args.epochs} epochs of {recipe.num_views} views at {recipe.size} px: {path}"
    )
    return 0
