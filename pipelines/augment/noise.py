"""Gaussian noise that every engine can repeat: a hash of (seed, pixel) looked up in a table of normal quantiles."""

from __future__ import annotations

from functools import cache
from statistics import NormalDist

import numpy as np

from shards.counter_hash import GAMMA, mix64

NOISE_LEVELS = 4096  # 16 KiB as float32: stays in a first-level cache


@cache
def noise_table() -> np.ndarray:
    """Return the quantiles of N(0, 1) at (i + 1/2) / 4096, scaled to a variance of exactly 1: float32 (4096,), read-only.

    They lie within +-3.7.
    """
    quantiles = np.array([NormalDist().inv_cdf((i + 0.5) / NOISE_LEVELS) for i in range(NOISE_LEVELS)])
    table = (quantiles / np.sqrt(np.mean(quantiles**2))).astype(np.float32)
    table.setflags(write=False)
    return table


def unit_noise(seed: int, count: int) -> np.ndarray:
    """Return the noise of a seed, in the order of a (C, H, W) view: float32 (count,), standard deviation 1.

    One 64-bit hash serves four elements, 16 bits each, of which the top 12 choose the quantile.
    """
    element = np.arange(count, dtype=np.uint64)
    word = mix64(np.uint64(seed) + (element >> np.uint64(2)) * GAMMA)
    index = (word >> (np.uint64(16) * (element & np.uint64(3)))) & np.uint64(0xFFFF)
    return noise_table()[(index >> np.uint64(4)).astype(np.int64)]
