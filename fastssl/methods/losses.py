"""Losses that methods share: InfoNCE."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class ContrastiveLoss(NamedTuple):
    """InfoNCE of one set of queries."""

    ce: Tensor
    """Mean cross-entropy in nats, with gradient for the queries; ln(number of keys) at chance."""
    accuracy: Tensor
    """Share of queries whose own key is the most similar, 0 to 1; 1 / (number of keys) at chance."""


def info_nce(queries: Tensor, keys: Tensor, temperature: float, first_target: int = 0) -> ContrastiveLoss:
    """Return the cross-entropy of finding each query's own key among all keys (InfoNCE, arXiv 1807.03748).

    queries (N, D), keys (M, D), any floating dtype: both are L2-normalised here, in float32. The key of query n is row
    first_target + n. Queries are never each other's negatives.
    """
    queries = F.normalize(queries.float(), dim=1)
    keys = F.normalize(keys.float(), dim=1)
    logits = queries @ keys.T / temperature
    targets = torch.arange(first_target, first_target + len(queries), device=logits.device)
    with torch.no_grad():
        accuracy = (logits.argmax(dim=1) == targets).float().mean()
    return ContrastiveLoss(F.cross_entropy(logits, targets), accuracy)
