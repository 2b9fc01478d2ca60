"""Online evaluation: kNN and linear accuracy of the evaluated backbone while it trains, on labels that the training never sees."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from fastssl.core.nonfinite import count_unusable
from fastssl.evaluation.features import (
    backbone_encoder,
    check_labels,
    choose_voters,
    extract,
    labelled_ids,
    query_labels,
)
from fastssl.evaluation.knn import KNNConfig, classify, num_voters
from fastssl.evaluation.linear_probe import probe_accuracy
from pipelines.augment.recipe import Recipe
from pipelines.loading.evaluation_views import eval_cache
from pipelines.streaming.batch_stream import default_threads
from pipelines.streaming.cache import Samples, fill_ahead
from shards.dataset.shard_set import ShardSet
from shards.splits.split_table import open_split, reopen
from shards.units import plural


class OnlineEvaluation:
    """Evaluates a backbone on the same labelled samples each time. Made at the start of a run, so that mistakes show at once."""

    def __init__(
        self,
        cfg: KNNConfig,
        recipe: Recipe,
        training: ShardSet,
        device: torch.device,
        bf16: bool,
        threads: int = 0,
    ):
        self._probe = cfg.linear
        self._recipe, self._device, self._bf16, self._threads = recipe, device, bf16, threads
        near = training.near and training.near.settings

        def opened(where: str, split: str) -> ShardSet:
            return open_split(where, split, near) if where else reopen(training, split)

        self._bank = opened(cfg.shards, cfg.split) if cfg.shards or cfg.split else training
        test = cfg.test_shards or cfg.shards
        self._queries = opened(test, cfg.test_split) if cfg.test_shards or cfg.test_split else None
        self._bank_ids = labelled_ids(self._bank, cfg.max_samples)
        self._query_ids = labelled_ids(self._queries, cfg.max_samples) if self._queries else None
        for name, shards, ids in (
            ("shards", self._bank, self._bank_ids),
            ("test_shards", self._queries, self._query_ids),
        ):
            if shards is not None and ids is not None:
                check_labels(shards, ids, where=f"knn.{name}: ", otherwise=", or set --knn.every 0")
        if self._queries:
            self._query_labels = query_labels(self._bank, self._queries)
        self._samples: dict[ShardSet, Samples] = {}
        self._own: list[tuple[Samples, np.ndarray]] = []
        voters = choose_voters(self._bank, self._bank_ids, self._queries, self._query_ids)
        self._groups, self.what = voters.groups, voters.how
        count = len(self._bank_ids)
        self.k = min(cfg.k, count if self._queries else num_voters(count, self._groups))

    def keep_in_memory(self, training: Samples, engine: str, cache_gb: float) -> list[str]:
        """Keep the evaluated images in memory; return a line about each cache. Images that the training keeps are not kept twice.

        Args:
            training: the images of the training, kept in memory.
            engine: what decodes them.
            cache_gb: memory that all caches may fill, in 10^9 bytes; 0 means half of what is free.

        Raises:
            UserError: not even the encoded images fit beside those of the training.
        """
        taken, notes = training.num_bytes, []
        for shards, ids in ((self._bank, self._bank_ids), (self._queries, self._query_ids)):
            if shards is None or ids is None:
                continue
            kept = training.shards
            same = shards.folder == kept.folder and np.array_equal(shards.sizes, kept.sizes)
            if engine == "fused" and same and np.isin(ids, kept.ids).all():
                self._samples[shards] = training
                continue
            own = self._samples[shards] = eval_cache(shards, self._recipe, ids, cache_gb, taken)
            self._own.append((own, ids))
            taken += own.num_bytes
            notes.append(own.note)
        return notes

    def fill_caches(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Read, and decode, all that `keep_in_memory` keeps; `progress` takes the images that are held and their number."""
        for samples, ids in self._own:
            fill_ahead(samples, self._threads or default_threads(), progress, ids)

    @property
    def chance(self) -> float:
        """Return the accuracy, in [0, 1], of naming the voters' largest class for every sample that is classified."""
        voters = self._bank.labels[self._bank_ids]
        asked = self._query_labels[self._query_ids] if self._queries else voters
        return float((asked == np.bincount(voters).argmax()).mean())

    def evaluate(self, backbone: nn.Module) -> dict[str, float]:
        """Return accuracies in [0, 1] of the backbone as it is now: `knn_accuracy` and, if asked for, `linear_accuracy`.

        Nothing, with a warning, where features are not finite: an evaluation never ends a run.
        """

        def features(shards: ShardSet, ids, labels) -> tuple[Tensor, Tensor]:
            encode = backbone_encoder(backbone, self._device, self._bf16)
            found = extract(
                shards,
                self._recipe,
                ids,
                encode,
                device=self._device,
                threads=self._threads,
                samples=self._samples.get(shards),
            )
            return found, torch.from_numpy(labels[ids])

        bank = features(self._bank, self._bank_ids, self._bank.labels)
        queries = (None, None)
        if self._queries:
            queries = features(self._queries, self._query_ids, self._query_labels)
        if bad := sum(count_unusable(part[0]) for part in (bank, queries) if part[0] is not None):
            warnings.warn(
                f"The features of {plural(bad, 'evaluated image')} are not finite: no accuracy is measured, and best.pt stays as it "
                "is.",
                stacklevel=2,
            )
            return {}
        result = classify(
            *bank,
            *queries,
            num_classes=len(self._bank.classes),
            groups=self._groups,
            ks=(self.k,),
            device=self._device,
        )
        found = {"knn_accuracy": result.accuracy[self.k]}
        if self._probe:
            num_classes = len(self._bank.classes)
            found["linear_accuracy"] = probe_accuracy(
                *bank, *queries, num_classes, self._device, self._groups
            )
        return found

    def describe(self, found: dict[str, float]) -> str:
        """Return the accuracies as a line to print."""
        linear = f", linear {found['linear_accuracy']:.1%}" if "linear_accuracy" in found else ""
        return f"kNN accuracy {found['knn_accuracy']:.1%}{linear} (k = {self.k}, {self.what})"
