"""Features of a shard set, from a backbone or, as a baseline, from raw pixels."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.evaluation.knn import num_voters
from pipelines.augment.recipe import Recipe
from pipelines.loading.evaluation_views import eval_batches
from pipelines.streaming.cache import Samples
from shards.dataset.mixed_set import labels_by_name
from shards.dataset.order import epoch_order
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError
from shards.splits.sample_groups import sample_groups
from shards.units import plural

# Raw pixels are compared at this side at most: 3,072 numbers an image.
MAX_PIXEL_SIDE = 32


def labelled_ids(shards: ShardSet, limit: int = 0) -> np.ndarray:
    """Return ids of the labelled samples in use: int64, ascending, at most `limit` (0: all), chosen by a fixed permutation."""
    ids = shards.ids[shards.labels[shards.ids] >= 0]
    if limit and len(ids) > limit:
        ids = np.sort(ids[epoch_order(len(ids), seed=0, epoch=0)[:limit]])
    return ids


def check_labels(shards: ShardSet, ids: np.ndarray, *, where: str = "", otherwise: str = "") -> None:
    """Raise UserError unless there are two labelled samples; `where` begins the message, `otherwise` adds another way out."""
    if len(ids) < 2:
        part = f"the split '{shards.split}' of " if shards.split else ""
        raise UserError(
            f"{where}{part}'{shards.folder}' has {len(ids)} labelled samples, but kNN needs at least 2: convert a folder "
            f"whose sub-folders are classes{otherwise}."
        )


@dataclass(frozen=True)
class Voters:
    """Who votes for whom, beyond the labels; made before the first feature, so that what cannot be measured is told at once."""

    groups: Tensor | None
    """Numbers of the bank samples' groups, int64 (N,), where each is classified by those of other groups."""
    how: str
    """The same in words, for a report."""
    shared: int = 0
    """Queries of groups that vote, too."""


def choose_voters(
    bank: ShardSet, ids: np.ndarray, queries: ShardSet | None, query_ids: np.ndarray | None
) -> Voters:
    """Return who votes for whom: for queries of their own the bank, otherwise all other samples of other groups.

    Tiles of one scene know each other: where they vote for each other, a poor backbone is accurate. Warn where queries of their own
    are of groups that vote.

    Raises:
        UserError: all labelled samples are of one group.
    """
    groups = sample_groups(bank)
    if queries is None or query_ids is None:
        if groups is None:
            return Voters(None, f"leave one out of {len(ids):,} samples")
        numbers = torch.from_numpy(groups.numbers(ids))
        num_voters(len(ids), numbers)
        return Voters(numbers, f"leave one of {int(numbers.max()) + 1:,} groups out, {len(ids):,} samples")
    theirs = sample_groups(queries) if groups else None
    shared = theirs.num_shared(query_ids, groups, ids) if groups and theirs else 0
    how = f"{len(query_ids):,} test samples, {len(ids):,} vote"
    if shared:
        how += f"; {shared:,} are of groups that vote"
        warnings.warn(
            f"{shared:,} of {plural(len(query_ids), 'test sample')} are of groups, such as scenes, that vote too, so that the "
            "accuracy is too high for images of new groups: `fastssl split` keeps groups together.",
            stacklevel=2,
        )
    return Voters(None, how, shared)


def query_labels(bank: ShardSet, queries: ShardSet) -> np.ndarray:
    """Return the labels of all query samples as classes of the bank, joined by their names: int64 (num_samples,), -1 for none.

    Raises:
        UserError: the queries have a class that no voter has; they may lack some of the voters' classes.
    """
    unknown = [name for name in queries.classes if name not in set(bank.classes)]
    if unknown:
        shown = ", ".join(f"'{name}'" for name in unknown[:3]) + (", ..." if len(unknown) > 3 else "")
        raise UserError(
            f"'{queries.folder}' has {plural(len(unknown), 'class', 'classes')} that '{bank.folder}' does not have ({shown}): classes "
            "are matched by their names, and nobody votes for these. Rename them, or give voters that have them."
        )
    return labels_by_name(queries, bank.classes)


@torch.no_grad()
def extract(
    shards: ShardSet,
    recipe: Recipe,
    sample_ids: np.ndarray,
    encode: Callable[[Tensor], Tensor],
    *,
    device: torch.device | str = "cpu",
    batch: int = 256,
    threads: int = 0,
    progress: Callable[[int, int], None] | None = None,
    samples: Samples | None = None,
) -> Tensor:
    """Return features of the evaluation views of some samples: float32 (N, D) on the CPU, not normalised.

    `encode` maps normalised views (n, C, S, S) on `device` to (n, D); it is called with one batch at a time.
    `samples`: where the pixels come from, as for `eval_batches`.
    """
    found, done = None, 0
    options = {"threads": threads, "device": device, "reuse_memory": True, "samples": samples}
    for views in eval_batches(shards, recipe, sample_ids, batch=batch, **options):
        features = encode(views.views[0]).float().cpu()
        # Filled batch by batch: joining batches would need the memory twice.
        if found is None:
            found = features.new_empty(len(sample_ids), features.shape[1])
        found[done : done + len(features)] = features
        done += len(features)
        if progress:
            progress(done, len(sample_ids))
    assert found is not None, "callers refuse shards without labelled samples"
    return found


def backbone_encoder(
    backbone: nn.Module, device: torch.device | str, bf16: bool
) -> Callable[[Tensor], Tensor]:
    """Return an `encode` for `extract`: the backbone in evaluation mode, under bf16 autocast if asked."""
    kind = torch.device(device).type

    def encode(views: Tensor) -> Tensor:
        was_training = backbone.training
        backbone.eval()
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=bf16):
            features = backbone(views)
        backbone.train(was_training)
        return features

    return encode


def pixel_encoder(recipe: Recipe) -> Callable[[Tensor], Tensor]:
    """Return an `encode` for `extract` that gives the view's pixels in [0, 1], area-averaged to at most 32 x 32: a baseline."""
    side = min(recipe.size, MAX_PIXEL_SIDE)

    def encode(views: Tensor) -> Tensor:
        mean, std = (views.new_tensor(x)[:, None, None] for x in (recipe.mean, recipe.std))
        pixels = views * std + mean
        if side < recipe.size:
            pixels = F.interpolate(pixels, (side, side), mode="area")
        return pixels.flatten(1)

    return encode
