"""Samples that turn bad after conversion."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.augment.recipe import Recipe
from pipelines.engines.fused_engine import FusedEngine
from pipelines.loading.evaluation_views import eval_batches
from pipelines.loading.loader import Batch, open_loader
from pipelines.streaming.bad_samples import ALLOWED, BadSamples
from shards.dataset.order import epoch_order
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError

SMALL = Recipe(size=16)


@pytest.fixture
def spoil(monkeypatch):
    """`spoil(ids)`: the samples with these ids are junk when they are read."""

    def now(ids):
        read = ShardSet.read
        junk = memoryview(b"junk" * 8)
        monkeypatch.setattr(ShardSet, "read", lambda self, i: junk if i in ids else read(self, i))

    return now


def collect(loader, epoch=0) -> list[Batch]:
    return [Batch([v.clone() for v in b.views], b.sample_ids, b.labels) for b in loader.epoch(epoch)]


def test_another_sample_stands_in_is_counted_and_named_once(shard_set, spoil):
    spoil({7})
    lines = []
    loader = open_loader(shard_set, SMALL, batch=41, seed=0, log=lines.append)
    clean = epoch_order(41, 0, 0).tolist()
    for epoch in range(3):
        [batch] = collect(loader, epoch)
        assert 7 not in batch.sample_ids
        assert np.count_nonzero(batch.sample_ids != epoch_order(41, 0, epoch)) == 1
        assert batch.labels.tolist() == shard_set.labels[batch.sample_ids].tolist()
        place, other = clean.index(7), batch.sample_ids
        if epoch == 0:
            twin = [i for i in np.flatnonzero(other == other[place]) if i != place]
            assert twin  # it has its regular place too, with other views
            assert not torch.equal(batch.views[0][place], batch.views[0][twin[0]])
    assert (loader.bad.samples, loader.bad.replaced) == (1, 3)
    [line] = lines
    assert "sample 7 of" in line
    assert "003.png" not in line
    assert str(shard_set.shard_path(7)) in line
    assert "Unsupported image file" in line


def test_the_stand_in_does_not_depend_on_batch_size_ranks_or_threads(shard_set, spoil):
    spoil({3, 7, 20})

    def run(**how):
        batches = collect(open_loader(shard_set, SMALL, seed=2, log=lambda line: None, **how))
        return np.concatenate([b.sample_ids for b in batches])[:40], torch.cat([b.views[1] for b in batches])[
            :40
        ]

    ids, views = run(batch=40, threads=1)
    for how in ({"batch": 8, "threads": 3}, {"batch": 20, "threads": 2}):
        other_ids, other_views = run(**how)
        assert ids.tolist() == other_ids.tolist()
        assert torch.equal(views, other_views)
    halves = [run(batch=40, rank=rank, world=2)[0] for rank in range(2)]
    assert np.concatenate(halves).tolist() == ids.tolist()


def test_a_stand_in_that_is_bad_itself_is_replaced_too(shard_set, spoil):
    bad = BadSamples(shard_set, SMALL, seed=0, max_share=0.5)
    first = bad.stand_in(0, 7, 0)[0]
    spoil({7, first})
    loader = open_loader(shard_set, SMALL, batch=41, seed=0, max_bad_share=0.5, log=lambda line: None)
    [batch] = collect(loader)
    assert not {7, first} & set(batch.sample_ids.tolist())
    assert loader.bad.samples == 2


def test_more_than_the_allowed_share_stops_the_run(shard_set, spoil):
    spoil(set(range(ALLOWED)))
    collect(
        open_loader(shard_set, SMALL, batch=41, seed=0, log=lambda line: None)
    )  # ten are no reason to stop
    spoil(set(range(ALLOWED + 1)))
    with pytest.raises(
        UserError,
        match=r"11 of the 41 samples read so far are bad.*max_bad_share \(0.001\).*the last: sample",
    ):
        collect(open_loader(shard_set, SMALL, batch=41, seed=0, log=lambda line: None))
    collect(open_loader(shard_set, SMALL, batch=41, seed=0, max_bad_share=0.5, log=lambda line: None))


def test_a_share_of_0_stops_at_the_first_one(shard_set, spoil):
    spoil({5})
    with pytest.raises(UserError, match=r"1 of the 41 samples"):
        collect(open_loader(shard_set, SMALL, batch=41, seed=0, max_bad_share=0))


def test_a_data_set_without_a_good_sample_ends(shard_set, spoil):
    spoil(set(range(41)))
    with pytest.raises(UserError, match=r"samples in a row in place of sample|are bad, more than"):
        collect(open_loader(shard_set, SMALL, batch=4, seed=0, max_bad_share=1, log=lambda line: None))


def test_by_default_a_warning_names_it(shard_set, spoil):
    spoil({7})
    with pytest.warns(
        UserWarning,
        match=r"stands in for a bad one: sample 7 of .* \(made from '[ab]/\d+.png'\) does not decode",
    ):
        collect(open_loader(shard_set, SMALL, batch=41, seed=0))


def test_evaluation_replaces_nothing(shard_set, spoil):
    spoil({7})
    with pytest.raises(UserError, match="sample 7 of"):
        list(eval_batches(shard_set, SMALL, np.arange(12)))


def copied(shard_set: ShardSet, to: Path) -> ShardSet:
    shutil.copytree(shard_set.folder, to)
    return ShardSet.open(to)


@pytest.mark.parametrize("fault", ["vanished", "cut short", "empty", "flipped"])
def test_a_shard_that_goes_bad_between_start_and_first_use(shard_set, tmp_path, fault):
    shards = copied(shard_set, tmp_path / "shards")
    path = shards.shard_path(40)  # the last shard, of 9 samples
    if fault == "vanished":
        path.unlink()
    elif fault in ("cut short", "empty"):
        with open(path, "r+b") as file:
            file.truncate(1000 if fault == "cut short" else 0)
    else:
        damaged = bytearray(path.read_bytes())
        for header in re.finditer(b"IHDR", bytes(damaged)):
            damaged[header.start() + 6] ^= 0x40  # the width
        path.write_bytes(bytes(damaged))
    lines = []
    loader = open_loader(shards, SMALL, batch=41, seed=0, log=lines.append)
    [batch] = collect(loader)
    assert max(batch.sample_ids) < 32
    assert loader.bad.samples == len(lines) == 9
    assert all(str(path) in line for line in lines)


def test_an_image_of_another_size_than_the_table_says_is_bad(shard_set):
    shard_set.widths[4] += 1
    try:
        loader = open_loader(shard_set, SMALL, batch=41, seed=0, log=lambda line: None)
        [batch] = collect(loader)
    finally:
        shard_set.widths[4] -= 1
    assert 4 not in batch.sample_ids


def test_an_error_of_our_own_is_no_bad_sample(shard_set, monkeypatch):
    monkeypatch.setattr(FusedEngine, "render", lambda self, *args: np.zeros(3)[7])
    with pytest.raises(IndexError):
        collect(open_loader(shard_set, SMALL, batch=8, seed=0))
