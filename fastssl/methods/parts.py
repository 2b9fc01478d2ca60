"""What methods share: heads, the contrastive cross-entropy, the teacher's average, batch statistics."""

# pyright: reportPrivateImportUsage=false
# torch's multi-tensor operations (torch._foreach_*) have no public name; its own optimisers use them too.

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


class Contrast(NamedTuple):
    """One direction of a contrastive loss."""

    ce: Tensor
    """Plain mean cross-entropy in nats, with gradient for the queries; ln(number of keys) at chance."""
    accuracy: Tensor
    """Share of queries whose own key is the most similar, 0 to 1; 1 / (number of keys) at chance."""


def info_nce(queries: Tensor, keys: Tensor, temperature: float, first_target: int = 0) -> Contrast:
    """Cross-entropy of telling each query's own key from all other keys (InfoNCE, arXiv 1807.03748).

    queries (N, D), keys (M, D), any floating dtype and any lengths: both are normalised here, in float32. The
    key of query n is row first_target + n. Queries are never each other's negatives.
    """
    queries = F.normalize(queries.float(), dim=1)
    keys = F.normalize(keys.float(), dim=1)
    logits = queries @ keys.T / temperature
    targets = torch.arange(first_target, first_target + len(queries), device=logits.device)
    with torch.no_grad():
        accuracy = (logits.argmax(dim=1) == targets).float().mean()
    return Contrast(F.cross_entropy(logits, targets), accuracy)


@torch.no_grad()
def feature_std(features: Tensor) -> Tensor:
    """How spread out the features of a batch are, from 0 (all the same, collapsed) to 1 (healthy).

    The standard deviation over the batch of each dimension of the L2-normalised features (N, D), averaged
    over the dimensions and multiplied by sqrt(D) (SimSiam, arXiv 2011.10566). Zero-mean features without a
    preferred direction give 1 and nothing gives more. Features after a ReLU have a mean, which keeps a
    healthy value lower: sqrt(1 - 2 / pi) = 0.60 for the absolute values of normal ones.
    """
    features = F.normalize(features.float(), dim=1)
    return features.std(dim=0, unbiased=False).mean() * math.sqrt(features.shape[1])


def batch_statistics(features: Tensor) -> dict[str, Tensor]:
    """Metrics that need the whole batch at once, which means over chunks of it do not give; features (N, D), detached."""
    return {"feature_std": feature_std(features)}


@torch.no_grad()
def ema_update(
    teacher: Iterable[Tensor],
    student: Iterable[Tensor],
    momentum: float | Tensor,
    how: Literal["foreach", "loop"] = "foreach",
) -> None:
    """teacher = momentum * teacher + (1 - momentum) * student, in place, as one multi-tensor operation or tensor by tensor.

    A momentum on the device, a scalar tensor, takes three of them and a little memory, as no operation reads its weight there.
    """
    old, new = list(teacher), list(student)
    if isinstance(momentum, Tensor):
        for first in range(0, len(old), 32):
            some = old[first : first + 32]
            change = torch._foreach_sub(new[first : first + 32], some)
            torch._foreach_mul_(change, 1 - momentum)
            torch._foreach_add_(some, change)
    elif how == "foreach":
        torch._foreach_lerp_(old, new, 1 - momentum)
    else:
        for average, value in zip(old, new, strict=True):
            average.lerp_(value, 1 - momentum)


@torch.no_grad()
def relative_distance(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> Tensor:
    """|teacher - student| / |student|, L2 over all elements together: a scalar on the device, 0 where they are equal."""
    differences = [torch.linalg.vector_norm(t - s) for t, s in zip(teacher, student, strict=True)]
    lengths = torch._foreach_norm(list(student))
    tiny = torch.finfo(lengths[0].dtype).tiny
    return torch.stack(differences).norm() / torch.stack(list(lengths)).norm().clamp(min=tiny)


def depends_on_batch(module: nn.Module) -> bool:
    """True when the module holds a layer with batch statistics (BatchNorm and its kin).

    Such a module's output for an image depends on the batch it comes with, so two views may not share one
    forward.
    """
    return any(name.endswith("running_var") for name, _ in module.named_buffers())
