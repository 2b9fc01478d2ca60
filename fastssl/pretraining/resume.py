"""Resume: check that a checkpoint belongs to the run that continues it."""

from __future__ import annotations

import hashlib
import warnings
from typing import TYPE_CHECKING, Any

from fastssl.models.model_config import check_architecture
from fastssl.pretraining.run_config import from_tree
from pipelines.loading.data_config import DataConfig
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError

if TYPE_CHECKING:
    from fastssl.pretraining.run_config import Resolved, RunConfig


def data_set_of(shards: ShardSet) -> dict[str, Any]:
    """Return the properties of a data set that must stay the same for a run to continue."""
    whole = {"num_samples": len(shards), "options_sha256": shards.manifest.options_sha256}
    # A split that was made again under its old name is a different one.
    part = {"ids_sha256": hashlib.sha256(shards.ids.tobytes()).hexdigest()} if shards.split else {}
    return whole | part


def check_same_order(before: DataConfig, now: DataConfig, where: str) -> None:
    """Raise UserError where the samples of an epoch would come in another order than so far: some twice, others never."""
    was, is_now = _meant(before), _meant(now)
    changed: list[tuple[str, str | int, str | int]] = [("order", was, is_now)]
    if "blocks" in (was, is_now):
        changed.append(("block_shards", before.block_shards, now.block_shards))
    flags = [f"--data.{name.replace('_', '-')} {old}" for name, old, new in changed if old != new]
    if flags:
        told = " and ".join(f"data.{name} = {old}" for name, old, new in changed if old != new)
        raise UserError(
            f"'{where}' was made with {told}, and this run has "
            f"{' and '.join(str(new) for _, old, new in changed if old != new)}: in another order an epoch takes some images twice "
            f"and others never. Add {' '.join(flags)}, or start a new run with another --train.out."
        )


def _meant(data: DataConfig) -> str:
    """Return what data.order means; a version that did not note it stored auto."""
    if data.order != "auto":
        return data.order
    folders = (data.shards,) if isinstance(data.shards, str) else data.shards
    return "blocks" if any("://" in f and not f.startswith("file://") for f in folders) else "global"


def check_same_run(
    state: dict[str, Any], resolved: Resolved, shards: ShardSet, shape: dict[str, Any], where: str
) -> RunConfig:
    """Raise UserError for the checkpoint of a different run; warn about settings that changed. Return the checkpoint's settings.

    The number of processes is not a setting: order and draws are functions of the global step, so a run may continue on any number
    that divides the batch, with the same samples. So it may with another train.micro_batch.
    """
    check_architecture(shape, state["architecture"], where)
    if state["shards"] != data_set_of(shards):
        raise UserError(
            f"'{where}' was trained on {state['shards']['num_samples']} samples of another conversion or split, '{shards.folder}' "
            f"has {len(shards)}: give the same shards, or start a new run with another --train.out."
        )
    # Parsed again, so that settings of an older version get their present names, and new settings their defaults.
    saved = from_tree(state["config"])
    check_same_order(saved.config.data, resolved.config.data, where)
    before, now = saved.tree(), resolved.tree()
    fixed = {("train", "batch"), ("train", "seed")}
    # They decide which state the optimizer holds, and for which weights.
    fixed |= {("optim", "name"), ("model", "stop_grad_conv1")}
    free = {
        ("train", k)
        for k in (
            "out",
            "device",
            # The trainer tells what it means.
            "epochs",
            "log_every",
            "save_every",
            "save_every_steps",
            "keep_last",
            "keep_every",
            "max_skipped",
            "compile",
            "checkpointing",
        )
    }
    for section, values in now.items():
        for key, value in values.items():
            old = before.get(section, {}).get(key)
            if old == value or section in ("data", "knn", "log") or (section, key) in free:
                continue
            if section in ("recipe", "method") or (section, key) in fixed:
                raise UserError(
                    f"'{where}' was made with {section}.{key} = {old} and this run has {value}: use the same to resume, or start a "
                    "new run with another --train.out."
                )
            warnings.warn(f"{section}.{key} was {old} so far and is {value} from now on.", stacklevel=3)
    return saved.config
