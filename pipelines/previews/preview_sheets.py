"""What people look at before they train: views, the effect of each operation, and how far engines are apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
from pipelines.previews.sheet import BACK, Box, Display, Sheet, frame_colours
from pipelines.streaming.bad_samples import bad_sample
from shards.dataset.order import epoch_order
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError
from shards.overview.mask_overlay import class_colour, class_name

SEARCH_EPOCHS = 200  # looked through for one that draws an operation
SMALLEST_CELL = 96
LEVELS = (1, 2, 4, 8, 16, 32, 64, 128, 255)  # where the scale of differences may end


@dataclass(frozen=True)
class SheetOptions:
    """What all sheets are asked for."""

    rows: int = 6
    """Number of images."""
    cell: int = 144
    """Side of each picture in pixels, at least SMALLEST_CELL."""
    seed: int = 0
    """Seed of the draws, as of a run."""
    samples: tuple[int, ...] = ()
    """Ids of the samples to show; empty: `rows` samples chosen by `samples_seed`."""
    samples_seed: int = 0
    engine: str = "fused"
    """Engine that makes the views."""
    bands: tuple[int, ...] = ()
    """Channels shown as red, green and blue, counted from 1; empty: the first three."""
    value_range: str = "auto"
    """As `fit_recipe`."""
    masks: bool = True
    """Draw the masks of samples that have one."""
    recipe_name: str = ""
    """What the title calls the recipe."""


def contact_sheet(
    shards: ShardSet, recipe: Recipe, path: Path, options: SheetOptions | None = None, *, epochs: int = 3
) -> Path:
    """Draw images, each beside its views of the first `epochs` epochs, and write a PNG.

    The views are those that training with this seed and recipe makes, un-normalised, at their true side where that is at least
    96 pixels and enlarged without smoothing where it is less. The box of each view's crop is drawn on the original in the colour
    of the view's frame. Masks lie over originals and views where there are any.
    """
    table = _Table(shards, recipe, options)
    views = range(table.recipe.total_views)
    colours = frame_colours(epochs * len(views))
    sheet = table.sheet(["original"] + [f"epoch {e} view {v + 1}" for e in range(epochs) for v in views])
    for row, sample_id in enumerate(table.ids):
        draws = [table.draws(sample_id, e) for e in range(epochs)]
        boxes = [crop_box(record) for records in draws for record in records]
        mask = table.original(sheet, row, sample_id, list(zip(boxes, colours, strict=True)))
        for e in range(epochs):
            for v, view in enumerate(table.views(table.options.engine, sample_id, draws[e])):
                number = e * len(views) + v
                sheet.put(
                    row,
                    1 + number,
                    table.display.view(view),
                    describe(draws[e][v]),
                    mask=None if mask is None else mask_view(mask, draws[e][v], view.shape[-1]),
                    frame=colours[number],
                )
    return table.save(sheet, path)


def operations_sheet(
    shards: ShardSet, recipe: Recipe, path: Path, options: SheetOptions | None = None
) -> Path:
    """Draw each operation of the recipe by itself on the centre of images, with the value drawn, and write a PNG.

    The value is that of the first epoch and view in which the image meets the operation. The boxes of the centre and of the crop
    are drawn on the original in the colours of their frames.
    """
    table = _Table(shards, recipe, options)
    shown, engine = columns(table.recipe), table.options.engine
    of_centre, of_crop = frame_colours(2)
    sheet = table.sheet(["original", "centre", *(column.title for _, column in shown)])
    for row, sample_id in enumerate(table.ids):
        at = np.array([sample_id])
        still = eval_draws(table.recipe, shards.widths[at], shards.heights[at])[0]
        boxes = [(crop_box(still[0]), of_centre)]
        for name, neutral in (("brightness", 1), ("contrast", 1), ("saturation", 1), ("order", [0, 1, 2, 3])):
            still[name] = neutral
        centre = table.display.view(table.views(engine, sample_id, still)[0])
        sheet.put(row, 1, centre, "nothing else", frame=of_centre)
        for place, (operation, column) in enumerate(shown, start=2):
            epochs = (table.draws(sample_id, e)[: table.recipe.num_views] for e in range(SEARCH_EPOCHS))
            found = next((d for draws in epochs for d in draws if operation.happens(d)), None)
            if found is None:
                empty = Image.new("RGB", (sheet.cell, sheet.cell), BACK)
                sheet.put(row, place, empty, "not drawn")
                continue
            alone = still.copy()
            for name in column.fields:
                alone[name] = found[name]
            is_crop = operation.name == "crop"
            if is_crop:
                boxes.append((crop_box(alone[0]), of_crop))
            view = table.display.view(table.views(engine, sample_id, alone)[0])
            sheet.put(row, place, view, column.say(found), frame=of_crop if is_crop else None)
        table.original(sheet, row, sample_id, boxes)
    return table.save(sheet, path)


def engines_sheet(
    shards: ShardSet,
    recipe: Recipe,
    path: Path,
    engines: Sequence[str],
    options: SheetOptions | None = None,
) -> Path:
    """Draw the global views of images by each engine, and how far the others are from the first, and write a PNG.

    A pixel's colour is the largest difference of its channels, on one scale for the whole sheet; the captions give mean and
    maximum in levels of 255.
    """
    table = _Table(shards, recipe, options)
    views, (first, *others) = range(table.recipe.num_views), engines
    colours = frame_colours(len(views))
    heads = ["original"]
    for v in views:
        heads += [f"view {v + 1} {first}", *(h for e in others for h in (e, f"{e} - {first}"))]
    sheet = table.sheet(heads, f"views by {', '.join(engines)}")
    apart: dict[tuple[int, int], np.ndarray] = {}
    for row, sample_id in enumerate(table.ids):
        draws = table.draws(sample_id, 0)[: len(views)]
        boxes = [(crop_box(record), colour) for record, colour in zip(draws, colours, strict=True)]
        table.original(sheet, row, sample_id, boxes)
        made = {engine: table.views(engine, sample_id, draws) for engine in engines}
        column = 1
        for v in views:
            view = table.display.view(made[first][v])
            sheet.put(row, column, view, describe(draws[v]), frame=colours[v])
            for engine in others:
                sheet.put(row, column + 1, table.display.view(made[engine][v]), frame=colours[v])
                apart[row, column + 2] = table.display.difference(made[engine][v], made[first][v])
                column += 2
            column += 1
    top = scale_end(list(apart.values()))
    for (row, column), levels in apart.items():
        told = f"mean {levels.mean():.2f}, max {levels.max():.0f}"
        sheet.put(row, column, Image.fromarray(heat(levels.max(axis=0), top)), told)
    sheet.scale(heat(np.arange(256.0), 255), "0", f"{top} of 255 levels or more, the largest of the channels")
    return table.save(sheet, path)


def crop_box(draw: np.void) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of a DRAW record's crop in pixels of the original; the last two are exclusive."""
    left, top = int(draw["left"]), int(draw["top"])
    return left, top, left + int(draw["width"]), top + int(draw["height"])


