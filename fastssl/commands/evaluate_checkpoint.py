"""`fastssl.evaluate_knn`: what a checkpoint has learned, for Python and for the command."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastssl.core import checkpoint as checkpoints
from fastssl.core.distributed import choose_device
from fastssl.evaluation.features import (
    backbone_encoder,
    check_labels,
    choose_voters,
    extract,
    labelled_ids,
    pixel_encoder,
    query_labels,
)
from fastssl.evaluation.knn import KS, classify
from fastssl.models.backbones import build_backbone
from fastssl.models.pretrained import model_config, restore_backbone
from fastssl.pretraining.build import use_bf16
from fastssl.pretraining.train_config import TrainConfig
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError

Shards = str | Path | ShardSet


def evaluate_knn(
    checkpoint: str | Path,
    shards: Shards,
    test_shards: Shards | None = None,
    *,
    ks: tuple[int, ...] = KS,
    max_samples: int = 0,
    baselines: bool = True,
    device: str = "auto",
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Return the kNN accuracies of a checkpoint and of the baselines that it must beat, as plain values.

        evaluate_knn("runs/photos", "labelled-shards")["rows"][0]["accuracy"][20]

    Args:
        checkpoint: a .pt file, or the folder of a run, whose newest checkpoint is taken.
        shards: labelled shards whose samples vote: a folder or URL, or a `ShardSet`, such as `open_split(folder, "train")`.
        test_shards: labelled shards to classify; None classifies each sample of `shards` by all the others (leave
            one out) or, where the shards know groups, such as scenes, by those of other groups; `queries` says which.
        ks: numbers of neighbours; each is clamped to the number there are.
        max_samples: samples used of each shard set; 0 for all.
        baselines: also measure raw pixels and the untrained backbone.
        device: auto (a GPU where there is one), cpu or cuda.
        progress: called with what is being measured, the samples done and their number.

    Returns:
        {"checkpoint", "step", "queries", "classes", "rows": [{"features", "accuracy": {k: share}, "per_class_k": k, "per_class":
        {class: share or None}}]}; shares lie in [0, 1], and `per_class` is at the k nearest to 20.

    Raises:
        UserError: no such device, no checkpoint, shards of other channels than the training's, no labels, labels of one group only, or
            different classes in the two shard sets.
    """
    if max_samples < 0:
        raise UserError(f"max_samples is {max_samples}, but it must be at least 0 (all).")
    place = choose_device(device)
    path = checkpoints.find_checkpoint(Path(checkpoint))
    state = checkpoints.load(path)
    trained, contract = restore_backbone(state, str(path))
    recipe, model, train = (
        contract.eval_recipe(),
        model_config(state["config"], str(path)),
        state["config"]["train"],
    )

    given = [shards] if test_shards is None else [shards, test_shards]
    sets = [found if isinstance(found, ShardSet) else ShardSet.open(found) for found in given]
    ids = [labelled_ids(found, max_samples) for found in sets]
    for found, used in zip(sets, ids, strict=True):
        check_labels(found, used)
        contract.check_shards(found)
    classes = sets[0].classes
    labels = [
        torch.from_numpy(query_labels(sets[0], found)[used]) for found, used in zip(sets, ids, strict=True)
    ]

    voters = choose_voters(sets[0], ids[0], *((sets[1], ids[1]) if len(sets) == 2 else (None, None)))

    bf16, name = use_bf16(train.get("precision", TrainConfig.precision), place), model.backbone
    encoders = {
        f"{name}, pretrained {state['step']:,} steps": backbone_encoder(trained.to(place), place, bf16)
    }
    if baselines:
        # The very weights that the run started from.
        torch.manual_seed(train.get("seed", TrainConfig.seed))
        untrained = build_backbone(model, contract.size)
        encoders[f"{name}, untrained"] = backbone_encoder(untrained.to(place), place, bf16)
        encoders["raw pixels"] = pixel_encoder(recipe)
    rows = []
    for what, encode in encoders.items():
        report = (lambda done, total, what=what: progress(what, done, total)) if progress else None
        features = [
            extract(found, recipe, used, encode, device=place, progress=report)
            for found, used in zip(sets, ids, strict=True)
        ]
        queries = (features[1], labels[1]) if len(sets) == 2 else (None, None)
        result = classify(
            features[0],
            labels[0],
            *queries,
            num_classes=len(classes),
            groups=voters.groups,
            ks=ks,
            device=place,
        )
        near = min(result.accuracy, key=lambda k: abs(k - 20))
        shares = zip(classes, result.per_class[near].tolist(), strict=True)
        per_class = {c: None if math.isnan(share) else share for c, share in shares}
        rows.append(
            {"features": what, "accuracy": result.accuracy, "per_class_k": near, "per_class": per_class}
        )
    return {
        "checkpoint": str(path),
        "step": state["step"],
        "queries": voters.how,
        "classes": classes,
        "rows": rows,
    }
