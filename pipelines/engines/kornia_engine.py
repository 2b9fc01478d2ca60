"""Kornia's operations, driven by our draws: a batch at a time, on a CPU or a GPU.

Kornia's augmentation classes draw one order of colour jitter per batch and blend what was not chosen; its functions, called here on
the samples that were drawn, take a factor per sample and so do exactly what the records say. How far the result is from the reference
is Kornia's own: crops are sampled bilinearly without antialiasing, pixels are not rounded to 8 bits after the crop, and the blur
is a true Gaussian where Pillow's is three box filters. `fastssl bench fidelity` measures it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import kornia.color
import kornia.enhance
import kornia.filters
import kornia.geometry.transform as geometry
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.augment.operations import JITTER
from pipelines.augment.pointwise import apply_batched, drawn_fields
from pipelines.augment.recipe import Recipe
from pipelines.engines.batch_engine import ALONE, BatchEngine, BatchOptions
from pipelines.engines.engine_table import refuse_bicubic, refuse_channels
from pipelines.kernels.torch_kernels import unit_noise

# Images worked on at a time. A GPU wants many, bounded by the memory of their padded crops; a core few, which stay in its cache.
CHUNK = {"cuda": 32, "cpu": 4}
BLUR_TAPS = 13  # 2 ceil(3 sigma) + 1 for the widest blur, sigma 2


class KorniaEngine(BatchEngine):
    """The views of a recipe by Kornia's functions."""

    def __init__(self, recipe: Recipe, options: BatchOptions = ALONE):
        """Raise UserError where the recipe has other than three channels, or bicubic crops."""
        refuse_channels("kornia", recipe)
        refuse_bicubic("kornia", recipe)
        super().__init__(recipe)
        self._device = torch.device(options.device)
        self._mean, self._std = (torch.tensor(x, device=self._device) for x in (recipe.mean, recipe.std))
        self._pool = None
        if self._device.type == "cpu":
            others = (torch.get_num_threads(),)
            self._pool = ThreadPoolExecutor(options.threads, "kornia", initializer=_alone, initargs=others)

    def render(self, items: Sequence[np.ndarray], draws: np.ndarray) -> list[Tensor]:
        """As `BatchEngine.render`."""
        sides = [self.recipe.side(view) for view in range(len(draws))]
        views = [torch.empty((len(items), 3, side, side), device=self._device) for side in sides]

        def make(part: slice) -> None:
            with torch.no_grad():
                for view, of_view, side in zip(views, draws, sides, strict=True):
                    view[part] = self._view(items[part], of_view[part], side)

        size = CHUNK[self._device.type]
        parts = [slice(start, start + size) for start in range(0, len(items), size)]
        for _ in self._pool.map(make, parts) if self._pool else map(make, parts):
            pass
        return [self.erase(view, of_view) for view, of_view in zip(views, draws, strict=True)]

    def _view(self, items: Sequence[np.ndarray], draws: np.ndarray, size: int) -> Tensor:
        """Return one view of some images: float32 (N, 3, S, S), normalised."""
        x = self._crop(items, draws, size)
        self._jitter(x, draws)
        for picked in self._where(draws["gray"] > 0):
            x[picked] = kornia.color.rgb_to_grayscale(x[picked]).expand(-1, 3, -1, -1)
        for picked in self._where(draws["sigma"] > 0):
            sigma = self._tensor(draws["sigma"][draws["sigma"] > 0])
            taps = (BLUR_TAPS, BLUR_TAPS)
            x[picked] = kornia.filters.gaussian_blur2d(
                x[picked], taps, sigma[:, None].expand(-1, 2), "replicate"
            )
        fields = drawn_fields(draws).items()
        apply_batched(x, {op: {name: self._place(v) for name, v in of.items()} for op, of in fields})
        for picked in self._where(draws["solarize"] > 0):
            # The first inverted level is 128 of 255; between it and 127 lies the threshold.
            x[picked] = kornia.enhance.solarize(x[picked], 127.5 / 255)
        for picked in self._where(draws["hflip"] > 0):
            x[picked] = geometry.hflip(x[picked])
        for picked in self._where(draws["vflip"] > 0):
            x[picked] = geometry.vflip(x[picked])
        for picked in self._where(draws["turns"] > 0):
            # Nearest neighbours of quarter turns are the pixels themselves, so that Kornia's rotation is exact here.
            degrees = 90.0 * self._tensor(draws["turns"][draws["turns"] > 0])
            x[picked] = geometry.rotate(x[picked], degrees, mode="nearest")
        for picked in self._where(draws["noise_std"] > 0):
            noisy = draws[draws["noise_std"] > 0]
            seeds = torch.from_numpy(noisy["noise_seed"].astype(np.uint64).view(np.int64)).to(self._device)
            noise = unit_noise(seeds, x[0].numel()).view(len(noisy), *x.shape[1:])
            std = self._tensor(noisy["noise_std"])[:, None, None, None]
            x[picked] = (x[picked] + std * noise).clamp(0, 1)
        return kornia.enhance.normalize(x, self._mean, self._std)

    def _crop(self, items: Sequence[np.ndarray], draws: np.ndarray, size: int) -> Tensor:
        """Crop and resize: float32 (N, 3, S, S) in [0, 1]."""
        crops = [_cut(pixels, draw, size) for pixels, draw in zip(items, draws, strict=True)]
        if self._device.type == "cpu":
            return resize_each(crops, size)
        return resize_together(crops, size, self._device)

    def _jitter(self, x: Tensor, draws: np.ndarray) -> None:
        """Colour jitter in place, the parts of each sample in its own order."""
        for turn in range(4):
            for part, adjust in enumerate(_PARTS):
                chosen = (draws["jitter"] > 0) & (draws["order"][:, turn] == part)
                for picked in self._where(chosen):
                    x[picked] = adjust(x[picked], self._tensor(draws[JITTER[part]][chosen]))

    def _where(self, chosen: np.ndarray) -> Iterator[Tensor]:
        """Return the numbers of the chosen samples as one index, or nothing where there are none."""
        if chosen.any():
            yield self._place(np.flatnonzero(chosen))

    def _tensor(self, values: np.ndarray) -> Tensor:
        return self._place(values.astype(np.float32))

    def _place(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self._device, non_blocking=True)


