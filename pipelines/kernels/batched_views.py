"""Which batched kernels make the views on a device: Triton's where they run and pass a test, torch's functions elsewhere."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from functools import cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pipelines.augment.draws import draw
from pipelines.augment.recipe import RECIPES, Recipe
from pipelines.kernels import torch_kernels
from pipelines.kernels.torch_kernels import PLAIN, Form, Params

# Both keep 8 bits between the steps; where a rounding differs, a pixel is a level off, and its hue some.
ALLOWED_LEVELS = 0.25


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Within, `device` is the current one where it is a GPU: Triton launches on that, wherever the tensors lie."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


class BatchedKernels(Protocol):
    """The operations on a batch of views, uint8 (M, 3, S, S); see `gpu_kernels`, whose functions are the plainest form."""

    def crop(
        self,
        pixels: Tensor,
        params: Params,
        size: int,
        heights: np.ndarray,
        widths: np.ndarray,
        interpolation: str = "bilinear",
    ) -> Tensor:
        """Cut and resize."""
        ...

    def colour(self, views: Tensor, params: Params) -> Tensor:
        """Jitter and greyscale."""
        ...

    def blur(self, views: Tensor, params: Params) -> Tensor:
        """Blur the views that were drawn."""
        ...

    def finish(self, views: Tensor, params: Params, mean: Tensor, std: Tensor, form: Form = PLAIN) -> Tensor:
        """Solarise, flip, turn, noise, normalise."""
        ...


def make_views(
    kernels: BatchedKernels,
    pixels: Tensor,
    params: Params,
    draws: np.ndarray,
    size: int,
    mean: Tensor,
    std: Tensor,
    form: Form = PLAIN,
    interpolation: str = "bilinear",
    erased: Tensor | None = None,
) -> Tensor:
    """All operations in their order: (M, 3, S, S) in `form`, normalised.

    Args:
        pixels: uint8, the bytes of all images, each (H, W, 3).
        draws: the DRAW records (M,) of `params`, for what the host has to know.
        mean, std: float32 (3,).
        interpolation: of the crops, bilinear or bicubic.
        erased: as for `gpu_kernels.erase`; None erases nothing.
    """
    heights, widths = draws["height"], draws["width"]
    views = kernels.crop(pixels, params, size, heights, widths, interpolation)
    views = kernels.blur(kernels.colour(views, params), params)
    views = kernels.finish(views, params, mean, std, form)
    return views if erased is None else torch_kernels.erase(views, params, erased)


class BatchedViews:
    """Makes all views of a batch on a device, from images that lie there decoded."""

    def __init__(
        self,
        recipe: Recipe,
        device: torch.device,
        kernels: BatchedKernels | None = None,
        form: Form = PLAIN,
    ):
        """`kernels`: without them the best for the device."""
        self._recipe, self._device, self._form = recipe, device, form
        self._kernels = kernels or choose_kernels(device)
        self._mean, self._std = (torch.tensor(x, device=device) for x in (recipe.mean, recipe.std))
        self._erased = torch.tensor(recipe.erased(), device=device) if recipe.erase_p else None

    def __call__(
        self, pixels: Tensor, first_bytes: np.ndarray, widths: np.ndarray, draws: np.ndarray
    ) -> list[Tensor]:
        """The views, (N, 3, S, S) each, of DRAW records (V, N); launches kernels on the device's current stream without waiting.

        Args:
            pixels: uint8, the bytes of all images, each (H, W, 3).
            first_bytes, widths: (N,), where each image of the batch begins in them and its width in pixels.
        """
        with on_device(self._device):
            return self._views(pixels, first_bytes, widths, draws)

    def _views(
        self, pixels: Tensor, first_bytes: np.ndarray, widths: np.ndarray, draws: np.ndarray
    ) -> list[Tensor]:
        views: list[Tensor] = []
        for group in self._groups(len(draws)):  # views of one side together
            some = draws[group.start : group.stop].reshape(-1)  # view after view
            places = np.tile(first_bytes, len(group)), np.tile(widths, len(group))
            params = torch_kernels.pack(some, *places, pin=self._device.type == "cuda").to(self._device)
            out = make_views(
                self._kernels,
                pixels,
                params,
                some,
                self._recipe.side(group.start),
                self._mean,
                self._std,
                self._form,
                self._recipe.interpolation,
                self._erased,
            )
            views += out.view(len(group), len(first_bytes), *out.shape[1:]).unbind(0)
        return views

    def _groups(self, num_views: int) -> list[range]:
        if num_views == self._recipe.total_views:
            return self._recipe.groups()
        return [range(num_views)]  # the view of evaluation


@cache
def choose_kernels(device: torch.device) -> BatchedKernels:
    """Triton's kernels on a CUDA device where they compile and pass `self_test` (some seconds at first), else torch's functions.

    What keeps Triton from running (no C compiler for its launcher, no Triton on the system) is told in a warning.
    """
    if device.type != "cuda":
        return torch_kernels
    try:
        from pipelines.kernels import triton_kernels

        with on_device(device):
            levels = self_test(triton_kernels, device)
    except Exception as fault:
        reason = f"{type(fault).__name__}: {str(fault).splitlines()[0] if str(fault) else 'no reason given'}"
    else:
        if levels <= ALLOWED_LEVELS:
            return triton_kernels
        reason = f"they are {levels:.2f} levels off, more than {ALLOWED_LEVELS}"
    warnings.warn(
        f"The Triton kernels do not work here ({reason}); views are made by torch's functions instead, which are slower.",
        stacklevel=2,
    )
    return torch_kernels


def self_test(kernels: BatchedKernels, device: torch.device) -> float:
    """The mean difference, in levels of 255, of `kernels` on `device` to torch's functions on the CPU, for ragged pictures."""
    size, rng = 16, np.random.default_rng(0)
    heights, widths = np.array([20, 15, 40, 16] * 3), np.array([30, 35, 21, 16] * 3)
    sizes = heights * widths * 3
    # Smooth, as photographs are: in noise a level more or less before the hue is another colour.
    images = [
        np.cumsum(np.cumsum(rng.normal(size=(h, w, 3)), axis=0), axis=1) * 2 + 128
        for h, w in zip(heights, widths, strict=True)
    ]
    pixels = torch.from_numpy(
        np.concatenate([np.clip(image, 0, 255).astype(np.uint8).reshape(-1) for image in images])
    )
    recipe = dataclasses.replace(
        RECIPES["satellite"], num_views=1, blur_p=(0.5,), solarize_p=(0.5,), jitter_p=1.0, noise_p=0.5
    )
    draws = draw(recipe, 0, 0, np.arange(len(sizes)), widths, heights)[0]
    params = torch_kernels.pack(draws, np.cumsum(sizes) - sizes, widths)
    mean, std = torch.zeros(3), torch.ones(3)
    wanted = make_views(torch_kernels, pixels, params, draws, size, mean, std)
    place = [x.to(device) for x in (pixels, mean, std)]
    made = make_views(kernels, place[0], params.to(device), draws, size, place[1], place[2])
    return float((made.cpu() - wanted).abs().mean() * 255)
