"""The operations of a recipe in DALI's terms: graph nodes of 8-bit images (H, W, 3) on the CPU or a GPU.

Pillow truncates after each blend and DALI rounds to the nearest level, so that just less than half a level is taken off first. Hue is
turned in the 8-bit HSV of Pillow's `convert`: `fn.hsv` and `fn.color_twist` turn a linear colour space, another augmentation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from nvidia.dali import fn as _fn
from nvidia.dali import math, types

from pipelines.cpu_kernels import _box_weights

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601-2, as Pillow's convert("L")
TAPS = 13  # of the widest blur: three box filters of five taps
_TRUNCATE = 0.4999
_U8, _U16, _I16 = types.DALIDataType.UINT8, types.DALIDataType.UINT16, types.DALIDataType.INT16
_F32 = types.DALIDataType.FLOAT
_SOLARIZED = [v if v < 128 else 255 - v for v in range(256)]

fn: Any = _fn  # whose stubs know of several outputs only
_KEYS = list(range(1 << 16))


def _strengths() -> list[float]:
    """How far the least channel lies below the greatest, after rounding the saturation: at 256 * greatest + their difference."""
    top, reach = np.divmod(np.arange(1 << 16), 256)
    saturation = np.floor(reach.clip(max=top) * 255 / np.maximum(top, 1))
    return (top * saturation / 255).tolist()


def _drops() -> list[float]:
    """The share of that by which a channel lies below the greatest: at 256 * channel + hue, both whole numbers."""
    sixths = np.arange(256) * 6 / 255
    k = np.stack([(sixths + start) % 6 for start in (5, 3, 1)])
    return np.clip(np.minimum(k, 4 - k), 0, 1).ravel().tolist()


_STRENGTHS, _DROPS = _strengths(), _drops()

Node = Any  # a DALI DataNode


def beside(image: Node, value: Node) -> Node:
    """A value from the host on the device of the image, for operations that take both as inputs."""
    return value.gpu() if image.device == "gpu" else value


def _constant(value: np.ndarray, image: Node) -> Node:
    return types.Constant(value, device=image.device)


def brightness(image: Node, factor: Node) -> Node:
    """Blend with black."""
    return fn.brightness_contrast(image, brightness=factor, brightness_shift=-_TRUNCATE / 255)


def saturation(image: Node, matrix: Node) -> Node:
    """Blend each pixel with its own luma. `matrix`: (3, 3) of `saturation_matrix`."""
    return fn.coord_transform(image, M=matrix, T=-_TRUNCATE, dtype=_U8)


def saturation_matrix(factor: np.ndarray) -> np.ndarray:
    """The colour matrices of factors (N,): float32 (N, 3, 3)."""
    f = factor.astype(np.float64)[:, None, None]
    return (f * np.eye(3) + (1 - f) * np.tile(LUMA, (3, 1))).astype(np.float32)


def contrast(image: Node, factor: Node) -> Node:
    """Blend with the rounded mean of the image's greyscale version. `factor`: a scalar."""
    mean = fn.reductions.mean(image, axes=[0, 1], dtype=_F32)
    gray = math.floor(
        fn.reductions.sum(mean * _constant(np.array(LUMA, dtype=np.float32), image), dtype=_F32) + 0.5
    )
    factor = beside(image, factor)
    return fn.cast(image * factor + (gray * (1 - factor) - _TRUNCATE), dtype=_U8)


def turn_hue(image: Node, levels: Node) -> Node:
    """Turn the hue of 8-bit HSV by `levels`, a whole number of 255ths of the colour circle (int16).

    A node costs about the same whatever it computes, so integers and tables take the place of longer sums.
    """
    planes = fn.cast(image, dtype=_I16)
    r, g, b = (planes[:, :, c : c + 1] for c in range(3))
    top, low = math.max(math.max(r, g), b), math.min(math.min(r, g), b)
    reach = top - low
    # Each third of the circle belongs to the largest channel; of equal ones to the first.
    is_r = r == top
    is_g = (g == top) & (r < top)
    is_b = (is_r | is_g) ^ True
    over = is_r * (g - b) + is_g * (b - r) + is_b * (r - g)
    sixths = over / math.max(reach, 1) + (is_g * 2 + is_b * 4)
    below = sixths < 0  # 255 levels make the circle, and & 255 adds 256
    hue = (fn.cast(math.floor(sixths * (255 / 6)), dtype=_I16) - below + beside(image, levels)) & 255
    strength = fn.lookup_table(
        fn.cast(top * 256 + reach, dtype=_U16), keys=_KEYS, values=_STRENGTHS, dtype=_F32
    )
    drop = fn.lookup_table(
        fn.cast(hue + _constant(np.array([[[0, 256, 512]]], dtype=np.int16), image), dtype=_U16),
        keys=_KEYS[: len(_DROPS)],
        values=_DROPS,
        dtype=_F32,
    )
    return fn.cast(top - strength * drop, dtype=_U8)


def gray(image: Node) -> Node:
    """The luma in all three channels."""
    return fn.coord_transform(image, M=list(LUMA) * 3, dtype=_U8)


def blur_taps(sigma: np.ndarray) -> np.ndarray:
    """The three extended box filters of Pillow's blur as one filter, of standard deviations (N,) up to 2: float32 (N, 13)."""
    out = np.zeros((len(sigma), TAPS), dtype=np.float32)
    for taps, width in zip(out, sigma, strict=True):
        reach, inner, outer = (int(x) for x in _box_weights(width)) if width > 0 else (0, 1 << 24, 0)
        box = np.zeros(5)
        box[2 - reach : 3 + reach] = inner
        box[[1 - reach, 3 + reach]] = outer
        box /= 1 << 24
        taps[:] = np.convolve(np.convolve(box, box), box)
    return out


def blur(image: Node, taps: Node) -> Node:
    """Filter along both axes; the outermost pixels repeat. `taps`: (13,)."""
    taps = beside(image, taps)
    across = fn.filter(image, fn.reshape(taps, shape=[1, TAPS]), border="clamp", dtype=_F32)
    return fn.cast(fn.filter(across, fn.reshape(taps, shape=[TAPS, 1]), border="clamp"), dtype=_U8)


def solarize(image: Node) -> Node:
    """Invert every value of 128 and above."""
    return fn.lookup_table(image, keys=list(range(256)), values=_SOLARIZED, dtype=_U8)


def symmetry(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What makes the flips and then the turns of DRAW records (N,): a transposition, then a horizontal and a vertical flip.

    A quarter turn counter-clockwise is the transposition and a vertical flip; a transposition exchanges the flips before it.
    """
    turns, hflip, vflip = (draws[name].astype(np.int32) for name in ("turns", "hflip", "vflip"))
    transposed = turns % 2 == 1
    horizontal = np.where(transposed, vflip, hflip) ^ ((turns == 2) | (turns == 3))
    vertical = np.where(transposed, hflip, vflip) ^ ((turns == 1) | (turns == 2))
    return transposed, horizontal.astype(np.int32), vertical.astype(np.int32)


def add_noise(view: Node, noise: Node, mean: Sequence[float], std: Sequence[float]) -> Node:
    """Add noise (3, S, S), made for pixels in [0, 1] and clipped there, to a view (3, S, S) that is normalised already."""
    means, widths = (np.array(x, dtype=np.float32)[:, None, None] for x in (mean, std))
    noisy = view + beside(view, noise) * _constant(1 / widths, view)
    low, high = _constant((0 - means) / widths, view), _constant((1 - means) / widths, view)
    return math.min(math.max(noisy, low), high)
