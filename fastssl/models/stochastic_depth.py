"""Stochastic depth (Huang et al., arXiv 1603.09382) whose draws are a function of step, sample, view and layer.

So a batch in chunks, on any number of ranks, or run a second time drops the same paths of the same images, and there is no random
state to save.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from shards.counter_hash import UInt64, hash_key, uniform


class KeyedDropPath(nn.Module):
    """timm's DropPath with draws that are given for the rows of a forward pass; without, from PyTorch's random numbers as timm's."""

    drawn: Tensor | None = None
    """Uniform numbers in [0, 1) of the rows of the pass, float32 (rows,) on their device."""

    def __init__(self, drop_prob: float, scale_by_keep: bool = True) -> None:
        super().__init__()
        self.drop_prob, self.scale_by_keep = drop_prob, scale_by_keep

    def forward(self, x: Tensor) -> Tensor:
        """Set the rows (N, ...) to 0 whose number is at or above the share to keep, and scale the others by its inverse."""
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1.0 - self.drop_prob
        numbers = torch.rand(len(x), device=x.device) if self.drawn is None else self.drawn
        kept = (numbers < keep).to(x.dtype)
        if self.scale_by_keep and keep > 0.0:
            kept = kept / keep
        return x * kept.view(-1, *[1] * (x.ndim - 1))


def key_stochastic_depth(module: nn.Module) -> None:
    """Replace timm's DropPath layers of a module by keyed ones, in place."""
    # Here, since timm takes 2 s to import, which a command's --help should not wait for.
    from timm.layers.drop import DropPath

    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is DropPath:
                setattr(parent, name, KeyedDropPath(child.drop_prob, child.scale_by_keep))


def step_keys(seed: int, step: int, sample_ids: np.ndarray) -> UInt64:
    """Return the keys of a step's samples, uint64 (N,): a function of the seed, the step and the sample alone."""
    return np.asarray(hash_key(seed, step, sample_ids))


@contextlib.contextmanager
def drawn_depths(
    module: nn.Module, keys: UInt64 | None, views: Sequence[int], by_image: bool = False
) -> Iterator[None]:
    """Give the keyed layers inside the context their numbers for one pass of these views.

    Args:
        keys: of the samples in the pass; None leaves the layers to PyTorch's random numbers.
        views: numbers of the views in the pass.
        by_image: whether the rows of an image are neighbours; else a view's rows are.
    """
    layers = [m for m in module.modules() if isinstance(m, KeyedDropPath)] if keys is not None else []
    layers = [layer for layer in layers if layer.training and layer.drop_prob]
    if not layers:
        yield
        return
    assert keys is not None
    of_views = hash_key(np.asarray(views, dtype=np.int64)[:, None], keys)
    of_rows = (of_views.T if by_image else of_views).ravel()
    numbers = np.stack([uniform(hash_key(layer, of_rows)) for layer in range(len(layers))])
    # Rounding to float32 could give 1.
    exact = torch.from_numpy(np.minimum(numbers, 1 - 2.0**-24).astype(np.float32))
    device = next(module.parameters()).device
    on_device = (exact.pin_memory() if device.type == "cuda" else exact).to(device, non_blocking=True)
    for layer, row in zip(layers, on_device, strict=True):
        layer.drawn = row
    try:
        yield
    finally:
        for layer in layers:
            layer.drawn = None


def same_depths(module: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Return a context in which the module's layers have the numbers that they have now: for a forward that is repeated later."""
    held = [(m, m.drawn) for m in module.modules() if isinstance(m, KeyedDropPath)]

    @contextlib.contextmanager
    def given() -> Iterator[None]:
        before = [layer.drawn for layer, _ in held]
        for layer, drawn in held:
            layer.drawn = drawn
        try:
            yield
        finally:
            for (layer, _), drawn in zip(held, before, strict=True):
                layer.drawn = drawn

    return given()
