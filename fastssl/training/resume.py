"""Resume: check that a checkpoint belongs to the run that continues it, and restore the optimizer."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from fastssl.core.optimizers import match_layout
from fastssl.training.loop_config import LoopConfig
from fastssl.training.trainer import Trainer
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError

# Of the loop's settings, epochs is the trainer's to tell: its schedules change with it.
LOOP_SETTINGS = tuple(f"train.{field.name}" for field in fields(LoopConfig))


@dataclass(frozen=True)
class ResumeRules:
    """Which settings a run may change when it continues: sections, or settings by full name. Others may change with a warning."""

    fixed: tuple[str, ...]
    """Those that must be the same."""
    free: tuple[str, ...] = LOOP_SETTINGS
    """Those that change nothing that was computed."""


def data_set_of(shards: ShardSet) -> dict[str, Any]:
    """Return the properties of a data set that must stay the same for a run to continue."""
    whole = {"num_samples": len(shards), "options_sha256": shards.manifest.options_sha256}
    # A split that was made again under its old name is a different one.
    part = {"ids_sha256": hashlib.sha256(shards.ids.tobytes()).hexdigest()} if shards.split else {}
    return whole | part


def check_data_set(saved: dict[str, Any], shards: ShardSet, where: str) -> None:
    """Raise UserError where a checkpoint's data set (`data_set_of`) is another; `where`: the checkpoint's path."""
    if saved != data_set_of(shards):
        raise UserError(
            f"'{where}' was trained on {saved['num_samples']} samples of another conversion or split, '{shards.folder}' "
            f"has {len(shards)}: give the same shards, or start a new run with another --train.out."
        )


def check_settings(
    before: Mapping[str, Mapping[str, Any]],
    now: Mapping[str, Mapping[str, Any]],
    rules: ResumeRules,
    where: str,
) -> None:
    """Raise UserError for a fixed setting that changed, and warn about others that are not free.

    Args:
        before: the checkpoint's configuration as plain nested values, section by section, with present names.
        now: that of the run which continues it.
        rules: what may change.
        where: the checkpoint's path.
    """
    for section, values in now.items():
        for key, value in values.items():
            name, old = f"{section}.{key}", before.get(section, {}).get(key)
            if old == value or not {section, name}.isdisjoint(rules.free):
                continue
            if not {section, name}.isdisjoint(rules.fixed):
                raise UserError(
                    f"'{where}' was made with {name} = {old} and this run has {value}: use the same to resume, or start a "
                    "new run with another --train.out."
                )
            warnings.warn(f"{name} was {old} so far and is {value} from now on.", stacklevel=4)


def check_length(trainer: Trainer, before: LoopConfig, now: LoopConfig, where: str) -> None:
    """Raise UserError where a restored trainer has done more steps than the run has; `where`: the checkpoint's path."""
    if trainer.done > trainer.total:
        raise UserError(
            f"'{where}' is {trainer.done} steps into its run, and train.epochs = {now.epochs} ends after {trainer.total}: set "
            f"--train.epochs {-(-trainer.done // trainer.steps_per_epoch)} or more (it was {before.epochs})."
        )


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Load an optimizer's saved state, but keep this run's settings.

    Those in the checkpoint, such as weight_decay, would silently undo a change.
    """
    own_groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": saved["state"], "param_groups": own_groups})
    match_layout(optimizer)
