"""Colour jitter and grayscale of a batch of views in Triton, in Pillow's 8 bits or torchvision's floats; as `torch_colour`."""

# Triton's decorators hide from the type checker that launches take plain numbers for constants, and what `static_range` is.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAssignmentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipelines.kernels import torch_colour
from pipelines.kernels.triton_crop import EXACT
from pipelines.kernels.view_params import Params

BLOCK = 1024  # pixels that one program works on
_RED, _GREEN, _BLUE = (tl.constexpr(x) for x in (torch_colour.RED, torch_colour.GREEN, torch_colour.BLUE))
_ONE = tl.constexpr(float(1 << 24))  # the gray of floats is summed in this fixed point


def colour(views: Tensor, params: Params) -> Tensor:
    """As `torch_colour.colour`, in place."""
    m, channels, size, _ = views.shape
    total = torch.zeros(m, dtype=torch.int64, device=views.device)
    grid = (m, triton.cdiv(size * size, BLOCK))
    rest = (params.jitter, params.order, params.gray, size * size, channels, BLOCK)
    _gray_before_contrast[grid](views, total, *rest, **EXACT)
    _colour[grid](views, total, *rest, **EXACT)
    return views


@triton.jit
def _luma(r, g, b):
    """ITU-R 601-2 in Pillow's 16-bit fixed point: int32."""
    return (r.to(tl.int32) * 19595 + g.to(tl.int32) * 38470 + b.to(tl.int32) * 7471 + 0x8000) >> 16


@triton.jit
def _gray(r, g, b, FLOATS: tl.constexpr):
    if FLOATS:
        return _RED * r + _GREEN * g + _BLUE * b
    else:
        return _luma(r, g, b).to(tl.float32)


@triton.jit
def _whole(gray, FLOATS: tl.constexpr):
    """Gray as an integer: sums of integers do not depend on the order in which threads add to them."""
    if FLOATS:
        return (gray * _ONE + 0.5).to(tl.int64)
    else:
        return gray.to(tl.int32)


