"""The operations of a recipe on one 8-bit view, without the GIL: what PIL computes, bit by bit, several times faster.

A view is planar uint8 (3, S, S) and stays in the second-level cache from the crop to the last step, so each operation is one short
loop over it that the compiler vectorises. Values are rounded to 8 bits after each operation in the way Pillow rounds, so colour
jitter (ImageEnhance, the 8-bit HSV of its `convert`), grayscale, solarise and blur equal the reference exactly; the tests demand it.
Formulas: Pillow 11-13, `Blend.c`, `Convert.c`, `BoxBlur.c` as behaviour, and P. Gwosdek et al. 2011 (extended box filters).
"""

from __future__ import annotations

import math

import numpy as np

from pipelines.cpu_kernels.transpose import transpose
from pipelines.kernel_cache import njit
from shards.counter_hash import GAMMA, mix64

_F0, _F1, _F3, _F5, _F6 = np.float32(0), np.float32(1), np.float32(3), np.float32(5), np.float32(6)
_F255, _F256, _HALF = np.float32(255), np.float32(256), np.float32(0.5)
_ONE, _SIX, _LAST = np.int32(1), np.int32(6), np.int32(255)
_mix = njit(nogil=True, cache=True)(mix64)


@njit(nogil=True, cache=True)
def _blend(
    base, value, factor
):  # uint8-valued float32s: truncation toward zero after clipping, as ImagingBlend does
    mixed = base + factor * (value - base)
    return np.uint8(min(max(mixed, _F0), _F255))


@njit(nogil=True, cache=True)
def _luma(r, g, b):  # ITU-R 601-2, 16-bit fixed point, as convert("L")
    return np.uint8((np.uint32(r) * 19595 + np.uint32(g) * 38470 + np.uint32(b) * 7471 + 0x8000) >> 16)


@njit(nogil=True, cache=True)
def adjust_brightness(view, factor):
    """Blend with black, in place: v -> clip(factor * v)."""
    flat = view.reshape(-1)
    for i in range(flat.size):
        flat[i] = _blend(_F0, np.float32(flat[i]), factor)


@njit(nogil=True, cache=True)
def adjust_contrast(view, factor):
    """Blend with the rounded mean of the view's grayscale version, in place."""
    r, g, b = view[0].reshape(-1), view[1].reshape(-1), view[2].reshape(-1)
    total = np.uint64(0)
    for i in range(r.size):
        total += np.uint64(_luma(r[i], g[i], b[i]))
    mean = np.float32(int(total / r.size + 0.5))
    flat = view.reshape(-1)
    for i in range(flat.size):
        flat[i] = _blend(mean, np.float32(flat[i]), factor)


@njit(nogil=True, cache=True)
def adjust_saturation(view, factor):
    """Blend each pixel with its own grayscale value, in place."""
    r, g, b = view[0].reshape(-1), view[1].reshape(-1), view[2].reshape(-1)
    for i in range(r.size):
        gray = np.float32(_luma(r[i], g[i], b[i]))
        r[i] = _blend(gray, np.float32(r[i]), factor)
        g[i] = _blend(gray, np.float32(g[i]), factor)
        b[i] = _blend(gray, np.float32(b[i]), factor)


