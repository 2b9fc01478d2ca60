"""The operations of a recipe on a batch of 8-bit views, as torch functions for any device.

Views are uint8 (M, 3, S, S), each with parameters of its own; every step rounds to 8 bits as Pillow does, so that the steps after the
crop stay within a fraction of a level of the reference. Nothing here waits for the device. Formulas: as in `cpu_kernels`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache

import numpy as np
import torch
from torch import Tensor

from pipelines.augment.noise import noise_table
from pipelines.kernels.cpu_kernels import _box_weights
from shards.hashing import FIRST, GAMMA, SECOND

CROP_BYTES = 1 << 29  # for the padded sources of the views that are cropped at a time


@dataclass(frozen=True)
class Form:
    """How finished views lie in memory: as the model takes them, they need no further pass over their pixels."""

    dtype: torch.dtype = torch.float32
    channels_last: bool = False

    @property
    def memory_format(self) -> torch.memory_format:
        """PyTorch's name for the layout."""
        return torch.channels_last if self.channels_last else torch.contiguous_format


PLAIN = Form()


@dataclass(frozen=True)
class Params:
    """What happens to each of M views, on one device. Made by `pack`."""

    source: Tensor  # int64 (M, 7): first byte of the image, its width; top, left, height, width of the crop; rows of crops before it
    jitter: Tensor  # float32 (M, 4): brightness, contrast, saturation, hue
    order: Tensor  # int32 (M, 4): the parts in turn, -1 where nothing is to be done
    gray: Tensor  # bool (M,)
    blurred: Tensor  # int64 (B,): the views to blur
    boxes: Tensor  # int64 (B, 3): reach, inner and outer weight of the box filter
    solarize: Tensor  # bool (M,)
    symmetry: Tensor  # int32 (M,): turns + 4 * hflip + 8 * vflip
    noise_std: Tensor  # float32 (M,)
    noise_seed: Tensor  # int64 (M,): the bits of the uint64
    erase: Tensor  # int32 (M, 4): top, left, height, width
    erase_seed: Tensor  # int64 (M,)

    def to(self, device: torch.device) -> Params:
        """A copy on the device, asynchronous from pinned memory."""
        return Params(*(getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)))


def pack(draws: np.ndarray, first_bytes: np.ndarray, widths: np.ndarray, *, pin: bool = False) -> Params:
    """The parameters of DRAW records (M,), of images at `first_bytes` (M,) of a buffer with `widths` (M,) in pixels."""

    def tensor(values: np.ndarray) -> Tensor:
        made = torch.from_numpy(values.copy())  # a field of a record is strided, in bytes
        return made.pin_memory() if pin else made

    box = [draws[name].astype(np.int64) for name in ("top", "left", "height", "width")]
    rows = np.cumsum(box[2]) - box[2]
    blurred = np.flatnonzero(draws["sigma"] > 0)
    symmetry = draws["turns"].astype(np.int32) + 4 * draws["hflip"] + 8 * draws["vflip"]
    return Params(
        tensor(np.stack([first_bytes.astype(np.int64), widths.astype(np.int64), *box, rows], axis=1)),
        tensor(np.stack([draws[name] for name in ("brightness", "contrast", "saturation", "hue")], axis=1)),
        tensor(np.where(draws["jitter"][:, None] > 0, draws["order"].astype(np.int32), np.int32(-1))),
        tensor(draws["gray"] > 0),
        tensor(blurred),
        tensor(np.array([_box_weights(s) for s in draws["sigma"][blurred]], dtype=np.int64).reshape(-1, 3)),
        tensor(draws["solarize"] > 0),
        tensor(symmetry.astype(np.int32)),
        tensor(draws["noise_std"]),
        tensor(draws["noise_seed"].view(np.int64)),
        tensor(np.stack([draws[f"erase_{name}"] for name in ("top", "left", "height", "width")], axis=1)),
        tensor(draws["erase_seed"].view(np.int64)),
    )


