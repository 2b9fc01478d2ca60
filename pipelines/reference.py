"""The oracle: one image at a time with PIL and torchvision, slow and obvious, quantised to 8 bits after each step as PIL does."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import functional as tvf

from pipelines.noise import unit_noise
from pipelines.recipe import Recipe


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
    pixels = levels.transpose(2, 0, 1) / np.float32(255)
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
