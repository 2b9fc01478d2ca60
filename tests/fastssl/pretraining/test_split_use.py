"""Pretraining and kNN on the parts of one shard folder."""

import json
import shutil
from pathlib import Path

import pytest

from fastssl.cli import main
from fastssl.commands.evaluate_checkpoint import evaluate_knn
from fastssl.core import checkpoint
from fastssl.pretraining.run import train
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError
from shards.splits.split_rules import SplitRule
from shards.splits.split_table import open_split, split
from shards.storage.opening import open_place
from tests.fastssl.runs import resolve, rows


@pytest.fixture
def folder(shards: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "shards"
    shutil.copytree(shards, copy)
    split(open_place(copy), SplitRule(val=0.2, labelled=(0.25,)))
    return copy


def test_knn_between_the_parts_of_one_folder(finished: Path, folder: Path, shards: Path) -> None:
    train, few, val = (open_split(folder, name) for name in ("train", "labelled-0.25", "val"))
    options = {"ks": (1,), "baselines": False, "device": "cpu"}
    assert evaluate_knn(finished, train, val, **options)["queries"] == "12 test samples, 48 vote"
    assert evaluate_knn(finished, few, val, **options)["queries"] == "12 test samples, 12 vote"
    assert evaluate_knn(finished, val, **options)["queries"] == "leave one out of 12 samples"


def test_the_command_takes_the_names_of_splits(
    finished: Path, folder: Path, shards: Path, tmp_path: Path, told
) -> None:
    out = tmp_path / "knn.json"
    flags = ["--ks", "1", "--baselines", "False", "--device", "cpu", "--json", str(out)]
    for more, queries in (
        (["--split", "train", "--test-split", "val"], "12 test samples, 48 vote"),
        (["--split", "val"], "leave one out of 12 samples"),
    ):
        assert main(["eval", "knn", str(finished), "--shards", str(folder), *more, *flags]) == 0
        assert json.loads(out.read_text())["queries"] == queries
    assert "has no splits" in told("eval", "knn", finished, "--shards", shards, "--split", "train")


def test_pretraining_on_a_split_and_resuming_on_that_alone(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = ({"data": {"split": "train"}}, {"knn": {"test_split": "val"}}, {"train": {"batch": 12}})
    train(resolve(folder, run, *flags))
    [path] = checkpoint.list_checkpoints(run)[-1:]
    state = checkpoint.load(path)
    assert state["shards"]["num_samples"] == 48
    assert state["step"] == 4 * resolve(folder, run, *flags).config.train.epochs
    assert [row for row in rows(run) if "knn_accuracy" in row]
    split(open_place(folder), SplitRule(val=0.2, labelled=(0.25,), seed=1), overwrite=True)
    assert len(open_split(folder, "train")) == 48
    with pytest.raises(UserError, match="of another conversion or split"):
        train(resolve(folder, run, *flags), resume=True)


def test_a_split_that_is_not_there_is_one_sentence(folder: Path, told, finished: Path) -> None:
    said = told("eval", "knn", finished, "--shards", folder, "--split", "trian", "--device", "cpu")
    assert "has no split called 'trian'. Did you mean 'train'?" in said
    assert len(ShardSet.open(folder)) == 60
