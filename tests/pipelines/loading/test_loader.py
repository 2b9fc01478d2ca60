import contextlib
import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.augment.recipe import RECIPES, Recipe
from pipelines.loading.evaluation_views import eval_batches
from pipelines.loading.loader import Batch, Loader, open_loader
from shards.dataset.order import epoch_order
from shards.errors import UserError
from tests.needs import HANGS_S

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


def test_multi_crop_gives_views_of_two_sizes(shard_set):
    recipe = dataclasses.replace(RECIPES["dino"], size=24, local_size=8, local_views=3)
    fused, reference = (
        collect(open_loader(shard_set, recipe, batch=8, seed=3, engine=engine), 0)
        for engine in ("fused", "reference")
    )
    sides = [view.shape for view in fused[0].views]
    assert sides == [(8, 3, 24, 24)] * 2 + [(8, 3, 8, 8)] * 3
    for a, b in zip(fused, reference, strict=True):
        for x, y in zip(a.views, b.views, strict=True):
            assert (x - y).abs().mean() * 255 * 0.226 < 0.4
    again = collect(open_loader(shard_set, recipe, batch=8, seed=3, threads=3), 0, start_step=2)
    assert all(same(a.views, b.views) for a, b in zip(fused[2:], again, strict=True))


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


def test_evaluation_batches_come_in_the_asked_order(shard_set):
    ids = np.array([5, 40, 0, 12, 7])
    batches = [
        Batch([v.clone() for v in b.views], b.sample_ids, b.labels)
        for b in eval_batches(shard_set, SMALL, ids, batch=2)
    ]
    assert [b.sample_ids.tolist() for b in batches] == [[5, 40], [0, 12], [7]]
    one = next(eval_batches(shard_set, SMALL, np.array([12]), batch=1))
    assert torch.equal(one.views[0][0], batches[1].views[0][1])


def test_blocks_read_few_shards_at_a_time_and_every_sample_once(shard_set):
    loader = open_loader(shard_set, SMALL, batch=4, seed=1, order="blocks", block_shards=1)
    ids = np.concatenate([b.sample_ids for b in collect(loader, 0)])
    assert len(set(ids.tolist())) == 40
    shards_seen = [shard_set.shard_path(int(i)).name for i in ids]
    assert sum(a != b for a, b in itertools.pairwise(shards_seen)) == 2  # three shards, one after the other


def test_steps_go_on_over_the_end_of_an_epoch(shard_set):
    loader = open_loader(shard_set, SMALL, batch=8, seed=5)
    ids = [b.sample_ids.tolist() for b in loader.steps(3, 12)]
    assert ids == [
        b.sample_ids.tolist()
        for e, start, n in ((0, 3, 2), (1, 0, 5), (2, 0, 2))
        for b in collect(loader, e, start)[:n]
    ]


def test_an_error_of_the_caller_ends_all_threads(shard_set):
    before = threading.active_count()

    def train():
        with contextlib.closing(
            open_loader(shard_set, SMALL, batch=4, seed=0, threads=3).steps(0, 100)
        ) as batches:
            next(batches)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
    assert threading.active_count() == before


SIGNALLED = """
import os, signal, sys, threading, time
from pipelines.loading.loader import open_loader
from pipelines.engines.fused_engine import FusedEngine
from pipelines.augment.recipe import Recipe
from shards.dataset.shard_set import ShardSet
render = FusedEngine.render
def slow(self, *args):
    time.sleep(0.2)  # 41 samples in 2 threads: a batch takes 4 s, and two are always under way
    render(self, *args)
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the parent may have had it ignored
    batches = open_loader(ShardSet.open(sys.argv[1]), Recipe(size=16), batch=2, seed=0, threads=2).steps(0, 1000)
    next(batches)
    FusedEngine.render = slow
    next(batches)
    loader = open_loader(ShardSet.open(sys.argv[1]), Recipe(size=16), batch=41, seed=0, threads=2).steps(0, 9)
    print("ready", flush=True)
    next(loader)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_process_with_a_decode_under_way(shard_set, tmp_path, number):
    """Without the threads' own stop, the interpreter would first work off all that waits: 82 samples, 8 s."""
    (tmp_path / "run.py").write_text(SIGNALLED)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    with subprocess.Popen(
        [sys.executable, tmp_path / "run.py", str(shard_set.folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        _, err = process.communicate(timeout=HANGS_S)
    assert process.returncode == -number
    assert ("KeyboardInterrupt" in err) == (number == signal.SIGINT)
