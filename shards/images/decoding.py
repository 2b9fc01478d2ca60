"""Decode an image as it is stored in a shard: the plain way, for notebooks and reports; training has faster ones."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt

from shards.images.pixels import read_npy

_NPY = b"\x93NUMPY"


def decode(data: bytes) -> npt.NDArray:
    """Return the pixels (H, W, C) of a stored image or mask: uint8, uint16 or float32."""
    if data.startswith(_NPY):
        return read_npy(data)
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        pixels = np.array(image)
    if pixels.dtype == np.int32:  # how Pillow holds 16 bits
        pixels = pixels.astype(np.uint16)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]
