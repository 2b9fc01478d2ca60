"""Training on a part of the shards: order over its positions, draws by the ids of the whole folder."""

import itertools

import numpy as np
import pytest
import torch

from pipelines.augment.recipe import Recipe
from pipelines.loading.data_config import DataConfig
from pipelines.loading.loader import open_loader
from pipelines.streaming.bad_samples import BadSamples
from pipelines.streaming.cache import open_samples
from shards.dataset.order import epoch_order
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError
from shards.splits.split_rules import SplitRule
from shards.splits.split_table import split
from shards.storage.opening import open_place

SMALL = Recipe(size=16)


@pytest.fixture(scope="module")
def train(shard_set: ShardSet) -> ShardSet:
    split(open_place(shard_set.folder), SplitRule(val=0.4, seed=1), "parts", overwrite=True)
    return DataConfig(shards=str(shard_set.folder), split="parts/train").open()


def batches(shards: ShardSet, **options):
    loader = open_loader(shards, SMALL, batch=4, seed=3, **options)
    return [(b.sample_ids.copy(), [v.clone() for v in b.views]) for b in loader.epoch(0)]


def test_an_epoch_visits_the_split_in_the_order_of_its_positions(train: ShardSet) -> None:
    loader = open_loader(train, SMALL, batch=4, seed=3)
    assert len(train) == 25
    assert loader.steps_per_epoch == 6
    assert loader.order(2).tolist() == train.ids[epoch_order(25, 3, 2)].tolist()
    assert [i for ids, _ in batches(train) for i in ids] == loader.order(0)[:24].tolist()


def test_a_sample_has_the_views_that_it_has_without_a_split(shard_set: ShardSet, train: ShardSet) -> None:
    whole = {int(i): views for ids, both in batches(shard_set) for i, *views in zip(ids, *both, strict=True)}
    compared = 0
    for ids, both in batches(train):
        for i, *views in zip(ids, *both, strict=True):
            if int(i) in whole:
                compared += 1
                assert all(torch.equal(a, b) for a, b in zip(views, whole[int(i)], strict=True))
    assert compared > 20


def test_blocks_keep_to_the_split_and_take_shards_together(train: ShardSet) -> None:
    loader = open_loader(train, SMALL, batch=4, seed=3, order="blocks", block_shards=1)
    order = loader.order(0)
    assert sorted(order.tolist()) == train.ids.tolist()
    shards = (order // 16).tolist()  # 16 samples a shard
    assert sum(a != b for a, b in itertools.pairwise(shards)) == 2
    assert shards != sorted(shards) or order.tolist() != train.ids.tolist()


def test_stand_ins_come_from_the_split(train: ShardSet) -> None:
    bad = BadSamples(train, SMALL, seed=0, max_share=1)
    others = {bad.stand_in(epoch, 7, attempt)[0] for epoch in range(40) for attempt in range(5)}
    assert others == set(train.ids.tolist())


def test_a_cache_holds_the_split_alone(shard_set: ShardSet, train: ShardSet) -> None:
    pixels = int((shard_set.widths[train.ids].astype(int) * shard_set.heights[train.ids] * 3).sum())
    encoded = int(shard_set.sizes[train.ids].sum())
    assert encoded < pixels
    plain = batches(train)
    for fits, kind in ((pixels, "DecodedCache"), (encoded, "EncodedCache")):
        gb = (fits + 1) / 1e9
        samples = open_samples(train, lambda data: np.empty(0), 3, "ram", cache_gb=gb)
        assert type(samples).__name__ == kind
        assert "25 images" in samples.note
        cached = batches(train, cache="ram", cache_gb=gb)
        for (ids, views), (other_ids, other) in zip(cached, plain, strict=True):
            assert ids.tolist() == other_ids.tolist()
            assert all(torch.equal(a, b) for a, b in zip(views, other, strict=True))
    with pytest.raises(UserError, match="the 41 images are"):
        open_samples(shard_set, lambda data: np.empty(0), 3, "ram", cache_gb=(pixels + 1) / 1e9)


def test_a_batch_larger_than_the_split_names_it(train: ShardSet) -> None:
    with pytest.raises(
        UserError, match=r"the split 'parts/train' of .* has 25 samples, fewer than one batch of 32"
    ):
        open_loader(train, SMALL, batch=32, seed=0)
