"""A run folder through the command line: in use, continued, changed, damaged, full."""

import errno
import os
import warnings
from pathlib import Path

import pytest
import torch

from fastssl.cli import main
from fastssl.core import checkpoint, optimizers, own_files
from fastssl.core.meters import MetricsLog
from shards.storage.atomic_files import lock_file
from tests.fastssl.runs import SAVE_STEPS, STEPS, TOTAL, assert_same_end, differences, newest, rows


@pytest.fixture
def stopped(config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that died after its second checkpoint."""
    save = checkpoint.save

    def save_and_die(path, state, *kept):
        save(path, state, *kept)
        if state["step"] == 2 * SAVE_STEPS:
            raise RuntimeError("killed")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", save_and_die)
        with pytest.raises(RuntimeError, match="killed"):
            main(["pretrain", str(config())])
    return tmp_path / "run"


def test_a_run_and_its_continuation(
    stopped: Path, config, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["pretrain", str(config()), "--resume"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert (
        f"moco_v3 resnet10_w32 on 60 images at 16 px: batch 8 on 1 x cpu, fp32, 3 epochs of {STEPS} steps"
        in out
    )
    assert f"resuming after step {2 * SAVE_STEPS} of {TOTAL}" in out
    assert "epoch 3/3  kNN accuracy" in out
    assert f"Done: {TOTAL} steps" in out
    assert f"Weights: {checkpoint.checkpoint_path(stopped, TOTAL)}" in out
    assert f"fastssl eval knn {stopped} --shards" in out
    assert torch.equal(newest(stopped)["rng"], newest(finished)["rng"])


def test_a_run_folder_in_use(stopped: Path, told, config) -> None:
    assert told("pretrain", config()) == (
        f"'{stopped}' already holds a run (step-000000006.pt): add --resume to continue it, or choose another --train.out."
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"train": {"batch": 10}},
            "was made with train.batch = 8 and this run has 10: use the same to resume, or start a new",
        ),
        ({"train": {"seed": 5}}, "train.seed = 0 and this run has 5"),
        ({"recipe": {"hue": 0.2}}, "recipe.hue = 0.1 and this run has 0.2"),
        ({"recipe": {"preset": "moco_v3"}}, "recipe.crop_scale = [0.2, 1.0] and this run has [0.08, 1.0]"),
        ({"method": {"temperature": 0.5}}, "method.temperature = 0.2 and this run has 0.5"),
        ({"optim": {"name": "lars"}}, "optim.name = sgd and this run has lars"),
        ({"model": {"stop_grad_conv1": False}}, "model.stop_grad_conv1 = True and this run has False"),
        (
            {"model": {"backbone": "resnet18"}},
            "another architecture: name is resnet10_w32 there and resnet18 here",
        ),
        ({"model": {"stem_stride": 1}}, "stem_stride is 2 there and 1 here"),
    ],
)
def test_a_run_continues_only_as_itself(changes: dict, expected: str, stopped: Path, told, config) -> None:
    sentence = told("pretrain", config(changes), "--resume")
    assert expected in sentence
    assert "step-000000006.pt" in sentence
    assert [row["step"] for row in rows(stopped)] == [0, 2, 4, 6]  # nothing was touched


def test_a_run_continues_only_on_its_shards(stopped: Path, told, config, unlabelled_shards: Path) -> None:
    sentence = told("pretrain", config({"knn": {"every": 0}}, data=unlabelled_shards), "--resume")
    assert (
        f"was trained on 60 samples of another conversion or split, '{unlabelled_shards}' has 20" in sentence
    )


def test_changes_are_told_in_a_line_each(stopped: Path, config, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert main(["pretrain", str(config({"optim": {"lr": 0.03}})), "--resume"]) == 0
    assert capsys.readouterr().err == "fastssl: note: optim.lr was 0.06 so far and is 0.03 from now on.\n"


def _cut(data: bytes) -> bytes:
    return data[:5000]


def _flip(data: bytes) -> bytes:
    """One bit of a weight; torch itself would not notice."""
    changed = bytearray(data)
    changed[len(data) // 2] ^= 4
    return bytes(changed)


@pytest.mark.parametrize("damage", [_cut, _flip])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    damage, stopped: Path, config, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = checkpoint.checkpoint_path(stopped, 2 * SAVE_STEPS)
    damaged = damage(last.read_bytes())
    last.write_bytes(damaged)
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert main(["pretrain", str(config()), "--resume"]) == 0
    out, err = capsys.readouterr()
    assert err == (
        f"fastssl: note: The checkpoint '{last}' is damaged: it was renamed to '{last.name}.damaged', and the run continues from "
        "'step-000000003.pt', the one before it.\n"
    )
    assert f"resuming after step {SAVE_STEPS} of {TOTAL}" in out
    assert last.with_name(f"{last.name}.damaged").read_bytes() == damaged
    assert_same_end(stopped, finished)


def test_the_best_weights_are_kept(finished: Path) -> None:
    accuracies = {
        row["step"]: row["knn_accuracy"] for row in rows(finished) if "knn_accuracy" in row and row["step"]
    }
    step = max(accuracies, key=lambda s: accuracies[s])  # the first of equals
    best = checkpoint.load(finished / "checkpoints" / "best.pt")
    assert best["step"] == step
    assert best["knn_accuracy"] == pytest.approx(accuracies[step], rel=1e-5)
    assert "optimizer" not in best
    if step == TOTAL:
        assert differences(best["method"], newest(finished)["method"]) == []


def test_rows_are_on_the_disk_before_the_checkpoint_that_follows_them(
    config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss of power must not leave a checkpoint without the rows before it."""
    done: list[str] = []
    flush, write = MetricsLog.flush, checkpoint.atomic_write
    monkeypatch.setattr(MetricsLog, "flush", lambda self: (flush(self), done.append("rows"))[0])
    monkeypatch.setattr(
        checkpoint,
        "atomic_write",
        lambda path, content: (write(path, content), done.append(Path(path).name))[0],
    )
    assert main(["pretrain", str(config({"train": {"epochs": 1}, "knn": {"every": 0}}))]) == 0
    assert done == ["rows", "step-000000003.pt", "rows", "step-000000006.pt", "rows", "step-000000007.pt"]


def test_where_all_checkpoints_are_damaged_nothing_is_touched(stopped: Path, told, config) -> None:
    for path in checkpoint.list_checkpoints(stopped):
        path.write_bytes(_cut(path.read_bytes()))
    first = checkpoint.checkpoint_path(stopped, SAVE_STEPS)
    assert told("pretrain", config(), "--resume") == (
        f"The checkpoint '{first}' is damaged and is the oldest of its run: remove it, and --resume starts from the beginning."
    )
    assert len(checkpoint.list_checkpoints(stopped)) == 2


def test_two_trainers_in_one_folder(stopped: Path, told, config) -> None:
    with lock_file(stopped / ".lock"):
        assert told("pretrain", config(), "--resume") == (
            f"Another trainer uses '{stopped}': wait for it or stop it, or choose another --train.out."
        )
    assert main(["pretrain", str(config()), "--resume"]) == 0


def test_a_full_disk(told, config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from shards.storage import atomic_files

    replace = os.replace

    def refuse(source, target):
        if Path(target).name == f"step-{2 * SAVE_STEPS:09d}.pt":
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(atomic_files.os, "replace", refuse)
    sentence = told("pretrain", config())
    assert sentence.startswith("The disk is full: '")
    assert "bytes are free. Make room there" in sentence
    assert newest(tmp_path / "run")["step"] == SAVE_STEPS


def test_a_run_folder_that_cannot_be_written(
    told, config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    for out, reason in (
        (tmp_path / "file", "Not a directory"),
        (tmp_path / "file" / "below", "Not a directory"),
    ):
        sentence = told("pretrain", config({"train": {"out": str(out)}}))
        assert sentence == f"The run folder '{out}' cannot be written ({reason}): choose another --train.out."

    # Root may write anywhere, so the refusal is the tests' own.
    def refuse(path, content):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(own_files, "atomic_write", refuse)
    assert "cannot be written (Permission denied)" in told("pretrain", config())


@pytest.mark.parametrize(
    ("changes", "flags", "words"),
    [
        ({"data": {"shards": "nowhere"}}, [], "There is no folder 'nowhere'"),
        ({"knn": {"shards": "nowhere"}}, [], "There is no folder 'nowhere'"),
        ({"data": {"cache": "ram", "cache_gb": 1e-9}}, [], "raise --data.cache-gb"),
        ({"model": {"backbone": "resnet500"}}, [], "resnet500"),
        ({}, ["--resume", "nowhere/run"], "There is no checkpoint at 'nowhere/run'"),
    ],
)
@pytest.mark.parametrize("is_new", [True, False])
def test_a_refused_run_leaves_nothing(
    changes: dict, flags: list, words: str, is_new: bool, told, config, tmp_path: Path
) -> None:
    out = tmp_path / "runs" / "photos"
    if not is_new:
        out.mkdir(parents=True)
    path = config(changes, {"train": {"out": str(out)}})
    before = sorted(tmp_path.rglob("*"))
    assert words in told("pretrain", path, *flags)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_loss_that_is_no_number(told, config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "scaled_lr", lambda cfg, batch: 1e30)
    sentence = told("pretrain", config({"optim": {"warmup_epochs": 0}}))
    assert "lower --optim.lr (now 0.06) or set --train.clip_grad" in sentence
    assert "keeps the earlier checkpoints" in sentence
