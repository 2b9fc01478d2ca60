"""What decides a loader's batches, and whether a saved position in one stream is a position in another."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from typing import Any

from pipelines.augment.recipe import Recipe
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError

# key of a state: what it is, and the way out where it differs
_FIXED = {
    "data_set": ("the data set", "give the same shards"),
    "samples": ("the number of samples", "give the same shards and split"),
    "split": ("the split", "give the same split"),
    "seed": ("the seed", "give the same seed"),
    "batch": ("the batch over all ranks", "give the same batch"),
    "block_shards": ("the shards in a block of the order (0: global)", "set order and block_shards as then"),
}


def describe_run(shards: ShardSet, recipe: Recipe, batch: int, seed: int, window: int) -> dict[str, Any]:
    """Return what the batches of a loader are a function of, beside the epoch and the step: numbers, words, and dicts of them."""
    # A split made anew under its old name is another one.
    ids = hashlib.sha256(shards.ids.tobytes()).hexdigest()[:16] if shards.split else ""
    return {
        "data_set": shards.manifest.options_sha256,
        "samples": len(shards),
        "split": f"{shards.split} {ids}".strip(),
        "seed": seed,
        "batch": batch,
        "block_shards": window,
        # Through JSON, as a state may have gone: tuples become lists.
        "recipe": json.loads(json.dumps(dataclasses.asdict(recipe))),
    }


def check_state(state: dict[str, Any], here: dict[str, Any]) -> None:
    """Check that a position in the stream that `state` describes is one in the stream described by `here`.

    Raises:
        UserError: the state lacks something, or its order, and so its next batches, are others; with both values. Another recipe
            changes the views and not the samples: that is a warning.
    """
    missing = [key for key in ("epoch", "step", *_FIXED) if key not in state]
    if missing:
        raise UserError(f"This is no state of a loader: it has no {', '.join(map(repr, missing))}.")
    for key, (what, way_out) in _FIXED.items():
        if state[key] != here[key]:
            raise UserError(
                f"The state is that of another stream of batches: {what} was {state[key]!r} and is {here[key]!r} here. To go on, "
                f"{way_out}; to begin anew, do not load the state."
            )
    before, now = json.loads(json.dumps(state.get("recipe", {}))), here["recipe"]
    changed = [f"{k} was {before.get(k)!r} and is {v!r}" for k, v in now.items() if before.get(k) != v]
    if changed:
        warnings.warn(f"The recipe is another than in the state: {'; '.join(changed)}.", stacklevel=3)
