"""Decoding on a CPU: libjpeg-turbo, libpng and libwebp through torchvision's operator, or Pillow where that is gone; arrays."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import numpy as np
import torch

from shards.images.pixels import NPY_MAGIC, BadImage, read_npy

_RGB = 3  # torchvision.io.ImageReadMode.RGB


@cache
def _operator():
    """Return torchvision's decoding operator, or None.

    The Python function around it is deprecated since torchvision 0.29 in favour of another package; the operator needs neither a
    warning a call nor a further dependency, and is about a quarter faster than Pillow. Only the library that registers it is loaded:
    importing torchvision takes over a second, as long as PyTorch.
    """
    package = importlib.util.find_spec("torchvision")
    folders = package.submodule_search_locations if package is not None else None
    libraries = [path for folder in folders or [] for path in Path(folder).glob("image*.so")]
    try:
        for library in libraries:  # one: image.so, or image_stable.so
            torch.ops.load_library(library)
    except OSError:
        libraries = []
    if not libraries:  # other systems; of another version of PyTorch
        import torchvision.io  # noqa: F401
    # The one overload, so that no call has to choose among them.
    return getattr(getattr(getattr(torch.ops, "image", None), "decode_image", None), "default", None)


def decode_rgb(data: memoryview) -> torch.Tensor:
    """Decode a JPEG, PNG or WebP image: uint8 (3, H, W); grayscale is repeated in three channels. Releases the GIL.

    Raises:
        RuntimeError: the data are no image, or damaged.
    """
    operator = _operator()
    if operator is None:
        return _decode_with_pillow(data)
    if not len(data):
        raise RuntimeError("the file has no bytes.")
    # A copy of some 50 KB: torch refuses to promise not to write to the read-only map of a shard.
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return operator(encoded, _RGB, False)


def is_array(data: memoryview) -> bool:
    """Return whether a stored file is an array, not an encoded image."""
    return bytes(data[: len(NPY_MAGIC)]) == NPY_MAGIC


def decode_array(data: memoryview, channels: int) -> np.ndarray | None:
    """Return the pixels (H, W, `channels`) of a stored array, uint8, uint16 or float32; None where the data are an encoded image.

    One channel is repeated where three are wanted.

    Raises:
        RuntimeError: the array is damaged, or has another number of channels.
    """
    if not is_array(data):
        return None
    try:
        pixels = read_npy(data)
    except BadImage as error:
        raise RuntimeError(error.reason) from error
    if pixels.shape[2] == 1 and channels == 3:
        pixels = np.repeat(pixels, 3, axis=2)
    if pixels.shape[2] != channels:
        raise RuntimeError(f"it has {pixels.shape[2]} channels, and {channels} are wanted")
    return pixels


def _decode_with_pillow(data: memoryview) -> torch.Tensor:
    from pipelines.kernels import reference

    return torch.from_numpy(np.array(reference.decode(data))).permute(2, 0, 1)
