"""Former names of settings, which older files and checkpoints have."""

from __future__ import annotations

from typing import Any

# The present name, and present values by former ones.
RENAMED: dict[str, tuple[str, dict[str, Any]]] = {
    "model.grad_checkpointing": ("train.checkpointing", {"true": "blocks", "false": "none"}),
    "train.keep": ("train.keep_last", {}),
}


def present_names(named: dict[str, Any]) -> dict[str, Any]:
    """Return settings by full name under their present names; where both names are given, the present one wins."""
    moved = {}
    for old, (new, values) in RENAMED.items():
        if old in named:
            moved[new] = values.get(str(named[old]).lower(), named[old])
    return {**moved, **{name: value for name, value in named.items() if name not in RENAMED}}
