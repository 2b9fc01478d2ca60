"""Which settings of a pretraining run may change when it continues."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastssl.models.model_config import check_architecture
from fastssl.pretraining.run_config import from_tree
from fastssl.training.resume import LOOP_SETTINGS, ResumeRules, check_data_set, check_settings
from shards.dataset.shard_set import ShardSet

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
    check_settings(saved.tree(), resolved.tree(), RULES, where)
    return saved.config