def scale_end(differences: Sequence[np.ndarray]) -> int:
    """Return the first of LEVELS that 999 of 1,000 of the differences do not exceed."""
    most = float(np.quantile(np.concatenate([levels.ravel() for levels in differences]), 0.999))
    return next((level for level in LEVELS if level >= most), LEVELS[-1])


def heat(levels: np.ndarray, top: float) -> np.ndarray:
    """Return levels as colours from black at 0 over red to pale yellow at `top` and above: uint8 (..., 3)."""
    from matplotlib import colormaps

    return colormaps["inferno"](np.clip(levels / top, 0, 1), bytes=True)[..., :3]


class _Table:
    """What all sheets need: some samples, their draws, their views by any engine, and how to show them."""

    def __init__(self, shards: ShardSet, recipe: Recipe, options: SheetOptions | None):
        self.options = options or SheetOptions()
        self.shards, self.recipe = shards, fit_recipe(recipe, shards, self.options.value_range)
        check_operations(self.recipe)
        self.display = Display(shards, self.recipe, self.options.bands)
        self.ids = self._choose()
        self._engines = {}
        # Of the masks that were drawn.
        self._classes: set[int] = set()

    def _choose(self) -> list[int]:
        """Return the ids of the samples to show. Raise UserError where one does not exist."""
        shards, options = self.shards, self.options
        if not options.samples:
            order = epoch_order(len(shards), options.samples_seed, 0)
            return [int(i) for i in shards.ids[order][: options.rows]]
        for sample_id in options.samples:
            if sample_id not in shards.ids:
                what = f"the split '{shards.split}' of " if shards.split else ""
                raise UserError(
                    f"--samples names {sample_id}, which is not among the {len(shards):,} samples of {what}'{shards.folder}': "
                    f"their ids go from {shards.ids[0]} to {shards.ids[-1]}."
                )
        return list(options.samples)

    def sheet(self, heads: Sequence[str], by: str = "") -> Sheet:
        """Return an empty sheet whose title tells recipe, data, seeds and engine."""
        options, split = self.options, f", split {self.shards.split}" if self.shards.split else ""
        chosen = "as named" if options.samples else f"chosen by seed {options.samples_seed}"
        title = f"Recipe {options.recipe_name or 'without a name'}: {self.shards.folder}{split}"
        about = f"draws of seed {options.seed} · {by or f'views by {options.engine}'} · samples {chosen}"
        return Sheet((title, about), heads, len(self.ids), max(SMALLEST_CELL, options.cell))

    def save(self, sheet: Sheet, path: Path) -> Path:
        """Write the PNG, with a legend where masks were drawn."""
        sheet.legend([(class_name(index), class_colour(index)) for index in sorted(self._classes - {0})])
        return sheet.save(path)

    def original(self, sheet: Sheet, row: int, sample_id: int, boxes: Sequence[Box]) -> np.ndarray | None:
        """Put the original in the first column; return its mask, if there is one and masks are drawn."""
        try:
            pixels = self._engine("fused").decode(self.shards.read(sample_id))
            encoded = self.shards.read_mask(sample_id) if self.options.masks else None
            mask = decode_mask(encoded) if encoded is not None else None
        except RuntimeError as error:
            raise UserError(bad_sample(self.shards, sample_id)) from error
        if mask is not None:
            self._classes.update(np.unique(mask).tolist())
        label = self.shards.labels[sample_id]
        caption = f"{sample_id}: {pixels.shape[1]} x {pixels.shape[0]}"
        if pixels.shape[2] != 3:
            caption += f" x {pixels.shape[2]}"
        caption += f"  {self.shards.classes[label]}" if label >= 0 else ""
        sheet.put(row, 0, self.display.pixels(pixels), caption, mask=mask, boxes=boxes)
        return mask

    def draws(self, sample_id: int, epoch: int) -> np.ndarray:
        """Return DRAW records (V,)."""
        at = np.array([sample_id])
        drawn = draw(
            self.recipe, self.options.seed, epoch, at, self.shards.widths[at], self.shards.heights[at]
        )
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
