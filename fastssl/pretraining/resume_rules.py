"""Which settings of a pretraining run may change when it continues."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastssl.models.model_config import check_architecture
from fastssl.pretraining.run_config import from_tree
from fastssl.training.resume import LOOP_SETTINGS, ResumeRules, check_data_set, check_settings
from pipelines.loading.data_config import DataConfig
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError

if TYPE_CHECKING:
    from fastssl.pretraining.run_config import Resolved, RunConfig

RULES = ResumeRules(
    fixed=(
        "recipe",
        "method",
        "train.batch",
        "train.seed",
        # They decide which state the optimizer holds, and for which weights.
        "optim.name",
        "model.stop_grad_conv1",
    ),
    free=(
        "data",
        "knn",
        "log",
        *LOOP_SETTINGS,
        "train.device",
        "train.max_skipped",
        "train.compile",
        "train.checkpointing",
    ),
)


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
    check_data_set(state["shards"], shards, where)
    # Parsed again, so that settings of an older version get their present names, and new settings their defaults.
    saved = from_tree(state["config"])
    check_same_order(saved.config.data, resolved.config.data, where)
    check_settings(saved.tree(), resolved.tree(), RULES, where)
    return saved.config
