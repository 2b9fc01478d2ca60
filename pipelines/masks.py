"""Segmentation masks beside their views: the same crop, flips and turns, and always the nearest pixel, so that no class is made up."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

NO_MASK = 255  # fills the mask of a sample that has none, and is what segmentation data sets leave out of loss and score


def decode_mask(data: memoryview) -> np.ndarray:
    """A stored mask's class indices, uint8 or uint16 (H, W). RuntimeError where it does not decode."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            return np.asarray(image).astype(np.uint16 if image.mode.startswith("I") else np.uint8)
    except (OSError, SyntaxError, ValueError) as fault:  # the kinds Pillow's decoder raises
        raise RuntimeError(str(fault)) from fault


def mask_view(mask: np.ndarray, draw: np.void, size: int) -> np.ndarray:
    """The mask (H, W) under one draw of its image: (size, size), of the same type.

    Each pixel takes the class at its centre, as Pillow's nearest filter. What changes colours, and erasing, leaves masks alone.
    """
    rows, columns = (
        int(draw[first]) + ((np.arange(size) + 0.5) * int(draw[length]) / size).astype(np.int64)
        for first, length in (("top", "height"), ("left", "width"))
    )
    view = mask[rows[:, None], columns]
    view = view[:: -1 if draw["vflip"] else 1, :: -1 if draw["hflip"] else 1]
    return np.ascontiguousarray(np.rot90(view, k=int(draw["turns"])))
