"""The operations of a recipe on one view of any number of channels, as 32-bit floats in [0, 1], without the GIL.

For images of 16 bits, of floats, or of other than three channels, which 8 bits and Pillow's formulas do not fit. Nothing is rounded on
the way, so three channels follow torchvision's formulas for float tensors. Gray is luma for three channels, the mean of all others.
"""

from __future__ import annotations

import math

import numpy as np

from pipelines.cpu_kernels.colour import _box_weights, finish
from pipelines.kernel_cache import njit

_F0, _F1, _HALF = np.float32(0), np.float32(1), np.float32(0.5)
_RED, _GREEN, _BLUE = np.float32(0.2989), np.float32(0.587), np.float32(0.114)  # torchvision's, for tensors


@njit(nogil=True, cache=True)
def _unit(value):
    """Clamped to [0, 1]; not a number becomes 0."""
    return min(value, _F1) if value > _F0 else _F0


@njit(nogil=True, cache=True)
def levels(pixels, gain, offset, out):
    """out[c] = clamp(pixels[..., c] * gain[c] + offset[c]), from (H, W, C or 1) of any type to float32 (C, H, W)."""
    for c in range(out.shape[0]):
        source = c if pixels.shape[2] > 1 else 0
        for y in range(out.shape[1]):
            for x in range(out.shape[2]):
                out[c, y, x] = _unit(np.float32(pixels[y, x, source]) * gain[c] + offset[c])


@njit(nogil=True, cache=True)
def filter_table(length, size, cubic):
    """Pillow's weights to resize `length` pixels to `size`: first pixel and number of pixels (size,), weights float64 (size, K)."""
    scale = length / size
    wide = max(scale, 1.0)
    support = (2.0 if cubic else 1.0) * wide
    firsts, counts = np.empty(size, np.int32), np.empty(size, np.int32)
    table = np.zeros((size, math.ceil(support) * 2 + 1))
    for i in range(size):
        centre = (i + 0.5) * scale
        first = max(int(centre - support + 0.5), 0)
        count = min(int(centre + support + 0.5), length) - first
        total = 0.0
        for k in range(count):
            x = abs((k + first - centre + 0.5) / wide)
            if not cubic:
                weight = max(1.0 - x, 0.0)
            elif x < 1:
                weight = (1.5 * x - 2.5) * x * x + 1.0
            else:
                weight = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0 if x < 2 else 0.0
            table[i, k] = weight
            total += weight
        for k in range(count):
            table[i, k] /= total
        firsts[i], counts[i] = first, count
    return firsts, counts, table


@njit(nogil=True, cache=True)
def resize(image, cubic, out):
    """Antialiased: float32 (C, H, W) to (C, S, S), along x and then along y, as Pillow resizes planes of floats; clamped to [0, 1]."""
    channels, height, width = image.shape
    size = out.shape[1]
    firsts, counts, table = filter_table(width, size, cubic)
    across = np.empty((height, size), np.float32)
    row = np.empty(size, np.float64)
    tops, heights, rows = filter_table(height, size, cubic)
    for c in range(channels):
        for y in range(height):
            for x in range(size):
                total = 0.0
                for k in range(counts[x]):
                    total += table[x, k] * image[c, y, firsts[x] + k]
                across[y, x] = total
        for y in range(size):
            row[:] = 0.0
            for k in range(heights[y]):
                weight, source = rows[y, k], across[tops[y] + k]
                for x in range(size):
                    row[x] += weight * source[x]
            for x in range(size):
                out[c, y, x] = _unit(np.float32(row[x]))


@njit(nogil=True, cache=True)
def _gray(view, i, j):
    if view.shape[0] == 3:
        return _RED * view[0, i, j] + _GREEN * view[1, i, j] + _BLUE * view[2, i, j]
    total = _F0
    for c in range(view.shape[0]):
        total += view[c, i, j]
    return total / np.float32(view.shape[0])


@njit(nogil=True, cache=True)
def _blend(base, value, factor):
    return _unit(factor * value + (_F1 - factor) * base)


@njit(nogil=True, cache=True)
def adjust_brightness(view, factor):
    """Blend with black, in place."""
    flat = view.reshape(-1)
    for i in range(flat.size):
        flat[i] = _unit(factor * flat[i])


@njit(nogil=True, cache=True)
def adjust_contrast(view, factor):
    """Blend with the mean of the view's gray version, in place."""
    total = 0.0
    for i in range(view.shape[1]):
        for j in range(view.shape[2]):
            total += _gray(view, i, j)
    mean = np.float32(total / (view.shape[1] * view.shape[2]))
    flat = view.reshape(-1)
    for i in range(flat.size):
        flat[i] = _blend(mean, flat[i], factor)


@njit(nogil=True, cache=True)
def adjust_saturation(view, factor):
    """Blend each pixel of three channels with its own gray, in place."""
    for i in range(view.shape[1]):
        for j in range(view.shape[2]):
            gray = _gray(view, i, j)
            for c in range(3):
                view[c, i, j] = _blend(gray, view[c, i, j], factor)


