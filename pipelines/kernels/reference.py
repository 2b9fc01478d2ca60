"""The oracle: one image at a time with PIL and torchvision, slow and obvious, quantised to 8 bits after each step as PIL does.

It goes through `augment.operations.OPERATIONS`, whose order is the order of the operations; all other engines are compared with it.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import functional as tvf

from pipelines.augment.channels import FULL
from pipelines.augment.noise import unit_noise
from pipelines.augment.operation import Pointwise
from pipelines.augment.operations import JITTER, OPERATIONS, POINTWISE
from pipelines.augment.recipe import Recipe


def decode(data: bytes | memoryview) -> Image.Image:
    """Return the encoded image as 8-bit RGB; gray is repeated in three channels. RuntimeError where it does not decode."""
    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # the kinds Pillow's decoders raise
        raise RuntimeError(str(error)) from error


def make_view(image: Image.Image, draw: np.void, recipe: Recipe, size: int) -> np.ndarray:
    """Return one normalised view of one image: float32 (3, size, size)."""
    return _apply(image, draw, Target(recipe, size), _EIGHT_BIT)


def deep_view(pixels: np.ndarray, draw: np.void, recipe: Recipe, size: int) -> np.ndarray:
    """Return one normalised view of an image of any type and number of channels, (H, W, C): float32 (C, size, size).

    Pillow's resize of planes of floats, torchvision's functions for tensors where there are three channels, and no rounding.
    """
    return _apply(pixels, draw, Target(recipe, size), _DEEP)


@dataclass(frozen=True)
class Target:
    """What a view is made for."""

    recipe: Recipe
    size: int


# An operation of one view, as each table below has it; what it takes and returns is what the operations beside it do.
Step = Callable[[Any, np.void, Target], Any]


def _apply(view: Any, draw: np.void, target: Target, steps: Mapping[str, Step]) -> np.ndarray:
    """Apply the operations that a draw asks for, in the order of their table."""
    for name, operation in OPERATIONS.items():
        if operation.happens(draw):
            view = steps[name](view, draw, target)
    return view


# ----------------------------------------------------------------------------------------------- 8 bits: Pillow's images


def _crop(image: Image.Image, draw: np.void, target: Target) -> Image.Image:
    left, top = int(draw["left"]), int(draw["top"])
    image = image.crop((left, top, left + int(draw["width"]), top + int(draw["height"])))
    resample = Image.Resampling[target.recipe.interpolation.upper()]
    return image.resize((target.size, target.size), resample)


def _jitter(image: Any, draw: np.void, target: Target) -> Any:
    adjust = (tvf.adjust_brightness, tvf.adjust_contrast, tvf.adjust_saturation, tvf.adjust_hue)
    for part in draw["order"]:
        image = adjust[part](image, float(draw[JITTER[part]]))
    return image


def _gray(image: Image.Image, draw: np.void, target: Target) -> Image.Image:
    return image.convert("L").convert("RGB")


def _blur(image: Image.Image, draw: np.void, target: Target) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(radius=float(draw["sigma"])))


def _solarize(image: Image.Image, draw: np.void, target: Target) -> Image.Image:
    return ImageOps.solarize(image, threshold=128)


def _hflip(image: Image.Image, draw: np.void, target: Target) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def _vflip(image: Image.Image, draw: np.void, target: Target) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)


def _turn(image: Image.Image, draw: np.void, target: Target) -> Image.Image:
    turns = (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
    return image.transpose(turns[int(draw["turns"]) - 1])


def _pointwise(operation: Pointwise) -> Step:
    """An operation of a file of its own, on an image."""

    def step(image: Image.Image, draw: np.void, target: Target) -> Image.Image:
        view = np.array(image).transpose(2, 0, 1).copy()
        operation.reference(view, draw)
        return Image.fromarray(np.ascontiguousarray(view.transpose(1, 2, 0)))

    return step


def _in_floats(view: Image.Image | np.ndarray) -> np.ndarray:
    """Return a view with pixels in [0, 1], float32 (C, size, size), whether it is an image yet or not."""
    if isinstance(view, np.ndarray):
        return view
    return np.asarray(view, dtype=np.float32).transpose(2, 0, 1) / np.float32(255)


# ----------------------------------------------------------------------------------------------- floats in [0, 1], (C, size, size)


def _deep_crop(pixels: np.ndarray, draw: np.void, target: Target) -> np.ndarray:
    recipe, size = target.recipe, target.size
    low = np.array(recipe.value_low or [0.0] * pixels.shape[2])
    high = np.array(recipe.value_high or [1.0] * pixels.shape[2])
    top, left = int(draw["top"]), int(draw["left"])
    crop = pixels[top : top + int(draw["height"]), left : left + int(draw["width"])].astype(np.float64)
    crop = np.nan_to_num((crop / FULL[pixels.dtype.name] - low) / (high - low), nan=0).clip(0, 1)
    resample = Image.Resampling[recipe.interpolation.upper()]
    planes = [
        np.asarray(
            Image.fromarray(np.ascontiguousarray(crop[:, :, c], dtype=np.float32)).resize(
                (size, size), resample
            )
        )
        for c in range(crop.shape[2])
    ]
    return np.stack(planes).clip(0, 1)


def _deep_jitter(image: np.ndarray, draw: np.void, target: Target) -> np.ndarray:
    view = torch.from_numpy(image)
    for part in draw["order"]:
        view = _deep_part(view, int(part), draw)
    return view.numpy()


def _deep_part(view: torch.Tensor, part: int, draw: np.void) -> torch.Tensor:
    three = len(view) == 3
    if part == 0:
        return (view * float(draw["brightness"])).clamp(0, 1)
    if part == 1:
        if three:
            return tvf.adjust_contrast(view, float(draw["contrast"]))
        factor = float(draw["contrast"])
        return (factor * view + (1 - factor) * view.mean()).clamp(0, 1)
    if three:
        adjust, name = ((tvf.adjust_saturation, "saturation"), (tvf.adjust_hue, "hue"))[part - 2]
        return adjust(view, float(draw[name]))
    return view


def _deep_gray(image: np.ndarray, draw: np.void, target: Target) -> np.ndarray:
    if len(image) != 3:
        return image
    return tvf.rgb_to_grayscale(torch.from_numpy(image), num_output_channels=3).numpy()


def _deep_blur(image: np.ndarray, draw: np.void, target: Target) -> np.ndarray:
    kernel = _box_kernel(float(draw["sigma"]))
    for axis in (1, 2) * 3:
        reach = len(kernel) // 2
        edges = [(reach, reach) if a == axis else (0, 0) for a in range(3)]
        wide = np.pad(image, edges, mode="edge")
        image = np.apply_along_axis(lambda line: np.convolve(line, kernel, "valid"), axis, wide)
    return image


def _box_kernel(sigma: float) -> np.ndarray:
    """Return a box filter with a third of the variance sigma^2: whole pixels, and at both ends a share (Gwosdek et al. 2011)."""
    variance = sigma * sigma / 3
    whole = int((np.sqrt(12 * variance + 1) - 1) / 2)
    share = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    kernel = np.ones(2 * whole + 3)
    kernel[[0, -1]] = share
    return kernel / kernel.sum()


def _deep_solarize(image: np.ndarray, draw: np.void, target: Target) -> np.ndarray:
    return np.where(image >= 0.5, 1 - image, image)


def _deep_hflip(image: np.ndarray, draw: np.void, target: Target) -> np.ndarray:
    return image[:, :, ::-1]


def _deep_vflip(image: np.ndarray, draw: np.void, target: Target) -> np.ndarray:
    return image[:, ::-1]


def _deep_turn(image: np.ndarray, draw: np.void, target: Target) -> np.ndarray:
    return np.rot90(image, k=int(draw["turns"]), axes=(1, 2))


def _deep_pointwise(operation: Pointwise) -> Step:
    """An operation of a file of its own, on floats."""

    def step(image: np.ndarray, draw: np.void, target: Target) -> np.ndarray:
        view = np.array(image, dtype=np.float32)
        operation.reference(view, draw)
        return view

    return step


# ----------------------------------------------------------------------------------------------- common to both


def _noise(view: Image.Image | np.ndarray, draw: np.void, target: Target) -> np.ndarray:
    pixels = _in_floats(view).astype(np.float32)
    noise = unit_noise(int(draw["noise_seed"]), pixels.size).reshape(pixels.shape)
    return np.clip(pixels + draw["noise_std"] * noise, 0, 1)


def _normalize(view: Image.Image | np.ndarray, draw: np.void, target: Target) -> np.ndarray:
    mean, std = (
        np.array(x, dtype=np.float32)[:, None, None] for x in (target.recipe.mean, target.recipe.std)
    )
    return (_in_floats(view).astype(np.float32) - mean) / std


def _erase(view: np.ndarray, draw: np.void, target: Target) -> np.ndarray:
    fill = target.recipe.erased()
    top, left = int(draw["erase_top"]), int(draw["erase_left"])
    box = np.s_[:, top : top + int(draw["erase_height"]), left : left + int(draw["erase_width"])]
    if fill:
        view[box] = np.array(fill)[:, None, None]
    else:
        view[box] = unit_noise(int(draw["erase_seed"]), view.size).reshape(view.shape)[box]
    return view


_COMMON: Mapping[str, Step] = {"noise": _noise, "normalize": _normalize, "erase": _erase}
# What each operation is, by its name; the order is that of OPERATIONS.
_EIGHT_BIT: Mapping[str, Step] = {
    "crop": _crop,
    "jitter": _jitter,
    "gray": _gray,
    "blur": _blur,
    "solarize": _solarize,
    "hflip": _hflip,
    "vflip": _vflip,
    "turn": _turn,
    **{name: _pointwise(operation) for name, operation in POINTWISE.items()},
    **_COMMON,
}
_DEEP: Mapping[str, Step] = {
    "crop": _deep_crop,
    "jitter": _deep_jitter,
    "gray": _deep_gray,
    "blur": _deep_blur,
    "solarize": _deep_solarize,
    "hflip": _deep_hflip,
    "vflip": _deep_vflip,
    "turn": _deep_turn,
    **{name: _deep_pointwise(operation) for name, operation in POINTWISE.items()},
    **_COMMON,
}
