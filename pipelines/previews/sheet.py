"""Sheets of pictures in rows and columns, and pixels of any channels as pictures that people can look at."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipelines.augment.channels import FULL, HIGH, LOW, gain_and_offset
from pipelines.augment.recipe import Recipe
from pipelines.loading.masks import NO_MASK
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError
from shards.storage.atomic_files import atomic_write

GAP, HEAD, FOOT = 6, 26, 18
PAPER, INK, FAINT, BACK = (255, 255, 255), (20, 20, 20), (110, 110, 110), (238, 238, 238)
MASK_SHARE = 0.5  # of a class's colour over the picture


class Sheet:
    """A grid of square cells with headings above the columns and a caption under each cell."""

    def __init__(self, heads: Sequence[str], rows: int, cell: int):
        self.cell = cell
        size = (GAP + len(heads) * (cell + GAP), HEAD + rows * (cell + FOOT + GAP))
        self._image = Image.new("RGB", size, PAPER)
        self._pen = ImageDraw.Draw(self._image)
        for column, head in enumerate(heads):
            self._write((GAP + column * (cell + GAP), 7), head, INK)

    def put(self, row: int, column: int, picture: Image.Image, caption: str = "") -> None:
        """Draw a picture in its cell, smaller where it is too large and enlarged by a whole factor where it is small."""
        x, y = GAP + column * (self.cell + GAP), HEAD + row * (self.cell + FOOT + GAP)
        self._image.paste(self._fit(picture), (x, y))
        self._write((x, y + self.cell + 1), caption, FAINT)

    def save(self, path: Path) -> Path:
        """Write a PNG; the same pictures give the same bytes."""
        atomic_write(path, lambda file: self._image.save(file, format="PNG"))
        return path

    def _write(self, place: tuple[int, int], text: str, colour: tuple[int, int, int]) -> None:
        """Return a text in the largest size that fits the cell, or what fits of it."""
        fonts = [ImageFont.load_default(size) for size in (12, 11, 10, 9, 8)]
        font = next((f for f in fonts if self._pen.textlength(text, f) <= self.cell), fonts[-1])
        while text and self._pen.textlength(text, font) > self.cell:
            text = text[:-1]
        self._pen.text(place, text, colour, font)

    def _fit(self, picture: Image.Image) -> Image.Image:
        cell = self.cell
        if max(picture.size) > cell:
            scale = cell / max(picture.size)
            size = tuple(max(1, round(side * scale)) for side in picture.size)
            picture = picture.resize((size[0], size[1]), Image.Resampling.LANCZOS)
        factor = max(1, cell // max(picture.size))
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
        out = Image.new("RGB", (cell, cell), BACK)
        out.paste(picture, ((cell - picture.width) // 2, (cell - picture.height) // 2))
        return out


class Display:
    """Turns pixels and views of a data set into RGB pictures.

    8-bit images of three channels are shown as they are. Of others, three channels are shown, each stretched from its 1st to its
    99th percentile in the manifest.
    """

    def __init__(self, shards: ShardSet, recipe: Recipe, bands: Sequence[int] = ()):
        """`bands`: the channels for red, green and blue, counted from 1; without: the first three. Raises UserError beyond them."""
        self._recipe = recipe
        channels = len(recipe.mean)
        if bands and (len(bands) != 3 or not all(1 <= band <= channels for band in bands)):
            raise UserError(
                f"--bands is {' '.join(map(str, bands))}, but it must be three of the channels 1 to {channels}."
            )
        self._bands = [band - 1 for band in bands] or [min(c, channels - 1) for c in range(3)]
        low, high = np.zeros(channels), np.ones(channels)
        if not recipe.value_low and (channels != 3 or shards.manifest.dtypes != ["uint8"]):
            found = list(shards.manifest.statistics.values())
            low = np.min([np.broadcast_to(facts[LOW], channels) for facts in found], axis=0)
            high = np.max([np.broadcast_to(facts[HIGH], channels) for facts in found], axis=0)
        self._low, self._span = low[:, None, None], np.maximum(high - low, 1e-6)[:, None, None]

    def pixels(self, pixels: np.ndarray) -> Image.Image:
        """Decoded pixels (H, W, C)."""
        gain, offset = gain_and_offset(self._recipe, pixels.dtype)
        assert pixels.dtype.name in FULL
        return self._picture((pixels * gain + offset).transpose(2, 0, 1))

    def view(self, view: np.ndarray) -> Image.Image:
        """Return a picture of a finished view, float32 (C, S, S), without its normalisation."""
        mean, std = (np.array(x)[:, None, None] for x in (self._recipe.mean, self._recipe.std))
        return self._picture(view * std + mean)

    def difference(self, view: np.ndarray, other: np.ndarray, times: float) -> tuple[Image.Image, float]:
        """Return how far two views are apart, amplified; and the mean over pixels and channels in levels of 255."""
        apart = np.abs(view - other) * np.array(self._recipe.std)[:, None, None]
        levels = np.clip(apart[self._bands] * 255 * times, 0, 255).round().astype(np.uint8)
        return Image.fromarray(levels.transpose(1, 2, 0)), float(apart.mean() * 255)

    def _picture(self, levels: np.ndarray) -> Image.Image:
        shown = ((np.nan_to_num(levels) - self._low) / self._span)[self._bands]
        return Image.fromarray((np.clip(shown, 0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0))


def overlay(picture: Image.Image, mask: np.ndarray) -> Image.Image:
    """Return a picture with a mask (H, W) of its size over it: a colour a class, none for class 0 and where there is no mask."""
    pixels = np.asarray(picture).astype(np.float32)
    for label in np.unique(mask):
        if label not in (0, NO_MASK):
            # Hues a golden section apart: no two of the first dozens are alike.
            colour = np.array(colorsys.hsv_to_rgb(label * 0.618034 % 1, 0.9, 1.0), dtype=np.float32) * 255
            where = mask == label
            pixels[where] = (1 - MASK_SHARE) * pixels[where] + MASK_SHARE * colour
    return Image.fromarray(pixels.round().astype(np.uint8))
