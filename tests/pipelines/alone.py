"""A sample's views out of a batch, beside those that the same engine makes of it alone."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch

from pipelines.augment.draws import draw
from pipelines.augment.recipe import RECIPES
from pipelines.engines.engine_table import make_engine
from pipelines.loading.loader import open_loader
from shards.dataset.shard_set import ShardSet


def in_batch_and_alone(
    shard_set: ShardSet, name: str, batch: int
) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
    """Of every fifth sample of two batches: each view float32 (3, 24, 24), made in the batch and alone."""
    recipe = dataclasses.replace(RECIPES["satellite"], size=24)
    loader = open_loader(shard_set, recipe, batch=batch, seed=3, engine=name, threads=2)
    engine = make_engine(name, recipe)
    for made in loader.steps(0, 2):
        for i, sample_id in list(enumerate(made.sample_ids))[::5]:
            size = shard_set.widths[[sample_id]], shard_set.heights[[sample_id]]
            draws = draw(recipe, 3, 0, np.array([sample_id]), *size)[:, 0]
            alone = np.empty((2, 3, 24, 24), dtype=np.float32)
            engine(shard_set.read(int(sample_id)), draws, list(alone))
            yield from zip((view[i] for view in made.views), alone, strict=True)
