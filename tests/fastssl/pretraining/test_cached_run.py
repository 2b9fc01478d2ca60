"""Runs whose images lie in memory: the same bits as others, also resumed, and told before and while the memory is filled."""

import os
from pathlib import Path

import pytest

from fastssl.core.distributed import Dist, cleanup
from fastssl.core.meters import ProgressDisplay
from fastssl.pretraining.run import train
from pipelines.streaming import cache
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError
from tests.fastssl.runs import NUM_IMAGES, TOTAL, assert_same_end, resolve
from tests.gloo import _free_port, run_ranks
from tests.needs import HANGS_S

RAM = {"data": {"cache": "ram"}}


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The ids of all samples that are read from their shards."""
    ids, read = [], ShardSet.read
    monkeypatch.setattr(ShardSet, "read", lambda self, i: (ids.append(i), read(self, i))[1])
    return ids


def test_a_run_from_memory_ends_with_the_same_bits_and_reads_each_image_once(
    shards: Path, tmp_path: Path, finished: Path, reads: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    train(resolve(shards, tmp_path / "run", RAM))
    # The kNN of each epoch looks at the same images, which are kept once.
    assert sorted(reads) == list(range(NUM_IMAGES))
    assert_same_end(tmp_path / "run", finished)
    said = capsys.readouterr().out
    assert f"cache in RAM: the {NUM_IMAGES} images are" in said
    assert said.index("cache in RAM") < said.index(f"filling the cache: {NUM_IMAGES} of {NUM_IMAGES}")
    assert said.index("filling the cache") < said.index("epoch 1/")


def test_evaluation_data_of_their_own_are_read_once_too(
    shards: Path,
    unlabelled_shards: Path,
    tmp_path: Path,
    reads: list[int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = {"knn": {"shards": str(shards), "max_samples": 20}}
    train(resolve(unlabelled_shards, tmp_path / "plain", own))
    reads.clear()
    train(resolve(unlabelled_shards, tmp_path / "run", own, RAM))
    assert len(reads) == ShardSet.open(unlabelled_shards).num_samples + 20
    assert_same_end(tmp_path / "run", tmp_path / "plain")
    said = capsys.readouterr().out
    assert "cache in RAM: the 20 images for evaluation are" in said
    assert "filling the evaluation's cache: 20 of 20" in said


def test_a_run_from_memory_is_resumed_by_one_without(shards: Path, tmp_path: Path, finished: Path) -> None:
    class Stopped(Exception):
        pass

    def stop(self: ProgressDisplay, step: int) -> None:
        if step == TOTAL // 2:
            raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProgressDisplay, "step", stop)
        with pytest.raises(Stopped):
            train(resolve(shards, tmp_path / "run", RAM))
    train(resolve(shards, tmp_path / "run"), resume=True)
    assert_same_end(tmp_path / "run", finished)


def test_evaluation_data_that_do_not_fit_beside_the_training_are_refused_before_anything_is_read(
    shards: Path, unlabelled_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[int]
) -> None:
    opened = ShardSet.open(unlabelled_shards)
    room = int(cache.decoded_sizes(opened, 3).sum()) + 10
    monkeypatch.setattr(cache, "free_memory", lambda: 2 * room)
    with pytest.raises(UserError, match=r"20 images for evaluation are .* allowed beside"):
        train(
            resolve(
                unlabelled_shards, tmp_path / "run", RAM, {"knn": {"shards": str(shards), "max_samples": 20}}
            )
        )
    assert reads == []


def run_rank(here: Dist, port: int, shards: Path, out: Path, changes: dict) -> tuple[int, str]:
    cleanup()  # the run joins the group itself
    os.environ |= {"MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(here.world)}
    seen, read = [], ShardSet.read
    ShardSet.read = lambda self, i: (seen.append(i), read(self, i))[1]
    summary = train(
        resolve(shards, out.with_name(f"{out.name}-{here.rank}"), {"train": {"out": str(out)}}, changes)
    )
    return len(seen), str(summary.checkpoint)


def test_two_ranks_read_each_image_once_and_end_with_the_same_bits(shards: Path, tmp_path: Path) -> None:
    plain = run_ranks(run_rank, _free_port(), shards, tmp_path / "plain", {}, timeout_s=HANGS_S)
    kept = run_ranks(run_rank, _free_port(), shards, tmp_path / "kept", RAM, timeout_s=HANGS_S)
    assert sum(count for count, _ in kept) == NUM_IMAGES < sum(count for count, _ in plain)
    assert_same_end(tmp_path / "kept", tmp_path / "plain")
