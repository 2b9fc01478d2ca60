"""What happens to one sample: a pure function of (recipe, seed, epoch, sample id, view).

Every random number comes from a counter-based hash (`shards.counter_hash`), so the same sample gets the same views whatever the batch,
the rank count, the engine or the point of resume.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from pipelines.augment.operations import OPERATIONS, POINTWISE, draw_fields
from pipelines.augment.recipe import Recipe
from pipelines.kernel_cache import njit
from shards.counter_hash import PART, fold, hash_key, mix64, uniform

# One record says all that an engine has to do to make one view of one image.
DRAW = np.dtype(draw_fields())

CROP_TRIES = 10  # torchvision's RandomResizedCrop gives up after ten boxes that do not fit
_ORDERS = np.array(list(permutations(range(4))), dtype=np.uint8)
# Counters of the random numbers of one (sample, view), as the table of operations states them.
_COUNTERS = {name: operation.counters for name, operation in OPERATIONS.items()}
_AREA, _RATIO, _TOP, _LEFT = _COUNTERS["crop"][::16]  # + number of the try
_JITTER, _ORDER, _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = _COUNTERS["jitter"]
(_GRAY,), (_BLUR, _SIGMA), (_SOLARIZE,) = (_COUNTERS[name] for name in ("gray", "blur", "solarize"))
(_HFLIP,), (_VFLIP,), (_TURNS,) = (_COUNTERS[name] for name in ("hflip", "vflip", "turn"))
_NOISE, _NOISE_STD, _NOISE_SEED = _COUNTERS["noise"]
_ERASE, _ERASE_SEED, *_OF_TRIES = _COUNTERS["erase"]
_ERASE_AREA, _ERASE_RATIO, _ERASE_TOP, _ERASE_LEFT = _OF_TRIES[::16]  # + number of the try
# Those of which a view has one number.
_SINGLE = range(_JITTER, _NOISE_STD + 1)


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
    views = np.arange(recipe.total_views, dtype=np.uint64)[:, None]
    # `hash_key(key, counter)` is `fold(hash_key(key), counter)`: what all counters share is hashed once.
    key = np.asarray(hash_key(fold(hash_key(seed, epoch, np.asarray(sample_ids, dtype=np.uint64)), views)))
    widths, heights = (np.broadcast_to(np.asarray(sides), key.shape) for sides in (widths, heights))
    _draw_views(recipe, key, widths, heights, out)
    return out


def eval_draws(recipe: Recipe, widths: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """Return the one fixed view used for evaluation: a centred square of `recipe.eval_crop` of the shorter side, nothing else.

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


_mix64, _uniform = njit(nogil=True)(mix64), njit(nogil=True)(uniform)


@njit(nogil=True, cache=True)
def _uniform_of(keys, counters):
    """See `_uniforms`; counters (K,) and keys (M,), uint64, give float64 (K, M)."""
    out = np.empty((counters.size, keys.size))
    for k in range(counters.size):
        # As `fold`, which hashes the part first.
        part = _mix64(np.add(counters[k], PART))
        for m in range(keys.size):
            out[k, m] = _uniform(_mix64(keys[m] ^ part))
    return out


def _uniforms(key: np.ndarray, counters: Sequence[int] | range) -> np.ndarray:
    """Return `uniform(fold(key, counter))`, in [0, 1), of each counter and key: float64 (len(counters), *key.shape)."""
    numbers = _uniform_of(np.ascontiguousarray(key).reshape(-1), np.array(counters, dtype=np.uint64))
    return numbers.reshape(-1, *key.shape)


def _draw_views(
    recipe: Recipe, key: np.ndarray, widths: np.ndarray, heights: np.ndarray, out: np.ndarray
) -> None:
    """Fill `out` (V, N) from keys, widths and heights (V, N)."""
    u = dict(zip(_SINGLE, _uniforms(key, _SINGLE), strict=True))
    views, numbers = range(recipe.total_views), _Numbers(recipe, key)
    setting = numbers.setting

    def between(counter: int, low: float | np.ndarray, high: float | np.ndarray) -> np.ndarray:
        return low + (high - low) * u[counter]

    if recipe.crop == "center":
        _centred_square(recipe, widths, heights, out)
    else:
        _random_resized_crop(recipe, key, widths, heights, out)
    out["jitter"] = u[_JITTER] < setting("jitter_p")
    out["order"] = _ORDERS[(u[_ORDER] * len(_ORDERS)).astype(np.int64)]
    for name, counter in (("brightness", _BRIGHTNESS), ("contrast", _CONTRAST), ("saturation", _SATURATION)):
        reach = setting(name)
        out[name] = between(counter, np.maximum(0.0, 1 - reach), 1 + reach)
    out["hue"] = between(_HUE, -setting("hue"), setting("hue"))
    out["gray"] = u[_GRAY] < setting("gray_p")
    out["sigma"] = np.where(u[_BLUR] < setting("blur_p"), between(_SIGMA, *recipe.blur_sigma), 0)
    out["solarize"] = u[_SOLARIZE] < setting("solarize_p")
    out["hflip"] = u[_HFLIP] < recipe.hflip_p
    out["vflip"] = u[_VFLIP] < recipe.vflip_p
    out["turns"] = (u[_TURNS] * 4).astype(np.uint8) if recipe.quarter_turns else 0
    out["noise_std"] = np.where(u[_NOISE] < recipe.noise_p, between(_NOISE_STD, *recipe.noise_std), 0)
    out["noise_seed"] = fold(key, np.uint64(_NOISE_SEED))
    if recipe.erase_p:
        for view in views:
            _random_erasing(recipe, recipe.side(view), key[view], out[view])
    for name, operation in POINTWISE.items():
        if OPERATIONS[name].possible(recipe):
            for field, values in operation.draw(recipe, numbers).items():
                out[field] = values


