"""What happens to one sample: a pure function of (recipe, seed, epoch, sample id, view).

Every random number comes from a counter-based hash (`shards.hashing`), so the same sample gets the same views whatever the batch,
the rank count, the engine or the point of resume.
"""

from __future__ import annotations

from itertools import permutations

import numpy as np

from pipelines.augment.recipe import Recipe
from shards.hashing import hash_key, uniform

# One record says all that an engine has to do to make one view of one image.
DRAW = np.dtype(
    [
        ("top", np.int32),  # crop box, pixels of the decoded image
        ("left", np.int32),
        ("height", np.int32),
        ("width", np.int32),
        ("jitter", np.uint8),  # 1: apply the four parts below in `order`
        ("order", np.uint8, (4,)),  # 0 brightness, 1 contrast, 2 saturation, 3 hue, as in torchvision
        ("brightness", np.float32),  # factors, 1 leaves the image as it is
        ("contrast", np.float32),
        ("saturation", np.float32),
        ("hue", np.float32),  # shift in turns, 0 leaves the image as it is
        ("gray", np.uint8),
        ("sigma", np.float32),  # blur in pixels of the view, 0: none
        ("solarize", np.uint8),
        ("hflip", np.uint8),
        ("vflip", np.uint8),
        ("turns", np.uint8),  # quarter turns counter-clockwise, 0..3
        ("noise_std", np.float32),  # pixels in [0, 1], 0: none
        ("noise_seed", np.uint64),
        ("erase_top", np.int32),  # the rectangle erased, pixels of the finished view; height 0: none
        ("erase_left", np.int32),
        ("erase_height", np.int32),
        ("erase_width", np.int32),
        ("erase_seed", np.uint64),  # of the numbers that fill it where recipe.erase_value is random
    ]
)

CROP_TRIES = 10  # torchvision's RandomResizedCrop gives up after ten boxes that do not fit
_ORDERS = np.array(list(permutations(range(4))), dtype=np.uint8)
# Counters of the random numbers of one (sample, view). Fixed for ever: changing one changes what old runs saw.
_AREA, _RATIO, _TOP, _LEFT = 0, 16, 32, 48  # + number of the try
_JITTER, _ORDER, _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE, _GRAY = 64, 65, 66, 67, 68, 69, 70
_BLUR, _SIGMA, _SOLARIZE, _HFLIP, _VFLIP, _TURNS = 71, 72, 73, 74, 75, 76
_NOISE, _NOISE_STD, _NOISE_SEED, _ERASE, _ERASE_SEED = 77, 78, 79, 80, 81
_ERASE_AREA, _ERASE_RATIO, _ERASE_TOP, _ERASE_LEFT = 96, 112, 128, 144  # + number of the try


def draw(
    recipe: Recipe, seed: int, epoch: int, sample_ids: np.ndarray, widths: np.ndarray, heights: np.ndarray
) -> np.ndarray:
    """Draw the parameters of every view of some samples.

    Args:
        recipe: what may happen.
        seed, epoch: non-negative integers.
        sample_ids: integers (N,), ids within the data set.
        widths, heights: integers (N,), size of the decoded images in pixels.

    Returns:
        DRAW records of shape (recipe.total_views, N): the global views first.
    """
    out = np.zeros((recipe.total_views, len(sample_ids)), dtype=DRAW)
    for view in range(recipe.total_views):
        key = np.asarray(hash_key(seed, epoch, np.asarray(sample_ids, dtype=np.uint64), view))
        _draw_view(recipe, view, key, np.asarray(widths), np.asarray(heights), out[view])
    return out


