"""Which batched kernels make the views on a device: Triton's where they run and pass a test, torch's functions elsewhere."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from pipelines.augment.channels import FULL
from pipelines.augment.draws import draw
from pipelines.augment.recipe import RECIPES
from pipelines.kernels import torch_kernels
from pipelines.kernels.batched_kernels import BatchedKernels, FinishOptions, make_views, on_device
from pipelines.kernels.view_params import CropOptions, pack


@dataclass(frozen=True)
class Trial:
    """Ragged pictures that kernels are tried on."""

    images: str  # their name in messages
    dtype: str
    channels: int
    # Mean difference, in levels of 255. In 8 bits a pixel is a level off where a rounding differs, and its hue some.
    allowed: float


EIGHT_BIT = Trial("8-bit RGB images", "uint8", 3, 0.25)
IN_FLOATS = (
    Trial("16-bit RGB images", "uint16", 3, 0.01),
    Trial("float images of 4 channels", "float32", 4, 0.01),
    Trial("8-bit images of 5 channels", "uint8", 5, 0.01),
)


@cache
def choose_kernels(device: torch.device, in_floats: bool = False) -> BatchedKernels:
    """Return Triton's kernels on a CUDA device where they compile and pass their test (some seconds at first), else torch's functions.

    What keeps Triton from running (no C compiler for its launcher, no Triton on the system) is told in a warning.

    Args:
        in_floats: not only 8-bit RGB: the kernels for all other images are compiled and tested too.
    """
    if device.type != "cuda":
        return torch_kernels
    trials = (EIGHT_BIT, *IN_FLOATS) if in_floats else (EIGHT_BIT,)
    try:
        from pipelines.kernels import triton_kernels

        with on_device(device):
            made = [(trial, difference(triton_kernels, device, trial)) for trial in trials]
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
    else:
        off = [(trial, levels) for trial, levels in made if not levels <= trial.allowed]
        if not off:
            return triton_kernels
        trial, levels = off[0]
        reason = f"on {trial.images} they are {levels:.2f} levels off, more than {trial.allowed}"
    warnings.warn(
        f"The Triton kernels do not work here ({reason}); views are made by torch's functions instead, which are slower.",
        stacklevel=2,
    )
    return torch_kernels


def difference(kernels: BatchedKernels, device: torch.device, trial: Trial = EIGHT_BIT) -> float:
    """Return the mean difference, in levels of 255, of `kernels` on `device` to torch's functions on the CPU."""
    size, channels, rng = 16, trial.channels, np.random.default_rng(0)
    heights, widths = np.array([20, 15, 40, 16] * 2), np.array([30, 35, 21, 16] * 2)
    dtype = np.dtype(trial.dtype)
    sizes = heights * widths * channels
    # Smooth, as photographs are: in noise a level more or less before the hue is another colour.
    waves = [
        np.cumsum(np.cumsum(rng.normal(size=(h, w, channels)), axis=0), axis=1) * 2 + 128
        for h, w in zip(heights, widths, strict=True)
    ]
    images = [(np.clip(wave, 0, 255) * (FULL[dtype.name] / 255)).astype(dtype).reshape(-1) for wave in waves]
    pixels = torch.from_numpy(np.concatenate(images))
    recipe = dataclasses.replace(
        RECIPES["satellite" if channels == 3 else "multispectral"],
        num_views=1,
        blur_p=(0.5,),
        solarize_p=(0.5,),
        jitter_p=1.0,
        noise_p=0.5,
    )
    draws = draw(recipe, 0, 0, np.arange(len(sizes)), widths, heights)[0]
    made = []
    both: list[tuple[BatchedKernels, torch.device]] = [
        (torch_kernels, torch.device("cpu")),
        (kernels, device),
    ]
    for who, where in both:
        params = pack(draws, np.cumsum(sizes) - sizes, widths, where)
        gain = offset = None
        if trial is not EIGHT_BIT:  # a value range too: some pixels lie below and above it
            low, high = 0.1 * FULL[dtype.name], 0.8 * FULL[dtype.name]
            gain = torch.full((channels,), 1 / (high - low), device=where)
            offset = torch.full((channels,), -low / (high - low), device=where)
        flat = torch.zeros(channels, device=where), torch.ones(channels, device=where)
        crops = CropOptions(size, "bilinear", gain, offset)
        made.append(make_views(who, pixels.to(where), params, crops, FinishOptions(*flat)).cpu())
    return float((made[1] - made[0]).abs().mean() * 255)
