"""A continued run takes the samples in the order in which it began, and a new start in a used folder mixes with no dead run."""

from pathlib import Path

import pytest
import yaml

from fastssl.core import checkpoint
from fastssl.pretraining.run import train
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError
from shards.format.layout import MANIFEST, TABLE
from shards.storage.opening import open_place
from tests.fastssl.core.test_loggers import events
from tests.fastssl.runs import STEPS, TOTAL, newest, resolve, rows

ONE_EPOCH = {"train": {"epochs": 1}, "knn": {"every": 0}}


def _first_half(run: Path) -> None:
    """Leave the checkpoint in the middle of the first epoch alone."""
    for path in checkpoint.list_checkpoints(run)[1:]:
        path.unlink()
    assert 0 < newest(run)["step"] < STEPS


def test_a_run_on_remote_shards_keeps_their_order_on_a_local_copy(
    shards: Path, bucket: str, tmp_path: Path
) -> None:
    """The order `auto` is by blocks for remote shards and global for local ones: some images came twice, others never."""
    place, local = open_place(bucket), ShardSet.open(shards)
    for name in (*(shard.name for shard in local.manifest.shards), TABLE, MANIFEST):
        place.write(name, (shards / name).read_bytes())
    run, cache = tmp_path / "run", {"data": {"cache_dir": str(tmp_path / "cache")}}
    blocks = {"data": {"block_shards": 1}}
    train(resolve(bucket, run, ONE_EPOCH, cache, blocks))
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["order"] == "blocks"
    whole = newest(run)["method"]
    _first_half(run)
    for change, told in (
        (blocks, r"data.order = blocks, and this run has global: .*Add --data.order blocks, or"),
        (
            {"data": {"order": "blocks"}},
            r"data.block_shards = 1, and this run has 16: .*Add --data.block-shards 1, or",
        ),
        ({}, r"Add --data.order blocks --data.block-shards 1, or"),
    ):
        with pytest.raises(UserError, match=told):
            train(resolve(shards, run, ONE_EPOCH, change), resume=True)
    train(resolve(shards, run, ONE_EPOCH, blocks, {"data": {"order": "blocks"}}), resume=True)
    again = newest(run)["method"]
    assert all((again[name] == value).all() for name, value in whole.items())


def test_a_checkpoint_that_does_not_say_what_auto_meant_resumes_where_it_began(
    shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(resolve(shards, run, ONE_EPOCH))
    _first_half(run)
    [path] = checkpoint.list_checkpoints(run)
    state = checkpoint.load(path)
    assert state["config"]["data"]["order"] == "global"
    state["config"]["data"]["order"] = "auto"
    checkpoint.save(path, state)
    with pytest.raises(UserError, match=r"was made with data\.order = global, and this run has blocks"):
        train(resolve(shards, run, ONE_EPOCH, {"data": {"order": "blocks"}}), resume=True)
    # How many shards a block has says nothing of the global order.
    assert train(resolve(shards, run, ONE_EPOCH, {"data": {"block_shards": 2}}), resume=True).steps == STEPS


def test_a_resume_that_finds_nothing_says_so(
    shards: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    said = f"nothing to resume in '{run}': the run starts at its first step"
    train(resolve(shards, run, ONE_EPOCH), resume=True)
    assert said in capsys.readouterr().out.splitlines()
    train(resolve(shards, run, ONE_EPOCH), resume=True)
    train(resolve(shards, tmp_path / "other", ONE_EPOCH))
    assert "nothing to resume" not in capsys.readouterr().out


@pytest.mark.filterwarnings("default::DeprecationWarning")  # TensorBoard's own
def test_a_new_start_in_the_folder_of_a_dead_run_shows_its_own_curves_alone(
    shards: Path, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", {"log": {"tensorboard": True}, "train": {"log_every": 1}}
    train(resolve(shards, run, log))
    for path in checkpoint.list_checkpoints(run):
        path.unlink()
    assert [step for step, _ in events(run)["loss"]] == list(range(1, TOTAL + 1))
    train(resolve(shards, run, log, ONE_EPOCH, {"train": {"seed": 1}}))
    expected = [(row["step"], row["loss"]) for row in rows(run) if "loss" in row]
    assert len(expected) == STEPS
    found = events(run)
    assert [step for step, _ in found["loss"]] == [step for step, _ in expected]
    assert [v for _, v in found["loss"]] == pytest.approx([v for _, v in expected], rel=1e-5)