@triton.jit
def _mean(total, count, FLOATS: tl.constexpr):
    """The mean of gray from its sum over `count` pixels."""
    if FLOATS:
        return (total.to(tl.float64) / (count * 16777216.0)).to(tl.float32)
    else:
        return ((2 * total + count) // (2 * count)).to(tl.float32)  # Pillow's int(mean + 0.5)


@triton.jit
def _blend(base, x, factor, FLOATS: tl.constexpr):
    if FLOATS:
        return tl.minimum(tl.maximum(factor * x + (1.0 - factor) * base, 0.0), 1.0)
    else:
        return tl.floor(tl.minimum(tl.maximum(base + factor * (x - base), 0.0), 255.0))


@triton.jit
def _from_sector(k, top, p, q, t):
    """The colour in sector `k`, 0 to 5, of the hue's circle, from its largest value, its smallest, and the two between."""
    red = tl.where((k == 0) | (k == 5), top, tl.where(k == 1, q, tl.where(k == 4, t, p)))
    green = tl.where((k == 1) | (k == 2), top, tl.where(k == 0, t, tl.where(k == 3, q, p)))
    blue = tl.where((k == 3) | (k == 4), top, tl.where(k == 2, t, tl.where(k == 5, q, p)))
    return red, green, blue


@triton.jit
def _hue_8bit(r, g, b, shift):
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
    return _from_sector(part.to(tl.int32) % 6, top, p, q, t)


@triton.jit
def _hue(r, g, b, shift):
    """Turn the hue by `shift` of a circle; gray pixels stay."""
    top, low = tl.maximum(tl.maximum(r, g), b), tl.minimum(tl.minimum(r, g), b)
    span = top - low
    whole = tl.where(span > 0, span, 1.0)
    by_green, by_blue = 2.0 + tl.div_rn(b - r, whole), 4.0 + tl.div_rn(r - g, whole)
    sector = tl.where(r == top, tl.div_rn(g - b, whole), tl.where(g == top, by_green, by_blue))
    turn = tl.div_rn(sector, tl.full(sector.shape, 6.0, tl.float32)) + shift
    six = (turn - tl.floor(turn)) * 6.0
    part = tl.floor(six)
    frac = six - part
    return _from_sector(part.to(tl.int32) % 6, top, low, top - span * frac, low + span * frac)


@triton.jit
def _one_part(part, r, g, b, factors, mean, FLOATS: tl.constexpr):
    """One part of the jitter: 0 brightness, 1 contrast, 2 saturation, 3 hue; -1 leaves the colours."""
    if part == 0:
        factor = tl.load(factors)
        r, g, b = (
            _blend(0.0, r, factor, FLOATS),
            _blend(0.0, g, factor, FLOATS),
            _blend(0.0, b, factor, FLOATS),
        )
    elif part == 1:
        factor = tl.load(factors + 1)
        r, g, b = (
            _blend(mean, r, factor, FLOATS),
            _blend(mean, g, factor, FLOATS),
            _blend(mean, b, factor, FLOATS),
        )
    elif part == 2:
        factor = tl.load(factors + 2)
        gray = _gray(r, g, b, FLOATS)
        r, g, b = (
            _blend(gray, r, factor, FLOATS),
            _blend(gray, g, factor, FLOATS),
            _blend(gray, b, factor, FLOATS),
        )
    elif part == 3:
        if FLOATS:
            r, g, b = _hue(r, g, b, tl.load(factors + 3))
        else:
            r, g, b = _hue_8bit(r, g, b, tl.load(factors + 3))
    return r, g, b


@triton.jit
def _band(x, order, factors, mean, BEFORE_CONTRAST: tl.constexpr):
    """The parts of the jitter that there are for other than three channels, brightness and contrast, on one of them."""
    ahead = True
    for turn in tl.static_range(4):
        part = tl.load(order + turn)
        if BEFORE_CONTRAST:
            ahead = ahead & (part != 1)
            x = tl.where((part == 0) & ahead, _blend(0.0, x, tl.load(factors), True), x)
        else:
            bright, contrast = (
                _blend(0.0, x, tl.load(factors), True),
                _blend(mean, x, tl.load(factors + 1), True),
            )
            x = tl.where(part == 0, bright, tl.where(part == 1, contrast, x))
    return x


@triton.jit
def _gray_before_contrast(
    views, total, jitter, order, gray, count, CHANNELS: tl.constexpr, BLOCK: tl.constexpr
):
    """Adds to `total` (M,) the gray of all pixels, as integers, as they are when the contrast has its turn."""
    FLOATS: tl.constexpr = views.dtype.element_ty == tl.float32
    m = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    place = views + m * (CHANNELS * count) + at
    p0, p1 = tl.load(order + m * 4), tl.load(order + m * 4 + 1)
    p2, p3 = tl.load(order + m * 4 + 2), tl.load(order + m * 4 + 3)
    if (p0 == 1) | (p1 == 1) | (p2 == 1) | (p3 == 1):
        factors = jitter + m * 4
        if CHANNELS == 3:
            r = tl.load(place, mask=there, other=0).to(tl.float32)
            g = tl.load(place + count, mask=there, other=0).to(tl.float32)
            b = tl.load(place + 2 * count, mask=there, other=0).to(tl.float32)
            if p0 != 1:
                r, g, b = _one_part(p0, r, g, b, factors, 0.0, FLOATS)
                if p1 != 1:
                    r, g, b = _one_part(p1, r, g, b, factors, 0.0, FLOATS)
                    if p2 != 1:
                        r, g, b = _one_part(p2, r, g, b, factors, 0.0, FLOATS)
            mean = _gray(r, g, b, FLOATS)
        else:
            mean = tl.zeros((BLOCK,), tl.float32)
            for c in range(CHANNELS):
                x = tl.load(place + c * count, mask=there, other=0).to(tl.float32)
                mean += _band(x, order + m * 4, factors, 0.0, True)
            mean = mean * (1.0 / CHANNELS)
        tl.atomic_add(total + m, tl.sum(tl.where(there, _whole(mean, FLOATS), 0)).to(tl.int64))


@triton.jit
def _colour(views, total, jitter, order, gray, count, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """All parts in their order, then grayscale, in place."""
    FLOATS: tl.constexpr = views.dtype.element_ty == tl.float32
    m = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    place = views + m * (CHANNELS * count) + at
    to_gray = tl.load(gray + m)
    jittered = tl.load(order + m * 4) >= 0
    if CHANNELS == 3:
        if jittered | to_gray:
            r = tl.load(place, mask=there, other=0).to(tl.float32)
            g = tl.load(place + count, mask=there, other=0).to(tl.float32)
            b = tl.load(place + 2 * count, mask=there, other=0).to(tl.float32)
            if jittered:
                mean = _mean(tl.load(total + m), count, FLOATS)
                for turn in tl.static_range(4):
                    r, g, b = _one_part(tl.load(order + m * 4 + turn), r, g, b, jitter + m * 4, mean, FLOATS)
            if to_gray:
                r = _gray(r, g, b, FLOATS)
                g = r
                b = r
            tl.store(place, r.to(views.dtype.element_ty), mask=there)
            tl.store(place + count, g.to(views.dtype.element_ty), mask=there)
            tl.store(place + 2 * count, b.to(views.dtype.element_ty), mask=there)
    elif jittered:
        mean = _mean(tl.load(total + m), count, FLOATS)
        for c in range(CHANNELS):
            x = tl.load(place + c * count, mask=there, other=0)
            tl.store(place + c * count, _band(x, order + m * 4, jitter + m * 4, mean, False), mask=there)