def eval_draws(recipe: Recipe, widths: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """The one fixed view used for evaluation: a centred square of `recipe.eval_crop` of the shorter side, nothing else.

    Resizing that square straight to `recipe.size` equals resizing the shorter side to size / eval_crop and cropping the centre, up to
    rounding.

    Returns:
        DRAW records of shape (1, N).
    """
    out = np.zeros((1, len(widths)), dtype=DRAW)
    _centred_square(recipe, np.asarray(widths), np.asarray(heights), out)
    return out


def _centred_square(recipe: Recipe, widths: np.ndarray, heights: np.ndarray, out: np.ndarray) -> None:
    side = np.maximum(1, np.rint(np.minimum(widths, heights) * recipe.eval_crop)).astype(np.int32)
    out["top"], out["left"] = (heights - side) // 2, (widths - side) // 2
    out["height"] = out["width"] = side


def _draw_view(
    recipe: Recipe, view: int, key: np.ndarray, widths: np.ndarray, heights: np.ndarray, out: np.ndarray
) -> None:
    def u(counter: int) -> np.ndarray:
        return uniform(hash_key(key, counter))

    def between(counter: int, low: float, high: float) -> np.ndarray:
        return low + (high - low) * u(counter)

    if recipe.crop == "center":
        _centred_square(recipe, widths, heights, out)
    else:
        _random_resized_crop(recipe, view, key, widths, heights, out)
    out["jitter"] = u(_JITTER) < recipe.per_view("jitter_p", view)
    out["order"] = _ORDERS[(u(_ORDER) * len(_ORDERS)).astype(np.int64)]
    for name, counter in (("brightness", _BRIGHTNESS), ("contrast", _CONTRAST), ("saturation", _SATURATION)):
        reach = recipe.per_view(name, view)
        out[name] = between(counter, max(0.0, 1 - reach), 1 + reach)
    out["hue"] = between(_HUE, -recipe.per_view("hue", view), recipe.per_view("hue", view))
    out["gray"] = u(_GRAY) < recipe.per_view("gray_p", view)
    out["sigma"] = np.where(
        u(_BLUR) < recipe.per_view("blur_p", view), between(_SIGMA, *recipe.blur_sigma), 0
    )
    out["solarize"] = u(_SOLARIZE) < recipe.per_view("solarize_p", view)
    out["hflip"] = u(_HFLIP) < recipe.hflip_p
    out["vflip"] = u(_VFLIP) < recipe.vflip_p
    out["turns"] = (u(_TURNS) * 4).astype(np.uint8) if recipe.quarter_turns else 0
    out["noise_std"] = np.where(u(_NOISE) < recipe.noise_p, between(_NOISE_STD, *recipe.noise_std), 0)
    out["noise_seed"] = hash_key(key, _NOISE_SEED)
    if recipe.erase_p:
        _random_erasing(recipe, recipe.side(view), key, out)


def _random_resized_crop(
    recipe: Recipe, view: int, key: np.ndarray, widths: np.ndarray, heights: np.ndarray, out: np.ndarray
) -> None:
    """The crop boxes, with the rejection rule of torchvision.transforms.RandomResizedCrop.get_params.

    A try draws an area and a log-uniform ratio and is rejected where the box is larger than the image; after ten rejections
    the largest centred box whose ratio is allowed is taken. Rejection skews the accepted areas, so it cannot be left out.
    """
    w, h = widths[:, None].astype(np.float64), heights[:, None].astype(np.float64)
    ratios = recipe.crop_ratio
    box_w, box_h = _boxes(key, w * h, recipe.scale(view), ratios, _AREA, _RATIO)
    fits = (box_w > 0) & (box_w <= w) & (box_h > 0) & (box_h <= h)
    top = np.floor(_tries(key, _TOP) * (h - box_h + 1))
    left = np.floor(_tries(key, _LEFT) * (w - box_w + 1))

    first = fits.argmax(axis=1)
    rows = np.arange(len(key))
    image_ratio = widths / heights
    back_w = np.where(image_ratio > ratios[1], np.rint(heights * ratios[1]), widths)
    back_h = np.where(image_ratio < ratios[0], np.rint(widths / ratios[0]), heights)
    # Rounding may exceed a one-pixel-wide image or vanish: keep the box inside the image and not empty.
    back_w, back_h = np.clip(back_w, 1, widths), np.clip(back_h, 1, heights)
    found = fits.any(axis=1)
    out["width"] = np.where(found, box_w[rows, first], back_w)
    out["height"] = np.where(found, box_h[rows, first], back_h)
    out["left"] = np.where(found, left[rows, first], (widths - back_w) // 2)
    out["top"] = np.where(found, top[rows, first], (heights - back_h) // 2)


def _random_erasing(recipe: Recipe, side: int, key: np.ndarray, out: np.ndarray) -> None:
    """The rectangles, with the rejection rule of torchvision.transforms.RandomErasing.get_params.

    A try is rejected where the rectangle is as high or as wide as the view; after ten rejections nothing is erased.
    """
    box_h, box_w = _boxes(
        key, np.float64(side * side), recipe.erase_scale, recipe.erase_ratio, _ERASE_AREA, _ERASE_RATIO
    )
    fits = (box_h < side) & (box_w < side) & (box_h > 0) & (box_w > 0)
    top = np.floor(_tries(key, _ERASE_TOP) * (side - box_h + 1))
    left = np.floor(_tries(key, _ERASE_LEFT) * (side - box_w + 1))
    first, rows = fits.argmax(axis=1), np.arange(len(key))
    erased = fits.any(axis=1) & (uniform(hash_key(key, _ERASE)) < recipe.erase_p)
    for name, values in (("top", top), ("left", left), ("height", box_h), ("width", box_w)):
        out[f"erase_{name}"] = np.where(erased, values[rows, first], 0)
    out["erase_seed"] = hash_key(key, _ERASE_SEED)


def _tries(key: np.ndarray, counter: int) -> np.ndarray:
    """A uniform number for each try: float64 (N, CROP_TRIES)."""
    return uniform(hash_key(key[:, None], np.arange(CROP_TRIES, dtype=np.uint64) + np.uint64(counter)))


def _boxes(
    key: np.ndarray,
    area: np.ndarray | np.float64,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    area_counter: int,
    ratio_counter: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The sides of boxes of a share in `scale` of `area`, whole pixels (N, CROP_TRIES); first / second is in `ratio`, log-uniform."""
    box = area * (scale[0] + (scale[1] - scale[0]) * _tries(key, area_counter))
    low, high = np.log(ratio)
    drawn = np.exp(low + (high - low) * _tries(key, ratio_counter))
    return np.rint(np.sqrt(box * drawn)), np.rint(np.sqrt(box / drawn))
