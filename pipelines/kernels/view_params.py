"""What the batched kernels are told: the parameters of each view, how crops are made, and how finished views lie in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from pipelines.augment.channels import FULL
from pipelines.augment.pointwise import drawn_fields
from pipelines.cpu_kernels.colour import _box_weights
from pipelines.kernel_cache import njit

# The element types of decoded images; the number of one is its place here.
TYPES = tuple(FULL)
# Of each array in the copy to a device, in bytes: Triton compiles a kernel anew for pointers that are aligned in another way.
_ALIGNMENT = 16


@dataclass(frozen=True)
class Form:
    """How finished views lie in memory: as the model takes them, they need no further pass over their pixels."""

    dtype: torch.dtype = torch.float32
    channels_last: bool = False

    @property
    def memory_format(self) -> torch.memory_format:
        """Return PyTorch's name for the layout."""
        return torch.channels_last if self.channels_last else torch.contiguous_format


PLAIN = Form()


@dataclass(frozen=True)
class CropOptions:
    """How crops become views of C channels, (C, S, S) each: uint8 from 8-bit images without `gain`, else float32 in [0, 1]."""

    size: int  # S
    interpolation: str = "bilinear"
    gain: Tensor | None = None  # float32 (C,): pixel * gain + offset is clamped to [0, 1] before the resize
    offset: Tensor | None = None  # float32 (C,), with gain

    @property
    def channels(self) -> int:
        """Return C; without a gain 3."""
        return 3 if self.gain is None else len(self.gain)

    @property
    def dtype(self) -> torch.dtype:
        """Return the type of the views between the steps."""
        return torch.uint8 if self.gain is None else torch.float32


@dataclass(frozen=True)
class Params:
    """What happens to each of M views, on one device, and what the host has to know of it. Made by `pack`."""

    # int64 (M, 7): first element of the image, its width; top, left, height, width of the crop; rows of the crops before it
    source: Tensor
    jitter: Tensor  # float32 (M, 4): brightness, contrast, saturation, hue
    order: Tensor  # int32 (M, 4): the parts in turn, -1 where nothing is to be done
    gray: Tensor  # bool (M,)
    blurred: Tensor  # int64 (B,): the views to blur
    boxes: Tensor  # int64 (B, 3): reach, inner and outer weight of the box filter, 24-bit
    solarize: Tensor  # bool (M,)
    symmetry: Tensor  # int32 (M,): turns + 4 * hflip + 8 * vflip
    noise_std: Tensor  # float32 (M,)
    noise_seed: Tensor  # int64 (M,): the bits of the uint64
    erase: Tensor  # int32 (M, 4): top, left, height, width
    erase_seed: Tensor  # int64 (M,)
    heights: np.ndarray  # int32 (M,): of the crops, on the host
    widths: np.ndarray  # int32 (M,)
    # (M,) each: the fields, by name, of each pointwise operation that any of the views met
    pointwise: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)


