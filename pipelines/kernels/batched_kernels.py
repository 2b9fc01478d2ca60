"""What batched kernels are: the operations on a batch of views, and their order."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pipelines.augment.pointwise import apply_batched
from pipelines.kernels import torch_kernels
from pipelines.kernels.view_params import PLAIN, CropOptions, Form, Params


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Within, `device` is the current one where it is a GPU: Triton launches on that, wherever the tensors lie."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


class BatchedKernels(Protocol):
    """The operations on a batch of views, uint8 (M, 3, S, S) or float32 (M, C, S, S); see `torch_kernels`, their plainest form."""

    def crop(self, pixels: Tensor, params: Params, options: CropOptions) -> Tensor:
        """Cut and resize."""
        ...

    def colour(self, views: Tensor, params: Params) -> Tensor:
        """Jitter and grayscale."""
        ...

    def blur(self, views: Tensor, params: Params) -> Tensor:
        """Blur the views that were drawn."""
        ...

    def finish(self, views: Tensor, params: Params, mean: Tensor, std: Tensor, form: Form = PLAIN) -> Tensor:
        """Solarise, flip, turn, noise, normalise."""
        ...


@dataclass(frozen=True)
class FinishOptions:
    """What finished views are, on one device."""

    mean: Tensor  # float32 (C,)
    std: Tensor  # float32 (C,)
    form: Form = PLAIN
    erased: Tensor | None = None  # as for `torch_kernels.erase`; None erases nothing


def make_views(
    kernels: BatchedKernels, pixels: Tensor, params: Params, crops: CropOptions, finished: FinishOptions
) -> Tensor:
    """Apply all operations in their order: (M, C, S, S) in the form asked for, normalised.

    Args:
        pixels: as for `torch_kernels.crop`.
    """
    views = kernels.crop(pixels, params, crops)
    views = kernels.blur(kernels.colour(views, params), params)
    views = apply_batched(views, params.pointwise)
    views = kernels.finish(views, params, finished.mean, finished.std, finished.form)
    return views if finished.erased is None else torch_kernels.erase(views, params, finished.erased)
