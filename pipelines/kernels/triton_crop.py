"""Crop and resize a batch of views in Triton: along x into scratch rows, then along y."""

# Triton's decorators hide from the type checker that launches take plain numbers for constants.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAssignmentType=false

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from pipelines.kernels.view_params import CropOptions, Params

ROWS = 4  # rows that one program resizes: 8 need twice the registers
PLANES = 3  # channels that one program resizes
SCRATCH_BYTES = 1 << 28  # for the half-resized rows of a chunk of views
# A fused multiply-add rounds once where PIL and torch round twice, which a floor() can show as a whole level.
EXACT = {"enable_fp_fusion": False}


def crop(pixels: Tensor, params: Params, options: CropOptions) -> Tensor:
    """As `torch_crop.crop`: along x into scratch rows of the type of the views, then along y."""
    size, channels, heights = options.size, options.channels, params.heights
    constants = (channels, triton.next_power_of_2(size), ROWS, options.interpolation == "bicubic")
    place = {"dtype": options.dtype, "device": pixels.device}
    views = torch.empty((len(heights), channels, size, size), **place)
    planes = triton.cdiv(channels, PLANES)
    for a, b, rows in chunks(heights, channels * size * views.element_size()):
        scratch = torch.empty((rows, channels, size), **place)
        source = params.source[a:b]
        grid = (b - a, triton.cdiv(int(heights[a:b].max()), ROWS), planes)
        _crop_x[grid](pixels, source, options.gain, options.offset, scratch, size, *constants, **EXACT)
        grid = (b - a, triton.cdiv(size, ROWS), planes)
        _crop_y[grid](scratch, source, views[a:b], size, *constants, **EXACT)
    return views


