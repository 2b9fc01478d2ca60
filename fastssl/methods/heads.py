"""Projection and prediction heads: multi-layer perceptrons with BatchNorm."""

import itertools
from collections.abc import Sequence
from typing import Literal

from torch import nn


def mlp(dims: Sequence[int], *, last_norm: Literal["none", "plain"]) -> nn.Sequential:
    """Return linear layers (N, dims[0]) -> ... -> (N, dims[-1]) without bias, with BatchNorm and ReLU between them.

    With `last_norm` "plain" a BatchNorm without scale and shift (affine=False) follows the last layer, with "none" nothing does. The
    initialisation is PyTorch's default.
    """
    layers: list[nn.Module] = []
    for i, (num_in, num_out) in enumerate(itertools.pairwise(dims)):
        layers.append(nn.Linear(num_in, num_out, bias=False))
        if i < len(dims) - 2:
            layers += [nn.BatchNorm1d(num_out), nn.ReLU(inplace=True)]
        elif last_norm == "plain":
            layers.append(nn.BatchNorm1d(num_out, affine=False))
    return nn.Sequential(*layers)
