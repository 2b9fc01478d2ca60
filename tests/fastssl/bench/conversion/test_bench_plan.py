"""`fastssl bench plan`: what it reports, and that memory does not grow with the number of images."""

import json
from pathlib import Path

import pytest

from fastssl.bench import bench_command
from fastssl.bench.conversion import bench_plan
from shards.errors import UserError

IN_MEMORY = 20_000
MB = 1e6


def test_memory_does_not_grow_with_the_number_of_images() -> None:
    few, many, unbounded = (
        bench_plan.measure(num, in_memory=held)
        for num, held in ((2 * IN_MEMORY, IN_MEMORY), (300_000, IN_MEMORY), (300_000, 1_000_000))
    )
    growth = many["peak_bytes"] - few["peak_bytes"]
    assert growth < 30 * MB
    assert unbounded["peak_bytes"] - few["peak_bytes"] > 2 * max(growth, 15 * MB)  # so the bound is one
    assert many["num_shards"] == unbounded["num_shards"] == 74
    assert many["plan_bytes"] == unbounded["plan_bytes"]


def test_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    assert bench_command.run(["plan", "--entries", "1000", "--json", str(path), "--out", str(tmp_path)]) == 0
    report = json.loads(path.read_text())
    assert (report["kind"], report["settings"]["entries"], report["rows"]) == ("plan", 1000, [])
    found = report["plan"]
    assert found["num_shards"] == 8
    assert 10 * MB < found["before_bytes"] <= found["peak_bytes"]
    assert min(found["survey_s"], found["write_s"], found["cpu_s"]) > 0
    assert "1,000 images planned" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [(["--entries", "0"], "--entries is 0"), (["--out", "nowhere"], "no folder 'nowhere'")],
)
def test_mistakes_are_told(flags: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        bench_command.run(["plan", *flags])