@njit(nogil=True, cache=True)
def adjust_hue(view, shift):
    """Turn the hue of 8-bit HSV by trunc(255 * shift) levels, in place."""
    level = np.int32(shift * 255)
    flat, plane = view.reshape(-1), np.uint64(view.shape[1] * view.shape[2])
    for i in range(plane):
        # Numba computes with integers of 64 bits, whose shifts and conversions AVX2 lacks: rounded back to 32, the loop vectorises.
        r, g, b = np.int32(flat[i]), np.int32(flat[plane + i]), np.int32(flat[2 * plane + i])
        top, low = max(r, max(g, b)), min(r, min(g, b))
        span = np.int32(top - low)
        # Of the channels' distances from the top, in spans, one is 0, one is 1, and the third is `away`. Gray pixels come out right
        # with any hue: their saturation is 0.
        away = np.float32(np.int32(top - np.int32(np.int32(r + g + b) - top - low))) / np.float32(
            max(span, _ONE)
        )
        of_red = _F1 - away if b == low else away - _F1
        of_green = _F1 + away if b == low else _F3 - away
        of_blue = _F3 + away if r == low else _F5 - away
        sector = of_red if r == top else (of_green if g == top else of_blue)
        # Pillow's C code computes the hue in doubles and stores a float: whole levels hang on that rounding, nothing else does.
        turn = sector / _F6
        turn = turn + _F1 if turn < _F0 else turn
        # floor(255 turn) = floor(256 turn - turn), which is exact where 255 turn would be rounded to a whole level.
        wide = turn * _F256
        whole = np.int32(wide)
        hue = np.int32(np.int32(whole - np.int32(wide - np.float32(whole) < turn) + level) & _LAST)

        sat = np.float32(np.int32(np.float32(np.int32(_LAST * span)) / np.float32(max(top, _ONE)))) / _F255
        six = np.int32(hue * _SIX)
        k = np.int32(np.int32(six * 257 + 257) >> 16)  # six // 255
        frac = np.float32(np.int32(six - np.int32(_LAST * k))) / _F255
        value = np.float32(top)
        p = np.int32(value * (_F1 - sat) + _HALF)
        q = np.int32(value * (_F1 - sat * frac) + _HALF)
        t = np.int32(value * (_F1 - sat * (_F1 - frac)) + _HALF)
        # Sums of products, where conditions would be branches: of these factors one is 1.
        in_0, in_1, in_2 = np.int32((k == 0) | (k == 6)), np.int32(k == 1), np.int32(k == 2)
        in_3, in_4, in_5 = np.int32(k == 3), np.int32(k == 4), np.int32(k == 5)
        flat[i] = np.uint8((in_0 + in_5) * top + in_1 * q + (in_2 + in_3) * p + in_4 * t)
        flat[plane + i] = np.uint8((in_1 + in_2) * top + in_3 * q + (in_4 + in_5) * p + in_0 * t)
        flat[2 * plane + i] = np.uint8((in_3 + in_4) * top + in_5 * q + (in_0 + in_1) * p + in_2 * t)


@njit(nogil=True, cache=True)
def to_gray(view):
    """Replace the three channels by the luma, in place."""
    flat, plane = view.reshape(-1), np.uint64(view.shape[1] * view.shape[2])
    for i in range(plane):
        luma = _luma(flat[i], flat[plane + i], flat[2 * plane + i])
        flat[i], flat[plane + i], flat[2 * plane + i] = luma, luma, luma


@njit(nogil=True, cache=True)
def solarize(view):
    """Invert every value of 128 and above, in place."""
    flat = view.reshape(-1)
    for i in range(flat.size):
        flat[i] = flat[i] if flat[i] < 128 else 255 - flat[i]


