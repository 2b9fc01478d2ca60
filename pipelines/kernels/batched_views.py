"""The views of a batch of decoded images of any type and number of channels, made by batched kernels on a device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipelines.augment.channels import eight_bit_rgb, gain_and_offset
from pipelines.augment.recipe import Recipe
from pipelines.kernels.batched_kernels import BatchedKernels, FinishOptions, make_views, on_device
from pipelines.kernels.kernel_choice import choose_kernels
from pipelines.kernels.view_params import PLAIN, TYPES, CropOptions, Form, pack, upload


class BatchedViews:
    """Makes the views of a batch of decoded images that lie in one buffer of a device."""

    def __init__(
        self,
        recipe: Recipe,
        device: torch.device,
        kernels: BatchedKernels | None = None,
        form: Form = PLAIN,
        dtypes: Sequence[str] = ("uint8",),
    ):
        """`kernels`: without them the best for the device. `dtypes`: the element types of the images that there may be."""
        self._recipe, self._device = recipe, device
        levels: list[tuple[Tensor, Tensor] | None] = []  # of each type: how its pixels come to lie in [0, 1]
        for name in TYPES:
            dtype = np.dtype(name)
            if eight_bit_rgb(dtype, len(recipe.mean), recipe):
                levels.append(None)
            else:
                gain, offset = (torch.from_numpy(x).to(device) for x in gain_and_offset(recipe, dtype))
                levels.append((gain, offset))
        self._levels = levels
        in_floats = any(levels[TYPES.index(name)] is not None for name in dtypes)
        self._kernels = kernels or choose_kernels(device, in_floats)
        mean, std = (torch.tensor(x, device=device) for x in (recipe.mean, recipe.std))
        erased = torch.tensor(recipe.erased(), device=device) if recipe.erase_p else None
        self._finished = FinishOptions(mean, std, form, erased)

    def __call__(
        self,
        pixels: Tensor,
        first_bytes: np.ndarray,
        widths: np.ndarray,
        draws: np.ndarray,
        types: np.ndarray,
    ) -> list[Tensor]:
        """Return the views, (N, C, S, S) each, of DRAW records (V, N); launch kernels on the device's current stream without waiting.

        Args:
            pixels: uint8, the bytes of all images, each (H, W, C); those of other types begin at multiples of their elements' size.
            first_bytes, widths: (N,), where each image of the batch begins in them and its width in pixels.
            types: integers (N,), the place of each image's type in `TYPES`.
        """
        with on_device(self._device):
            return self._views(pixels, first_bytes, widths, draws, types)

    def _views(
        self,
        pixels: Tensor,
        first_bytes: np.ndarray,
        widths: np.ndarray,
        draws: np.ndarray,
        types: np.ndarray,
    ) -> list[Tensor]:
        views: list[Tensor] = []
        for group in self._groups(len(draws)):  # views of one side together
            some = draws[group.start : group.stop].reshape(-1)  # view after view
            places = np.stack([np.tile(values, len(group)) for values in (first_bytes, widths, types)])
            out = self._of_any_type(pixels, places, some, self._recipe.side(group.start))
            views += out.view(len(group), len(first_bytes), *out.shape[1:]).unbind(0)
        return views

    def _of_any_type(self, pixels: Tensor, places: np.ndarray, draws: np.ndarray, size: int) -> Tensor:
        """Return the views of DRAW records (M,); `places`: integers (3, M), first bytes, widths and types of their images."""
        types = np.unique(places[2])
        if len(types) == 1:
            return self._of_type(int(types[0]), pixels, places, draws, size)
        shape, form = (len(draws), len(self._recipe.mean), size, size), self._finished.form
        out = torch.empty(shape, dtype=form.dtype, device=self._device, memory_format=form.memory_format)
        for kind in types:  # each type on its own; then every view goes to its place
            chosen = np.flatnonzero(places[2] == kind)
            at = upload(chosen, self._device)
            out.index_copy_(0, at, self._of_type(int(kind), pixels, places[:, chosen], draws[chosen], size))
        return out

    def _of_type(self, kind: int, pixels: Tensor, places: np.ndarray, draws: np.ndarray, size: int) -> Tensor:
        """As `_of_any_type`, of images that are all of type `kind`."""
        dtype = np.dtype(TYPES[kind])
        params = pack(draws, places[0], places[1], self._device, dtype.itemsize)
        gain, offset = self._levels[kind] or (None, None)
        crops = CropOptions(size, self._recipe.interpolation, gain, offset)
        elements = pixels[: len(pixels) // dtype.itemsize * dtype.itemsize].view(getattr(torch, TYPES[kind]))
        return make_views(self._kernels, elements, params, crops, self._finished)

    def _groups(self, num_views: int) -> list[range]:
        if num_views == self._recipe.total_views:
            return self._recipe.groups()
        return [range(num_views)]  # the view of evaluation
