"""Shards of small pictures for the tests of `pipelines`."""

from pathlib import Path

import pytest

from shards.conversion.convert import convert
from shards.dataset.shard_set import ShardSet
from tests.pictures import photo


@pytest.fixture(scope="session")
def shard_set(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """41 pictures of different sizes in classes a and b, in shards of 16."""
    root: Path = tmp_path_factory.mktemp("pictures")
    for i in range(41):
        path = root / "source" / "ab"[i % 2] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(30 + i, 24 + i % 7, seed=i).save(path)
    convert(root / "source", root / "shards", workers=0, samples_per_shard=16)
    return ShardSet.open(root / "shards")
