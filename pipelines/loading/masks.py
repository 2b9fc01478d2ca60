"""Segmentation masks of views: the same crop, flips and turns, and the nearest pixel, so that no new class appears."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from pipelines.cpu_kernels.colour import source_row
from pipelines.kernel_cache import njit

# Fills the mask of a sample that has none; segmentation data sets leave it out of loss and score.
NO_MASK = 255


def decode_mask(data: memoryview) -> np.ndarray:
    """Return a stored mask's class indices, uint8 or uint16 (H, W). RuntimeError where it does not decode."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            return np.asarray(image).astype(np.uint16 if image.mode.startswith("I") else np.uint8)
    # The kinds that Pillow's decoder raises.
    except (OSError, SyntaxError, ValueError) as error:
        raise RuntimeError(str(error)) from error


def mask_view(mask: np.ndarray, draw: np.void, size: int, ignore: int = NO_MASK) -> np.ndarray:
    """Return the mask (H, W) under one draw of its image: int32 (size, size), as `render_masks` writes it."""
    out = np.empty((size, size), dtype=np.int32)
    render_masks(mask, np.atleast_1d(draw), ignore, [out])
    return out


def render_masks(mask: np.ndarray, draws: np.ndarray, ignore: int, out: Sequence[np.ndarray]) -> None:
    """Write the mask of each view to `out`; releases the GIL.

    Each pixel takes the class at its centre, as Pillow's nearest filter. Operations on colours leave masks alone.

    Args:
        mask: class indices, uint8 or uint16 (H, W), the size that the image was drawn for.
        draws: DRAW records (V,).
        ignore: what becomes of erased pixels, whose class nothing in the view tells.
        out: V arrays int32 (S, S); S is each view's own.
    """
    for index, view in enumerate(out):
        _make_view(mask, draws, index, ignore, view)


@njit(nogil=True, cache=True)
def _make_view(mask, draws, index, ignore, out):
    draw = draws[index]
    size = out.shape[0]
    rows, columns = np.empty(size, dtype=np.uint64), np.empty(size, dtype=np.uint64)
    for i in range(size):
        rows[i] = draw.top + (2 * i + 1) * np.int64(draw.height) // (2 * size)
        columns[i] = draw.left + (2 * i + 1) * np.int64(draw.width) // (2 * size)
    # Unsigned, since an index that could be meant from the end costs five times as much.
    for y in range(size):
        y0, x0, dy, dx = source_row(draw, size - 1, y)
        for x in range(size):
            out[y, x] = mask[rows[np.uint64(y0 + x * dy)], columns[np.uint64(x0 + x * dx)]]
    for y in range(draw.erase_top, draw.erase_top + draw.erase_height):
        for x in range(draw.erase_left, draw.erase_left + draw.erase_width):
            out[y, x] = ignore
