"""The default engine: decode once with libjpeg-turbo, crop each view with torchvision's SIMD resize, then our kernels.

Images of 16 bits, of floats or of other than three channels take `float_kernels` instead, in 32-bit floats.

All three release the GIL, so plain threads use every core and no pixels travel between processes.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from pipelines.augment.channels import gain_and_offset, is_deep
from pipelines.augment.noise import noise_table
from pipelines.augment.pointwise import apply, drawn
from pipelines.augment.recipe import Recipe
from pipelines.kernels import cpu_kernels, float_kernels
from pipelines.kernels.decode import decode_array, decode_rgb


def cut(pixels: np.ndarray, draw: np.void) -> np.ndarray:
    """Return the crop of a draw, (h, w, C), not copied."""
    top, left = int(draw["top"]), int(draw["left"])
    return pixels[top : top + int(draw["height"]), left : left + int(draw["width"])]


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
        """Return the pixels of an image, (H, W, C), uint8 but for other arrays. Raise RuntimeError where it does not decode."""
        pixels = decode_array(data, len(self.recipe.mean))
        return decode_rgb(data).permute(1, 2, 0).numpy() if pixels is None else pixels

    def render(self, pixels: np.ndarray, draws: np.ndarray, out: Sequence[np.ndarray]) -> None:
        """Write the views of a decoded image, (H, W, C), to `out`: V arrays float32 (C, S, S)."""
        if is_deep(pixels, self.recipe):
            self._render_deep(pixels, draws, out)
            return
        for index, draw in enumerate(draws):
            size = out[index].shape[-1]
            # Copied by numpy, which stays in this thread: torch would start a team of threads for it in every loader thread.
            crop = torch.from_numpy(np.ascontiguousarray(cut(pixels, draw))).permute(2, 0, 1)
            view = F.interpolate(crop[None], (size, size), mode=self.recipe.interpolation, antialias=True)[0]
            view = view.contiguous().numpy()
            rest = (self._scale, self._bias, self._fill, noise_table())
            pointwise = drawn(draw)
            if not pointwise:
                cpu_kernels.make_view(view, draws, index, *rest, self._spare(size), out[index])
                continue
            cpu_kernels.adjust_colors(view, draws, index, self._spare(size))
            apply(pointwise, view, draw)
            cpu_kernels.complete(view, draws, index, *rest, out[index])

    def _render_deep(self, pixels: np.ndarray, draws: np.ndarray, out: Sequence[np.ndarray]) -> None:
        gain, offset = gain_and_offset(self.recipe, pixels.dtype)
        cubic = self.recipe.interpolation == "bicubic"
        for index, draw in enumerate(draws):
            crop = cut(pixels, draw)
            image = np.empty((len(gain), *crop.shape[:2]), dtype=np.float32)
            float_kernels.levels(crop, gain, offset, image)
            rest = (self._scale, self._bias, self._fill, noise_table())
            pointwise = drawn(draw)
            if not pointwise:
                float_kernels.make_view(image, draws, index, cubic, *rest, out[index])
                continue
            view = np.empty(out[index].shape, dtype=np.float32)
            float_kernels.adjust_colors(image, draws, index, cubic, view)
            apply(pointwise, view, draw)
            float_kernels.complete(view, draws, index, *rest, out[index])

    def _spare(self, size: int) -> np.ndarray:
        """Return the scratch planes of this thread, uint8 (2, S, S)."""
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
        from pipelines.kernels import reference

        pixels = decode_array(data, len(self.recipe.mean))
        return np.asarray(reference.decode(data)) if pixels is None else pixels

    def render(self, pixels: np.ndarray, draws: np.ndarray, out: Sequence[np.ndarray]) -> None:
        """As `FusedEngine.render`."""
        from PIL import Image

        from pipelines.kernels import reference

        if is_deep(pixels, self.recipe):
            for view, draw in zip(out, draws, strict=True):
                view[:] = reference.deep_view(pixels, draw, self.recipe, view.shape[-1])
            return
        image = Image.fromarray(pixels)
        for view, draw in zip(out, draws, strict=True):
            view[:] = reference.make_view(image, draw, self.recipe, view.shape[-1])