@njit(nogil=True, cache=True)
def adjust_hue(view, shift):
    """Turn the hue of three channels' HSV by `shift` of a circle, in place."""
    for i in range(view.shape[1]):
        for j in range(view.shape[2]):
            r, g, b = view[0, i, j], view[1, i, j], view[2, i, j]
            top, low = max(r, max(g, b)), min(r, min(g, b))
            span = top - low
            if span == 0:
                continue
            if top == r:
                sector = (g - b) / span
            elif top == g:
                sector = np.float32(2) + (b - r) / span
            else:
                sector = np.float32(4) + (r - g) / span
            turn = sector / np.float32(6) + shift
            six = (turn - math.floor(turn)) * 6.0
            k = int(six)
            frac = np.float32(six - k)
            p, q, t = low, top - span * frac, low + span * frac
            k = k % 6
            view[0, i, j] = top if (k == 0 or k == 5) else (q if k == 1 else (t if k == 4 else p))
            view[1, i, j] = top if (k == 1 or k == 2) else (q if k == 3 else (t if k == 0 else p))
            view[2, i, j] = top if (k == 3 or k == 4) else (q if k == 5 else (t if k == 2 else p))


@njit(nogil=True, cache=True)
def to_gray(view):
    """Replace the three channels by their luma, in place."""
    for i in range(view.shape[1]):
        for j in range(view.shape[2]):
            view[:, i, j] = _gray(view, i, j)


@njit(nogil=True, cache=True)
def solarize(view):
    """Invert every value of one half and above, in place."""
    flat = view.reshape(-1)
    for i in range(flat.size):
        flat[i] = flat[i] if flat[i] < _HALF else _F1 - flat[i]


@njit(nogil=True, cache=True)
def _box_rows(src, dst, reach, inner, outer):
    """One box pass down the columns of a plane; edges repeat."""
    last = src.shape[0] - 1
    for y in range(last + 1):
        a, b = src[max(y - 1, 0)], src[min(y + 1, last)]
        c, d = src[max(y - 2, 0)], src[min(y + 2, last)]
        mid, out = src[y], dst[y]
        if reach == 0:
            for x in range(mid.size):
                out[x] = mid[x] * inner + (a[x] + b[x]) * outer
        else:
            for x in range(mid.size):
                out[x] = (a[x] + mid[x] + b[x]) * inner + (c[x] + d[x]) * outer


@njit(nogil=True, cache=True)
def gaussian_blur(view, sigma):
    """Three extended box filters an axis, as in Pillow, of a Gaussian's variance; 0 < sigma <= 2; in place."""
    reach, whole, rest = _box_weights(sigma)
    inner, outer = np.float32(whole / (1 << 24)), np.float32(rest / (1 << 24))
    size = view.shape[1]
    a, b = np.empty((size, size), np.float32), np.empty((size, size), np.float32)
    for c in range(view.shape[0]):
        plane = view[c]
        for _ in range(2):  # along x, then along y: each time three passes and a transpose
            for x in range(size):
                for y in range(size):  # writing in rows is twice as fast as reading in rows
                    a[x, y] = plane[y, x]
            _box_rows(a, b, reach, inner, outer)
            _box_rows(b, a, reach, inner, outer)
            _box_rows(a, plane, reach, inner, outer)


@njit(nogil=True, cache=True)
def adjust_colors(image, draws, index, cubic, view):
    """Apply what comes before the pointwise operations to a crop, float32 (C, H, W) in [0, 1]; write float32 (C, S, S) to `view`.

    Saturation, hue and grayscale are left out unless there are three channels: a recipe that has them is refused for other images.
    """
    draw = draws[index]
    resize(image, cubic, view)
    three = view.shape[0] == 3
    if draw.jitter:
        for slot in range(4):
            part = draw.order[slot]
            if part == 0:
                adjust_brightness(view, draw.brightness)
            elif part == 1:
                adjust_contrast(view, draw.contrast)
            elif part == 2 and three:
                adjust_saturation(view, draw.saturation)
            elif part == 3 and three:
                adjust_hue(view, draw.hue)
    if draw.gray and three:
        to_gray(view)
    if draw.sigma > 0:
        gaussian_blur(view, draw.sigma)


@njit(nogil=True, cache=True)
def complete(view, draws, index, scale, bias, fill, table, out):
    """Apply what comes after the pointwise operations to `view`, which is overwritten, and write it normalised to `out`."""
    draw = draws[index]
    if draw.solarize:
        solarize(view)
    finish(view, draw, _F1, scale, bias, fill, table, out)


@njit(nogil=True, cache=True)
def make_view(image, draws, index, cubic, scale, bias, fill, table, out):
    """Make the view of `draws[index]`, without its pointwise operations, from its crop: float32 (C, H, W) to (C, S, S) in `out`."""
    view = np.empty(out.shape, np.float32)
    adjust_colors(image, draws, index, cubic, view)
    complete(view, draws, index, scale, bias, fill, table, out)
