"""k-nearest-neighbour classification on frozen features, weighted as in DINO (Caron et al. 2021, arXiv 2104.14294, appendix F.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.core.nonfinite import check_features
from shards.errors import UserError, check_least

KS = (10, 20, 100, 200)
TEMPERATURE = 0.07
# Queries at a time, or fewer.
CHUNK = 1024
# Similarities at a time: 1 GiB of float32.
MAX_SIMILARITIES = 2**28


@dataclass(frozen=True)
class KNNConfig:
    """Online evaluation: accuracy of kNN and of a linear classifier on labelled shards during pretraining."""

    every: int = 0
    """Evaluate before the first step, every N epochs, and after the last one; 0: never."""
    shards: str = ""
    """Labelled shards whose samples vote. Empty: the training shards, whose labels are used for this evaluation only."""
    test_shards: str = ""
    """Labelled shards to classify. Empty: each sample of `shards` is classified by all the others (leave one out), where the shards
    know groups, such as scenes, by those of other groups."""
    split: str = ""
    """Split of `shards` whose samples vote, such as train. Empty: the samples that are trained on, or all of `shards`."""
    test_split: str = ""
    """Split to classify, such as val: of `test_shards` or, where that is empty, of the shards whose samples vote."""
    k: int = 20
    """Number of neighbours; clamped to the number there are."""
    linear: bool = True
    """Also fit a linear classifier to the same features, in closed form (ridge regression), and log its accuracy."""
    max_samples: int = 10_000
    """Samples used of each shard set, the same ones each time; 0: all."""

    def __post_init__(self) -> None:
        check_least(self, "knn.", every=0, k=1, max_samples=0)


@dataclass(frozen=True)
class KNNResult:
    """Accuracies in [0, 1]: `accuracy[k]` of all queries, `per_class[k]` (num_classes,), nan for a class without queries."""

    accuracy: dict[int, float]
    per_class: dict[int, Tensor]


def classify(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor | None = None,
    query_labels: Tensor | None = None,
    *,
    num_classes: int,
    groups: Tensor | None = None,
    ks: Sequence[int] = KS,
    temperature: float = TEMPERATURE,
    device: torch.device | str = "cpu",
) -> KNNResult:
    """Classify each query by the votes of the k most similar bank features, weighted exp(cosine similarity / temperature).

    Args:
        bank: features (N, D); bank_labels: int64 (N,) in [0, num_classes).
        queries: features (M, D) with query_labels (M,); None classifies each bank sample by all the others.
        groups: int64 (N,), for None as queries: bank samples of the query's own group, such as tiles of one scene, do not vote.
        ks: numbers of neighbours; each is clamped to the number available, and clamped duplicates are reported once.

    Returns:
        KNNResult keyed by the clamped k. Equal votes go to the class with the lower index.

    Raises:
        UserError: fewer than two bank samples, or groups of them, to leave one out, or an empty bank, or no k of at least 1; or
            features that are not finite: their votes would all be for class 0.
    """
    if not ks or min(ks) < 1:
        raise UserError(
            f"kNN needs numbers of neighbours of at least 1, but ks is {list(ks)}: set it, such as --ks 20."
        )
    leave_one_out = queries is None
    available = num_voters(len(bank), groups) if leave_one_out else len(bank)
    if available < 1:
        raise UserError("kNN needs at least one neighbour, but the labelled shards hold 0 samples: add more.")
    if leave_one_out:
        queries, query_labels = bank, bank_labels
        groups = (torch.arange(len(bank)) if groups is None else groups).to(device)
    assert queries is not None
    assert query_labels is not None
    for features in (bank,) if leave_one_out else (bank, queries):
        check_features(features, "kNN")
    ks = sorted({min(k, available) for k in ks})
    bank = F.normalize(bank.to(device).float(), dim=1)
    bank_labels = bank_labels.to(device)
    predictions = {k: [] for k in ks}
    size = max(1, min(CHUNK, MAX_SIMILARITIES // len(bank)))
    for start in range(0, len(queries), size):
        chunk = F.normalize(queries[start : start + size].to(device).float(), dim=1)
        similarity = chunk @ bank.T
        if groups is not None and leave_one_out:
            own = groups[start : start + size, None] == groups
            # Their votes have no weight.
            similarity.masked_fill_(own, -torch.inf)
        top, index = similarity.topk(ks[-1], dim=1)
        # Dividing by the largest weight changes no vote and keeps exp() within float32.
        weight = torch.exp((top - top[:, :1]) / temperature)
        labels = bank_labels[index]
        for k in ks:
            votes = weight.new_zeros(len(chunk), num_classes).scatter_add_(1, labels[:, :k], weight[:, :k])
            predictions[k].append(votes.argmax(dim=1).cpu())
    correct = {k: torch.cat(p) == query_labels.cpu() for k, p in predictions.items()}
    return KNNResult(
        {k: float(right.float().mean()) for k, right in correct.items()},
        {k: _per_class(right, query_labels.cpu(), num_classes) for k, right in correct.items()},
    )


def num_voters(count: int, groups: Tensor | None = None) -> int:
    """Return how many of `count` samples can vote for each of them, at least: those outside of its group, or all others.

    UserError where there are none.
    """
    if count < 2:
        raise UserError(
            f"kNN needs at least one neighbour, but the labelled shards hold {count} samples: add more."
        )
    voters = count - (1 if groups is None else int(groups.bincount().max()))
    if not voters:
        raise UserError(
            f"All {count:,} labelled samples are of one group, such as a scene, and samples of a group do not vote for each other: "
            "label samples of other groups too, or give test shards."
        )
    return voters


def _per_class(right: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    totals = torch.bincount(labels, minlength=num_classes).double()
    return torch.bincount(labels[right], minlength=num_classes).double() / totals
