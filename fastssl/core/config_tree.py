"""A configuration as plain nested values: its settings by full name, and its YAML."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield full names and values: {'train': {'lr': 1}} -> ('train.lr', 1)."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def plain(value: Any) -> Any:
    """Return the value with lists in place of tuples, for YAML and JSON."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def to_yaml(tree: Mapping[str, Any]) -> str:
    """Return plain nested values as YAML, in their order."""
    return yaml.safe_dump(dict(tree), sort_keys=False, width=110)
