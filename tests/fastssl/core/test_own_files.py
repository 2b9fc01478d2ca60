"""A run replaces no file that no run wrote, and empties no log."""

import shutil
from pathlib import Path

import pytest
import yaml

from fastssl.core.own_files import check_files, is_own_config, write_config
from fastssl.pretraining.run import train
from fastssl.pretraining.run_config import load_config
from shards.errors import UserError
from tests.fastssl.runs import resolve, rows


def test_a_configuration_of_the_users_own_is_not_replaced(shards: Path, config, tmp_path: Path, told) -> None:
    own = config({"train": {"out": str(tmp_path)}}).rename(tmp_path / "config.yaml")
    for text in (own.read_text(), f"# The one that worked.\n{load_config().to_yaml()}"):
        own.write_text(text)
        said = told("pretrain", own, "--train.out", tmp_path, "--data.shards", shards, "--train.batch", "8")
        assert said.startswith(f"'{own}' was not written by a run, and this one would replace it")
        assert f"such as '{tmp_path / 'run'}'" in said
        assert own.read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_a_file_called_like_the_log_is_not_emptied(config, tmp_path: Path, told) -> None:
    for text in ("my notes\n", '{"epoch": 3, "loss": 2.0}\n', "no line end", "\xff"):
        (tmp_path / "metrics.jsonl").write_text(text, encoding="latin-1")
        assert "was not written by a run" in told("pretrain", config(), "--train.out", tmp_path)
        assert (tmp_path / "metrics.jsonl").read_text(encoding="latin-1") == text


@pytest.mark.parametrize("out", ["", " "])
def test_an_empty_name_of_the_folder_is_refused(out: str, config, told) -> None:
    assert "train.out is empty, such as from a variable that is not set" in told(
        "pretrain", config(), "--train.out", out
    )


def test_files_of_runs_are_told_from_others(finished: Path, tmp_path: Path) -> None:
    tree = yaml.safe_load((finished / "config.yaml").read_text())
    check_files(finished, tree)
    check_files(tmp_path / "none", tree)
    assert is_own_config(finished / "config.yaml", tree)
    assert not is_own_config(finished / "config.yaml", {"train": dict.fromkeys("abcdef", 1)})
    (tmp_path / "metrics.jsonl").write_text('{"st')  # a crash
    check_files(tmp_path, tree)
    edited = tmp_path / "config.yaml"
    edited.write_text((finished / "config.yaml").read_text().replace("epochs: 3", "epochs: 3  # enough?"))
    before = edited.read_text()
    with pytest.raises(UserError):
        check_files(tmp_path, tree)
    with pytest.warns(UserWarning, match="is not as the run wrote it, and stays as it is"):
        write_config(edited, tree)
    assert edited.read_text() == before


def test_a_new_start_keeps_the_log_of_the_run_before(shards: Path, finished: Path, tmp_path: Path) -> None:
    """Somebody who removed the checkpoints of a finished run still has its curves."""
    run = tmp_path / "run"
    run.mkdir()
    for name in ("metrics.jsonl", "config.yaml"):
        shutil.copy(finished / name, run)
    train(resolve(shards, run, {"train": {"epochs": 1}, "knn": {"every": 0}}))
    assert (run / "metrics.jsonl.1").read_bytes() == (finished / "metrics.jsonl").read_bytes()
    assert max(row["step"] for row in rows(run)) < max(row["step"] for row in rows(finished))
