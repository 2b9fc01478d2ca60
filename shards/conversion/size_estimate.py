"""Estimate the disk space of a conversion from a few of its images."""

from __future__ import annotations

import shutil
from dataclasses import dataclass

from shards.conversion.shard_plan import Plan
from shards.images.pixels import BadImage
from shards.images.policy import Policy
from shards.images.proof import prove
from shards.sources.source import Source

NUM_TRIED = 16
_PER_SAMPLE_BYTES = 2048  # headers, padding, JSON


@dataclass(frozen=True)
class Estimate:
    """Bytes that the shards will take; `free` is what their disk has, None where nobody knows."""

    num_bytes: int
    free: int | None


def estimate(source: Source, plan: Plan, policy: Policy, todo: int) -> Estimate:
    """Convert the plan's first images on trial, and reckon with their average for the `todo` shards to be made."""
    sizes = []
    rows = plan.rows(plan.first_shard).slice(0, NUM_TRIED).to_pylist()
    for row, found in zip(rows, source.read_all(rows), strict=True):
        if isinstance(found, BadImage):
            continue
        try:
            stored = prove(found.image, row["source"], policy)
        except BadImage:
            continue
        sizes.append(len(stored.data) + _PER_SAMPLE_BYTES)
    num_images = min(plan.settings.num_images, todo * plan.settings.samples_per_shard)
    free = shutil.disk_usage(plan.place.local).free if plan.place.local else None
    return Estimate(round(num_images * sum(sizes) / max(len(sizes), 1)), free)