def resize_each(crops: Sequence[np.ndarray], size: int) -> Tensor:
    """Resize crops, uint8 (H, W, 3), by `resize`, which is fast for bytes on a CPU: float32 (N, 3, S, S) in [0, 1]."""
    resized = [
        geometry.resize(torch.from_numpy(crop).permute(2, 0, 1), (size, size), align_corners=False)
        for crop in crops
    ]
    return torch.stack(resized).float().div_(255)


def resize_together(crops: Sequence[np.ndarray], size: int, device: torch.device) -> Tensor:
    """Resize crops, uint8 (H, W, 3), by `crop_and_resize`, in few kernels of a GPU: float32 (N, 3, S, S) in [0, 1].

    Its boxes name the centres of the corner pixels that are sampled. The centre of output pixel i lies at (i + 1/2) h / S - 1/2 of a
    crop of h pixels, so the box reaches from h / 2S - 1/2 to h - h / 2S - 1/2: with the crop's own corners instead, the picture would
    be squeezed by a pixel. Where that leaves the crop, its outermost pixels repeat.
    """
    heights, widths = (np.array([crop.shape[axis] for crop in crops]) for axis in (0, 1))
    shape = (len(crops), int(heights.max()) + 2, int(widths.max()) + 2, 3)
    # Pinned for a GPU, so that the copy to it keeps nobody waiting.
    canvas = torch.zeros(shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
    for place, crop in zip(canvas.numpy(), crops, strict=True):
        place[: crop.shape[0] + 2, : crop.shape[1] + 2] = np.pad(crop, ((1, 1), (1, 1), (0, 0)), mode="edge")
    # 1 is the width of that border.
    low_y, low_x = (1 + side / (2 * size) - 0.5 for side in (heights, widths))
    high_y, high_x = (1 + side - side / (2 * size) - 0.5 for side in (heights, widths))
    corners = [(low_x, low_y), (high_x, low_y), (high_x, high_y), (low_x, high_y)]
    boxes = np.stack([np.stack(corner, axis=1) for corner in corners], axis=1).astype(np.float32)
    sources = canvas.to(device, non_blocking=True).permute(0, 3, 1, 2)
    placed = torch.from_numpy(boxes).to(device, non_blocking=True)
    return geometry.crop_and_resize(sources.float() / 255, placed, (size, size))


def _alone(others: int) -> None:
    """Let torch use no further threads in the calling thread, and `others` in threads that start later, as before."""
    torch.get_num_threads()  # a thread takes the common number at the first use of it: not after the next line
    torch.set_num_threads(1)
    # It also sets what new threads begin with, which another thread has to set right.
    restore = threading.Thread(target=partial(torch.set_num_threads, others))
    restore.start()
    restore.join()


def _cut(pixels: np.ndarray, draw: np.void, size: int) -> np.ndarray:
    """Return the crop of an image, uint8 (H, W, 3).

    A crop of twice the view's side or more is first averaged in whole blocks, because bilinear sampling would leave out pixels.
    """
    top, left, height, width = (int(draw[name]) for name in ("top", "left", "height", "width"))
    crop = pixels[top : top + height, left : left + width]
    blocks = (max(1, height // size), max(1, width // size))
    if max(blocks) > 1:
        planes = torch.from_numpy(np.ascontiguousarray(crop)).permute(2, 0, 1)[None].float()
        # Blocks of nearly one size that fill the crop, so that its scale stays a single number.
        planes = F.adaptive_avg_pool2d(planes, (math.ceil(height / blocks[0]), math.ceil(width / blocks[1])))
        crop = planes[0].permute(1, 2, 0).round().to(torch.uint8).numpy()
    return crop


def _turn_hue(x: Tensor, turns: Tensor) -> Tensor:
    return kornia.enhance.adjust_hue(x, turns * (2 * math.pi))


# In the order of DRAW's `order`, each (N, 3, S, S) and factors (N,): Pillow's definitions, not Kornia's additive ones.
_PARTS = (
    kornia.enhance.adjust_brightness_accumulative,
    kornia.enhance.adjust_contrast_with_mean_subtraction,
    kornia.enhance.adjust_saturation_with_gray_subtraction,
    _turn_hue,
)