@dataclass(frozen=True)
class _Numbers:
    """The random numbers of some samples; an `operation.RandomNumbers`."""

    recipe: Recipe
    key: np.ndarray  # uint64 (V, N)

    def uniform(self, counter: int) -> np.ndarray:
        """Return the numbers of one counter: float64 (V, N) in [0, 1)."""
        return _uniforms(self.key, (counter,))[0]

    def setting(self, name: str) -> np.ndarray:
        """Return the values of a setting: float64 (V, 1)."""
        return np.array([self.recipe.per_view(name, view) for view in range(self.recipe.total_views)])[
            :, None
        ]


def _random_resized_crop(
    recipe: Recipe, key: np.ndarray, widths: np.ndarray, heights: np.ndarray, out: np.ndarray
) -> None:
    """Draw the crop boxes with the rejection rule of torchvision.transforms.RandomResizedCrop.get_params.

    A try draws an area and a log-uniform ratio and is rejected where the box is larger than the image; after ten rejections
    the largest centred box whose ratio is allowed is taken. Rejection skews the accepted areas, so it cannot be left out.
    """
    low, high = np.array([recipe.scale(view) for view in range(recipe.total_views)]).T[:, :, None]
    low, high = np.broadcast_to(low, key.shape), np.broadcast_to(high, key.shape)
    left_over = np.ones(key.shape, dtype=np.bool_)
    # Most first tries fit, so each try is made for those only that have none yet.
    for number in range(CROP_TRIES):
        k, w, h = key[left_over], widths[left_over], heights[left_over]
        area, ratio, top, left = _uniforms(
            k, (_AREA + number, _RATIO + number, _TOP + number, _LEFT + number)
        )
        shares = low[left_over], high[left_over]
        box_w, box_h = _box_sides(w.astype(np.float64) * h, shares, recipe.crop_ratio, area, ratio)
        fits = (box_w > 0) & (box_w <= w) & (box_h > 0) & (box_h <= h)
        places = {
            "width": box_w,
            "height": box_h,
            "left": np.floor(left * (w - box_w + 1)),
            "top": np.floor(top * (h - box_h + 1)),
        }
        found = left_over.copy()
        found[left_over] = fits
        for name, values in places.items():
            out[name][found] = values[fits]
        left_over &= ~found
        if not left_over.any():
            return
    _largest_box(recipe.crop_ratio, widths, heights, left_over, out)


def _largest_box(
    ratios: tuple[float, float], widths: np.ndarray, heights: np.ndarray, where: np.ndarray, out: np.ndarray
) -> None:
    """Give the records `where` (V, N) the largest centred box whose width / height lies in `ratios`."""
    w, h = widths[where], heights[where]
    box_w = np.where(w / h > ratios[1], np.rint(h * ratios[1]), w)
    box_h = np.where(w / h < ratios[0], np.rint(w / ratios[0]), h)
    # Rounding may exceed a one-pixel-wide image or vanish: keep the box inside the image and not empty.
    box_w, box_h = np.clip(box_w, 1, w), np.clip(box_h, 1, h)
    for name, values in (
        ("width", box_w),
        ("height", box_h),
        ("left", (w - box_w) // 2),
        ("top", (h - box_h) // 2),
    ):
        out[name][where] = values


def _random_erasing(recipe: Recipe, side: int, key: np.ndarray, out: np.ndarray) -> None:
    """Draw the rectangles with the rejection rule of torchvision.transforms.RandomErasing.get_params.

    A try is rejected where the rectangle is as high or as wide as the view; after ten rejections nothing is erased.
    """
    area, ratio, up, across = (
        _uniforms(key, range(counter, counter + CROP_TRIES)).T
        for counter in (_ERASE_AREA, _ERASE_RATIO, _ERASE_TOP, _ERASE_LEFT)
    )
    pixels = np.float64(side * side)
    box_h, box_w = _box_sides(pixels, recipe.erase_scale, recipe.erase_ratio, area, ratio)
    fits = (box_h < side) & (box_w < side) & (box_h > 0) & (box_w > 0)
    top, left = np.floor(up * (side - box_h + 1)), np.floor(across * (side - box_w + 1))
    first, rows = fits.argmax(axis=1), np.arange(len(key))
    erased = fits.any(axis=1) & (_uniforms(key, (_ERASE,))[0] < recipe.erase_p)
    for name, values in (("top", top), ("left", left), ("height", box_h), ("width", box_w)):
        out[f"erase_{name}"] = np.where(erased, values[rows, first], 0)
    out["erase_seed"] = fold(key, np.uint64(_ERASE_SEED))


def _box_sides(
    area: np.ndarray | np.float64,
    scale: tuple[float, float] | tuple[np.ndarray, np.ndarray],
    ratio: tuple[float, float],
    area_drawn: np.ndarray,
    ratio_drawn: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the sides, whole pixels, of boxes that cover a share in `scale` of `area`; first / second is in `ratio`, log-uniform.

    `area_drawn` and `ratio_drawn` are uniform in [0, 1).
    """
    box = area * (scale[0] + (scale[1] - scale[0]) * area_drawn)
    low, high = np.log(ratio)
    drawn = np.exp(low + (high - low) * ratio_drawn)
    return np.rint(np.sqrt(box * drawn)), np.rint(np.sqrt(box / drawn))