def pack(
    draws: np.ndarray,
    first_bytes: np.ndarray,
    widths: np.ndarray,
    device: torch.device | str = "cpu",
    item_bytes: int = 1,
) -> Params:
    """Return the parameters of DRAW records (M,), on `device`: one copy on its current stream, for which the host does not wait.

    Fields of pointwise operations, where any are drawn, are copied on their own.

    Args:
        first_bytes: integers (M,), where each view's image begins in the buffer, a multiple of `item_bytes`.
        widths: integers (M,), of the images, in pixels.
        item_bytes: size of an element of the images.
    """
    count, device = len(draws), torch.device(device)
    first, of_image = (np.ascontiguousarray(x, dtype=np.int64) for x in (first_bytes, widths))
    assert item_bytes == 1 or not (first % item_bytes).any(), "images lie at multiples of their elements"
    layout, size = _layout(count)
    # Pinned memory of this call's own. PyTorch's allocator keeps it until the copy is done (it records an event on the stream of each
    # copy that does not block) and then gives it to a later call without asking the driver: nothing in flight is written to.
    host = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    words = {dtype: host.numpy().view(dtype) for dtype in ("int64", "int32", "float32", "bool")}
    places = {
        name: words[dtype][start : start + count * columns].reshape(count, columns)
        for name, (dtype, columns, start) in layout.items()
    }
    num_blurred = _fill(np.ascontiguousarray(draws), first, of_image, item_bytes, *places.values())
    there = host.to(device, non_blocking=True)
    typed = {dtype: there.view(getattr(torch, dtype)) for dtype in words}
    rows = {"blurred": num_blurred, "boxes": num_blurred}
    tensors = {}
    for name, (dtype, columns, start) in layout.items():
        shape, strides = ((columns,), (1,)) if columns > 1 else ((), ())
        of = rows.get(name, count)
        tensors[name] = typed[dtype].as_strided((of, *shape), (columns, *strides), start)
    pointwise = {
        name: {field: upload(values, device) for field, values in fields.items()}
        for name, fields in drawn_fields(draws).items()
    }
    heights, widths = draws["height"].copy(), draws["width"].copy()
    return Params(**tensors, heights=heights, widths=widths, pointwise=pointwise)


@lru_cache(maxsize=64)
def _layout(count: int) -> tuple[dict[str, tuple[str, int, int]], int]:
    """Return where the arrays of `count` views lie in a buffer (type, columns, first element of each), and the buffer's bytes."""
    columns = {
        "int64": {"source": 7, "blurred": 1, "boxes": 3, "noise_seed": 1, "erase_seed": 1},
        "float32": {"jitter": 4, "noise_std": 1},
        "int32": {"order": 4, "symmetry": 1, "erase": 4},
        "bool": {"gray": 1, "solarize": 1},
    }
    layout, end = {}, 0
    for dtype, arrays in columns.items():
        item = np.dtype(dtype).itemsize
        for name, wide in arrays.items():
            layout[name] = (dtype, wide, end // item)
            end = -(-(end + count * wide * item) // _ALIGNMENT) * _ALIGNMENT
    return layout, end


@njit(nogil=True, cache=True)
def _fill(
    draws,
    first_bytes,
    widths,
    item_bytes,
    source,
    blurred,
    boxes,
    noise_seed,
    erase_seed,
    jitter,
    noise_std,
    order,
    symmetry,
    erase,
    gray,
    solarize,
):
    """Write the arrays of `Params`, (M, columns) each, from DRAW records (M,); return the number of views to blur."""
    rows, count = 0, 0
    for i in range(draws.size):
        draw = draws[i]
        source[i, 0], source[i, 1] = first_bytes[i] // item_bytes, widths[i]
        source[i, 2], source[i, 3] = draw.top, draw.left
        source[i, 4], source[i, 5], source[i, 6] = draw.height, draw.width, rows
        rows += draw.height
        jitter[i, 0], jitter[i, 1] = draw.brightness, draw.contrast
        jitter[i, 2], jitter[i, 3] = draw.saturation, draw.hue
        for turn in range(4):
            order[i, turn] = draw.order[turn] if draw.jitter else -1
        gray[i, 0], solarize[i, 0] = draw.gray > 0, draw.solarize > 0
        symmetry[i, 0] = draw.turns + 4 * draw.hflip + 8 * draw.vflip
        noise_std[i, 0] = draw.noise_std
        noise_seed[i, 0], erase_seed[i, 0] = np.int64(draw.noise_seed), np.int64(draw.erase_seed)
        erase[i, 0], erase[i, 1] = draw.erase_top, draw.erase_left
        erase[i, 2], erase[i, 3] = draw.erase_height, draw.erase_width
        if draw.sigma > 0:
            blurred[count, 0] = i
            boxes[count, 0], boxes[count, 1], boxes[count, 2] = _box_weights(draw.sigma)
            count += 1
    return count


def upload(values: np.ndarray, device: torch.device) -> Tensor:
    """Return a copy of an array on a device; the host does not wait for it."""
    host = torch.from_numpy(np.ascontiguousarray(values))
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
