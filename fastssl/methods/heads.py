"""Projection and prediction heads: multi-layer perceptrons with BatchNorm."""

import itertools
from collections.abc import Sequence
from typing import Literal

from torch import nn


def mlp(dims: Sequence[int], *, last_norm: Literal["none", "plain"]) -> nn.Sequential:
    """Linear layers dims[0] -> dims[1] -> ... without bias, BatchNorm and ReLU between them.

    `last_norm` "plain" ends with a BatchNorm that has no scale and shift (affine=False), "none" with the
    linear layer. (N, dims[0]) -> (N, dims[-1]). PyTorch's default initialisation.
    """
    layers: list[nn.Module] = []
    for i, (num_in, num_out) in enumerate(itertools.pairwise(dims)):
        layers.append(nn.Linear(num_in, num_out, bias=False))
        if i < len(dims) - 2:
            layers += [nn.BatchNorm1d(num_out), nn.ReLU(inplace=True)]
        elif last_norm == "plain":
            layers.append(nn.BatchNorm1d(num_out, affine=False))
    return nn.Sequential(*layers)
