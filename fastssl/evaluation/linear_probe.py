"""A linear probe in closed form: ridge regression to one-hot labels, with the strength chosen by leave-one-out accuracy."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.core.nonfinite import check_features

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


class Ridge(NamedTuple):
    """A linear classifier: scores (N, classes) = ((features - mean) / scale) @ weight + bias, all float64."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    scale: Tensor
    strength: float
    """The chosen regularisation strength, as a multiple of the number of samples."""
    left_out: Tensor
    """Scores (N, classes) of each sample from the classifier fitted to all others."""

    def scores(self, features: Tensor) -> Tensor:
        """Return scores (M, classes) of features (M, D)."""
        return ((features.to(self.weight) - self.mean) / self.scale) @ self.weight + self.bias


def fit_ridge(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    strengths: tuple[float, ...] = STRENGTHS,
    groups: Tensor | None = None,
) -> Ridge:
    """Return the classifier that minimises |Y - X W|^2 + strength * N * |W|^2.

    W = (X'X + strength N I)^-1 X'Y. Leaving sample i out changes its residual to r_i / (1 - h_i), h_i = x_i' (X'X + ..)^-1 x_i + 1/N
    (Allen's PRESS; Hastie et al., The Elements of Statistical Learning, eq. 7.64), with mean and scale of all samples. So one
    decomposition gives the leave-one-out accuracy of every strength; the best one is taken, the largest of equals. Samples of a group
    are left out together: their residuals become (I - H)^-1 r, where H is the group's block of the hat matrix.

    Args:
        features: X (N, D), N >= 2; standardised here.
        labels: int64 (N,), of which Y is the centred one-hot form.
        num_classes: number of classes.
        strengths: the strengths to choose from.
        groups: int64 (N,), equal for samples that are left out together, such as tiles of one scene; None: each alone.

    Raises:
        UserError: features that are not finite.
    """
    check_features(features, "the linear probe")
    x = features.double()
    mean, scale = x.mean(dim=0), x.std(dim=0, unbiased=False)
    scale = torch.where(scale > 1e-9 * scale.max().clamp(min=1e-30), scale, torch.inf)  # constant: no weight
    x = (x - mean) / scale
    y = F.one_hot(labels.to(x.device), num_classes).to(x)
    base = y.mean(dim=0)
    y = y - base
    values, vectors = torch.linalg.eigh(x.T @ x)
    turned = x @ vectors  # its columns are the principal components
    pull = turned.T @ y
    together = [] if groups is None else _members(groups)
    best = None
    for strength in sorted(strengths, reverse=True):
        inverse = 1 / (values.clamp(min=0) + strength * len(x))
        fitted = turned @ (inverse[:, None] * pull)
        leverage = (turned.square() * inverse).sum(dim=1, keepdim=True) + 1 / len(x)
        residual = (y - fitted) / (1 - leverage).clamp(min=1e-9)
        for rows in together:
            hat = (turned[rows] * inverse) @ turned[rows].T + 1 / len(x)
            residual[rows] = torch.linalg.solve(torch.eye(len(rows)).to(hat) - hat, (y - fitted)[rows])
        left_out = y - residual + base
        right = int((left_out.argmax(dim=1) == labels.to(x.device)).sum())
        if best is None or right > best[0]:
            weight = vectors @ (inverse[:, None] * pull)
            best = right, Ridge(weight, base, mean, scale, strength, left_out)
    assert best is not None, "there is a strength to try"
    return best[1]


def _members(groups: Tensor) -> list[Tensor]:
    """Return the indices of the samples of each group of at least two."""
    order = groups.argsort(stable=True)
    return [rows for rows in order.split(groups.bincount().tolist()) if len(rows) > 1]


def probe_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor | None,
    query_labels: Tensor | None,
    num_classes: int,
    device: torch.device | str = "cpu",
    groups: Tensor | None = None,
) -> float:
    """Return the accuracy in [0, 1] of a linear classifier fitted to the bank, features (N, D), on the queries (M, D).

    Without queries: the leave-one-out accuracy on the bank, by `groups` as for `fit_ridge`. UserError for features that are not
    finite.
    """
    ridge = fit_ridge(bank.to(device), bank_labels.to(device), num_classes, groups=groups)
    if queries is None or query_labels is None:
        scores, labels = ridge.left_out, bank_labels
    else:
        check_features(queries, "the linear probe")
        scores, labels = ridge.scores(queries.to(device)), query_labels
    return float((scores.argmax(dim=1).cpu() == labels.cpu()).double().mean())
