"""`fastssl bench fidelity` as a user calls it."""

import json

import pytest

from fastssl.bench import bench_command
from pipelines.previews import engine_fidelity
from pipelines.previews.engine_fidelity import ROWS
from shards.conversion.convert import convert
from shards.errors import UserError
from tests.pictures import photo


@pytest.fixture(scope="module")
def shard_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("fidelity")
    (root / "pictures").mkdir()
    for i in range(4):
        photo(40 + i, 32, seed=i).save(root / "pictures" / f"{i}.jpg")
    convert(root / "pictures", root / "shards", workers=0)
    return str(root / "shards")


def test_table_and_rows(shard_folder, tmp_path, capsys):
    path = tmp_path / "fidelity.json"
    flags = ["--size", "24", "--engines", "fused,reference", "--json", str(path)]
    assert bench_command.run(["fidelity", shard_folder, *flags]) == 0
    rows = json.loads(path.read_text())
    assert len(rows) == 2 * 2 * (len(ROWS) + 1)
    assert {row["engine"] for row in rows} == {"fused", "reference"}
    for row in rows:
        assert 0 <= row["mean_levels"] <= row["max_levels"]
        assert row["fidelity"] == "exact"
        assert row["versions"]["torch"]
        assert row["engine"] != "reference" or row["max_levels"] == 0
    shown = capsys.readouterr().out
    assert "whole recipe" in shown
    assert "solarise" in shown


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--engines", "fussed"], "Did you mean 'fused'"),
        (["--images", "0"], "--images is 0"),
        (["--recipe", "moco"], "no recipe called 'moco'"),
        (["--json", "no/such/x.json"], "no folder 'no/such'"),
    ],
)
def test_mistakes_are_named(shard_folder, flags, words):
    with pytest.raises(UserError, match=words):
        bench_command.run(["fidelity", shard_folder, *flags])


def test_an_engine_that_refuses_is_told(shard_folder, capsys):
    flags = ["--size", "24", "--engines", "kornia", "--recipe", "byol"]
    assert bench_command.run(["fidelity", shard_folder, *flags]) == 0
    assert "kornia was not measured: The engine 'kornia' has bilinear crops only" in " ".join(
        capsys.readouterr().out.split()
    )


def test_ctrl_c_keeps_the_rows_so_far(shard_folder, tmp_path, capsys, monkeypatch):
    path, measure, calls = tmp_path / "fidelity.json", engine_fidelity.measure, []

    def stopped(engine, recipe, data):
        calls.append(engine)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(engine, recipe, data)

    monkeypatch.setattr(engine_fidelity, "measure", stopped)
    flags = ["--size", "24", "--engines", "fused,reference", "--json", str(path)]
    assert bench_command.run(["fidelity", shard_folder, *flags]) == 130
    rows = json.loads(path.read_text())
    assert [row["engine"] for row in rows] == ["fused"] * 2 * (len(ROWS) + 1)
    assert all(row["incomplete"] for row in rows)
    shown = capsys.readouterr().out
    assert "Stopped. This was measured until then:" in shown
    assert "whole recipe" in shown.split("Stopped.")[1]
    assert f"Written to {path}" in shown.splitlines()
