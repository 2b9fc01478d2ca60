"""Masks of class indices drawn over pictures: a translucent fill and an outline, so that the picture stays visible."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

IGNORED = 255  # the index of pixels that have no class, where nothing else was chosen
FILL = 0.3  # share of a class's colour within its areas
OUTLINE = 0.9  # and at their borders
_STRIPES = 8  # pixels from stripe to stripe of what is ignored
_GRAY = (128, 128, 128)
# Of the classes from 1 on; further ones get them again, darker.
_COLOURS = (
    (255, 45, 85),
    (0, 213, 255),
    (255, 214, 10),
    (191, 64, 255),
    (48, 209, 88),
    (255, 138, 0),
    (47, 107, 255),
    (255, 163, 199),
    (0, 168, 150),
    (160, 98, 45),
)


def class_colour(index: int) -> tuple[int, int, int]:
    """Return the colour of a class, RGB 0 to 255; no two of the first dozens are the same."""
    if index == IGNORED:
        return _GRAY
    again, place = divmod(index - 1, len(_COLOURS))
    red, green, blue = (round(part * 0.7 ** (again % 4)) for part in _COLOURS[place])
    return red, green, blue


def class_name(index: int) -> str:
    """Return what a legend calls the class."""
    return f"{IGNORED} (ignored)" if index == IGNORED else f"class {index}"


def resized(mask: npt.NDArray, height: int, width: int) -> npt.NDArray:
    """Return the mask (H, W) in another size: each pixel takes the class at its centre."""
    rows, columns = (
        (2 * np.arange(new) + 1) * old // (2 * new)
        for new, old in zip((height, width), mask.shape, strict=True)
    )
    return mask[rows[:, None], columns]


def overlay(picture: npt.NDArray[np.uint8], mask: npt.NDArray) -> npt.NDArray[np.uint8]:
    """Return a picture (H, W, 3) with a mask of class indices (H, W) over it; class 0 is left free.

    What is ignored is striped. Outlines lie within the class and grow with the picture; its own border is none.
    """
    width = 1 + max(mask.shape) // 200
    around = np.pad(mask, width, mode="edge")
    border = np.zeros(mask.shape, bool)
    for step in range(1, width + 1):
        for down, right in ((step, 0), (-step, 0), (0, step), (0, -step)):
            rows = slice(width + down, width + down + mask.shape[0])
            columns = slice(width + right, width + right + mask.shape[1])
            border |= around[rows, columns] != mask
    down, right = np.indices(mask.shape)
    stripe = (down + right) % _STRIPES < 2
    out = picture.astype(np.float64)
    for index in np.unique(mask[mask != 0]):
        where = mask == index
        share = np.where(stripe, OUTLINE, 0.0) if index == IGNORED else np.where(border, OUTLINE, FILL)
        mixed = share[where][:, None]
        out[where] = (1 - mixed) * out[where] + mixed * np.array(class_colour(int(index)))
    return out.round().astype(np.uint8)