def chunks(heights: np.ndarray, row_bytes: int, limit: int = SCRATCH_BYTES) -> list[tuple[int, int, int]]:
    """Runs of views whose crops' rows fit the scratch memory (at least one view each): first, end, rows in all."""
    ends = np.cumsum(heights.astype(np.int64))
    allowed, cuts = max(1, limit // row_bytes), [0]
    while cuts[-1] < len(heights):
        before = int(ends[cuts[-1] - 1]) if cuts[-1] else 0
        cuts.append(max(cuts[-1] + 1, int(np.searchsorted(ends, before + allowed, side="right"))))
    return [(a, b, int(heights[a:b].sum())) for a, b in pairwise(cuts)]


@triton.jit
def _filter(i, length, size, CUBIC: tl.constexpr):
    """Of the filter for output pixel `i`: its centre, its reach, the first pixel, and the number of taps that may count."""
    scale = length.to(tl.float32) / size
    reach = tl.maximum(scale, 1.0)
    centre = (i.to(tl.float32) + 0.5) * scale
    span = 2 * reach if CUBIC else reach
    first = tl.maximum(tl.floor(centre - span), 0.0).to(tl.int32)
    return centre, reach, first, tl.ceil(2 * span).to(tl.int32) + 1


@triton.jit
def _weight(at, length, centre, reach, CUBIC: tl.constexpr):
    """The weight of pixel `at`, as `torch_crop.filter_weights`; 0 past the end."""
    x = tl.abs(at.to(tl.float32) + 0.5 - centre) / reach
    if CUBIC:
        near, far = (1.5 * x - 2.5) * x * x + 1.0, ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
        weight = tl.where(x < 1.0, near, tl.where(x < 2.0, far, 0.0))
    else:
        weight = tl.maximum(1.0 - x, 0.0)
    return tl.where(at < length, weight, 0.0)


@triton.jit
def _plane(c, gain, offset, CHANNELS: tl.constexpr):
    """Of channel `c`: whether it is there, its gain and its offset."""
    there = c < CHANNELS
    if gain is None:
        return there, 1.0, 0.0
    else:
        return there, tl.load(gain + c, mask=there, other=0.0), tl.load(offset + c, mask=there, other=0.0)


@triton.jit
def _pixel(place, here, scale, shift, FLOATS: tl.constexpr):
    """An element as a float32: in 8 bits its level, else in [0, 1]; not a number becomes 0."""
    value = tl.load(place, mask=here, other=0).to(tl.float32)
    if FLOATS:
        value = value * scale + shift
        value = tl.where(value > 0.0, tl.minimum(value, 1.0), 0.0)
    return value


@triton.jit
def _mean(weighted, total, FLOATS: tl.constexpr, CLAMPED: tl.constexpr):
    """The weighted mean: rounded to 0 .. 255, or a float, in [0, 1] if CLAMPED."""
    mean = weighted / total
    if FLOATS:
        if CLAMPED:
            mean = tl.minimum(tl.maximum(mean, 0.0), 1.0)
    else:
        mean = tl.minimum(tl.maximum(tl.floor(mean + 0.5), 0.0), 255.0).to(tl.uint8)
    return mean


@triton.jit
def _crop_x(
    pixels,
    source,
    gain,
    offset,
    scratch,
    size,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    CUBIC: tl.constexpr,
):
    """Some rows and up to three channels of one crop (h, w, C) become rows (C, size) of `scratch`, below those of the view before."""
    FLOATS: tl.constexpr = gain is not None
    box = source + tl.program_id(0) * 7
    high, row = tl.load(box + 4).to(tl.int32), tl.program_id(1) * ROWS
    if row >= high:  # the grid is as high as the highest crop
        return
    start, width, top, left = tl.load(box), tl.load(box + 1), tl.load(box + 2), tl.load(box + 3)
    wide = tl.load(box + 5).to(tl.int32)
    to = tl.load(box + 6) - tl.load(source + 6)  # counted from the first view of this launch
    c = 0 if CHANNELS == 3 else tl.program_id(2) * 3
    there_0, scale_0, shift_0 = _plane(c, gain, offset, CHANNELS)
    there_1, scale_1, shift_1 = _plane(c + 1, gain, offset, CHANNELS)
    there_2, scale_2, shift_2 = _plane(c + 2, gain, offset, CHANNELS)
    y = tl.arange(0, ROWS)
    x = tl.arange(0, COLUMNS)
    centre, reach, first, taps = _filter(x, wide, size, CUBIC)
    there = (row + y < high)[:, None] & (x < size)[None, :]
    # 64 bits for where the program's rows begin; within them 32 bits reach, and take half the registers.
    pixels += start + ((top + row) * width + left) * CHANNELS + c
    lines = (y * width.to(tl.int32) * CHANNELS)[:, None]
    sum_0 = tl.zeros((ROWS, COLUMNS), tl.float32)
    sum_1 = tl.zeros((ROWS, COLUMNS), tl.float32)
    sum_2 = tl.zeros((ROWS, COLUMNS), tl.float32)
    total = tl.zeros((COLUMNS,), tl.float32)
    for k in range(0, taps):
        at = first + k
        weight = _weight(at, wide, centre, reach, CUBIC)
        total += weight
        here = there & (weight != 0)[None, :]
        place = pixels + (lines + (at * CHANNELS)[None, :])
        sum_0 += weight[None, :] * _pixel(place, here & there_0, scale_0, shift_0, FLOATS)
        sum_1 += weight[None, :] * _pixel(place + 1, here & there_1, scale_1, shift_1, FLOATS)
        sum_2 += weight[None, :] * _pixel(place + 2, here & there_2, scale_2, shift_2, FLOATS)
    total = tl.where(total != 0, total, 1.0)[None, :]
    out = scratch + (to + row) * (CHANNELS * size) + c * size + (y * (CHANNELS * size))[:, None] + x[None, :]
    # Pillow keeps 8 bits between its two passes.
    tl.store(out, _mean(sum_0, total, FLOATS, False), mask=there & there_0)
    tl.store(out + size, _mean(sum_1, total, FLOATS, False), mask=there & there_1)
    tl.store(out + 2 * size, _mean(sum_2, total, FLOATS, False), mask=there & there_2)


@triton.jit
def _crop_y(
    scratch,
    source,
    views,
    size,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    CUBIC: tl.constexpr,
):
    """Some rows of one view, in up to three channels."""
    FLOATS: tl.constexpr = views.dtype.element_ty == tl.float32
    m = tl.program_id(0).to(tl.int64)
    high = tl.load(source + m * 7 + 4).to(tl.int32)
    rows = tl.load(source + m * 7 + 6) - tl.load(source + 6)
    c = 0 if CHANNELS == 3 else tl.program_id(2) * 3
    there_0, _, _ = _plane(c, None, None, CHANNELS)
    there_1, _, _ = _plane(c + 1, None, None, CHANNELS)
    there_2, _, _ = _plane(c + 2, None, None, CHANNELS)
    row = tl.program_id(1) * ROWS
    y = row + tl.arange(0, ROWS)
    x = tl.arange(0, COLUMNS)
    there = (y < size)[:, None] & (x < size)[None, :]
    centre, reach, first, taps = _filter(y, high, size, CUBIC)
    # As in `_crop_x`: 64 bits for the first line that the program reads, 32 from there on.
    _, _, lowest, _ = _filter(row, high, size, CUBIC)
    line = CHANNELS * size
    scratch += (rows + lowest) * line + c * size
    sum_0 = tl.zeros((ROWS, COLUMNS), tl.float32)
    sum_1 = tl.zeros((ROWS, COLUMNS), tl.float32)
    sum_2 = tl.zeros((ROWS, COLUMNS), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for k in range(0, taps):
        at = first + k
        weight = _weight(at, high, centre, reach, CUBIC)
        total += weight
        here = there & (weight != 0)[:, None]
        place = scratch + (((at - lowest) * line)[:, None] + x[None, :])
        sum_0 += weight[:, None] * tl.load(place, mask=here & there_0, other=0).to(tl.float32)
        sum_1 += weight[:, None] * tl.load(place + size, mask=here & there_1, other=0).to(tl.float32)
        sum_2 += weight[:, None] * tl.load(place + 2 * size, mask=here & there_2, other=0).to(tl.float32)
    total = tl.where(total != 0, total, 1.0)[:, None]
    out = views + (m * CHANNELS + c) * (size * size) + y[:, None] * size + x[None, :]
    tl.store(out, _mean(sum_0, total, FLOATS, True), mask=there & there_0)
    tl.store(out + size * size, _mean(sum_1, total, FLOATS, True), mask=there & there_1)
    tl.store(out + 2 * size * size, _mean(sum_2, total, FLOATS, True), mask=there & there_2)
