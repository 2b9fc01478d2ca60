"""The operations of a recipe in DALI's terms: graph nodes of 8-bit colour planes (3, H * W) on the CPU or a GPU.

Pillow truncates after each blend and DALI rounds to the nearest level, so that just less than half a level is taken off first. Hue is
turned in the 8-bit HSV of Pillow's `convert`: `fn.hsv` and `fn.color_twist` turn a linear colour space, another augmentation.

What a node costs on a CPU, in ms for 224 x 224 pixels, says how the operations are written: `filter` of planes 0.1 and arithmetic of
one plane 0.02, but `color_twist` and `coord_transform` 1, `gaussian_blur` 2 to 6, and floats made whole numbers 0.3. To that come
20 to 50 microseconds per batch for every node of the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from nvidia.dali import fn as _fn
from nvidia.dali import math, types

from pipelines.cpu_kernels.colour import _box_weights

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601-2, as Pillow's convert("L")
_FLAT = "HW"  # layout of planes (3, H * W)
TAPS = 13  # of the widest blur: three box filters of five taps
_TRUNCATE = 0.4999
_U8, _U16 = types.DALIDataType.UINT8, types.DALIDataType.UINT16
_F32 = types.DALIDataType.FLOAT
_SOLARIZED = [v if v < 128 else 255 - v for v in range(256)]

fn: Any = _fn  # whose stubs know of several outputs only
_KEYS = list(range(1 << 16))

# Each sextant of the colour circle has one order of red, green and blue, and 42.5 of the 255 levels of hue; within it the hue rises or
# falls with the middle channel. Tables of two bytes make a hue and turn it back into colours with few nodes.


def _sextants() -> tuple[list[int], list[int]]:
    """Return, for g > r, b > g and r > b as the bits of a number, the hue where its sextant begins or ends, and which of the two.

    The second is given as the bits to turn over in a key of `_hues`.
    """
    r_g, g_b, b_r = (1 - (np.arange(8) >> bit & 1) for bit in range(3))  # r >= g, g >= b, b >= r
    thirds = (1 - r_g) * g_b + 2 * (1 - g_b) * b_r + 3 * r_g * (1 - g_b) * (1 - b_r)
    return (85 * thirds).tolist(), (0xFFFF * (r_g ^ g_b ^ b_r)).tolist()


def _hues() -> list[int]:
    """Return how far the hue lies beyond that, modulo 256: at 256 * (greatest - least) + (middle - least).

    Where the sextant ends there, all bits of the place are turned over. The second number is never more than the first, so that both
    kinds of keys have a place; where they meet, on the diagonal, the first has it.
    """
    reach, above = np.divmod(np.arange(1 << 16), 256)
    begins = above <= reach
    reach, above = np.where(begins, reach, 255 - reach), np.where(begins, above, 255 - above)
    # A sextant has 42.5 levels, and the hue is truncated. Its sum with the others' is one of bytes.
    return (np.where(begins, above, -above) * 85 // (2 * np.maximum(reach, 1)) % 256).tolist()


def _drops() -> list[list[int]]:
    """Return how far red, green and blue lie below the greatest channel: at 256 * (greatest - least) + hue."""
    reach, hue = np.divmod(np.arange(1 << 16), 256)
    # Truncating the saturation to 8 bits takes up to greatest / 255 off the difference: a quarter of a level on average.
    reach = np.maximum(reach - 0.25, 0)
    ks = ((hue * 6 / 255 + start) % 6 for start in (5, 3, 1))
    return [np.rint(reach * np.clip(np.minimum(k, 4 - k), 0, 1)).astype(int).tolist() for k in ks]


_BASES, _TURNED = _sextants()
_HUES, _DROPS = _hues(), _drops()
_COMPARE = np.array([[-255], [255]], dtype=np.float32)
_BITS = np.array([[1], [2], [4]], dtype=np.float32) / 255

Node = Any  # a DALI DataNode


def beside(image: Node, value: Node) -> Node:
    """A value from the host on the device of the image, for operations that take both as inputs."""
    return value.gpu() if image.device == "gpu" else value


def _constant(value: np.ndarray, image: Node) -> Node:
    return types.Constant(value, device=image.device)


def _table(keys: Node, values: list[int], dtype: Any = _U8) -> Node:
    return fn.lookup_table(keys, keys=_KEYS[: len(values)], values=values, dtype=dtype)


def planes(image: Node) -> Node:
    """Return an image (H, W, 3) as planes (3, H * W)."""
    # Twice as fast on a CPU as `transpose`.
    made = fn.crop_mirror_normalize(image, mean=[0.0], std=[1.0], dtype=_U8, output_layout="CHW")
    return fn.reshape(made, shape=[3, -1], layout=_FLAT)


def blend(image: Node, taps: Node, of_mean: Node, size: int) -> Node:
    """Blend with black, with the mean of the luma, or with the luma of each pixel; `taps`, `of_mean`: (3, 1), see `blend_taps`.

    One filter across three rows: the colours, three times the luma, and white.
    """
    luma = _luma(image)
    mean = math.floor(fn.reductions.mean(luma, dtype=_F32) + 0.5)
    taps = beside(image, taps) + mean * beside(image, of_mean)
    white = _constant(np.full((3, size * size), 255, dtype=np.uint8), image)
    rows = fn.reshape(fn.cat(image, luma, luma, luma, white, axis=0), shape=[3, -1], layout=_FLAT)
    return fn.reshape(fn.filter(rows, taps, mode="valid"), shape=[3, -1], layout=_FLAT)


def blend_taps(part: np.ndarray, factor: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return what `blend` wants for brightness (part 0), contrast (1) and saturation (2) of factors (N,): float32 (N, 3, 1), twice.

    The shares of the colours, of the luma, and of white, as it is for brightness and saturation; and what the mean adds to them.
    """
    taps, of_mean = np.zeros((2, len(part), 3, 1), dtype=np.float32)
    taps[:, 0, 0] = factor
    taps[:, 1, 0] = np.where(part == 2, 1 - factor, 0)
    taps[:, 2] = -_TRUNCATE / 255
    of_mean[:, 2, 0] = np.where(part == 1, 1 - factor, 0) / 255
    return taps, of_mean


