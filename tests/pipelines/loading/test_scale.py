"""Large data sets and long runs: what the start costs and what stays in memory, counted in bytes, not in seconds."""

import dataclasses
import multiprocessing
import os
import subprocess
import sys
import tracemalloc
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines.augment.recipe import Recipe
from pipelines.loading.loader import open_loader
from shards.conversion.convert import convert
from shards.dataset.shard_set import ShardSet
from shards.format.layout import TABLE
from tests.pictures import photo

MANY = 1_000_000


def test_the_first_batch_of_a_million_samples_makes_no_object_per_sample(shard_set):
    """A table of a million rows that point at 41 images. A Python int per sample would be 28 MB, a dict entry more."""
    table = pq.read_table(shard_set.folder / TABLE)
    table = table.take(np.arange(MANY) % 41)
    manifest = dataclasses.replace(shard_set.manifest, num_samples=MANY)
    for _ in open_loader(shard_set, Recipe(size=16), batch=8, seed=0, threads=2).epoch(0):
        pass  # imports and compiled kernels are no matter of the number of samples
    tracemalloc.start()
    try:
        shards = ShardSet(shard_set.folder, manifest, table)
        loader = open_loader(shards, Recipe(size=16), batch=8, seed=0, threads=2)
        batches = loader.epoch(0)
        ids = next(batches).sample_ids
        peak = tracemalloc.get_traced_memory()[1]
        made = sum(stat.count for stat in tracemalloc.take_snapshot().statistics("filename"))
        batches.close()
    finally:
        tracemalloc.stop()
    assert ids.max() > 10_000
    assert made < 50_000
    assert peak < 150 * MANY  # some twelve columns and keys of eight bytes a sample


FIRST_BATCH = """
import sys
from pipelines.loading.loader import open_loader
from pipelines.augment.recipe import Recipe
from shards.splits.split_table import open_split
batches = open_loader(open_split(sys.argv[1]), Recipe(size=16), batch=8, seed=0, threads=2).epoch(0)
next(batches)
batches.close()
print(*sorted({"pandas", "pyarrow.dataset", "torchvision", "timm", "tyro"} & set(sys.modules)))
"""


def test_the_first_batch_waits_for_no_package_that_it_can_do_without(shard_set):
    """pandas and torchvision each took longer to import than a million rows take to read."""
    run = [sys.executable, "-c", FIRST_BATCH, str(shard_set.folder)]
    assert subprocess.check_output(run, cwd=Path(__file__).parents[3], text=True) == "\n"


def resident_bytes() -> int:
    """Memory of this process that lies in RAM."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memory_of_epochs(shards: str, epochs: int) -> list[int]:
    """Resident bytes after each epoch."""
    loader = open_loader(ShardSet.open(shards), Recipe(size=32), batch=4, seed=0, threads=2)
    after = []
    for epoch in range(epochs):
        for _ in loader.epoch(epoch):
            pass
        after.append(resident_bytes())
    return after


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_memory_stays_flat_over_epochs_of_mixed_sizes(tmp_path):
    for i in range(24):
        side = (40, 90, 300, 700)[i % 4]
        path = tmp_path / "source" / f"{i:03d}.jpg"
        path.parent.mkdir(exist_ok=True)
        photo(side + i, side, seed=i).save(path)
    convert(tmp_path / "source", tmp_path / "shards", workers=0)
    # In a process of its own: what other tests have left in this one (threads, caches) moves, too.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        after = process.submit(memory_of_epochs, str(tmp_path / "shards"), 9).result()
    # One decoded image of the largest size is 1.5 MB; a leak of each would be 35 MB an epoch.
    assert after[8] - after[3] < 8e6, after
