"""The default engine: decode once with libjpeg-turbo, then make each view in one call of our kernels.

Images of 16 bits, of floats or of other than three channels take `float_views` instead, in 32-bit floats.

Both release the GIL, and ask for it again once an image and once a view: so plain threads use every core, and no pixels travel between
processes.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from pipelines.augment.channels import gain_and_offset, is_deep
from pipelines.augment.noise import noise_table
from pipelines.augment.pointwise import apply, drawn
from pipelines.augment.recipe import Recipe
from pipelines.cpu_kernels import colour, float_views, views
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
        self._cubic = recipe.interpolation == "bicubic"
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
        return decode_rgb(data).numpy().transpose(1, 2, 0) if pixels is None else pixels

    def render(self, pixels: np.ndarray, draws: np.ndarray, out: Sequence[np.ndarray]) -> None:
        """Write the views of a decoded image, (H, W, C), to `out`: V arrays float32 (C, S, S)."""
        if is_deep(pixels, self.recipe):
            self._render_deep(pixels, draws, out)
            return
        # Stored arrays may lie otherwise, or in memory that must not be written, for which Numba would compile once more.
        pixels = np.require(pixels, requirements=["C", "W"])
        rest = (self._scale, self._bias, self._fill, noise_table())
        height, width, _ = pixels.shape
        memory = self._memory(height, width, max(view.shape[-1] for view in out))
        for index, view in enumerate(out):
            pointwise = drawn(draws[index])
            if not pointwise:
                views.make_view(pixels, draws, index, self._cubic, *rest, memory, view)
                continue
            cropped = views.cut_view(pixels, draws, index, self._cubic, memory, view.shape[-1])
            apply(pointwise, cropped, draws[index])
            colour.complete(cropped, draws, index, *rest, view)

    def _render_deep(self, pixels: np.ndarray, draws: np.ndarray, out: Sequence[np.ndarray]) -> None:
        gain, offset = gain_and_offset(self.recipe, pixels.dtype)
        for index, draw in enumerate(draws):
            crop = cut(pixels, draw)
            image = np.empty((len(gain), *crop.shape[:2]), dtype=np.float32)
            float_views.levels(crop, gain, offset, image)
            rest = (self._scale, self._bias, self._fill, noise_table())
            pointwise = drawn(draw)
            if not pointwise:
                float_views.make_view(image, draws, index, self._cubic, *rest, out[index])
                continue
            view = np.empty(out[index].shape, dtype=np.float32)
            float_views.adjust_colors(image, draws, index, self._cubic, view)
            apply(pointwise, view, draw)
            float_views.complete(view, draws, index, *rest, out[index])

    def _memory(self, height: int, width: int, size: int) -> np.ndarray:
        """Return scratch memory of this thread for views of up to `size` pixels of an image: uint8."""
        wanted = views.num_scratch(height, width, size)
        memory = self._local.__dict__.get("memory")
        if memory is None or len(memory) < wanted:
            memory = self._local.memory = np.empty(wanted, dtype=np.uint8)
        return memory


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
