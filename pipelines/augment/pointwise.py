"""The pointwise operations of the table, called by every engine between blur and solarise. They cost nothing where none is drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from pipelines.augment.operations import OPERATIONS, POINTWISE
from pipelines.kernel_cache import njit

if TYPE_CHECKING:
    from torch import Tensor


_SWITCHES = [(name, OPERATIONS[name].switch) for name in POINTWISE]


def drawn(draw: np.void) -> list[str]:
    """Return the names of the pointwise operations that a DRAW record asks for, in their order."""
    return [name for name, switch in _SWITCHES if draw[switch] > 0]


def apply(names: list[str], view: np.ndarray, draw: np.void) -> None:
    """Apply operations to a view, uint8 or float32 (C, S, S), in place, without the GIL."""
    for name in names:
        compiled(name)(view, draw)


@cache
def compiled(name: str) -> Callable[[np.ndarray, np.void], None]:
    """Return an operation's kernel, compiled by itself: a new operation is one file, and no other kernel changes."""
    return njit(nogil=True, cache=True)(POINTWISE[name].kernel)


def apply_batched(views: Tensor, drawn_fields: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
    """Apply the operations of `Params.pointwise` to views (M, C, S, S), in place; return `views`."""
    for name, fields in drawn_fields.items():
        POINTWISE[name].batched(views, fields)
    return views


def drawn_fields(draws: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
    """Return the fields of the operations that some of DRAW records (M,) ask for, by operation, as `Pointwise.batched` takes them."""
    asked = [name for name, switch in _SWITCHES if (draws[switch] > 0).any()]
    return {name: {field: _plain(draws[field]) for field in OPERATIONS[name].fields} for name in asked}


def _plain(values: np.ndarray) -> np.ndarray:
    """Return numbers in a type that torch computes with everywhere: float32, or int64 with the bits of uint64."""
    if values.dtype.kind == "f":
        return values.astype(np.float32)
    return values.astype(np.uint64).view(np.int64) if values.dtype.kind == "u" else values.astype(np.int64)
