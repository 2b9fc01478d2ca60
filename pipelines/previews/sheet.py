"""Sheets of pictures in rows and columns, and pixels of any channels as pictures that people can look at."""

from __future__ import annotations

import colorsys
import functools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipelines.augment.channels import FULL, HIGH, LOW, gain_and_offset
from pipelines.augment.recipe import Recipe
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError
from shards.overview.mask_overlay import overlay, resized
from shards.storage.atomic_files import atomic_write

# Pixels: between cells, two lines of title, headings, a caption, the legend below.
GAP, TITLE, HEAD, FOOT, LEGEND = 6, 44, 26, 20, 26
PAPER, INK, FAINT, BACK = (255, 255, 255), (20, 20, 20), (110, 110, 110), (238, 238, 238)
FRAME = 2  # pixels, of frames around pictures and of boxes
# Heights of letters in pixels.
LETTERS, SMALLEST_LETTERS, TITLE_LETTERS, ABOUT_LETTERS = 12, 9, 15, 12
# A narrow sheet becomes so wide, in pixels, where its title needs that.
WIDEST_TITLE = 720
# Letters are drawn so many times as large and then made small: drawn at 9 pixels, they and the gaps between words are rounded to
# whole pixels, and words run together.
_FINER = 4
_CUT = "..."
Colour = tuple[int, int, int]
# Left, top, right, bottom in pixels of a picture, the last two exclusive; and the colour of its line.
Box = tuple[tuple[int, int, int, int], Colour]


