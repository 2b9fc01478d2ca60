"""`fastssl eval knn CHECKPOINT --shards LABELLED`: kNN accuracy of a checkpoint, beside the baselines it must beat."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from shards.errors import UserError, nearest
from shards.storage.atomic_files import atomic_write, check_output

TESTS = ("knn",)


@dataclass(frozen=True)
class EvalKNN:
    """Classify labelled images by their nearest neighbours in feature space (DINO's weighted kNN, T = 0.07).

    Beside the checkpoint's backbone stand raw pixels and the same backbone before training: what it learned is the difference.
    """

    checkpoint: Annotated[str, tyro.conf.Positional]
    """A .pt file, or the folder of a run (its newest checkpoint is taken)."""
    shards: str
    """Labelled shards whose samples vote."""
    test_shards: str = ""
    """Labelled shards to classify. Empty: each sample of --shards is classified by all the others (leave one out)."""
    split: str = ""
    """Split of --shards whose samples vote (`fastssl split`), such as train or labelled-0.01; empty: all."""
    test_split: str = ""
    """Split to classify, such as val: of --test-shards, or where that is empty of --shards."""
    ks: tuple[int, ...] = (10, 20, 100, 200)
    """Numbers of neighbours; clamped to the number there are."""
    max_samples: int = 0
    """Samples used of each shard set; 0 means all."""
    baselines: bool = True
    """Also measure raw pixels and the untrained backbone."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""
    json: str = ""
    """Also write the results to this JSON file."""


def run(argv: list[str]) -> int:
    """Run the command."""
    if argv and argv[0] in ("-h", "--help"):
        print(
            "usage: fastssl eval knn CHECKPOINT --shards LABELLED [options]     (fastssl eval knn --help explains them)"
        )
        return 0
    if not argv:
        raise UserError(
            "Give the test and what to test: fastssl eval knn CHECKPOINT --shards LABELLED (fastssl eval --help)."
        )
    if argv[0] not in TESTS:
        raise UserError(f"There is no test '{argv[0]}'.{nearest(argv[0], TESTS)}")
    args = tyro.cli(EvalKNN, prog="fastssl eval knn", args=argv[1:], config=(tyro.conf.FlagConversionOff,))
    if args.json:
        check_output(args.json, "--json")
    from rich.console import Console
    from rich.progress import Progress

    with Progress(transient=True) as bar:
        task = bar.add_task("")

        def progress(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        report = knn_report(
            args.checkpoint,
            args.shards,
            args.test_shards,
            split=args.split,
            test_split=args.test_split,
            ks=args.ks,
            max_samples=args.max_samples,
            baselines=args.baselines,
            device=args.device,
            progress=progress,
        )
    print_report(report, Console(highlight=False))
    if args.json:
        atomic_write(args.json, (json.dumps(report, indent=1) + "\n").encode())
    return 0


def knn_report(
    checkpoint: str | Path,
    bank: str | Path,
    test: str | Path = "",
    *,
    split: str = "",
    test_split: str = "",
    ks: tuple[int, ...] = (10, 20, 100, 200),
    max_samples: int = 0,
    baselines: bool = True,
    device: str = "auto",
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """kNN accuracies of a checkpoint and of its baselines, as plain values.

    `split` is the part of `bank` that votes; `test_split` the part of `test`, or where that is empty of `bank`, to classify.

    Returns:
        {"checkpoint", "step", "queries", "classes", "rows": [{"features", "accuracy": {k: share}, "per_class_k": k, "per_class":
        {class: share or None}}]}; `per_class` is at the k nearest to 20.

    Raises:
        UserError: no such device, no checkpoint, no labels, or different classes in the two shard sets.
    """
    import torch

    from fastssl.core import checkpoint as checkpoints
    from fastssl.core.distributed import choose_device
    from fastssl.evaluation.features import (
        backbone_encoder,
        check_labels,
        check_same_classes,
        extract,
        labelled_ids,
        pixel_encoder,
    )
    from fastssl.evaluation.knn import classify
    from fastssl.models.backbones import build_backbone
    from fastssl.models.model_config import architecture, check_architecture
    from fastssl.pretraining.build import use_bf16
    from fastssl.pretraining.run_config import from_tree
    from shards.splits.split_table import open_split

    if max_samples < 0:
        raise UserError(f"max_samples is {max_samples}, but it must be at least 0 (all).")
    place = choose_device(device)
    path = checkpoints.find_checkpoint(Path(checkpoint))
    state = checkpoints.load(path)
    cfg = from_tree(state["config"]).config
    bf16 = use_bf16(cfg.train.precision, place)

    torch.manual_seed(cfg.train.seed)
    untrained = build_backbone(cfg.model, cfg.recipe.size).to(
        place
    )  # the very weights that the run started from
    trained = build_backbone(cfg.model, cfg.recipe.size)
    check_architecture(architecture(trained, cfg.model), state["architecture"], str(path))
    prefix = "backbone."
    weights = {k.removeprefix(prefix): v for k, v in state["method"].items() if k.startswith(prefix)}
    checkpoints.load_weights(trained, weights, str(path))
    trained = trained.to(place)

    test = test or (bank if test_split else "")
    sets = [open_split(bank, split)] + ([open_split(test, test_split)] if test else [])
    ids = [labelled_ids(shards, max_samples) for shards in sets]
    for shards, found in zip(sets, ids, strict=True):
        check_labels(shards, found)
    check_same_classes(sets[0], sets[-1])
    classes = sets[0].classes
    labels = [torch.from_numpy(shards.labels[found]) for shards, found in zip(sets, ids, strict=True)]

    encoders = {
        f"{cfg.model.backbone}, pretrained {state['step']:,} steps": backbone_encoder(trained, place, bf16)
    }
    if baselines:
        encoders[f"{cfg.model.backbone}, untrained"] = backbone_encoder(untrained, place, bf16)
        encoders["raw pixels"] = pixel_encoder(cfg.recipe)
    rows = []
    for name, encode in encoders.items():
        features = []
        for shards, found in zip(sets, ids, strict=True):
            tell = (lambda done, total, name=name: progress(name, done, total)) if progress else None
            features.append(extract(shards, cfg.recipe, found, encode, device=place, progress=tell))
        queries = (features[1], labels[1]) if test else (None, None)
        result = classify(features[0], labels[0], *queries, num_classes=len(classes), ks=ks, device=place)
        near = min(result.accuracy, key=lambda k: abs(k - 20))
        shares = zip(classes, result.per_class[near].tolist(), strict=True)
        per_class = {c: None if math.isnan(share) else share for c, share in shares}
        rows.append(
            {"features": name, "accuracy": result.accuracy, "per_class_k": near, "per_class": per_class}
        )
    how = (
        f"{len(ids[1]):,} test samples, {len(ids[0]):,} vote"
        if test
        else f"leave one out of {len(ids[0]):,} samples"
    )
    return {"checkpoint": str(path), "step": state["step"], "queries": how, "classes": classes, "rows": rows}


def print_report(report: dict[str, Any], console: Any) -> None:
    """The results as two tables: by number of neighbours, and by class."""
    from rich.table import Table

    table = Table(title=f"kNN accuracy, {report['queries']}", title_justify="left")
    table.add_column("features")
    ks = list(report["rows"][0]["accuracy"])
    for k in ks:
        table.add_column(f"k = {k}", justify="right")
    for row in report["rows"]:
        table.add_row(row["features"], *(f"{row['accuracy'][k]:.1%}" for k in ks))
    console.print(table)

    shown = report["classes"][:30]
    by_class = Table(title=f"By class, k = {report['rows'][0]['per_class_k']}", title_justify="left")
    by_class.add_column("class")
    for row in report["rows"]:
        by_class.add_column(row["features"].split(", ")[-1], justify="right")
    for name in shown:
        shares = (row["per_class"][name] for row in report["rows"])
        by_class.add_row(name, *("-" if share is None else f"{share:.1%}" for share in shares))
    console.print(by_class)
    if len(shown) < len(report["classes"]):
        console.print(f"{len(report['classes']) - len(shown)} more classes are in --json.")
