"""Runs in chunks: stopped and continued, with another number of chunks, on several processes."""

from pathlib import Path

import pytest
import torch

from fastssl.core.distributed import Dist, cleanup
from fastssl.core.meters import ProgressDisplay
from fastssl.pretraining.run import train
from fastssl.pretraining.run_config import from_tree
from tests.fastssl.pretraining.test_resume import Crash, crash_at, resume_after_crashes
from tests.fastssl.runs import BATCH, STEPS, TINY_VIT, assert_same_end, differences, newest, resolve, rows
from tests.gloo import _free_port, run_ranks
from tests.needs import HANGS_S

QUEUE = {"method": {"queue": 4 * BATCH}}
EXACT = {"train": {"micro_batch": 3, "exact_heads": True}}
FP16 = {"train": {"micro_batch": 3, "precision": "fp16"}}


@pytest.mark.parametrize("changes", [EXACT, FP16], ids=["exact heads", "fp16"])
def test_a_run_in_chunks_resumes_with_the_same_bits(changes: dict, shards: Path, tmp_path: Path) -> None:
    """With random depths, checkpointed activations and a queue that turns within the run."""
    train(resolve(shards, tmp_path / "expected", TINY_VIT, QUEUE, changes))
    resolved = resolve(shards, tmp_path / "run", TINY_VIT, QUEUE, changes)
    resume_after_crashes(resolved, (2, STEPS + 3))
    assert_same_end(tmp_path / "run", tmp_path / "expected")
    assert differences(newest(tmp_path / "run")["scaler"], newest(tmp_path / "expected")["scaler"]) == []
    assert int(newest(tmp_path / "run")["method"]["queue._extra_state"]) == 2 * STEPS * BATCH


def test_another_number_of_chunks_continues_a_run(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ViT with exact heads computes the same in any chunks, so the losses go on as they would have."""
    changes = {"model": {"drop_path": 0.0}, "train": {"log_every": 1, "clip_grad": 0.0}}
    train(resolve(shards, tmp_path / "expected", TINY_VIT, changes))
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, STEPS - 1)
        with pytest.raises(Crash):
            train(resolve(shards, tmp_path / "run", TINY_VIT, changes))
    said: list[str] = []
    monkeypatch.setattr(ProgressDisplay, "say", lambda self, text: said.append(text))
    with pytest.warns(UserWarning, match=r"train\.(micro_batch was 0|exact_heads was False)"):
        train(resolve(shards, tmp_path / "run", TINY_VIT, changes, EXACT), resume=True)
    told = "8 images a process in 3 chunks of at most 3, each against the whole batch: the gradient of"
    assert sum(told in line for line in said) == 1
    found, expected = rows(tmp_path / "run"), rows(tmp_path / "expected")
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for row, other in zip(found, expected, strict=True):
        assert ("loss" in row) == ("loss" in other)
        assert row.get("loss", 0) == pytest.approx(other.get("loss", 0), rel=2e-3)


def test_old_checkpoints_continue(shards: Path, tmp_path: Path) -> None:
    """A checkpoint from before there were chunks, queues and scalers lacks their settings and states."""
    resolved = resolve(shards, tmp_path / "run", {"knn": {"every": 0}})
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, 4)
        with pytest.raises(Crash):
            train(resolved)
    path = tmp_path / "run" / "checkpoints" / "step-000000003.pt"
    state = torch.load(path, weights_only=True)
    del state["scaler"], state["config"]["method"]["queue"]
    for name in ("micro_batch", "exact_heads", "checkpointing"):
        del state["config"]["train"][name]
    state["config"]["model"]["grad_checkpointing"] = False
    torch.save(state, path)
    assert from_tree(state["config"]).config.train.micro_batch == 0
    assert train(resolved, resume=True).steps == 3 * STEPS


def _train_rank(here: Dist, port: int, shards: str, out: str) -> tuple[int, dict]:
    """A rank of a run; 60 images make 3 steps of 18, and 6 images are left over."""
    cleanup()  # pretrain joins the group itself
    import os

    os.environ["MASTER_PORT"] = str(port)
    run = Path(out) / f"of rank {here.rank}"
    changes = {
        "train": {"epochs": 1, "batch": 18, "micro_batch": 4, "log_every": 1},
        "method": {"queue": 36},
        "knn": {"every": 0},
    }
    chunked = resolve(shards, run, TINY_VIT, changes, {"recipe": {"size": 32}})
    summary = train(chunked)
    return summary.steps, newest(Path(out) / "of rank 0")["method"] if here.is_main else {}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:PyTorch has no SyncBatchNorm on CPUs")
def test_three_processes_with_a_last_batch_left_over(shards: Path, tmp_path: Path) -> None:
    found = run_ranks(_train_rank, _free_port(), str(shards), str(tmp_path), world=3, timeout_s=HANGS_S)
    assert [steps for steps, _ in found] == [3, 3, 3]
    assert all(bool(value.isfinite().all()) for value in found[0][1].values())
    assert [row["step"] for row in rows(tmp_path / "of rank 0")] == [1, 2, 3, 3]
