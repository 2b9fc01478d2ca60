"""The random draws of stochastic depth, as a function of the step."""

from __future__ import annotations

from collections.abc import Callable

import torch

from shards.counter_hash import hash_key


def depth_draws(seed: int, step: int, rank: int) -> Callable[[int], None]:
    """Return what seeds the random depths of a chunk: a function of the step and the rank, so that there is no state to save."""

    def draw(chunk: int) -> None:
        parts = (seed, step, rank, chunk) if chunk else (seed, step, rank)
        torch.manual_seed(int(hash_key(*parts)) >> 1)

    return draw
