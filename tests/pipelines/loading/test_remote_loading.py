"""Training and evaluation from shards in a store of the S3 protocol."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.augment.recipe import Recipe
from pipelines.loading.data_config import DataConfig
from pipelines.loading.evaluation_views import eval_batches
from pipelines.loading.loader import Batch, open_loader
from pipelines.streaming.shard_downloads import ShardPrefetch, ShardUses
from shards.conversion.convert import convert
from shards.dataset.order import block_order
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError
from shards.format.layout import MANIFEST, TABLE
from shards.storage.cache_settings import CacheSettings, held_files
from shards.storage.opening import open_place
from tests.pictures import photo
from tests.s3 import FaultProxy

SMALL = Recipe(size=16)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """36 pictures in 6 shards."""
    root = tmp_path_factory.mktemp("remote")
    for i in range(36):
        path = root / "source" / "ab"[i % 2] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(30, 24 + i % 7, seed=i).save(path)
    convert(root / "source", root / "shards", workers=0, samples_per_shard=6)
    return ShardSet.open(root / "shards")


@pytest.fixture
def url(local: ShardSet, bucket: str) -> str:
    place = open_place(bucket)
    for name in (*(shard.name for shard in local.manifest.shards), TABLE, MANIFEST):
        place.write(name, (Path(local.folder) / name).read_bytes())
    return bucket


def collect(batches) -> list[Batch]:
    return [Batch([v.clone() for v in b.views], b.sample_ids.copy(), b.labels.copy()) for b in batches]


def test_two_ranks_with_a_small_cache_see_the_views_of_local_shards(
    local: ShardSet, url: str, tmp_path: Path, proxy: FaultProxy
):
    largest = max(shard.bytes for shard in local.manifest.shards)
    config = DataConfig(
        shards=url, cache_dir=str(tmp_path / "c"), cache_bytes=str(4 * largest), block_shards=2
    )
    table_bytes = (Path(local.folder) / TABLE).stat().st_size
    most, done = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.01):
            most = max(most, sum(size for *_, size in held_files(tmp_path / "c")))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        there = []
        for rank in range(2):
            shards = config.open()
            loader = open_loader(shards, SMALL, batch=4, seed=1, rank=rank, world=2, options=config.options())
            there.append(collect(loader.steps(5, 13)))  # from one epoch into the next
        here = open_loader(local, SMALL, batch=4, seed=1, order="blocks", block_shards=2)
        for whole, one, two in zip(collect(here.steps(5, 13)), *there, strict=True):
            assert [*one.sample_ids, *two.sample_ids] == whole.sample_ids.tolist()
            assert torch.equal(torch.cat([one.views[1], two.views[1]]), whole.views[1])
    finally:
        done.set()
        watcher.join()
    assert table_bytes < largest
    assert 0 < most <= 4 * largest
    assert "the order is by blocks of 2 shards" in loader.note
    assert "--data.order global" not in loader.note
    assert loader.order(1).tolist() == block_order(np.full(6, 6), 1, 1, 2).tolist()


def test_what_does_not_fit_the_cache_is_refused(local: ShardSet, url: str, tmp_path: Path):
    total, largest = local.manifest.bytes, max(shard.bytes for shard in local.manifest.shards)
    small = ShardSet.open(url, CacheSettings(str(tmp_path), str(2 * largest)))
    with pytest.raises(UserError, match=r"data\.order global needs all shards near, but .* has .* of shards"):
        open_loader(small, SMALL, batch=4, seed=1, order="global")
    with pytest.raises(UserError, match=r"A block of 16 shards takes up to .*lower --data\.block-shards"):
        open_loader(small, SMALL, batch=4, seed=1)
    roomy = ShardSet.open(url, CacheSettings(str(tmp_path), str(2 * total)))
    loader = open_loader(roomy, SMALL, batch=4, seed=1, order="global")
    assert loader.order(3).tolist() == open_loader(local, SMALL, batch=4, seed=1).order(3).tolist()
    assert "--data.order global shuffles all" in open_loader(roomy, SMALL, batch=4, seed=1).note
    assert open_loader(local, SMALL, batch=4, seed=1).note == ""
    with pytest.raises(UserError, match="'many' is no number of bytes"):
        DataConfig(cache_bytes="many")


def test_a_shard_that_vanishes_from_the_store_is_stood_in_for(
    local: ShardSet, url: str, tmp_path: Path, proxy: FaultProxy
):
    shards = ShardSet.open(url, CacheSettings(str(tmp_path), "1GB"))
    open_place(url).remove("shard-000003.tar")
    lines = []
    loader = open_loader(shards, SMALL, batch=36, seed=1, log=lines.append)
    [batch] = collect(loader.epoch(0))
    assert not set(batch.sample_ids.tolist()) & set(range(18, 24))
    assert (loader.bad.samples, len(lines)) == (6, 6)
    assert all(f"'{url}/shard-000003.tar'" in line and "No such file" in line for line in lines)


def test_a_copy_gone_bad_on_this_machine_is_fetched_again(
    local: ShardSet, url: str, tmp_path: Path, proxy: FaultProxy
):
    shards = ShardSet.open(url, CacheSettings(str(tmp_path), "1GB"))
    wanted = collect(eval_batches(local, SMALL, np.arange(36), batch=7))
    for number, views in enumerate((wanted, wanted, wanted)):
        found = collect(eval_batches(shards, SMALL, np.arange(36), batch=7))
        assert all(torch.equal(a.views[0], b.views[0]) for a, b in zip(found, views, strict=True))
        if number == 0:
            [path] = tmp_path.glob("shard-000002-*.tar")
            with open(path, "r+b") as file:  # under the very map that is in use
                file.seek(int(shards._offset[12]))
                file.write(bytes(64))
    assert [proxy.requests("GET", f"shard-{i:06d}") for i in range(6)] == [1, 1, 2, 1, 1, 1]


def test_shards_are_asked_for_before_they_are_used():
    uses = ShardUses(np.array([4, 1, 4, 1, 7, 7, 1, 2]))
    assert (uses.shards.tolist(), uses.first.tolist(), uses.last.tolist()) == (
        [4, 1, 7, 2],
        [0, 1, 4, 7],
        [2, 6, 5, 7],
    )
    assert uses.wanted(0, 2, reach=1) == [4, 1, 7]
    assert uses.wanted(3, 4, reach=1) == [1, 7]
    assert uses.wanted(6, 8, reach=5) == [1, 2]


def test_the_next_epoch_is_asked_for_at_the_end_of_one(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shards = ShardSet.open(url, CacheSettings(str(tmp_path), "1GB"))
    asked = []
    monkeypatch.setattr(ShardSet, "prefetch", lambda self, numbers: asked.append(list(numbers)))
    ahead = ShardPrefetch(shards, reach=1)
    now, then = ahead.uses(np.arange(36)), ahead.uses(np.arange(36)[::-1])
    for start in range(0, 36, 6):
        ahead.at(now, start, start + 6, then if start > 20 else None)
    assert asked[0] == [0, 1, 2, 3, 4, 5]
    assert asked[-1] == [5, 4, 3, 2, 1, 0]
    asked.clear()
    ahead.at(now, 30, 36, then)
    assert asked == []  # nothing new
