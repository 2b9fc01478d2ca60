"""Time a process from its start to its first batch, stage by stage. Few imports at the top: their time counts."""

from __future__ import annotations

import os
import time
from typing import Any

STAGES = ("python", "imports", "table", "loader", "first batch")


def first_batch(
    began_s: float, folder: str, preset: str, size: int, batch: int, threads: int, engine: str
) -> dict[str, Any]:
    """Open shards, make their first batch of views, and return the time of each stage.

    Args:
        began_s: `time.monotonic` of the process that started this one, just before.

    Returns:
        `stages`: [seconds, CPU seconds of all threads] of each of `STAGES`; `peak_bytes`: the peak of memory. The next batches are
        begun meanwhile, as in training, and count in the CPU time.
    """
    laps = [_now()]
    import dataclasses

    from pipelines.augment.recipe import get_recipe
    from pipelines.loading.loader import open_loader
    from shards.dataset.shard_set import ShardSet

    laps.append(_now())
    shards = ShardSet.open(folder)
    laps.append(_now())
    recipe = dataclasses.replace(get_recipe(preset), size=size)
    loader = open_loader(
        shards, recipe, batch=batch, seed=0, threads=threads, engine=engine, reuse_memory=True
    )
    laps.append(_now())
    batches = loader.epoch(0)
    next(batches)
    laps.append(_now())
    batches.close()
    from fastssl.core.peak_memory import peak_bytes

    before = [(began_s, 0.0), *laps[:-1]]
    stages = {
        name: [end[0] - start[0], end[1] - start[1]]
        for name, start, end in zip(STAGES, before, laps, strict=True)
    }
    return {"stages": stages, "peak_bytes": peak_bytes()}


def _now() -> tuple[float, float]:
    times = os.times()
    return time.monotonic(), times.user + times.system
