"""`fastssl.load_backbone`: the backbone of a checkpoint, ready for use, with its contract."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastssl.core import checkpoint
from fastssl.core.distributed import choose_device
from fastssl.core.former_names import present_names
from fastssl.models.backbones import build_backbone
from fastssl.models.contract import Contract, contract_of
from fastssl.models.moco_vit import heads_entries
from fastssl.models.model_config import ModelConfig, architecture, check_architecture
from shards.errors import UserError


def load_backbone(source: str | Path, *, device: str = "cpu") -> nn.Module:
    """Return the backbone of a checkpoint in evaluation mode, with its `fastssl.models.contract.Contract` as attribute `contract`.

        backbone = load_backbone("runs/photos")
        print(backbone.contract)
        features = backbone(backbone.contract.normalize(pixels))

    It maps float views (N, channels, size, size), made as the contract says, to features (N, num_features). It is the branch that the
    method names as evaluated, with parameters that do not require gradients; `requires_grad_(True)` and `train()` make it trainable.

    Args:
        source: a .pt file, or the folder of a run, whose newest checkpoint is taken.
        device: cpu, cuda, or auto (a GPU where there is one).

    Raises:
        UserError: no such device; no checkpoint; or weights that do not fit the backbone that this version builds.
    """
    place = choose_device(device)
    path = checkpoint.find_checkpoint(Path(source))
    backbone, _ = restore_backbone(checkpoint.load(path), str(path))
    return backbone.to(place)


def restore_backbone(state: dict[str, Any], where: str) -> tuple[nn.Module, Contract]:
    """Return the same and its contract from a checkpoint's content, on the CPU; `where` names the checkpoint in errors."""
    lacking = [name for name in ("config", "architecture", "shards", "step", "method") if name not in state]
    if lacking:
        raise UserError(
            f"'{where}' holds no backbone: it lacks the entry '{lacking[0]}'. Give a checkpoint that `fastssl pretrain` saved."
        )
    contract = contract_of(state)
    cfg = model_config(state["config"], where)
    # Initial values are drawn and then overwritten: the caller's random numbers stay what they would have been.
    with torch.random.fork_rng(devices=[]):
        backbone = build_backbone(cfg, contract.size)
    check_architecture(architecture(backbone, cfg), state["architecture"], where)
    prefix = f"{contract.evaluated}."
    weights = {k.removeprefix(prefix): v for k, v in state["method"].items() if k.startswith(prefix)}
    for name in heads_entries(backbone):
        # Compared with the architecture already; older checkpoints do not have it.
        weights.pop(name, None)
    checkpoint.load_weights(backbone, weights, where)
    backbone.contract = contract  # pyright: ignore[reportArgumentType]
    return backbone.requires_grad_(False).eval(), contract


def model_config(config: dict[str, Any], where: str) -> ModelConfig:
    """Return the section `model` of a checkpoint's configuration: the method, which may be a module of its own, need not be there.

    Raises:
        UserError: a setting that this version does not know; `where` names the checkpoint in it.
    """
    named = present_names({f"model.{name}": value for name, value in config["model"].items()})
    values = {
        name.removeprefix("model."): value for name, value in named.items() if name.startswith("model.")
    }
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    for name in values:
        if name not in known:
            raise UserError(
                f"'{where}' was made with model.{name}, which this fastssl does not know: update fastssl."
            )
    return ModelConfig(**values)
