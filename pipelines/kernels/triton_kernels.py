"""The batched kernels of `torch_kernels` in Triton: the same signatures and values, in a few passes over the pixels.

Compiled on first use on a CUDA device; on a CPU only Triton's interpreter runs them (the tests do). What threads sum up together are
integers, so a result does not depend on their order. Formulas: as in `cpu_kernels.colour` and `cpu_kernels.float_views`.
"""

# Triton's decorators hide from the type checker that launches take plain numbers for constants, and what `static_range` is.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAssignmentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipelines.kernels.torch_kernels import noise_values
from pipelines.kernels.triton_colour import BLOCK
from pipelines.kernels.triton_colour import colour as colour
from pipelines.kernels.triton_crop import EXACT
from pipelines.kernels.triton_crop import crop as crop
from pipelines.kernels.view_params import PLAIN, Form, Params
from shards.counter_hash import FIRST, GAMMA, SECOND

_GAMMA, _FIRST, _SECOND = (tl.constexpr(int(word)) for word in (GAMMA, FIRST, SECOND))


def blur(views: Tensor, params: Params) -> Tensor:
    """As `torch_kernels.blur`."""
    count, (_, channels, size, _) = len(params.blurred), views.shape
    if count:
        a, b = (
            torch.empty((count, *views.shape[1:]), dtype=views.dtype, device=views.device) for _ in range(2)
        )
        everyone = torch.arange(count, device=views.device)
        grid = (count, triton.cdiv(channels * size * size, BLOCK))
        steps = [(views, a), (a, b), (b, a), (a, b), (b, a), (a, views)]
        for k, (src, dst) in enumerate(steps):
            at = params.blurred if src is views else everyone
            to = params.blurred if dst is views else everyone
            _box[grid](src, dst, at, to, params.boxes, size, channels, k < 3, BLOCK, **EXACT)
    return views


def finish(views: Tensor, params: Params, mean: Tensor, std: Tensor, form: Form = PLAIN) -> Tensor:
    """As `torch_kernels.finish`."""
    m, channels, size, _ = views.shape
    out = torch.empty(views.shape, dtype=form.dtype, device=views.device, memory_format=form.memory_format)
    grid = (m, triton.cdiv(size * size, BLOCK))
    table = noise_values(views.device)
    seeds = params.noise_seed.view(torch.uint64)
    drawn = (params.solarize, params.symmetry, params.noise_std, seeds)
    constants = (channels, form.channels_last, BLOCK)
    _finish[grid](views, out, *drawn, table, mean, std, size, *constants, **EXACT)
    return out


@triton.jit
def _box(
    src,
    dst,
    src_views,
    dst_views,
    boxes,
    size,
    CHANNELS: tl.constexpr,
    ALONG_X: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One pass of the extended box filter along an axis, edges repeated; the weights are 24-bit and sum to one."""
    FLOATS: tl.constexpr = src.dtype.element_ty == tl.float32
    number: tl.constexpr = tl.float32 if FLOATS else tl.uint32
    m = tl.program_id(0)
    pixels = CHANNELS * size * size
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < pixels
    src += tl.load(src_views + m) * pixels
    dst += tl.load(dst_views + m) * pixels
    reach = tl.load(boxes + m * 3)
    inner, outer = tl.load(boxes + m * 3 + 1).to(number), tl.load(boxes + m * 3 + 2).to(number)
    if FLOATS:
        inner, outer = inner * (1 / 16777216), outer * (1 / 16777216)
    line = at // size
    if ALONG_X:
        i, step = at - line * size, 1
    else:
        i, step = line % size, size
    centre = tl.load(src + at, mask=there, other=0).to(number)
    near = tl.load(src + at - tl.minimum(i, 1) * step, mask=there, other=0).to(number)
    near += tl.load(src + at + tl.minimum(size - 1 - i, 1) * step, mask=there, other=0).to(number)
    if reach > 0:
        far = tl.load(src + at - tl.minimum(i, 2) * step, mask=there, other=0).to(number)
        far += tl.load(src + at + tl.minimum(size - 1 - i, 2) * step, mask=there, other=0).to(number)
        total = (centre + near) * inner + far * outer
    else:
        total = centre * inner + near * outer
    if not FLOATS:
        total = ((total + (1 << 23)) >> 24).to(tl.uint8)
    tl.store(dst + at, total, mask=there)


@triton.jit
def _mix64(x):
    """`counter_hash.mix64` of uint64."""
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
    CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gathers each pixel from its place before flip and turn; solarises, adds noise, normalises."""
    FLOATS: tl.constexpr = views.dtype.element_ty == tl.float32
    HALF: tl.constexpr = 0.5 if FLOATS else 128.0
    FULL: tl.constexpr = 1.0 if FLOATS else 255.0
    m = tl.program_id(0).to(tl.int64)
    count = size * size
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    y, x = at // size, at % size
    drawn = tl.load(symmetry + m)
    turns, last = drawn & 3, size - 1
    # As `torch_kernels.source_of`.
    from_y = tl.where(turns == 0, y, tl.where(turns == 1, x, tl.where(turns == 2, last - y, last - x)))
    from_x = tl.where(turns == 0, x, tl.where(turns == 1, last - y, tl.where(turns == 2, last - x, y)))
    from_y = tl.where((drawn & 8) > 0, last - from_y, from_y)
    from_x = tl.where((drawn & 4) > 0, last - from_x, from_x)
    source = from_y * size + from_x
    invert = tl.load(solarize + m)
    sigma = tl.load(noise_std + m)
    seed = tl.load(noise_seed + m)
    UNROLLED: tl.constexpr = 3 if CHANNELS == 3 else 1
    for c in tl.range(0, CHANNELS, loop_unroll_factor=UNROLLED):
        base = (m * CHANNELS + c) * count
        value = tl.load(views + base + source, mask=there, other=0).to(tl.float32)
        value = tl.where((value >= HALF) & invert, FULL - value, value) * (1 / FULL)
        if sigma > 0:
            element = (c * count + at).to(tl.uint64)
            word = _mix64(seed + (element >> 2) * _GAMMA)
            index = (word >> ((element & 3) * 16 + 4)) & 0xFFF
            noise = tl.load(table + index.to(tl.int32), mask=there, other=0.0)
            value = tl.minimum(tl.maximum(value + sigma * noise, 0.0), 1.0)
        value = tl.div_rn(value - tl.load(mean + c), tl.zeros_like(value) + tl.load(std + c))
        to = (m * count + at) * CHANNELS + c if CHANNELS_LAST else base + at
        tl.store(out + to, value.to(out.dtype.element_ty), mask=there)