class Sheet:
    """A grid of square cells below a title, with headings above the columns and a caption under each cell."""

    def __init__(self, title: tuple[str, str], heads: Sequence[str], rows: int, cell: int):
        """`title`: two lines, the second in smaller letters."""
        self.cell = cell
        bottom = TITLE + HEAD + rows * (cell + FOOT + GAP)
        lines = ((5, TITLE_LETTERS, INK, title[0]), (26, ABOUT_LETTERS, FAINT, title[1]))
        wanted = max(text_width(line, SMALLEST_LETTERS + 2) for line in title)
        width = max(GAP + len(heads) * (cell + GAP), min(wanted, WIDEST_TITLE) + 2 * GAP)
        size = (width, bottom + LEGEND)
        self._image = Image.new("RGB", size, PAPER)
        self._pen = ImageDraw.Draw(self._image)
        # Of the row of the legend: where it is, and how many pixels are used.
        self._bottom, self._used = bottom, GAP
        for y, largest, colour, line in lines:
            self._write((GAP, y), line, colour, width - 2 * GAP, largest)
        for column, head in enumerate(heads):
            self._write((self.corner(0, column)[0], TITLE + 7), head, INK, cell - GAP)

    def corner(self, row: int, column: int) -> tuple[int, int]:
        """Return x and y of a cell's first pixel."""
        return GAP + column * (self.cell + GAP), TITLE + HEAD + row * (self.cell + FOOT + GAP)

    def put(
        self,
        row: int,
        column: int,
        picture: Image.Image,
        caption: str = "",
        *,
        mask: np.ndarray | None = None,
        frame: Colour | None = None,
        boxes: Sequence[Box] = (),
    ) -> None:
        """Draw a picture in its cell, smaller where it is too large and enlarged by a whole factor where it is small.

        Args:
            mask: class indices (H, W) of the picture, laid over it.
            frame: colour of a line around the picture.
            boxes: rectangles drawn on the picture.
        """
        x, y = self.corner(row, column)
        scaled = self._scaled(picture)
        if mask is not None:
            scaled = Image.fromarray(overlay(np.asarray(scaled), resized(mask, scaled.height, scaled.width)))
        pen = ImageDraw.Draw(scaled)
        across, down = scaled.width / picture.width, scaled.height / picture.height
        for (left, top, right, bottom), colour in boxes:
            ends = (round(right * across) - 1, round(bottom * down) - 1)
            start = (min(round(left * across), ends[0]), min(round(top * down), ends[1]))
            pen.rectangle((start, ends), outline=colour, width=FRAME)
        self._image.paste(BACK, (x, y, x + self.cell, y + self.cell))
        left, top = x + (self.cell - scaled.width) // 2, y + (self.cell - scaled.height) // 2
        self._image.paste(scaled, (left, top))
        if frame is not None:
            end = (left + scaled.width + FRAME - 1, top + scaled.height + FRAME - 1)
            self._pen.rectangle(((left - FRAME, top - FRAME), end), outline=frame, width=FRAME)
        self._write((x, y + self.cell + 3), caption, FAINT, self.cell - GAP)

    def legend(self, entries: Sequence[tuple[str, Colour]]) -> None:
        """Draw names with their colours in the row below the cells, as many as fit."""
        for text, colour in entries:
            width = 20 + text_width(text, LETTERS) + 14
            if self._used + width <= self._image.width:
                x, y = self._used, self._bottom
                self._pen.rectangle((x, y + 4, x + 14, y + 16), fill=colour)
                self._write((x + 20, y + 3), text, INK, width)
                self._used += width

    def scale(self, colours: np.ndarray, low: str, high: str) -> None:
        """Draw the colours (N, 3), uint8, of a scale in the row below the cells, from `low` to `high`."""
        y, width = self._bottom, min(200, self._image.width // 3)
        strip = Image.fromarray(colours[None].repeat(12, axis=0)).resize((width, 12))
        x = self._used + self._write((self._used, y + 3), low, INK, width) + 6
        self._image.paste(strip, (x, y + 4))
        self._used = x + width + 6
        self._used += self._write((self._used, y + 3), high, INK, self._image.width - self._used) + 20

    def save(self, path: Path) -> Path:
        """Write a PNG; the same pictures give the same bytes."""
        image = self._image if self._used > GAP else self._image.crop((0, 0, self._image.width, self._bottom))
        atomic_write(path, lambda file: image.save(file, format="PNG"))
        return path

    def _write(
        self, place: tuple[int, int], text: str, colour: Colour, width: int, largest: int = LETTERS
    ) -> int:
        """Write a text in the largest size that fits the width, or its beginning; return its width in pixels."""
        size = next(
            (size for size in range(largest, SMALLEST_LETTERS, -1) if text_width(text, size) <= width),
            SMALLEST_LETTERS,
        )
        if text_width(text, size) > width:
            while text and text_width(text + _CUT, size) > width:
                text = text[:-1]
            text += _CUT
        used = text_width(text, size)
        # Letters reach below their line, and may begin before it.
        fine = Image.new("L", ((used + 2) * _FINER, 2 * size * _FINER))
        ImageDraw.Draw(fine).text((0, 0), text, 255, _font(size))
        self._image.paste(colour, place, fine.reduce(_FINER))
        return used

    def _scaled(self, picture: Image.Image) -> Image.Image:
        cell = self.cell
        if max(picture.size) > cell:
            scale = cell / max(picture.size)
            size = tuple(max(1, round(side * scale)) for side in picture.size)
            return picture.resize((size[0], size[1]), Image.Resampling.LANCZOS)
        factor = max(1, cell // max(picture.size))
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def text_width(text: str, size: int) -> int:
    """Return the width in pixels of a text in letters of this size."""
    return math.ceil(_font(size).getlength(text) / _FINER)


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size * _FINER)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow has FreeType"
    return font


def frame_colours(count: int) -> list[Colour]:
    """Return so many colours, RGB 0 to 255, with hues as far apart as they can be."""
    parts = (colorsys.hsv_to_rgb(number / count, 0.85, 0.95) for number in range(count))
    return [(round(255 * red), round(255 * green), round(255 * blue)) for red, green, blue in parts]


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

    def difference(self, view: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Return how far two views (C, S, S) are apart in levels of 255: (C, S, S)."""
        return np.abs(view - other) * np.array(self._recipe.std)[:, None, None] * 255

    def _picture(self, levels: np.ndarray) -> Image.Image:
        shown = ((np.nan_to_num(levels) - self._low) / self._span)[self._bands]
        return Image.fromarray((np.clip(shown, 0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0))
