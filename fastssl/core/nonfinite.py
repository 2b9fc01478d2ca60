"""What is not finite: steps, by their loss or gradient, weights and features; and RankMe, the rank of the features."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastssl.core.distributed import gather_keys, mean_over_ranks
from shards.errors import UserError

# Images whose features RankMe looks at: more would take seconds.
MAX_ROWS = 2048
EPSILON = 1e-7


@torch.no_grad()
def rank_me(features: Tensor) -> float:
    """Return RankMe of features (N, D), from 1 (all on one line, collapsed) to min(N, D); nan where they are not finite.

    exp(-sum p ln p) with p = s / sum(s) + 1e-7 of the singular values s: the number of directions that the features use (Garrido et
    al. 2023, arXiv 2210.02885, eq. 1). It compares epochs of a run, and runs of the same batch size and backbone.
    """
    features = features[:MAX_ROWS].float()
    if not bool(features.isfinite().all()):
        return float("nan")
    values = torch.linalg.svdvals(features)
    shares = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny) + EPSILON
    return float(torch.exp(-(shares * shares.log()).sum()))


def is_finite(module: nn.Module) -> bool:
    """Return whether all weights and BatchNorm's running statistics are finite; waits for the device."""
    # Other buffers may hold an infinity on purpose, such as a mask of attention.
    statistics = (b for m in module.modules() if isinstance(m, _BatchNorm) for b in m.buffers())
    tensors = [*module.parameters(), *statistics]
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def count_unusable(features: Tensor) -> int:
    """Return how many rows of features (N, D) have no finite length: they have no direction, and every vote of theirs is arbitrary."""
    return int((~torch.linalg.vector_norm(features.float(), dim=1).isfinite()).sum())


def check_features(features: Tensor, what: str) -> None:
    """Raise UserError where features (N, D) are not finite, or so large that their length is not; `what` names their use."""
    if bad := count_unusable(features):
        raise UserError(
            f"The features of {bad:,} of {len(features):,} images are not finite, so {what} measures nothing: the weights are "
            "those of a run that diverged, or the images have values that are not finite. Take an earlier checkpoint, or train with a "
            "lower --optim.lr."
        )


@dataclass(frozen=True)
class BadStep:
    """The first step that was not finite since the last poll."""

    step: int
    """Number of the step, counted from 1."""
    loss: float
    """Mean over ranks; finite where only the gradient was not."""
    sample_ids: np.ndarray
    """The batch, of all ranks in rank order: int64 (N,)."""
    skipped: int
    """Steps of the run so far that were not finite."""

    def __str__(self) -> str:
        if np.isfinite(self.loss):
            return f"The gradient was not finite at step {self.step}"
        return f"The loss was {self.loss} at step {self.step}"


class NonFiniteMonitor:
    """Records on the device which step was not finite first, so that no step waits for the device; sample ids stay on the host."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._first = torch.zeros((), dtype=torch.int64, device=device)
        self._loss = torch.zeros((), device=device)
        self._count = torch.zeros((), dtype=torch.int64, device=device)
        self._ids: dict[int, np.ndarray] = {}

    def record(self, step: int, bad: Tensor, loss: Tensor, sample_ids: np.ndarray) -> None:
        """Record a step: whether it was not finite (bool, the same on every rank), its loss, its sample ids (N,) on this rank."""
        new = bad & (self._first == 0)
        self._first = torch.where(new, step, self._first)
        self._loss = torch.where(new, loss.detach().float(), self._loss)
        self._count = self._count + bad
        self._ids[step] = sample_ids

    def poll(self) -> BadStep | None:
        """Return the first such step since the last poll, or None. Waits for the device; every rank polls after the same steps."""
        ids, self._ids = self._ids, {}
        step = int(self._first)
        if not step:
            return None
        self._first = torch.zeros_like(self._first)
        loss = float(mean_over_ranks({"loss": self._loss})["loss"])
        batch = gather_keys(torch.from_numpy(ids[step]).to(self._device)).cpu().numpy()
        return BadStep(step, loss, batch, int(self._count))

    @property
    def count(self) -> int:
        """Steps of the run so far that were not finite; reading it waits for the device."""
        return int(self._count)

    def restore(self, count: int) -> None:
        """Continue from the count of a checkpoint."""
        self._count = torch.full_like(self._count, count)
