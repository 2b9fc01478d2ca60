"""Metrics of a batch's features that show collapse."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def feature_std(features: Tensor) -> Tensor:
    """Return the spread of the features of a batch, from 0 (all the same: collapsed) to 1.

    It is the standard deviation over the batch of each dimension of the L2-normalised features (N, D), averaged over the dimensions
    and multiplied by sqrt(D) (SimSiam, arXiv 2011.10566). Zero-mean features without a preferred direction give 1, the maximum.
    Features after a ReLU have a mean, so their healthy value is lower: sqrt(1 - 2 / pi) = 0.60 for absolute values of normal ones.
    """
    features = F.normalize(features.float(), dim=1)
    return features.std(dim=0, unbiased=False).mean() * math.sqrt(features.shape[1])


def batch_statistics(features: Tensor) -> dict[str, Tensor]:
    """Return metrics that need the whole batch at once, unlike means over its chunks; features (N, D), detached."""
    return {"feature_std": feature_std(features)}
