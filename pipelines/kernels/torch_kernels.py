"""The operations of a recipe on a batch of views, as torch functions for any device.

Views of 8-bit RGB images are uint8 (M, 3, S, S), and every step rounds to 8 bits as Pillow does, so that the steps after the crop stay
within a fraction of a level of the reference (formulas: `cpu_kernels.colour`). Those of all other images are float32 (M, C, S, S) in
[0, 1], and nothing is rounded on the way (formulas: `cpu_kernels.float_views`). The type of the views says which. Nothing here waits
for the device.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from pipelines.augment.noise import noise_table
from pipelines.kernels.torch_colour import colour as colour
from pipelines.kernels.torch_crop import crop as crop
from pipelines.kernels.view_params import PLAIN, Form, Params
from shards.counter_hash import FIRST, GAMMA, SECOND


def blur(views: Tensor, params: Params) -> Tensor:
    """Blur the views that were drawn by three box filters an axis, as Pillow does (8 bits: as exactly); in place, returns `views`."""
    if len(params.blurred):
        rounded = views.dtype == torch.uint8
        x = views[params.blurred].to(torch.int64 if rounded else torch.float32)
        reach, inner, outer = params.boxes[:, :, None, None, None].unbind(1)
        if not rounded:
            inner, outer = inner.float() / (1 << 24), outer.float() / (1 << 24)
        size = x.shape[-1]
        near = torch.arange(-2, size + 2, device=x.device).clamp(0, size - 1)
        for axis in (3, 3, 3, 2, 2, 2):
            wide = x.index_select(axis, near)
            a, b, c, d, e = (wide.narrow(axis, k, size) for k in range(5))
            narrow_box, wide_box = c * inner + (b + d) * outer, (b + c + d) * inner + (a + e) * outer
            x = torch.where(reach == 0, narrow_box, wide_box)
            if rounded:
                x = (x + (1 << 23)) >> 24
        views[params.blurred] = x.to(views.dtype)
    return views


def finish(views: Tensor, params: Params, mean: Tensor, std: Tensor, form: Form = PLAIN) -> Tensor:
    """Solarise, flip, turn, add noise and normalise with `mean` and `std` (C,): (M, C, S, S) in `form`."""
    m, c, size, _ = views.shape
    half, full = (128, 255) if views.dtype == torch.uint8 else (0.5, 1)
    views = torch.where(params.solarize[:, None, None, None] & (views >= half), full - views, views)
    y, x = source_of(params.symmetry[:, None, None], size, views.device)
    views = views.flatten(2).gather(2, (y * size + x).reshape(m, 1, -1).expand(m, c, -1))
    pixels = views.float().view(m, c, size, size) * (1 / full)
    noise = params.noise_std[:, None] * unit_noise(params.noise_seed, c * size * size)
    noisy = (pixels + noise.view_as(pixels)).clamp(0, 1)
    pixels = torch.where(params.noise_std[:, None, None, None] > 0, noisy, pixels)
    normalised = (pixels - mean[:, None, None]) / std[:, None, None]
    return normalised.to(form.dtype, memory_format=form.memory_format)


def erase(views: Tensor, params: Params, erased: Tensor) -> Tensor:
    """Fill the rectangles of finished views (M, C, S, S) with `erased`, float32 (C,), or, where that is empty, with random numbers."""
    size = views.shape[-1]
    random = unit_noise(params.erase_seed, views[0].numel()).view_as(views) if not len(erased) else None
    fill = erased[:, None, None] if random is None else random
    top, left, height, width = params.erase[:, :, None, None, None].unbind(1)
    y = torch.arange(size, device=views.device)[:, None]
    x = torch.arange(size, device=views.device)
    inside = (y >= top) & (y < top + height) & (x >= left) & (x < left + width)
    return torch.where(inside, fill.to(views.dtype), views, out=torch.empty_like(views))  # in their layout


def source_of(symmetry: Tensor, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the row and column that each pixel of a flipped and turned view comes from; `symmetry` broadcasts to (M, S, S)."""
    y = torch.arange(size, device=device)[:, None]
    x = torch.arange(size, device=device)[None, :]
    last, turns = size - 1, symmetry & 3
    from_y = torch.where(
        turns == 0, y, torch.where(turns == 1, x, torch.where(turns == 2, last - y, last - x))
    )
    from_x = torch.where(
        turns == 0, x, torch.where(turns == 1, last - y, torch.where(turns == 2, last - x, y))
    )
    from_y = torch.where((symmetry & 8) > 0, last - from_y, from_y)
    return from_y, torch.where((symmetry & 4) > 0, last - from_x, from_x)


def unit_noise(seeds: Tensor, count: int) -> Tensor:
    """Return the numbers of `noise.unit_noise` for int64 `seeds` (M,): float32 (M, count)."""
    element = torch.arange(count, device=seeds.device)
    table = noise_values(seeds.device)
    word = _mix64(seeds[:, None] + (element[::4] >> 2) * _signed(GAMMA))
    parts = [(word >> (16 * k + 4)) & 0xFFF for k in range(4)]
    return table[torch.stack(parts, dim=2).flatten(1)[:, :count]]


@cache
def noise_values(device: torch.device) -> Tensor:
    """Return `noise.noise_table` on a device: float32 (4096,)."""
    return torch.tensor(noise_table(), device=device)


def _mix64(x: Tensor) -> Tensor:
    """Return `counter_hash.mix64` of int64 with the same bits: torch multiplies and adds modulo 2^64, but shifts copy the sign."""
    x = x + _signed(GAMMA)
    x = (x ^ _shift(x, 30)) * _signed(FIRST)
    x = (x ^ _shift(x, 27)) * _signed(SECOND)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: np.uint64) -> int:
    return int(word.view(np.int64))
