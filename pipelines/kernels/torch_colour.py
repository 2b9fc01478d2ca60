"""Colour jitter and grayscale of a batch of views as torch functions, in Pillow's 8 bits or torchvision's floats.

Formulas: uint8 as in `cpu_kernels.colour`, float32 as in `cpu_kernels.float_views`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipelines.kernels.view_params import Params

RED, GREEN, BLUE = 0.2989, 0.587, 0.114  # the luma of floats: torchvision's, for tensors


def colour(views: Tensor, params: Params) -> Tensor:
    """Colour jitter, each view's parts in its own order, then grayscale: as `views`, uint8 (M, 3, S, S) or float32 (M, C, S, S).

    With other than three channels saturation, hue and grayscale do nothing: recipes that draw them are refused.
    """
    jitter = _jitter_8bit if views.dtype == torch.uint8 else _jitter
    x, three = views.float(), views.shape[1] == 3
    for turn in range(4):
        x = jitter(x, params.order[:, turn, None, None, None], params.jitter[:, :, None, None, None])
    if three:
        base = (luma_8bit if views.dtype == torch.uint8 else gray)(x)
        x = torch.where(params.gray[:, None, None, None], base.expand_as(x), x)
    return x.to(views.dtype)


def _jitter_8bit(x: Tensor, part: Tensor, factor: Tensor) -> Tensor:
    luma = luma_8bit(x)
    mean = (luma.mean(dim=(1, 2, 3), keepdim=True) + 0.5).floor()
    made = torch.where(part == 0, _blend_8bit(torch.zeros_like(x), x, factor[:, 0]), x)
    made = torch.where(part == 1, _blend_8bit(mean, x, factor[:, 1]), made)
    made = torch.where(part == 2, _blend_8bit(luma, x, factor[:, 2]), made)
    return torch.where(part == 3, _hue_8bit(x, factor[:, 3]), made)


def _jitter(x: Tensor, part: Tensor, factor: Tensor) -> Tensor:
    base = gray(x)
    mean = base.mean(dim=(1, 2, 3), keepdim=True, dtype=torch.float64).float()
    made = torch.where(part == 0, _blend(torch.zeros_like(x), x, factor[:, 0]), x)
    made = torch.where(part == 1, _blend(mean, x, factor[:, 1]), made)
    if x.shape[1] == 3:
        made = torch.where(part == 2, _blend(base, x, factor[:, 2]), made)
        made = torch.where(part == 3, _hue(x, factor[:, 3]), made)
    return made


def luma_8bit(x: Tensor) -> Tensor:
    """ITU-R 601-2 in Pillow's 16-bit fixed point (exact in int32): float32 (M, 1, S, S)."""
    r, g, b = x.int().unbind(1)
    return ((r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16).float()[:, None]


def gray(x: Tensor) -> Tensor:
    """Luma of three channels, the mean of all others: float32 (M, 1, S, S)."""
    if x.shape[1] == 3:
        r, g, b = x.split(1, dim=1)
        return RED * r + GREEN * g + BLUE * b
    return x.mean(dim=1, keepdim=True)


def _blend_8bit(base: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    return (base + factor * (x - base)).clamp(0, 255).floor()


def _blend(base: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    return (factor * x + (1 - factor) * base).clamp(0, 1)


def _hue_8bit(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of Pillow's 8-bit HSV by trunc(255 * shift) levels."""
    top, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    r, g, b = x.split(1, dim=1)
    span = (top - low).clamp(min=1)
    rc, gc, bc = (top - r) / span, (top - g) / span, (top - b) / span
    sector = torch.where(r == top, bc - gc, torch.where(g == top, 2 + rc - bc, 4 + gc - rc))
    turn = sector / 6
    turn = torch.where(turn < 0, turn + 1, turn)
    hue = ((turn * 255).int() + (shift * 255).int()) & 255
    saturation = ((top - low) / top.clamp(min=1) * 255).floor() / 255
    six = hue.float() * 6 / 255
    part = six.floor()
    frac = six - part
    p = (top * (1 - saturation) + 0.5).floor()
    q = (top * (1 - saturation * frac) + 0.5).floor()
    t = (top * (1 - saturation * (1 - frac)) + 0.5).floor()
    return _from_sector(part.long() % 6, top, p, q, t)


def _hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by `shift` of a circle; gray pixels stay."""
    top, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    r, g, b = x.split(1, dim=1)
    span = top - low
    whole = torch.where(span > 0, span, 1)
    sector = torch.where(
        r == top, (g - b) / whole, torch.where(g == top, 2 + (b - r) / whole, 4 + (r - g) / whole)
    )
    turn = sector / 6 + shift
    six = (turn - turn.floor()) * 6
    part = six.floor()
    frac = six - part
    return _from_sector(part.long() % 6, top, low, top - span * frac, low + span * frac)


def _from_sector(k: Tensor, top: Tensor, p: Tensor, q: Tensor, t: Tensor) -> Tensor:
    """The colour (M, 3, S, S) in sector `k`, 0 to 5, of the hue's circle, from its largest value, its smallest, and two between."""
    table = (
        torch.stack([top, q, p, p, t, top]),
        torch.stack([t, top, top, q, p, p]),
        torch.stack([p, p, t, top, top, q]),
    )
    return torch.cat([channel.gather(0, k[None])[0] for channel in table], dim=1)
