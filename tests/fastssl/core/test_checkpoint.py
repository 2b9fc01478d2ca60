"""Checkpoints: whole or absent, plain, and refused where they do not fit."""

import errno
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from fastssl.core import checkpoint
from fastssl.core.checkpoint import (
    checkpoint_path,
    find_checkpoint,
    list_checkpoints,
    load,
    load_weights,
    save,
)
from fastssl.pretraining.run import train
from shards.errors import UserError
from shards.storage import atomic_files
from tests.fastssl.runs import SAVE_STEPS, differences, newest, resolve

STATE = {
    "step": 3,
    "method": {"w": torch.arange(4.0)},
    "config": {"train": {"lr": 1e-3, "out": "x", "b": [1, 2]}},
}


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = checkpoint_path(tmp_path, 3)
    assert path == tmp_path / "checkpoints" / "step-000000003.pt"
    save(path, STATE)
    assert differences(load(path), {"format": 1, **STATE}) == []


def test_the_newest_are_kept_and_other_files_left_alone(tmp_path: Path) -> None:
    for step in (1, 2, 30):
        save(checkpoint_path(tmp_path, step), STATE)
    (tmp_path / "checkpoints" / "step-best.pt").write_bytes(b"mine")
    save(checkpoint_path(tmp_path, 100), STATE, keep=2)
    assert list_checkpoints(tmp_path) == [checkpoint_path(tmp_path, step) for step in (30, 100)]
    assert (tmp_path / "checkpoints" / "step-best.pt").exists()
    assert list_checkpoints(tmp_path / "none") == []


def test_a_checkpoint_is_found_by_file_run_or_folder(tmp_path: Path) -> None:
    for step in (1, 2):
        save(checkpoint_path(tmp_path / "run", step), STATE)
    last = checkpoint_path(tmp_path / "run", 2)
    assert find_checkpoint(tmp_path / "run") == find_checkpoint(tmp_path / "run" / "checkpoints") == last
    assert find_checkpoint(checkpoint_path(tmp_path / "run", 1)) == checkpoint_path(tmp_path / "run", 1)
    (tmp_path / "empty").mkdir()
    for missing in (tmp_path / "none", tmp_path / "empty", checkpoint_path(tmp_path / "run", 7)):
        with pytest.raises(
            UserError, match=rf"no checkpoint at '{missing}': give a \.pt file, or the folder of a run"
        ):
            find_checkpoint(missing)


class Touch:
    """Unpickling it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    torch.save({"format": 1, "x": Touch(tmp_path / "ran")}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match=r"evil\.pt' is no checkpoint: give a \.pt file"):
        load(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_a_damaged_checkpoint_is_named(kept: float, tmp_path: Path) -> None:
    path = checkpoint_path(tmp_path, 1)
    save(path, STATE)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(
        UserError, match=r"step-000000001\.pt' is damaged and is the oldest .* starts from the beginning"
    ):
        load(path)
    later = checkpoint_path(tmp_path, 2)
    later.write_bytes(path.read_bytes())
    with pytest.raises(
        UserError,
        match=r"step-000000002\.pt' is damaged: remove it, .* 'step-000000001\.pt', the one before it, will be used",
    ):
        load(later)


def test_files_that_are_no_checkpoint_are_refused(tmp_path: Path) -> None:
    torch.save({"model": {}}, tmp_path / "other.pt")
    with pytest.raises(
        UserError, match=r"other\.pt' is no checkpoint of fastssl: it lacks the entry 'format'"
    ):
        load(tmp_path / "other.pt")
    torch.save({"format": 2}, tmp_path / "newer.pt")
    with pytest.raises(UserError, match="has checkpoint format 2, but this fastssl reads 1: update fastssl"):
        load(tmp_path / "newer.pt")
    with pytest.raises(UserError, match="There is no checkpoint"):
        load(tmp_path / "none.pt")


def test_weights_must_match_entirely() -> None:
    module = nn.Linear(2, 3)
    weights = {"weight": torch.ones(3, 2), "bias": torch.ones(3)}
    load_weights(module, weights, "here")
    assert torch.equal(module.weight, torch.ones(3, 2))
    with pytest.raises(
        UserError,
        match=r"weights in 'w.pt' do not fit this model: bias is missing; scale is not in the model; "
        r"weight is \(3, 4\) there and \(3, 2\) here\. Use",
    ):
        load_weights(module, {"weight": torch.ones(3, 4), "scale": torch.ones(1)}, "w.pt")
    many = {f"layer{i}": torch.ones(1) for i in range(9)}
    with pytest.raises(UserError, match="and 5 more"):
        load_weights(module, {**weights, **many}, "w.pt")


def _fail_from(monkeypatch: pytest.MonkeyPatch, step: int, error: OSError) -> None:
    """Let the disk refuse the checkpoint of `step`, halfway through its bytes."""
    write = atomic_files.atomic_write

    def write_half(path, content):
        if Path(path).name != f"step-{step:09d}.pt":
            return write(path, content)

        def half(file):
            file.write(b"half")
            file.flush()
            raise error

        return write(path, half)

    monkeypatch.setattr(checkpoint, "atomic_write", write_half)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            r"The disk is full: '.*step-000000006.pt' could not be written.*--resume",
        ),
        (
            OSError(errno.EIO, "Input/output error"),
            r"step-000000006.pt' could not be written \(Input/output error\).*--resume",
        ),
    ],
)
def test_a_failed_save_leaves_the_older_checkpoint(
    error: OSError, message: str, shards: Path, finished: Path, tmp_path: Path
) -> None:
    resolved = resolve(shards, tmp_path / "run", {"train": {"keep_last": 1}})
    with pytest.MonkeyPatch.context() as patch:
        _fail_from(patch, 2 * SAVE_STEPS, error)
        with pytest.raises(UserError, match=message):
            train(resolved)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000000003.pt"]
    assert newest(tmp_path / "run")["step"] == SAVE_STEPS
    train(resolved, resume=True)
    assert differences(newest(tmp_path / "run")["method"], newest(finished)["method"]) == []
