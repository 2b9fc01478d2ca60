"""Runs of a few seconds: their configuration, and what must be equal in two of them."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import torch
import yaml

from fastssl.core import checkpoint
from fastssl.pretraining.run_config import Resolved, load

NUM_IMAGES, BATCH, EPOCHS = 60, 8, 3
STEPS = NUM_IMAGES // BATCH  # an epoch
TOTAL = STEPS * EPOCHS
SAVE_STEPS = 3
# Rates, times and memory are the machine's, all else is the run's.
TIMES = ("images_per_s", "data_wait", "peak_memory_bytes", "peak_gpu_memory_bytes")

TINY: dict[str, Any] = {
    "data": {"threads": 1},
    "recipe": {"preset": "moco_v3_resnet", "size": 16},
    "model": {"backbone": "resnet10_w32", "stem_stride": 2},
    "method": {"name": "moco_v3", "hidden_dim": 64, "dim": 32},
    "optim": {"name": "sgd", "lr": 0.06, "weight_decay": 5e-4, "warmup_epochs": 1},
    # Rows are means of 2 steps and checkpoints come every 3, so some lie within a row's window.
    "train": {
        "epochs": EPOCHS,
        "batch": BATCH,
        "device": "cpu",
        "precision": "fp32",
        "log_every": 2,
        "save_every_steps": SAVE_STEPS,
    },
    "knn": {"every": 1, "k": 5},
}
# Random depths, so that the state of the random generator matters, and every other switch that acts on the gradient.
TINY_VIT: dict[str, Any] = {
    "recipe": {"preset": "moco_v3", "size": 32},
    "model": {"backbone": "test_vit", "stem_stride": 4, "drop_path": 0.3},
    "optim": {"name": "adamw", "lr": 1e-3, "weight_decay": 0.1, "warmup_epochs": 1},
    "train": {"clip_grad": 1.0, "epochs": 2, "checkpointing": "blocks"},
    "knn": {"every": 0},
}


def tiny(shards: Path | str, out: Path, *changes: dict[str, Any]) -> dict[str, Any]:
    """The tiny configuration as YAML holds it, with sections of `changes` laid over it in order."""
    tree = copy.deepcopy(TINY)
    for change in ({"data": {"shards": str(shards)}, "train": {"out": str(out)}}, *changes):
        for section, values in change.items():
            tree.setdefault(section, {}).update(values)
    return tree


def write_yaml(path: Path, tree: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(tree))
    return path


def resolve(shards: Path | str, out: Path, *changes: dict[str, Any]) -> Resolved:
    """As `tiny`, read by `fastssl.pretraining.run_config.load`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    return load(write_yaml(out.parent / f"{out.name}.yaml", tiny(shards, out, *changes)))


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def timeless(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows(run)]


def newest(run: Path) -> dict[str, Any]:
    return checkpoint.load(checkpoint.list_checkpoints(run)[-1])


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """The places at which two nested values differ in a single bit."""
    if isinstance(one, torch.Tensor):
        same = isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
        return [] if same else [where]
    if type(one) is not type(other):
        return [where]
    if isinstance(one, dict):
        if list(one) != list(other):
            return [f"{where}: keys"]
        return [d for key in one for d in differences(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, (list, tuple)):
        if len(one) != len(other):
            return [f"{where}: length"]
        pairs = enumerate(zip(one, other, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, f"{where}/{i}")]
    return [] if one == other or (one != one and other != other) else [where]


def assert_same_end(run: Path, expected: Path) -> None:
    """Both runs ended with the same bits: weights, optimiser, random generator, meters, and each row of metrics."""
    found, wanted = newest(run), newest(expected)
    assert found["step"] == wanted["step"]
    for part in ("method", "optimizer", "rng", "meters", "architecture", "shards"):
        assert differences(found[part], wanted[part], part) == []
    assert timeless(run) == timeless(expected)
    assert all(math.isfinite(v) for row in rows(run) for v in row.values())


# Flags of `fastssl bench CONFIG` at tiny size; the last four are the ladder's own, the others settings.
LADDER_STEP = (
    *(
        "--model.backbone",
        "resnet10_w32",
        "--recipe.size",
        "16",
        "--method.hidden_dim",
        "8",
        "--method.dim",
        "4",
    ),
    *("--train.batch", "4", "--train.device", "cpu", "--steps", "2", "--repeats", "1"),
)