def _luma(image: Node) -> Node:
    return fn.filter(image, _constant(np.array(LUMA, dtype=np.float32)[:, None], image), mode="valid")


def turn_hue(image: Node, levels: Node) -> Node:
    """Turn the hue of 8-bit HSV by `levels`, a whole number of 255ths of the colour circle, modulo 256 (uint8)."""
    r, g, b = (image[channel : channel + 1] for channel in range(3))
    # 255 where the next channel is greater, 0 elsewhere; and these as the bits of a number.
    rises = fn.filter(image, _constant(_COMPARE, image), anchor=[0, 0], border="wrap")
    code = fn.filter(rises, _constant(_BITS, image), mode="valid")
    high, low = math.max(r, g), math.min(r, g)
    rest = math.min(high, b)
    top, middle, low = math.max(high, b), math.max(low, rest), math.min(low, b)
    rows = (top - low) * types.Constant(256, dtype=_U16)
    hue = _table((rows + (middle - low)) ^ _table(code, _TURNED, _U16), _HUES)
    hue = hue + _table(code, _BASES) + beside(image, levels)  # bytes, which wrap around as Pillow's do
    return fn.reshape(fn.cat(*(top - _table(rows + hue, drops) for drops in _DROPS), axis=0), layout=_FLAT)


def gray(image: Node) -> Node:
    """Return the luma in all three channels."""
    luma = _luma(image)
    return fn.reshape(fn.cat(luma, luma, luma, axis=0), layout=_FLAT)


def blur_taps(sigma: np.ndarray) -> np.ndarray:
    """Return the three extended box filters of Pillow's blur as one filter, of standard deviations (N,) up to 2: float32 (N, 13)."""
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
    """Filter planes (3, H, W) along both axes; the outermost pixels repeat. `taps`: (13,)."""
    taps = beside(image, taps)
    across = fn.filter(image, fn.reshape(taps, shape=[1, TAPS]), border="clamp")
    return fn.filter(across, fn.reshape(taps, shape=[TAPS, 1]), border="clamp")


def solarize(image: Node) -> Node:
    """Invert every value of 128 and above."""
    return fn.lookup_table(image, keys=list(range(256)), values=_SOLARIZED, dtype=_U8)


def symmetry(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return what makes the flips and then the turns of DRAW records (N,): a transposition, then a horizontal and a vertical flip.

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
