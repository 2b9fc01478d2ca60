"""`fastssl bench start`: the data set that it makes up, and what it reports of a fresh process."""

import json
from pathlib import Path

import numpy as np
import pytest

from fastssl.bench import bench_command
from fastssl.bench.fresh import in_fresh_process
from fastssl.bench.loaders import bench_start
from fastssl.bench.loaders.bench_start import grow
from fastssl.bench.loaders.first_batch import STAGES
from pipelines.augment.recipe import Recipe
from pipelines.loading.loader import open_loader
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError
from tests.pictures import photo_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 pictures in shards of 5."""
    return photo_shards(tmp_path_factory.mktemp("pictures"), 12, 30, 24, "png", samples_per_shard=5)


def test_the_data_set_has_as_many_samples_and_the_images_of_the_few(shards: Path, tmp_path: Path) -> None:
    grow(shards, tmp_path, 3000)
    few, many = ShardSet.open(shards), ShardSet.open(tmp_path)
    assert len(many) == 3000
    by_width = {int(few.widths[i]): bytes(few.read(i)) for i in range(12)}
    used = {int(many.widths[i]) for i in range(0, 3000, 10)}
    assert used == set(by_width)
    for i in (0, 1, 77, 2999):
        assert bytes(many.read(i)) == by_width[int(many.widths[i])]
    ids = np.concatenate(
        [b.sample_ids for b in open_loader(many, Recipe(size=8), batch=1000, seed=0).epoch(0)]
    )
    assert sorted(ids.tolist()) == list(range(3000))


def test_the_report(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "start.json"
    flags = ["--samples", "20000", "--batch", "4", "--size", "16", "--repeats", "1", "--json", str(path)]
    assert bench_command.run(["start", str(shards), *flags]) == 0
    report = json.loads(path.read_text())
    assert (report["kind"], report["settings"]["samples"]) == ("start", 20_000)
    found = report["start"]
    assert list(found) == [*STAGES, "all", "peak_bytes"]
    assert all(found[name]["seconds"] >= 0 for name in STAGES)
    assert found["all"]["seconds"] == pytest.approx(sum(found[name]["seconds"] for name in STAGES))
    assert found["all"]["spread"] == [found["all"]["seconds"]] * 2
    assert found["imports"]["cpu_s"] > 0.2  # PyTorch
    assert found["peak_bytes"] > 100e6
    said = capsys.readouterr().out
    assert "first batch of 20,000 samples" in said
    assert all(name in said for name in (*STAGES, "CPU seconds", "MB at most"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--samples", "3"], "--samples is 3, but it must be at least one batch"),
        (["--repeats", "0"], "--repeats is 0"),
        (["--recipe", "moco"], "There is no recipe called 'moco'"),
    ],
)
def test_mistakes_are_told(shards: Path, flags: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        bench_command.run(["start", str(shards), *flags])
    with pytest.raises(UserError, match="There is no folder"):
        bench_command.run(["start", str(shards / "none")])
    with pytest.raises(UserError, match="is not on this machine"):
        bench_command.run(["start", "s3://bucket/shards"])


def test_a_process_that_ends_without_a_result_is_told() -> None:
    with pytest.raises(ChildProcessError, match="ended with exit code 3"):
        in_fresh_process(exit, 3)


def test_ctrl_c_before_the_first_turn_leaves_no_report(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_start, "in_fresh_process", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    path = tmp_path / "start.json"
    assert (
        bench_command.run(["start", str(shards), "--samples", "2000", "--batch", "4", "--json", str(path)])
        == 130
    )
    assert capsys.readouterr().out.splitlines()[-1] == "No turn was measured."
    assert not path.exists()
