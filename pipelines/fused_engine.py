"""The default engine: decode once with libjpeg-turbo, crop each view with torchvision's SIMD resize, then our kernels.

All three release the GIL, so plain threads use every core and no pixels travel between processes.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from pipelines import cpu_kernels
from pipelines.decode import decode_rgb
from pipelines.noise import noise_table
from pipelines.recipe import Recipe


class FusedEngine:
    """Turns one encoded image and its draws into normalised views; safe to call from many threads at once."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        std = np.array(recipe.std, dtype=np.float32)
        self._scale = 1 / std
        self._bias = -np.array(recipe.mean, dtype=np.float32) / std
        self._fill = np.array(recipe.erased(), dtype=np.float32)
        self._local = threading.local()

    def __call__(self, data: memoryview, draws: np.ndarray, out: Sequence[np.ndarray]) -> None:
        """Decode `data` and write its views.

        Args:
            data: an encoded JPEG, PNG or WebP image.
            draws: DRAW records (V,).
            out: V arrays float32 (3, S, S), written; S is each view's own.

        Raises:
            RuntimeError: the image does not decode.
        """
        self.render(self.decode(data), draws, out)

    def decode(self, data: memoryview) -> np.ndarray:
        """The pixels of an encoded image, uint8 (H, W, 3), as the decoder laid them; RuntimeError where it does not decode."""
        return decode_rgb(data).permute(1, 2, 0).numpy()

    def render(self, pixels: np.ndarray, draws: np.ndarray, out: Sequence[np.ndarray]) -> None:
        """Write the views of a decoded image, uint8 (H, W, 3), to `out`: V arrays float32 (3, S, S)."""
        for index, draw in enumerate(draws):
            size = out[index].shape[-1]
            top, left = int(draw["top"]), int(draw["left"])
            # Copied by numpy, which stays in this thread: torch would start a team of threads for it in every loader thread.
            crop = np.ascontiguousarray(
                pixels[top : top + int(draw["height"]), left : left + int(draw["width"])]
            )
            crop = torch.from_numpy(crop).permute(2, 0, 1)
            view = F.interpolate(crop[None], (size, size), mode=self.recipe.interpolation, antialias=True)[0]
            view = view.contiguous().numpy()
            cpu_kernels.make_view(
                view,
                draws,
                index,
                self._scale,
                self._bias,
                self._fill,
                noise_table(),
                self._spare(size),
                out[index],
            )

    def _spare(self, size: int) -> np.ndarray:
        """Scratch planes of this thread, uint8 (2, S, S)."""
        planes = self._local.__dict__.setdefault("planes", {})
        if size not in planes:
            planes[size] = np.empty((2, size, size), dtype=np.uint8)
        return planes[size]


class ReferenceEngine:
    """The PIL and torchvision oracle behind the same call as `FusedEngine`; slow, for tests, `preview` and comparison."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe

    def __call__(self, data: memoryview, draws: np.ndarray, out: Sequence[np.ndarray]) -> None:
        """As `FusedEngine.__call__`."""
        self.render(self.decode(data), draws, out)

    def decode(self, data: memoryview) -> np.ndarray:
        """As `FusedEngine.decode`."""
        from pipelines import reference

        return np.asarray(reference.decode(data))

    def render(self, pixels: np.ndarray, draws: np.ndarray, out: Sequence[np.ndarray]) -> None:
        """As `FusedEngine.render`."""
        from PIL import Image

        from pipelines import reference

        image = Image.fromarray(pixels)
        for view, draw in zip(out, draws, strict=True):
            view[:] = reference.make_view(image, draw, self.recipe, view.shape[-1])
