"""The batched kernels of `gpu_kernels` in Triton: the same signatures and values, in a few passes over the pixels.

Compiled on first use on a CUDA device; on a CPU only Triton's interpreter runs them (the tests do). What threads sum up together are
integers, so a result does not depend on their order. Formulas: as in `cpu_kernels`.
"""

# Triton's decorators hide from the type checker that launches take plain numbers for constants, and what `static_range` is.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from pipelines.kernels.torch_kernels import PLAIN, Form, Params, noise_values
from shards.hashing import FIRST, GAMMA, SECOND

BLOCK = 1024  # pixels that one program works on
ROWS = 8  # rows that one program resizes
SCRATCH_BYTES = 1 << 28  # for the half-resized rows of a chunk of views
_GAMMA, _FIRST, _SECOND = (tl.constexpr(int(word)) for word in (GAMMA, FIRST, SECOND))
# A fused multiply-add rounds once where PIL and torch round twice, which a floor() can show as a whole level.
_EXACT = {"enable_fp_fusion": False}


def crop(
    pixels: Tensor,
    params: Params,
    size: int,
    heights: np.ndarray,
    widths: np.ndarray,
    interpolation: str = "bilinear",
) -> Tensor:
    """As `gpu_kernels.crop`: along x into 8-bit scratch rows, then along y."""
    cubic = interpolation == "bicubic"
    views = torch.empty((len(heights), 3, size, size), dtype=torch.uint8, device=pixels.device)
    columns = triton.next_power_of_2(size)
    for a, b, rows in chunks(heights, 3 * size):
        scratch = torch.empty((rows, 3, size), dtype=torch.uint8, device=pixels.device)
        source = params.source[a:b]
        grid = (b - a, triton.cdiv(int(heights[a:b].max()), ROWS))
        _crop_x[grid](pixels, source, scratch, size, columns, ROWS, cubic, **_EXACT)
        grid = (b - a, triton.cdiv(size, ROWS))
        _crop_y[grid](scratch, source, views[a:b], size, columns, ROWS, cubic, **_EXACT)
    return views


