"""What people look at before they train: views, the effect of each operation, and how far engines are apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.augment.channels import check_operations, fit_recipe
from pipelines.augment.draws import draw, eval_draws
from pipelines.augment.operation import Operation, PreviewColumn
from pipelines.augment.operations import OPERATIONS
from pipelines.augment.recipe import Recipe
from pipelines.engines.engine_table import make_engine
from pipelines.loading.masks import decode_mask, mask_view
from pipelines.previews.sheet import Display, Sheet, overlay
from pipelines.streaming.bad_samples import bad_sample
from shards.dataset.order import epoch_order
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError

TIMES = 8  # how much the differences of engines are amplified
SEARCH_EPOCHS = 200  # looked through for one that draws an operation
SMALLEST_CELL = 96


def contact_sheet(
    shards: ShardSet,
    recipe: Recipe,
    path: Path,
    *,
    rows: int = 6,
    epochs: int = 3,
    cell: int = 144,
    seed: int = 0,
    engine: str = "fused",
    bands: Sequence[int] = (),
    value_range: str = "type",
) -> Path:
    """Draw `rows` images, each beside its views of the first `epochs` epochs, and write a PNG.

    The views are those that training with this seed and recipe makes, un-normalised, at their true side where that is at least
    96 pixels and enlarged without smoothing where it is less. Masks lie over originals and views where there are any.
    """
    table = _Table(shards, recipe, rows, cell, seed, bands, value_range)
    views = range(table.recipe.total_views)
    heads = ["original"] + [f"epoch {e} view {v + 1}" for e in range(epochs) for v in views]
    sheet = table.sheet(heads)
    for row, sample_id in enumerate(table.ids):
        mask = table.original(sheet, row, sample_id)
        for e in range(epochs):
            draws = table.draws(sample_id, e)
            for v, view in enumerate(table.views(engine, sample_id, draws)):
                picture = table.display.view(view)
                if mask is not None:
                    picture = overlay(picture, mask_view(mask, draws[v], view.shape[-1]))
                sheet.put(row, 1 + e * len(views) + v, picture, describe(draws[v]))
    return sheet.save(path)


def operations_sheet(
    shards: ShardSet,
    recipe: Recipe,
    path: Path,
    *,
    rows: int = 6,
    cell: int = 144,
    seed: int = 0,
    engine: str = "fused",
    bands: Sequence[int] = (),
    value_range: str = "type",
) -> Path:
    """Draw each operation of the recipe by itself on the centre of `rows` images, with the value drawn, and write a PNG.

    The value is that of the first epoch and view in which the image meets the operation.
    """
    table = _Table(shards, recipe, rows, cell, seed, bands, value_range)
    shown = columns(table.recipe)
    sheet = table.sheet(["original", "centre", *(column.title for _, column in shown)])
    for row, sample_id in enumerate(table.ids):
        table.original(sheet, row, sample_id)
        at = np.array([sample_id])
        still = eval_draws(table.recipe, shards.widths[at], shards.heights[at])[0]
        for name, neutral in (("brightness", 1), ("contrast", 1), ("saturation", 1), ("order", [0, 1, 2, 3])):
            still[name] = neutral
        sheet.put(row, 1, table.display.view(table.views(engine, sample_id, still)[0]), "nothing else")
        for place, (operation, column) in enumerate(shown, start=2):
            epochs = (table.draws(sample_id, e)[: table.recipe.num_views] for e in range(SEARCH_EPOCHS))
            found = next((d for draws in epochs for d in draws if operation.happens(d)), None)
            if found is None:
                sheet.put(row, place, Image.new("RGB", (cell, cell), (238, 238, 238)), "not drawn")
                continue
            alone = still.copy()
            for name in column.fields:
                alone[name] = found[name]
            view = table.views(engine, sample_id, alone)[0]
            sheet.put(row, place, table.display.view(view), column.say(found))
    return sheet.save(path)


def engines_sheet(
    shards: ShardSet,
    recipe: Recipe,
    path: Path,
    engines: Sequence[str],
    *,
    rows: int = 6,
    cell: int = 144,
    seed: int = 0,
    bands: Sequence[int] = (),
    value_range: str = "type",
) -> Path:
    """Draw the global views of `rows` images by each engine, and how far the others are from the first, and write a PNG.

    Differences are amplified `TIMES` times; the captions give their means in levels of 255.
    """
    table = _Table(shards, recipe, rows, cell, seed, bands, value_range)
    views, (first, *others) = range(table.recipe.num_views), engines
    heads = ["original"]
    for v in views:
        heads += [f"view {v + 1} {first}", *(h for e in others for h in (e, f"difference x {TIMES}"))]
    sheet = table.sheet(heads)
    for row, sample_id in enumerate(table.ids):
        table.original(sheet, row, sample_id)
        draws = table.draws(sample_id, 0)
        made = {engine: table.views(engine, sample_id, draws) for engine in engines}
        column = 1
        for v in views:
            sheet.put(row, column, table.display.view(made[first][v]), describe(draws[v]))
            for engine in others:
                apart, levels = table.display.difference(made[engine][v], made[first][v], TIMES)
                sheet.put(row, column + 1, table.display.view(made[engine][v]))
                sheet.put(row, column + 2, apart, f"mean {levels:.2f} levels")
                column += 2
            column += 1
    return sheet.save(path)


class _Table:
    """What all sheets need: some samples, their draws, their views by any engine, and how to show them."""

    def __init__(
        self,
        shards: ShardSet,
        recipe: Recipe,
        rows: int,
        cell: int,
        seed: int,
        bands: Sequence[int],
        value_range: str,
    ):
        self.shards, self.recipe = shards, fit_recipe(recipe, shards, value_range)
        check_operations(self.recipe)
        self.display = Display(shards, self.recipe, bands)
        ids = epoch_order(len(shards), seed, 0)
        self.ids = [int(i) for i in (shards.ids[ids] if shards.split else ids)[:rows]]
        self._cell, self._seed = max(SMALLEST_CELL, cell), seed
        self._engines = {}

    def sheet(self, heads: Sequence[str]) -> Sheet:
        return Sheet(heads, len(self.ids), self._cell)

    def original(self, sheet: Sheet, row: int, sample_id: int) -> np.ndarray | None:
        """Put the original in the first column; return its mask, if there is one."""
        try:
            pixels = self._engine("fused").decode(self.shards.read(sample_id))
            encoded = self.shards.read_mask(sample_id)
            mask = decode_mask(encoded) if encoded is not None else None
        except RuntimeError as error:
            raise UserError(bad_sample(self.shards, sample_id)) from error
        picture, label = self.display.pixels(pixels), self.shards.labels[sample_id]
        if mask is not None:
            picture = overlay(picture, mask)
        caption = f"{pixels.shape[1]} x {pixels.shape[0]}"
        if pixels.shape[2] != 3:
            caption += f" x {pixels.shape[2]}"
        sheet.put(row, 0, picture, caption + (f"  {self.shards.classes[label]}" if label >= 0 else ""))
        return mask

    def draws(self, sample_id: int, epoch: int) -> np.ndarray:
        """Return DRAW records (V,)."""
        at = np.array([sample_id])
        drawn = draw(self.recipe, self._seed, epoch, at, self.shards.widths[at], self.shards.heights[at])
        return np.ascontiguousarray(drawn[:, 0])

    def views(self, engine: str, sample_id: int, draws: np.ndarray) -> list[np.ndarray]:
        """Return the views of DRAW records (V,), at most one for each view of the recipe."""
        draws = np.atleast_1d(draws)
        sides = [self.recipe.side(view) for view in range(len(draws))]
        out = [np.empty((len(self.recipe.mean), side, side), dtype=np.float32) for side in sides]
        self._engine(engine)(self.shards.read(sample_id), draws, out)
        return out

    def _engine(self, name: str):
        if name not in self._engines:
            self._engines[name] = make_engine(name, self.recipe)
        return self._engines[name]


def describe(draw: np.void) -> str:
    """Return the drawn operations in a few letters, for a caption."""
    words = (operation.say(draw) for operation in OPERATIONS.values() if operation.happens(draw))
    return " ".join(word for word in dict.fromkeys(words) if word)


def columns(recipe: Recipe) -> list[tuple[Operation, PreviewColumn]]:
    """Return the columns of `operations_sheet`: what changes something in one of the recipe's global views, in order."""
    return [
        (operation, column)
        for operation in OPERATIONS.values()
        for column in operation.columns
        if any((column.reach or operation.reach)(recipe, view) > 0 for view in range(recipe.num_views))
    ]
