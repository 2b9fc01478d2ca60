"""Pretraining on several shard folders: resume, identity, and kNN on classes joined by name."""

from pathlib import Path

import pytest
from PIL import Image

from fastssl.core import checkpoint
from fastssl.evaluation.features import query_labels
from fastssl.pretraining.run import train
from shards import ShardSet, UserError, convert
from shards.dataset.mixed_set import MixedShardSet
from tests.fastssl.runs import assert_same_end, resolve, rows

# 6 steps an epoch, saved in its midst.
FEW = {"train": {"epochs": 2, "batch": 4, "keep_last": 9}}


def shades(root: Path, count: int, *names: str) -> str:
    for i in range(count):
        for name in names:
            path = root / "source" / name / f"{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 20 + i), name).save(path)
    convert(root / "source", root / "shards", workers=0)
    return str(root / "shards")


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """16 pictures in red and green, 8 in blue and red."""
    return [shades(tmp_path / "one", 8, "red", "green"), shades(tmp_path / "two", 4, "blue", "red")]


@pytest.mark.parametrize("weights", [[], [1, 2]])
def test_a_run_on_two_folders_resumes_in_the_midst_of_an_epoch(folders, tmp_path: Path, weights: list):
    mix = {"data": {"shards": folders, "weights": weights}}
    test = {"knn": {"test_shards": shades(tmp_path / "test", 3, "blue", "green"), "k": 3}}
    whole = train(resolve("", tmp_path / "whole", mix, test, FEW))
    assert whole.steps == 12
    found = [row["knn_accuracy"] for row in rows(tmp_path / "whole") if "knn_accuracy" in row]
    assert len(found) == 3  # before the first step and after each epoch
    train(resolve("", tmp_path / "cut", mix, test, FEW))
    for path in checkpoint.list_checkpoints(tmp_path / "cut")[1:]:
        path.unlink()
    [left] = checkpoint.list_checkpoints(tmp_path / "cut")
    assert checkpoint.load(left)["step"] == 3
    train(resolve("", tmp_path / "cut", mix, test, FEW), resume=True)
    assert_same_end(tmp_path / "cut", tmp_path / "whole")
    for other in ({"weights": [1, 3]}, {"shards": folders[::-1]}, {"shards": folders[0], "weights": []}):
        with pytest.raises(UserError, match="of another conversion or split"):
            train(resolve("", tmp_path / "cut", mix, test, FEW, {"data": other}), resume=True)


def test_labels_of_the_test_set_are_joined_by_name(folders, tmp_path: Path):
    mix = MixedShardSet([ShardSet.open(folder) for folder in folders])
    assert mix.classes == ["green", "red", "blue"]
    test = ShardSet.open(shades(tmp_path / "test", 2, "blue", "red"))
    assert [mix.classes[i] for i in query_labels(mix, test)] == [test.classes[i] for i in test.labels]
    other = ShardSet.open(shades(tmp_path / "other", 2, "blue", "gold"))
    with pytest.raises(UserError, match=r"has 1 class that .* does not have \('gold'\)"):
        query_labels(mix, other)