def crop(
    pixels: Tensor,
    params: Params,
    size: int,
    heights: np.ndarray,
    widths: np.ndarray,
    interpolation: str = "bilinear",
) -> Tensor:
    """Cut and resize with an antialiased filter, as two batched matrix products: uint8 (M, 3, S, S).

    Args:
        pixels: uint8, the bytes of all images, each (H, W, 3).
        heights, widths: (M,) of the crop boxes, as the host knows them.
    """
    high, wide = int(heights.max()), int(widths.max())
    # A pixel of a padded source takes three places of 8 bytes and three floats.
    chunk = max(1, CROP_BYTES // (36 * high * wide))
    views = []
    for source in params.source.split(chunk):
        first, width, top, left, box_h, box_w, _ = source.unbind(1)
        y = torch.arange(high, device=pixels.device).clamp(max=(box_h - 1)[:, None]) + top[:, None]
        x = torch.arange(wide, device=pixels.device).clamp(max=(box_w - 1)[:, None]) + left[:, None]
        at = first[:, None, None] + (y[:, :, None] * width[:, None, None] + x[:, None, :]) * 3
        channels = torch.arange(3, device=pixels.device)[None, :, None, None]
        cut = pixels[at[:, None] + channels].float()
        rows = filter_weights(box_h, high, size, interpolation)[:, None]
        columns = filter_weights(box_w, wide, size, interpolation)[:, None]
        across = (cut @ columns.mT).round().clamp(0, 255)  # Pillow keeps 8 bits between its two passes
        views.append((rows @ across).round().clamp(0, 255).to(torch.uint8))
    return torch.cat(views)


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


def colour(views: Tensor, params: Params) -> Tensor:
    """Colour jitter, each view's parts in its own order, then greyscale: uint8 like `views`."""
    x = views.float()
    for turn in range(4):
        part = params.order[:, turn, None, None, None]
        factor = params.jitter[:, :, None, None, None]
        gray = _luma(x)
        mean = (gray.mean(dim=(1, 2, 3), keepdim=True) + 0.5).floor()
        x = torch.where(
            part == 3,
            _hue(x, factor[:, 3]),
            torch.where(
                part == 2,
                _blend(gray, x, factor[:, 2]),
                torch.where(
                    part == 1,
                    _blend(mean, x, factor[:, 1]),
                    torch.where(part == 0, _blend(torch.zeros_like(x), x, factor[:, 0]), x),
                ),
            ),
        )
    return torch.where(params.gray[:, None, None, None], _luma(x).expand_as(x), x).to(torch.uint8)


def blur(views: Tensor, params: Params) -> Tensor:
    """Blur the views that were drawn by three box filters an axis, as Pillow does and as exactly; in place, returns `views`."""
    if len(params.blurred):
        x = views[params.blurred].long()
        reach, inner, outer = params.boxes[:, :, None, None, None].unbind(1)
        size = x.shape[-1]
        near = torch.arange(-2, size + 2, device=x.device).clamp(0, size - 1)
        for axis in (3, 3, 3, 2, 2, 2):
            wide = x.index_select(axis, near)
            a, b, c, d, e = (wide.narrow(axis, k, size) for k in range(5))
            narrow_box, wide_box = c * inner + (b + d) * outer, (b + c + d) * inner + (a + e) * outer
            x = (torch.where(reach == 0, narrow_box, wide_box) + (1 << 23)) >> 24
        views[params.blurred] = x.to(torch.uint8)
    return views


def finish(views: Tensor, params: Params, mean: Tensor, std: Tensor, form: Form = PLAIN) -> Tensor:
    """Solarise, flip, turn, add noise and normalise with `mean` and `std` (3,): (M, 3, S, S) in `form`."""
    m, c, size, _ = views.shape
    views = torch.where(params.solarize[:, None, None, None] & (views >= 128), 255 - views, views)
    y, x = source_of(params.symmetry[:, None, None], size, views.device)
    views = views.flatten(2).gather(2, (y * size + x).reshape(m, 1, -1).expand(m, c, -1))
    pixels = views.float().view(m, c, size, size) * (1 / 255)
    noise = params.noise_std[:, None] * unit_noise(params.noise_seed, c * size * size)
    noisy = (pixels + noise.view_as(pixels)).clamp(0, 1)
    pixels = torch.where(params.noise_std[:, None, None, None] > 0, noisy, pixels)
    normalised = (pixels - mean[:, None, None]) / std[:, None, None]
    return normalised.to(form.dtype, memory_format=form.memory_format)


def erase(views: Tensor, params: Params, erased: Tensor) -> Tensor:
    """Fill the rectangles of finished views (M, 3, S, S) with `erased`, float32 (3,), or, where that is empty, with random numbers."""
    size = views.shape[-1]
    random = unit_noise(params.erase_seed, views[0].numel()).view_as(views) if not len(erased) else None
    fill = erased[:, None, None] if random is None else random
    top, left, height, width = params.erase[:, :, None, None, None].unbind(1)
    y = torch.arange(size, device=views.device)[:, None]
    x = torch.arange(size, device=views.device)
    inside = (y >= top) & (y < top + height) & (x >= left) & (x < left + width)
    return torch.where(inside, fill.to(views.dtype), views, out=torch.empty_like(views))  # in their layout


def source_of(symmetry: Tensor, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The row and column that each pixel of a flipped and turned view comes from; `symmetry` broadcasts to (M, S, S)."""
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
    """The numbers of `noise.unit_noise` for int64 `seeds` (M,): float32 (M, count)."""
    element = torch.arange(count, device=seeds.device)
    table = noise_values(seeds.device)
    word = _mix64(seeds[:, None] + (element[::4] >> 2) * _signed(GAMMA))
    parts = [(word >> (16 * k + 4)) & 0xFFF for k in range(4)]
    return table[torch.stack(parts, dim=2).flatten(1)[:, :count]]


@cache
def noise_values(device: torch.device) -> Tensor:
    """`noise.noise_table` on a device: float32 (4096,)."""
    return torch.tensor(noise_table(), device=device)


def _mix64(x: Tensor) -> Tensor:
    """`hashing.mix64` on int64 with the same bits: torch multiplies and adds modulo 2^64, but shifts copy the sign."""
    x = x + _signed(GAMMA)
    x = (x ^ _shift(x, 30)) * _signed(FIRST)
    x = (x ^ _shift(x, 27)) * _signed(SECOND)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: np.uint64) -> int:
    return int(word.view(np.int64))


def _luma(x: Tensor) -> Tensor:
    """ITU-R 601-2 in Pillow's 16-bit fixed point (exact in int32): float32 (M, 1, S, S)."""
    r, g, b = x.int().unbind(1)
    return ((r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16).float()[:, None]


def _blend(base: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    return (base + factor * (x - base)).clamp(0, 255).floor()


def _hue(x: Tensor, shift: Tensor) -> Tensor:
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
    k = part.long() % 6
    table = (
        torch.stack([top, q, p, p, t, top]),
        torch.stack([t, top, top, q, p, p]),
        torch.stack([p, p, t, top, top, q]),
    )
    return torch.cat([channel.gather(0, k[None])[0] for channel in table], dim=1)
