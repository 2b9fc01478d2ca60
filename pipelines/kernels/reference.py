"""The oracle: one image at a time with PIL and torchvision, slow and obvious, quantised to 8 bits after each step as PIL does."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import functional as tvf

from pipelines.augment.channels import FULL
from pipelines.augment.noise import unit_noise
from pipelines.augment.recipe import Recipe


def decode(data: bytes | memoryview) -> Image.Image:
    """The encoded image as 8-bit RGB; greyscale is repeated in three channels. RuntimeError where it does not decode."""
    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # the kinds Pillow's decoders raise
        raise RuntimeError(str(error)) from error


def render(image: Image.Image, draw: np.void, size: int, interpolation: str = "bilinear") -> Image.Image:
    """Apply all of one draw that acts on 8-bit pixels: everything up to the quarter turns. RGB (size, size)."""
    left, top = int(draw["left"]), int(draw["top"])
    image = image.crop((left, top, left + int(draw["width"]), top + int(draw["height"])))
    image = image.resize((size, size), Image.Resampling[interpolation.upper()])
    if draw["jitter"]:
        for part in draw["order"]:
            if part == 0:
                image = tvf.adjust_brightness(image, float(draw["brightness"]))  # type: ignore[assignment,arg-type]
            elif part == 1:
                image = tvf.adjust_contrast(image, float(draw["contrast"]))  # type: ignore[assignment,arg-type]
            elif part == 2:
                image = tvf.adjust_saturation(image, float(draw["saturation"]))  # type: ignore[assignment,arg-type]
            else:
                image = tvf.adjust_hue(image, float(draw["hue"]))  # type: ignore[assignment,arg-type]
    if draw["gray"]:
        image = image.convert("L").convert("RGB")
    if draw["sigma"] > 0:
        image = image.filter(ImageFilter.GaussianBlur(radius=float(draw["sigma"])))
    if draw["solarize"]:
        image = ImageOps.solarize(image, threshold=128)
    if draw["hflip"]:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if draw["vflip"]:
        image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    turns = {1: Image.Transpose.ROTATE_90, 2: Image.Transpose.ROTATE_180, 3: Image.Transpose.ROTATE_270}
    if draw["turns"]:
        image = image.transpose(turns[int(draw["turns"])])
    return image


def make_view(image: Image.Image, draw: np.void, recipe: Recipe, size: int) -> np.ndarray:
    """One normalised view of one image: float32 (3, size, size)."""
    levels = np.asarray(render(image, draw, size, recipe.interpolation), dtype=np.float32)
    return _finish(levels.transpose(2, 0, 1) / np.float32(255), draw, recipe)


def deep_view(pixels: np.ndarray, draw: np.void, recipe: Recipe, size: int) -> np.ndarray:
    """One normalised view of an image of any type and number of channels, (H, W, C): float32 (C, size, size).

    Pillow's resize of planes of floats, torchvision's functions for tensors where there are three channels, and no rounding.
    """
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
    view = torch.from_numpy(np.stack(planes).clip(0, 1))
    if draw["jitter"]:
        for part in draw["order"]:
            view = _deep_jitter(view, int(part), draw)
    if draw["gray"] and len(view) == 3:
        view = tvf.rgb_to_grayscale(view, num_output_channels=3)
    image = view.numpy()
    if draw["sigma"] > 0:
        kernel = _box_kernel(float(draw["sigma"]))
        for axis in (1, 2) * 3:
            reach = len(kernel) // 2
            edges = [(reach, reach) if a == axis else (0, 0) for a in range(3)]
            wide = np.pad(image, edges, mode="edge")
            image = np.apply_along_axis(lambda line: np.convolve(line, kernel, "valid"), axis, wide)
    if draw["solarize"]:
        image = np.where(image >= 0.5, 1 - image, image)
    image = image[:, :: -1 if draw["vflip"] else 1, :: -1 if draw["hflip"] else 1]
    image = np.rot90(image, k=int(draw["turns"]), axes=(1, 2)).astype(np.float32)
    return _finish(image, draw, recipe)


def _deep_jitter(view: torch.Tensor, part: int, draw: np.void) -> torch.Tensor:
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


def _box_kernel(sigma: float) -> np.ndarray:
    """A box filter with a third of the variance sigma^2: whole pixels, and at both ends a share (Gwosdek et al. 2011)."""
    variance = sigma * sigma / 3
    whole = int((np.sqrt(12 * variance + 1) - 1) / 2)
    share = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    kernel = np.ones(2 * whole + 3)
    kernel[[0, -1]] = share
    return kernel / kernel.sum()


def _finish(pixels: np.ndarray, draw: np.void, recipe: Recipe) -> np.ndarray:
    """Noise, normalisation, erasing, of float32 (C, size, size) in [0, 1]."""
    if draw["noise_std"] > 0:
        noise = unit_noise(int(draw["noise_seed"]), pixels.size).reshape(pixels.shape)
        pixels = np.clip(pixels + draw["noise_std"] * noise, 0, 1)
    mean, std = (np.array(x, dtype=np.float32)[:, None, None] for x in (recipe.mean, recipe.std))
    view = (pixels - mean) / std
    top, left = int(draw["erase_top"]), int(draw["erase_left"])
    box = np.s_[:, top : top + int(draw["erase_height"]), left : left + int(draw["erase_width"])]
    if recipe.erased():
        view[box] = np.array(recipe.erased())[:, None, None]
    else:
        view[box] = unit_noise(int(draw["erase_seed"]), view.size).reshape(view.shape)[box]
    return view
