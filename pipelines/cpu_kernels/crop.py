"""Crop and resize one 8-bit image without the GIL: Pillow's antialiased filters, bit by bit, along x and then along y.

Both passes are sums of whole lines, which the compiler vectorises: for the first, the crop is turned so that its columns are lines.
Pillow rounds weights to 22 bits, and values to 8 bits after each pass (`Resample.c`, as behaviour). Since version 13 Pillow takes y
first where that saves work; here, as in the other engines, x is always first: such a crop differs from Pillow's by rounding.
"""

from __future__ import annotations

import numpy as np

from pipelines.cpu_kernels.float_views import filter_table
from pipelines.cpu_kernels.transpose import SIDE, transpose
from pipelines.kernel_cache import njit

_BITS, _HALF = np.int32(22), np.int32(1 << 21)
_LOW, _HIGH = np.int32(0), np.int32(255)
# Bytes of turned rows that stay in the second-level cache between the passes.
_STRIP_BYTES = 1 << 18


def scratch_bytes(height: int, width: int, size: int) -> int:
    """Return the bytes of scratch memory that `resize` needs for any crop of an image."""
    rows = _strip_rows(width)
    return 3 * (rows * (width + size) + height * size)


@njit(nogil=True, cache=True)
def strip_rows(width):
    """Return how many rows of a crop are turned at a time."""
    return max(SIDE, _STRIP_BYTES // (3 * width) // SIDE * SIDE)


_strip_rows = strip_rows.py_func


@njit(nogil=True, cache=True)
def _weights(length, size, cubic):
    """Return the first line and the weights, int32 (size, K), of each of `size` sums of `length` lines. K is even; the rest are 0."""
    firsts, counts, table = filter_table(length, size, cubic)
    most = 1
    for i in range(size):
        most = max(most, counts[i])
    weights = np.zeros((size, most + most % 2), np.int32)
    for i in range(size):
        for k in range(counts[i]):
            wide = table[i, k] * (1 << 22)
            weights[i, k] = np.int32(wide + 0.5) if wide >= 0 else np.int32(wide - 0.5)
    return firsts, weights


@njit(nogil=True, cache=True)
def _add(total, value, weight):
    """Return the sum in 32 bits, which products of bytes and weights fit; Numba would compute in 64."""
    return np.int32(total + np.int32(np.int32(value) * weight))


@njit(nogil=True, cache=True)
def _rounded(total):
    return np.uint8(min(max(np.int32(total >> _BITS), _LOW), _HIGH))


@njit(nogil=True, cache=True)
def _sum_lines(lines, length, step, between, pitch, firsts, weights, count, sums, out):
    """Make `size` lines of each channel out of its `length` lines, each a weighted sum of some, rounded to 0 .. 255.

    Args:
        lines: uint8; line i of channel c begins at (i * step + c * between) * pitch.
        firsts, weights: of the lines that are made, as from `_weights`.
        count: bytes of a line that count.
        sums: int32, at least `count`.
        out: uint8; line i of channel c begins at (c * size + i) * pitch.
    """
    # One function with all loops in it: a call for each line would take longer than its sum. Unsigned indices cannot be meant from
    # the end, so the innermost loops vectorise.
    size, taps = weights.shape
    num, by = np.uint64(count), step * pitch
    for i in range(size):
        for channel in range(3):
            first, last = (
                channel * between * pitch + firsts[i] * by,
                channel * between * pitch + (length - 1) * by,
            )
            to = np.uint64((channel * size + i) * pitch)
            # Past the last line weights are 0.
            a, b = np.uint64(first), np.uint64(min(first + by, last))
            v, w = weights[i, 0], weights[i, 1]
            if taps == 2:
                for x in range(num):
                    out[to + x] = _rounded(_add(_add(_HALF, lines[a + x], v), lines[b + x], w))
                continue
            c, d = np.uint64(min(first + 2 * by, last)), np.uint64(min(first + 3 * by, last))
            t, u = weights[i, 2], weights[i, 3]
            if taps == 4:
                for x in range(num):
                    total = _add(_add(_HALF, lines[a + x], v), lines[b + x], w)
                    out[to + x] = _rounded(_add(_add(total, lines[c + x], t), lines[d + x], u))
                continue
            for x in range(num):
                total = _add(_add(_HALF, lines[a + x], v), lines[b + x], w)
                sums[x] = _add(_add(total, lines[c + x], t), lines[d + x], u)
            for k in range(4, taps, 2):
                a, b = np.uint64(min(first + k * by, last)), np.uint64(min(first + (k + 1) * by, last))
                v, w = weights[i, k], weights[i, k + 1]
                for x in range(num):
                    sums[x] = _add(_add(sums[x], lines[a + x], v), lines[b + x], w)
            for x in range(num):
                out[to + x] = _rounded(sums[x])


@njit(nogil=True, cache=True)
def resize(pixels, top, left, height, width, cubic, scratch, out):
    """Cut a box out of an image and resize it.

    Args:
        pixels: contiguous uint8 (H, W, 3).
        top, left, height, width: the box, inside the image.
        cubic: Keys' cubic with a = -1/2 in place of the triangle; both are wider where pixels are merged.
        scratch: uint8, at least `scratch_bytes`.
        out: contiguous uint8 (3, S, S), written.
    """
    size = out.shape[1]
    image, view, pitch = pixels.reshape(-1), out.reshape(-1), 3 * pixels.shape[1]
    strip = strip_rows(pixels.shape[1])
    columns = scratch[: 3 * width * strip]
    wide = scratch[columns.size : columns.size + 3 * size * strip]
    across = scratch[columns.size + wide.size :]
    sums = np.empty(max(size, strip), np.int32)
    firsts, weights = _weights(width, size, cubic)
    for y in range(0, height, strip):
        rows = min(strip, height - y)
        transpose(image, (top + y) * pitch + 3 * left, pitch, rows, 3 * width, columns, 0, strip)
        _sum_lines(columns, width, 3, 1, strip, firsts, weights, rows, sums, wide)
        for c in range(3):
            transpose(wide, c * size * strip, strip, size, rows, across, (c * height + y) * size, size)
    firsts, weights = _weights(height, size, cubic)
    _sum_lines(across, height, 1, height, size, firsts, weights, size, sums, view)