@njit(nogil=True, cache=True)
def _box_weights(sigma):
    """Three passes of an extended box filter with the variance of a Gaussian: radius, inner and outer weight (24-bit).

    Rounded to float32 where Pillow's C code stores a float: the weights differ by a unit otherwise.
    """
    variance = np.float32(np.float32(sigma) * np.float32(sigma) / np.float32(3))
    length = np.float32(math.sqrt(12.0 * np.float64(variance) + 1.0))
    whole = np.float32(math.floor((np.float64(length) - 1.0) / 2.0))
    share = np.float32(
        (2 * np.float64(whole) + 1) * (np.float64(whole * (whole + _F1)) - 3.0 * np.float64(variance))
    )
    share = np.float32(share / (6.0 * np.float64(variance - (whole + _F1) * (whole + _F1))))
    radius = whole + share
    inner = np.uint32(np.float32(1 << 24) / (radius * np.float32(2) + _F1))
    reach = np.int32(radius)
    outer = np.uint32(((1 << 24) - (reach * 2 + 1) * np.int64(inner)) // 2)
    return reach, inner, outer


@njit(nogil=True, cache=True)
def _box_rows(src, dst, size, reach, inner, outer):
    """One box pass down the columns of a plane, flat uint8 (S * S,), so that the loop over a row vectorises; edges repeat."""
    # Unsigned indices cannot be meant from the end, and with few arrays few pairs of them have to be told apart.
    last, half = size - 1, np.uint32(1 << 23)
    for y in range(size):
        mid = np.uint64(y * size)
        a, b = np.uint64(max(y - 1, 0) * size), np.uint64(min(y + 1, last) * size)
        if reach == 0:
            for x in range(np.uint64(size)):
                beside = np.uint32(np.uint32(src[a + x]) + np.uint32(src[b + x]))
                bulk = np.uint32(np.uint32(np.uint32(src[mid + x]) * inner) + np.uint32(beside * outer))
                dst[mid + x] = np.uint8(np.uint32(bulk + half) >> np.uint32(24))
        else:
            c, d = np.uint64(max(y - 2, 0) * size), np.uint64(min(y + 2, last) * size)
            for x in range(np.uint64(size)):
                near = np.uint32(np.uint32(src[a + x]) + np.uint32(src[mid + x]) + np.uint32(src[b + x]))
                far = np.uint32(np.uint32(src[c + x]) + np.uint32(src[d + x]))
                bulk = np.uint32(np.uint32(near * inner) + np.uint32(far * outer))
                dst[mid + x] = np.uint8(np.uint32(bulk + half) >> np.uint32(24))


@njit(nogil=True, cache=True)
def gaussian_blur(view, sigma, spare):
    """Pillow's GaussianBlur(sigma) for 0 < sigma <= 2 (at most five taps a pass), in place. `spare`: uint8 (2, S, S)."""
    reach, inner, outer = _box_weights(sigma)
    a, b = spare[0].reshape(-1), spare[1].reshape(-1)
    size = view.shape[1]
    for c in range(3):
        plane = view[c].reshape(-1)
        for _ in range(2):  # along x, then along y: each time three passes and a transpose
            transpose(plane, 0, size, size, size, a, 0, size)
            _box_rows(a, b, size, reach, inner, outer)
            _box_rows(b, a, size, reach, inner, outer)
            _box_rows(a, plane, size, reach, inner, outer)


@njit(nogil=True, cache=True)
def _normal(table, seed, place):
    """Element `place` of `noise.unit_noise`."""
    element = np.uint64(place)
    word = _mix(seed + (element >> np.uint64(2)) * GAMMA)
    return table[(word >> (np.uint64(16) * (element & np.uint64(3)) + np.uint64(4))) & np.uint64(0xFFF)]


@njit(nogil=True, cache=True)
def source_row(draw, last, y):
    """Where row `y` of a flipped and turned view comes from: its pixel x is that at (y0 + x dy, x0 + x dx); `last` is the side - 1.

    Undoes the quarter turns, then the flips. Returns (y0, x0, dy, dx).
    """
    if draw.turns == 0:
        y0, x0, dy, dx = y, 0, 0, 1
    elif draw.turns == 1:
        y0, x0, dy, dx = 0, last - y, 1, 0
    elif draw.turns == 2:
        y0, x0, dy, dx = last - y, last, 0, -1
    else:
        y0, x0, dy, dx = last, y, -1, 0
    if draw.vflip:
        y0, dy = last - y0, -dy
    if draw.hflip:
        x0, dx = last - x0, -dx
    return y0, x0, dy, dx


@njit(nogil=True, cache=True)
def finish(view, draw, unit, scale, bias, fill, table, out):
    """Flip, turn, add noise, normalise and erase into `out` float32 (C, S, S): out = view * unit * scale + bias.

    `fill`: float32 (C,), what erased pixels become; empty: normal numbers by the draw's seed.
    """
    size = view.shape[1]
    last = size - 1
    std = draw.noise_std
    seed = draw.noise_seed
    for c in range(view.shape[0]):
        for y in range(size):
            row = out[c, y]
            y0, x0, dy, dx = source_row(draw, last, y)
            if dy == 0 and dx == 1:
                for x in range(size):
                    row[x] = np.float32(view[c, y0, x]) * unit
            elif dy == 0:
                source = view[c, y0]
                for x in range(size):  # an unsigned index cannot be meant from the end: so this vectorises
                    row[x] = np.float32(source[np.uint64(last - x)]) * unit
            else:
                for x in range(size):
                    row[x] = np.float32(view[c, y0 + x * dy, x0]) * unit
            first = (c * size + y) * size
            if std > 0:
                for x in range(size):
                    row[x] = min(max(row[x] + std * _normal(table, seed, first + x), _F0), _F1)
            for x in range(size):
                row[x] = row[x] * scale[c] + bias[c]
            if draw.erase_top <= y < draw.erase_top + draw.erase_height:
                for x in range(draw.erase_left, draw.erase_left + draw.erase_width):
                    row[x] = fill[c] if fill.size else _normal(table, draw.erase_seed, first + x)


@njit(nogil=True, cache=True)
def adjust_colors(view, draws, index, spare):
    """Apply what comes between the crop and the pointwise operations of `draws[index]` to uint8 (3, S, S), in place."""
    draw = draws[index]
    if draw.jitter:
        for slot in range(4):
            part = draw.order[slot]
            if part == 0:
                adjust_brightness(view, draw.brightness)
            elif part == 1:
                adjust_contrast(view, draw.contrast)
            elif part == 2:
                adjust_saturation(view, draw.saturation)
            else:
                adjust_hue(view, draw.hue)
    if draw.gray:
        to_gray(view)
    if draw.sigma > 0:
        gaussian_blur(view, draw.sigma, spare)


@njit(nogil=True, cache=True)
def complete(view, draws, index, scale, bias, fill, table, out):
    """Apply what comes after the pointwise operations to `view`, which is overwritten, and write float32 (3, S, S) to `out`."""
    draw = draws[index]
    if draw.solarize:
        solarize(view)
    finish(view, draw, _F1 / _F255, scale, bias, fill, table, out)
