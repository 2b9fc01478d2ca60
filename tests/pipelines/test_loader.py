import threading

import numpy as np
import pytest
import torch

from pipelines.loader import Batch, Loader, eval_batches, open_loader
from pipelines.recipe import RECIPES, Recipe
from shards.errors import UserError
from shards.order import epoch_order
from shards.read import ShardSet

SMALL = Recipe(size=16)


def collect(loader: Loader, epoch: int, start_step: int = 0) -> list[Batch]:
    """The batches, copied: their buffers are used again."""
    return [
        Batch([view.clone() for view in batch.views], batch.sample_ids, batch.labels)
        for batch in loader.epoch(epoch, start_step)
    ]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_an_epoch_visits_the_global_order(shard_set):
    batches = collect(open_loader(shard_set, SMALL, batch=8, seed=3), epoch=2)
    assert len(batches) == 5
    assert np.concatenate([b.sample_ids for b in batches]).tolist() == epoch_order(41, 3, 2)[:40].tolist()
    for batch in batches:
        assert [tuple(view.shape) for view in batch.views] == [(8, 3, 16, 16)] * 2
        assert batch.views[0].dtype == torch.float32
        assert batch.labels.tolist() == shard_set.labels[batch.sample_ids].tolist()


@pytest.mark.parametrize("engine", ["fused", "reference"])
def test_threads_and_batch_size_change_nothing(shard_set, engine):
    def views(batch, threads):
        loader = open_loader(
            shard_set, RECIPES["satellite"], batch=batch, seed=1, threads=threads, engine=engine
        )
        return [torch.cat(parts) for parts in zip(*(b.views for b in collect(loader, 0)), strict=True)]

    base = views(batch=10, threads=1)
    assert same([v[:40] for v in base], [v[:40] for v in views(batch=20, threads=3)])
    assert same([v[:40] for v in base], [v[:40] for v in views(batch=4, threads=2)])


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_each_global_batch(shard_set, world):
    whole = collect(open_loader(shard_set, SMALL, batch=8, seed=5), 1)
    ranks = [
        collect(open_loader(shard_set, SMALL, batch=8, seed=5, rank=r, world=world), 1) for r in range(world)
    ]
    for step, batch in enumerate(whole):
        parts = [ranks[r][step] for r in range(world)]
        assert np.concatenate([p.sample_ids for p in parts]).tolist() == batch.sample_ids.tolist()
        for view in range(2):
            assert torch.equal(torch.cat([p.views[view] for p in parts]), batch.views[view])


def test_resuming_inside_an_epoch_gives_the_rest(shard_set):
    loader = open_loader(shard_set, SMALL, batch=8, seed=5)
    whole = collect(loader, 4)
    for start in range(6):
        rest = collect(loader, 4, start_step=start)
        assert len(rest) == 5 - start
        for a, b in zip(whole[start:], rest, strict=True):
            assert a.sample_ids.tolist() == b.sample_ids.tolist()
            assert same(a.views, b.views)


def test_views_are_those_of_the_reference(shard_set):
    fused = collect(open_loader(shard_set, SMALL, batch=8, seed=0, engine="fused"), 0)
    reference = collect(open_loader(shard_set, SMALL, batch=8, seed=0, engine="reference"), 0)
    for a, b in zip(fused, reference, strict=True):
        for x, y in zip(a.views, b.views, strict=True):
            assert (x - y).abs().mean() * 255 * 0.226 < 0.25


def test_closing_early_ends_all_threads(shard_set):
    before = threading.active_count()
    batches = open_loader(shard_set, SMALL, batch=4, seed=0, threads=3).epoch(0)
    next(batches)
    assert threading.active_count() > before
    batches.close()
    assert threading.active_count() == before


def test_too_few_samples_and_uneven_ranks_are_refused(shard_set):
    with pytest.raises(UserError, match="has 41 samples, fewer than one batch of 64"):
        open_loader(shard_set, SMALL, batch=64, seed=0)
    with pytest.raises(UserError, match=r"8.*3"):
        open_loader(shard_set, SMALL, batch=8, seed=0, rank=0, world=3)


def test_a_sample_that_no_longer_decodes_is_named(shard_set, monkeypatch):
    read = ShardSet.read
    monkeypatch.setattr(
        ShardSet, "read", lambda self, i: memoryview(b"junk" * 8) if i == 7 else read(self, i)
    )
    with pytest.raises(UserError, match=r"sample 7 of .* \(made from '[ab]/\d+.png'\) does not decode"):
        collect(open_loader(shard_set, SMALL, batch=41, seed=0), 0)


def test_evaluation_batches_come_in_the_asked_order(shard_set):
    ids = np.array([5, 40, 0, 12, 7])
    batches = [
        Batch([v.clone() for v in b.views], b.sample_ids, b.labels)
        for b in eval_batches(shard_set, SMALL, ids, batch=2)
    ]
    assert [b.sample_ids.tolist() for b in batches] == [[5, 40], [0, 12], [7]]
    one = next(eval_batches(shard_set, SMALL, np.array([12]), batch=1))
    assert torch.equal(one.views[0][0], batches[1].views[0][1])
