"""Online evaluation as the loop takes it: kNN and linear accuracy of the branch that a method names."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING

import torch

from fastssl.core.distributed import Dist
from fastssl.evaluation.knn import KNNConfig
from fastssl.evaluation.online_evaluation import OnlineEvaluation
from fastssl.methods.method import Method
from fastssl.training.evaluation import BestBy, Evaluation
from pipelines.loading.loader import Loader
from shards.dataset.shard_set import ShardSet

if TYPE_CHECKING:
    from fastssl.pretraining.run_config import RunConfig

# Not how often it comes, and not the other accuracy.
DECIDING = tuple(f"knn.{field.name}" for field in fields(KNNConfig) if field.name not in ("every", "linear"))


class KNNEvaluation(Evaluation):
    """Evaluates a method's backbone on labels that the training never sees; on the first rank. On the others `online` is None."""

    best = BestBy("knn_accuracy", DECIDING)

    def __init__(self, method: Method, online: OnlineEvaluation | None, every: int) -> None:
        self._method, self._online, self.every = method, online, every

    def evaluate(self, epoch: int) -> dict[str, float]:
        if self._online is None:
            return {}
        found = self._online.evaluate(self._method.evaluated_backbone())
        if found and not epoch:
            found["knn_chance"] = self._online.chance
        return found

    def describe(self, found: dict[str, float]) -> str:
        return self._online.describe(found) if self._online else ""

    def fill_caches(self, progress: Callable[[int, int], None]) -> None:
        if self._online:
            self._online.fill_caches(progress)


def open_evaluation(
    cfg: RunConfig, method: Method, shards: ShardSet, ranks: Dist, dtype: torch.dtype, loader: Loader
) -> KNNEvaluation | None:
    """Return the evaluation during training, where it is asked for; it measures on the first rank.

    With data.cache ram it keeps its images in memory too, and the loader's note says so.

    Raises:
        UserError: there are no labels, a split is missing, or the images do not fit in memory.
    """
    if not cfg.knn.every:
        return None
    if not ranks.is_main:
        return KNNEvaluation(method, None, cfg.knn.every)
    if ranks.world > 1 and not cfg.knn.max_samples:
        warnings.warn(
            "knn.max_samples is 0 (all): every process waits while the first one evaluates.", stacklevel=2
        )
    online = OnlineEvaluation(
        cfg.knn, cfg.recipe, shards, ranks.device, dtype == torch.bfloat16, cfg.data.threads
    )
    if cfg.data.cache == "ram":
        notes = online.keep_in_memory(loader.samples, cfg.data.engine, cfg.data.cache_gb)
        loader.note = "\n".join([loader.note, *notes])
    return KNNEvaluation(method, online, cfg.knn.every)
