"""Contact sheets: originals beside the views that training would see."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipelines import reference
from pipelines.draws import draw
from pipelines.engines import make_engine
from pipelines.faults import bad_sample
from pipelines.loader import view_shapes
from pipelines.recipe import Recipe
from shards.errors import UserError
from shards.files import atomic_write
from shards.order import epoch_order
from shards.read import ShardSet

GAP, HEAD, FOOT = 6, 26, 18
PAPER, INK, FAINT = (255, 255, 255), (20, 20, 20), (120, 120, 120)


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
) -> Path:
    """Draw `rows` images, each beside its views of the first `epochs` epochs, and write a PNG.

    The views are those that training with this seed and recipe makes, un-normalised, at their true side where that is at least
    96 pixels and enlarged without smoothing where it is less.
    """
    make_views = make_engine(engine, recipe)
    ids = epoch_order(shards.num_samples, seed, 0)[:rows]
    cell = max(96, cell)
    columns = 1 + epochs * recipe.total_views
    sheet = Image.new("RGB", (GAP + columns * (cell + GAP), HEAD + len(ids) * (cell + FOOT + GAP)), PAPER)
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(12)
    heads = ["original"] + [
        f"epoch {e} view {v + 1}" for e in range(epochs) for v in range(recipe.total_views)
    ]
    for column, head in enumerate(heads):
        pen.text((GAP + column * (cell + GAP), 7), head, INK, font)

    out = [np.empty(shape, dtype=np.float32) for shape in view_shapes(recipe)]
    for row, sample_id in enumerate(int(i) for i in ids):
        y = HEAD + row * (cell + FOOT + GAP)
        try:
            original = reference.decode(shards.read(sample_id))
        except RuntimeError as fault:
            raise UserError(bad_sample(shards, sample_id)) from fault
        label = shards.labels[sample_id]
        caption = f"{original.width} x {original.height}" + (
            f"  {shards.classes[label]}" if label >= 0 else ""
        )
        _caption(pen, (GAP, y + cell + 1), caption, cell)
        original.thumbnail((cell, cell), Image.Resampling.LANCZOS)
        sheet.paste(_fit(original, cell), (GAP, y))
        for e in range(epochs):
            draws = draw(
                recipe,
                seed,
                e,
                ids[row : row + 1],
                shards.widths[ids[row : row + 1]],
                shards.heights[ids[row : row + 1]],
            )
            make_views(shards.read(sample_id), np.ascontiguousarray(draws[:, 0]), out)
            for v in range(recipe.total_views):
                x = GAP + (1 + e * recipe.total_views + v) * (cell + GAP)
                sheet.paste(_fit(_to_image(out[v], recipe), cell), (x, y))
                _caption(pen, (x, y + cell + 1), describe(draws[v, 0]), cell)
    atomic_write(path, lambda file: sheet.save(file, format="PNG"))
    return path


def describe(draw: np.void) -> str:
    """The drawn operations in a few letters, for a caption."""
    names = []
    if draw["jitter"]:
        names.append("jitter")
    if draw["gray"]:
        names.append("grey")
    if draw["sigma"] > 0:
        names.append(f"blur {draw['sigma']:.1f}")
    if draw["solarize"]:
        names.append("solar")
    if draw["hflip"] or draw["vflip"]:
        names.append("flip")
    if draw["turns"]:
        names.append(f"{90 * int(draw['turns'])}°")
    if draw["noise_std"] > 0:
        names.append("noise")
    return " ".join(names)


def _caption(pen: ImageDraw.ImageDraw, place: tuple[int, int], text: str, width: int) -> None:
    """Text in the largest size that fits the width."""
    fonts = (ImageFont.load_default(size) for size in (12, 11, 10, 9, 8))
    font = next((font for font in fonts if pen.textlength(text, font) <= width), ImageFont.load_default(8))
    pen.text(place, text, FAINT, font)


def _to_image(view: np.ndarray, recipe: Recipe) -> Image.Image:
    mean, std = (np.array(x, dtype=np.float32)[:, None, None] for x in (recipe.mean, recipe.std))
    pixels = np.clip((view * std + mean) * 255, 0, 255).round().astype(np.uint8)
    return Image.fromarray(pixels.transpose(1, 2, 0))


def _fit(image: Image.Image, cell: int) -> Image.Image:
    """The image centred in a square cell, enlarged by a whole factor where it is small."""
    if max(image.size) > cell:
        image = image.resize((cell, cell), Image.Resampling.BOX)
    factor = max(1, cell // max(image.size))
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    out = Image.new("RGB", (cell, cell), (238, 238, 238))
    out.paste(image, ((cell - image.width) // 2, (cell - image.height) // 2))
    return out