def chunks(heights: np.ndarray, row_bytes: int, limit: int = SCRATCH_BYTES) -> list[tuple[int, int, int]]:
    """Runs of views whose crops' rows fit the scratch memory (at least one view each): first, end, rows in all."""
    ends = np.cumsum(heights.astype(np.int64))
    allowed, cuts = max(1, limit // row_bytes), [0]
    while cuts[-1] < len(heights):
        before = int(ends[cuts[-1] - 1]) if cuts[-1] else 0
        cuts.append(max(cuts[-1] + 1, int(np.searchsorted(ends, before + allowed, side="right"))))
    return [(a, b, int(heights[a:b].sum())) for a, b in pairwise(cuts)]


def colour(views: Tensor, params: Params) -> Tensor:
    """As `gpu_kernels.colour`, in place."""
    m, _, size, _ = views.shape
    luma = torch.zeros(m, dtype=torch.int64, device=views.device)
    grid = (m, triton.cdiv(size * size, BLOCK))
    rest = (params.jitter, params.order, params.gray, size * size, BLOCK)
    _luma_before_contrast[grid](views, luma, *rest, **_EXACT)
    _colour[grid](views, luma, *rest, **_EXACT)
    return views


def blur(views: Tensor, params: Params) -> Tensor:
    """As `gpu_kernels.blur`."""
    count, size = len(params.blurred), views.shape[-1]
    if count:
        a, b = (
            torch.empty((count, *views.shape[1:]), dtype=torch.uint8, device=views.device) for _ in range(2)
        )
        everyone = torch.arange(count, device=views.device)
        grid = (count, triton.cdiv(3 * size * size, BLOCK))
        steps = [(views, a), (a, b), (b, a), (a, b), (b, a), (a, views)]
        for k, (src, dst) in enumerate(steps):
            at = params.blurred if src is views else everyone
            to = params.blurred if dst is views else everyone
            _box[grid](src, dst, at, to, params.boxes, size, k < 3, BLOCK)
    return views


def finish(views: Tensor, params: Params, mean: Tensor, std: Tensor, form: Form = PLAIN) -> Tensor:
    """As `gpu_kernels.finish`."""
    m, _, size, _ = views.shape
    out = torch.empty(views.shape, dtype=form.dtype, device=views.device, memory_format=form.memory_format)
    grid = (m, triton.cdiv(size * size, BLOCK))
    table = noise_values(views.device)
    seeds = params.noise_seed.view(torch.uint64)
    drawn = (params.solarize, params.symmetry, params.noise_std, seeds)
    _finish[grid](views, out, *drawn, table, mean, std, size, form.channels_last, BLOCK, **_EXACT)
    return out


@triton.jit
def _tap(first, k, length, centre, reach, CUBIC: tl.constexpr):
    """Where tap `k` of a filter lies, and its weight, as `gpu_kernels.filter_weights`; 0 past the ends."""
    at = first + k
    x = tl.abs(at.to(tl.float32) + 0.5 - centre) / reach
    if CUBIC:
        near, far = (1.5 * x - 2.5) * x * x + 1.0, ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
        weight = tl.where(x < 1.0, near, tl.where(x < 2.0, far, 0.0))
    else:
        weight = tl.maximum(1.0 - x, 0.0)
    return at, tl.where(at < length, weight, 0.0)


@triton.jit
def _level(weighted, total):
    """The weighted mean, rounded to 0 .. 255."""
    return tl.minimum(tl.maximum(tl.floor(weighted / total + 0.5), 0.0), 255.0).to(tl.uint8)


@triton.jit
def _crop_x(pixels, source, scratch, size, COLUMNS: tl.constexpr, ROWS: tl.constexpr, CUBIC: tl.constexpr):
    """Some rows of one crop box (h, w, 3) become rows (3, size) of `scratch`; a view's rows follow those of the view before."""
    box = source + tl.program_id(0) * 7
    start, width = tl.load(box), tl.load(box + 1)
    top, left, high, wide = tl.load(box + 2), tl.load(box + 3), tl.load(box + 4), tl.load(box + 5)
    to = tl.load(box + 6) - tl.load(source + 6)  # counted from the first view of this launch
    y = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    x = tl.arange(0, COLUMNS)
    scale = wide.to(tl.float32) / size
    reach = tl.maximum(scale, 1.0)
    centre = (x.to(tl.float32) + 0.5) * scale
    span = 2 * reach if CUBIC else reach
    first = tl.maximum(tl.floor(centre - span), 0.0).to(tl.int64)
    there = (y < high)[:, None] & (x < size)[None, :]
    r = tl.zeros((ROWS, COLUMNS), tl.float32)
    g = tl.zeros((ROWS, COLUMNS), tl.float32)
    b = tl.zeros((ROWS, COLUMNS), tl.float32)
    total = tl.zeros((COLUMNS,), tl.float32)
    for k in range(0, tl.ceil(2 * span).to(tl.int32) + 1):
        at, weight = _tap(first, k, wide, centre, reach, CUBIC)
        total += weight
        here = there & (weight != 0)[None, :]
        place = pixels + start + ((top + y)[:, None] * width + (left + at)[None, :]) * 3
        r += weight[None, :] * tl.load(place, mask=here, other=0).to(tl.float32)
        g += weight[None, :] * tl.load(place + 1, mask=here, other=0).to(tl.float32)
        b += weight[None, :] * tl.load(place + 2, mask=here, other=0).to(tl.float32)
    total = tl.where(total != 0, total, 1.0)[None, :]
    out = scratch + (to + y)[:, None] * (3 * size) + x[None, :]
    # Pillow keeps 8 bits between its two passes.
    tl.store(out, _level(r, total), mask=there)
    tl.store(out + size, _level(g, total), mask=there)
    tl.store(out + 2 * size, _level(b, total), mask=there)


@triton.jit
def _crop_y(scratch, source, views, size, COLUMNS: tl.constexpr, ROWS: tl.constexpr, CUBIC: tl.constexpr):
    """Some rows of one view, in its three channels."""
    m = tl.program_id(0).to(tl.int64)
    high = tl.load(source + m * 7 + 4)
    rows = tl.load(source + m * 7 + 6) - tl.load(source + 6)
    y = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    x = tl.arange(0, COLUMNS)
    there = (y < size)[:, None] & (x < size)[None, :]
    scale = high.to(tl.float32) / size
    reach = tl.maximum(scale, 1.0)
    centre = (y.to(tl.float32) + 0.5) * scale
    span = 2 * reach if CUBIC else reach
    first = tl.maximum(tl.floor(centre - span), 0.0).to(tl.int64)
    r = tl.zeros((ROWS, COLUMNS), tl.float32)
    g = tl.zeros((ROWS, COLUMNS), tl.float32)
    b = tl.zeros((ROWS, COLUMNS), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for k in range(0, tl.ceil(2 * span).to(tl.int32) + 1):
        at, weight = _tap(first, k, high, centre, reach, CUBIC)
        total += weight
        here = there & (weight != 0)[:, None]
        place = scratch + (rows + at)[:, None] * (3 * size) + x[None, :]
        r += weight[:, None] * tl.load(place, mask=here, other=0).to(tl.float32)
        g += weight[:, None] * tl.load(place + size, mask=here, other=0).to(tl.float32)
        b += weight[:, None] * tl.load(place + 2 * size, mask=here, other=0).to(tl.float32)
    total = tl.where(total != 0, total, 1.0)[:, None]
    out = views + m * (3 * size * size) + y[:, None] * size + x[None, :]
    tl.store(out, _level(r, total), mask=there)
    tl.store(out + size * size, _level(g, total), mask=there)
    tl.store(out + 2 * size * size, _level(b, total), mask=there)


@triton.jit
def _luma(r, g, b):
    """ITU-R 601-2 in Pillow's 16-bit fixed point: int32."""
    return (r.to(tl.int32) * 19595 + g.to(tl.int32) * 38470 + b.to(tl.int32) * 7471 + 0x8000) >> 16


@triton.jit
def _blend(base, x, factor):
    return tl.floor(tl.minimum(tl.maximum(base + factor * (x - base), 0.0), 255.0))


@triton.jit
def _hue(r, g, b, shift):
    """Turn the hue of Pillow's 8-bit HSV by trunc(255 * shift) levels."""
    top, low = tl.maximum(tl.maximum(r, g), b), tl.minimum(tl.minimum(r, g), b)
    span = tl.maximum(top - low, 1.0)
    rc, gc, bc = tl.div_rn(top - r, span), tl.div_rn(top - g, span), tl.div_rn(top - b, span)
    sector = tl.where(r == top, bc - gc, tl.where(g == top, 2.0 + rc - bc, 4.0 + gc - rc))
    turn = tl.div_rn(sector, tl.full(sector.shape, 6.0, tl.float32))
    turn = tl.where(turn < 0, turn + 1.0, turn)
    hue = ((turn * 255.0).to(tl.int32) + (shift * 255.0).to(tl.int32)) & 255
    full = tl.full(sector.shape, 255.0, tl.float32)
    saturation = tl.div_rn(tl.floor(tl.div_rn(top - low, tl.maximum(top, 1.0)) * 255.0), full)
    six = tl.div_rn(hue.to(tl.float32) * 6.0, full)
    part = tl.floor(six)
    frac = six - part
    p = tl.floor(top * (1.0 - saturation) + 0.5)
    q = tl.floor(top * (1.0 - saturation * frac) + 0.5)
    t = tl.floor(top * (1.0 - saturation * (1.0 - frac)) + 0.5)
    k = part.to(tl.int32) % 6
    red = tl.where((k == 0) | (k == 5), top, tl.where(k == 1, q, tl.where(k == 4, t, p)))
    green = tl.where((k == 1) | (k == 2), top, tl.where(k == 0, t, tl.where(k == 3, q, p)))
    blue = tl.where((k == 3) | (k == 4), top, tl.where(k == 2, t, tl.where(k == 5, q, p)))
    return red, green, blue


@triton.jit
def _one_part(part, r, g, b, factors, mean):
    """One part of the jitter: 0 brightness, 1 contrast, 2 saturation, 3 hue; -1 leaves the colours."""
    if part == 0:
        factor = tl.load(factors)
        r, g, b = _blend(0.0, r, factor), _blend(0.0, g, factor), _blend(0.0, b, factor)
    elif part == 1:
        factor = tl.load(factors + 1)
        r, g, b = _blend(mean, r, factor), _blend(mean, g, factor), _blend(mean, b, factor)
    elif part == 2:
        factor = tl.load(factors + 2)
        gray = _luma(r, g, b).to(tl.float32)
        r, g, b = _blend(gray, r, factor), _blend(gray, g, factor), _blend(gray, b, factor)
    elif part == 3:
        r, g, b = _hue(r, g, b, tl.load(factors + 3))
    return r, g, b


@triton.jit
def _luma_before_contrast(views, luma, jitter, order, gray, count, BLOCK: tl.constexpr):
    """Adds to `luma` (M,) the luma of all pixels as they are when the contrast has its turn."""
    m = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    place = views + m * (3 * count) + at
    p0, p1 = tl.load(order + m * 4), tl.load(order + m * 4 + 1)
    p2, p3 = tl.load(order + m * 4 + 2), tl.load(order + m * 4 + 3)
    if (p0 == 1) | (p1 == 1) | (p2 == 1) | (p3 == 1):
        r = tl.load(place, mask=there, other=0).to(tl.float32)
        g = tl.load(place + count, mask=there, other=0).to(tl.float32)
        b = tl.load(place + 2 * count, mask=there, other=0).to(tl.float32)
        factors = jitter + m * 4
        if p0 != 1:
            r, g, b = _one_part(p0, r, g, b, factors, 0.0)
            if p1 != 1:
                r, g, b = _one_part(p1, r, g, b, factors, 0.0)
                if p2 != 1:
                    r, g, b = _one_part(p2, r, g, b, factors, 0.0)
        tl.atomic_add(luma + m, tl.sum(tl.where(there, _luma(r, g, b), 0)).to(tl.int64))


@triton.jit
def _colour(views, luma, jitter, order, gray, count, BLOCK: tl.constexpr):
    """All parts in their order, then greyscale, in place."""
    m = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    place = views + m * (3 * count) + at
    to_gray = tl.load(gray + m)
    jittered = tl.load(order + m * 4) >= 0
    if jittered | to_gray:
        r = tl.load(place, mask=there, other=0).to(tl.float32)
        g = tl.load(place + count, mask=there, other=0).to(tl.float32)
        b = tl.load(place + 2 * count, mask=there, other=0).to(tl.float32)
        if jittered:
            mean = ((2 * tl.load(luma + m) + count) // (2 * count)).to(tl.float32)  # Pillow's int(mean + 0.5)
            for turn in tl.static_range(4):
                r, g, b = _one_part(tl.load(order + m * 4 + turn), r, g, b, jitter + m * 4, mean)
        if to_gray:
            r = _luma(r, g, b).to(tl.float32)
            g = r
            b = r
        tl.store(place, r.to(tl.uint8), mask=there)
        tl.store(place + count, g.to(tl.uint8), mask=there)
        tl.store(place + 2 * count, b.to(tl.uint8), mask=there)


@triton.jit
def _box(src, dst, src_views, dst_views, boxes, size, ALONG_X: tl.constexpr, BLOCK: tl.constexpr):
    """One pass of the extended box filter along an axis, edges repeated; the weights are 24-bit and sum to one."""
    m = tl.program_id(0)
    pixels = 3 * size * size
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < pixels
    src += tl.load(src_views + m) * pixels
    dst += tl.load(dst_views + m) * pixels
    reach = tl.load(boxes + m * 3)
    inner, outer = tl.load(boxes + m * 3 + 1).to(tl.uint32), tl.load(boxes + m * 3 + 2).to(tl.uint32)
    line = at // size
    if ALONG_X:
        i, step = at - line * size, 1
    else:
        i, step = line % size, size
    centre = tl.load(src + at, mask=there, other=0).to(tl.uint32)
    near = tl.load(src + at - tl.minimum(i, 1) * step, mask=there, other=0).to(tl.uint32)
    near += tl.load(src + at + tl.minimum(size - 1 - i, 1) * step, mask=there, other=0).to(tl.uint32)
    if reach > 0:
        far = tl.load(src + at - tl.minimum(i, 2) * step, mask=there, other=0).to(tl.uint32)
        far += tl.load(src + at + tl.minimum(size - 1 - i, 2) * step, mask=there, other=0).to(tl.uint32)
        total = (centre + near) * inner + far * outer
    else:
        total = centre * inner + near * outer
    tl.store(dst + at, ((total + (1 << 23)) >> 24).to(tl.uint8), mask=there)


@triton.jit
def _mix64(x):
    """`hashing.mix64` of uint64."""
    x = x + _GAMMA
    x = (x ^ (x >> 30)) * _FIRST
    x = (x ^ (x >> 27)) * _SECOND
    return x ^ (x >> 31)


@triton.jit
def _finish(
    views,
    out,
    solarize,
    symmetry,
    noise_std,
    noise_seed,
    table,
    mean,
    std,
    size,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gathers each pixel from its place before flip and turn; solarises, adds noise, normalises."""
    m = tl.program_id(0).to(tl.int64)
    count = size * size
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    y, x = at // size, at % size
    drawn = tl.load(symmetry + m)
    turns, last = drawn & 3, size - 1
    # As `gpu_kernels.source_of`.
    from_y = tl.where(turns == 0, y, tl.where(turns == 1, x, tl.where(turns == 2, last - y, last - x)))
    from_x = tl.where(turns == 0, x, tl.where(turns == 1, last - y, tl.where(turns == 2, last - x, y)))
    from_y = tl.where((drawn & 8) > 0, last - from_y, from_y)
    from_x = tl.where((drawn & 4) > 0, last - from_x, from_x)
    invert = tl.load(solarize + m)
    sigma = tl.load(noise_std + m)
    seed = tl.load(noise_seed + m)
    for c in tl.static_range(3):
        base = (m * 3 + c) * count
        level = tl.load(views + base + from_y * size + from_x, mask=there, other=0).to(tl.float32)
        level = tl.where((level >= 128) & invert, 255 - level, level)
        pixel = level * (1 / 255)
        if sigma > 0:
            element = (c * count + at).to(tl.uint64)
            word = _mix64(seed + (element >> 2) * _GAMMA)
            index = (word >> ((element & 3) * 16 + 4)) & 0xFFF
            noise = tl.load(table + index.to(tl.int32), mask=there, other=0.0)
            pixel = tl.minimum(tl.maximum(pixel + sigma * noise, 0.0), 1.0)
        value = tl.div_rn(pixel - tl.load(mean + c), tl.zeros_like(pixel) + tl.load(std + c))
        to = (m * count + at) * 3 + c if CHANNELS_LAST else base + at
        tl.store(out + to, value.to(out.dtype.element_ty), mask=there)
