"""What only a CUDA device shows of the views: the batched kernels on it against the same on the CPU, and the stream around them."""

import numpy as np
import pytest
import torch

from pipelines.loader import open_loader
from pipelines.recipe import RECIPES, Recipe

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("preset", ["moco_v3", "satellite"])
@pytest.mark.parametrize("cache", ["none", "ram", "gpu"])
def test_views_made_on_a_gpu_are_near_the_cpus(shard_set, preset, cache):
    recipe = Recipe(**{**vars(RECIPES[preset]), "size": 32, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)})
    on_cpu = open_loader(shard_set, recipe, batch=8, seed=0)
    on_gpu = open_loader(shard_set, recipe, batch=8, seed=0, device="cuda", augment_on="gpu", cache=cache)
    for epoch in range(3):
        for a, b in zip(on_cpu.epoch(epoch), on_gpu.epoch(epoch), strict=True):
            assert a.sample_ids.tolist() == b.sample_ids.tolist()
            for expected, view in zip(a.views, b.views, strict=True):
                assert view.device.type == "cuda"
                assert (view.cpu() - expected).abs().mean() * 255 < 1.0


def test_views_made_on_a_gpu_outlive_the_next_batches(shard_set):
    loader = open_loader(shard_set, Recipe(size=24), batch=4, seed=1, device="cuda", augment_on="gpu")
    kept = [(batch.views[0], batch.views[0].clone()) for batch in loader.epoch(0)]
    for view, copy in kept:
        torch.testing.assert_close(view, copy, rtol=0, atol=0)


def test_launching_does_not_wait_for_the_gpu(shard_set):
    loader = open_loader(shard_set, Recipe(size=24), batch=8, seed=1, device="cuda", augment_on="gpu")
    list(loader.epoch(0))  # warm
    batches = loader.epoch(1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ids = np.concatenate([batch.sample_ids for batch in batches])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(ids) == 40
