"""Trees of tensors whose first dimension is the sample: what methods pass from backbones to losses, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Return the tree with `function` applied to each tensor."""
    return tree_map_only(torch.Tensor, function, tree)


def tensors_of(tree: Any) -> list[Tensor]:
    """Return the tensors of a tree in order."""
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def join_rows(trees: Sequence[Any]) -> Any:
    """Return one tree whose tensors are those of the given trees, one chunk's rows after the other's."""
    if len(trees) == 1:
        return trees[0]
    columns = iter([torch.cat(parts) for parts in zip(*map(tensors_of, trees), strict=True)])
    return map_tensors(lambda _: next(columns), trees[0])
