"""Crop and resize a batch of views as torch functions: two batched matrix products, weights as in Pillow."""

from __future__ import annotations

import torch
from torch import Tensor

from pipelines.kernels.view_params import CropOptions, Params

CROP_BYTES = 1 << 29  # for the padded sources of the views that are cropped at a time


def crop(pixels: Tensor, params: Params, options: CropOptions) -> Tensor:
    """Cut and resize with an antialiased filter: (M, C, S, S), rounded to uint8 after each axis, or float32 in [0, 1].

    Args:
        pixels: uint8, uint16 or float32, the elements of all images, each (H, W, C).
    """
    size, channels = options.size, options.channels
    high, wide = int(params.heights.max()), int(params.widths.max())
    # A pixel of a padded source takes, in each channel, a place of 8 bytes and a float; one that is mapped to [0, 1] three more.
    bytes_each = channels * (12 if options.gain is None else 24)
    views = []
    for source in params.source.split(max(1, CROP_BYTES // (bytes_each * high * wide))):
        first, width, top, left, box_h, box_w, _ = source.unbind(1)
        y = torch.arange(high, device=pixels.device).clamp(max=(box_h - 1)[:, None]) + top[:, None]
        x = torch.arange(wide, device=pixels.device).clamp(max=(box_w - 1)[:, None]) + left[:, None]
        at = first[:, None, None] + (y[:, :, None] * width[:, None, None] + x[:, None, :]) * channels
        planes = torch.arange(channels, device=pixels.device)[None, :, None, None]
        cut = _unit(take(pixels, at[:, None] + planes), options)
        rows = filter_weights(box_h, high, size, options.interpolation)[:, None]
        columns = filter_weights(box_w, wide, size, options.interpolation)[:, None]
        across = cut @ columns.mT
        if options.gain is None:
            across = across.round().clamp(0, 255)  # Pillow keeps 8 bits between its two passes
            views.append((rows @ across).round().clamp(0, 255).to(torch.uint8))
        else:
            views.append((rows @ across).clamp(0, 1))
    return torch.cat(views)


def take(pixels: Tensor, at: Tensor) -> Tensor:
    """Return elements of a buffer as float32, at the places `at`, int64 of any shape."""
    if pixels.dtype == torch.uint16:  # PyTorch indexes only signed integers of 16 bits everywhere
        return (pixels.view(torch.int16)[at].int() & 0xFFFF).float()
    return pixels[at].float()


def filter_weights(lengths: Tensor, longest: int, size: int, interpolation: str = "bilinear") -> Tensor:
    """Weights that resize `lengths` (M,) pixels to `size`: float32 (M, size, longest), rows of sum 1, 0 past a length.

    bilinear is a triangle of reach 1, bicubic Keys' cubic with a = -1/2 of reach 2, both wider where pixels are merged, as in Pillow.
    """
    scale = lengths.float() / size
    reach = scale.clamp(min=1)[:, None, None]
    centre = (torch.arange(size, device=lengths.device) + 0.5)[None, :, None] * scale[:, None, None]
    place = torch.arange(longest, device=lengths.device)
    x = (place + 0.5 - centre).abs() / reach
    if interpolation == "bilinear":
        weights = (1 - x).clamp(min=0)
    else:
        near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
        weights = torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
    weights = weights * (place < lengths[:, None, None])
    return weights / weights.sum(dim=2, keepdim=True)


def _unit(cut: Tensor, options: CropOptions) -> Tensor:
    """Pixels (M, C, H, W) as they are resized: with a gain clamped to [0, 1]; not a number becomes 0."""
    if options.gain is None or options.offset is None:
        return cut
    value = cut * options.gain[:, None, None] + options.offset[:, None, None]
    return torch.where(value > 0, value.clamp(max=1), 0)
