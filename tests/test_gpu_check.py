"""`make gpu-check`: which jobs each part has, how it goes on after a failure, what it sums up; a tiny part run for real."""

import json
import sys
from pathlib import Path

import pytest

from fastssl import config
from fastssl.cli import main as fastssl
from tests import gpu_check
from tests.gpu_check import Job, Plan

ROOT = Path(__file__).parents[1]


def plan(on_gpu: bool = True, **changes) -> Plan:
    return Plan(**{"shards": Path("s"), "out": Path("o"), "stamp": "day-h100", "on_gpu": on_gpu, **changes})


def test_a_failing_job_is_listed_and_does_not_stop_the_next(capfd):
    jobs = [Job(("--version",)), Job(("bench", "nothing")), Job(("bench", "--help"))]
    assert gpu_check.run_jobs(jobs) == ["fastssl bench nothing (exit code 2)"]
    out, err = capfd.readouterr()
    assert out.startswith("\n$ fastssl --version\nfastssl ")
    assert "usage: fastssl bench CONFIG" in out.partition("$ fastssl bench --help")[2]
    assert err.startswith("fastssl: There is no 'fastssl bench nothing'")


def test_a_job_that_a_signal_or_the_clock_ends_is_listed(monkeypatch, tmp_path):
    fault = tmp_path / "python"
    fault.write_text('#!/bin/sh\n[ "$3" = wait ] && exec sleep 60\nkill -SEGV $$\n')
    fault.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fault))
    assert gpu_check.run_jobs([Job(("demo",))]) == ["fastssl demo (signal 11)"]
    late = gpu_check.run_jobs([Job(("wait",))], lambda job: gpu_check.start(job, limit_s=0.1))
    assert late == ["fastssl wait (took too long)"]
    assert gpu_check.run_jobs([Job((), module="pytest")], lambda job: 5) == []


@pytest.mark.parametrize("on_gpu", [True, False])
@pytest.mark.parametrize("part", gpu_check.PARTS)
def test_every_job_has_settings_that_exist_and_a_file_of_its_own(part, on_gpu, monkeypatch):
    monkeypatch.chdir(ROOT)
    jobs = plan(on_gpu).jobs(part)
    assert jobs or (part == "memory" and not on_gpu)
    outs = [job.out for job in jobs if job.out]
    assert len(set(outs)) == len(outs)
    for job in jobs:
        if job.argv[0] == "bench" and job.argv[1] != "loader":
            flags = list(job.argv[2:])
            for ours in ("--json", "--steps"):
                if ours in flags:
                    at = flags.index(ours)
                    del flags[at : at + 2]
            cfg = config.load(job.argv[1], [flag for flag in flags if flag != "--quick"]).config
            assert cfg.train.batch < 4096
            if part == "memory":
                assert cfg.train.batch == 2 * int(cfg.train.micro_batch)


def test_every_switch_of_the_page_is_measured_and_the_other_way_round():
    page = (ROOT / "docs" / "speed.md").read_text()
    measured = {word for flags in gpu_check.SWITCHES.values() for word in flags if word.startswith("--")}
    for flag in measured - {"--optim.name", "--optim.lr", "--optim.weight_decay"}:
        assert f"`{flag.removeprefix('--')}" in page
    for name in gpu_check.SWITCHES:
        assert f"| {name} |" in page or name == "base"


def test_summary_compares_each_with_its_base():
    def report(rate: float, peak: int) -> dict:
        rows = [
            {"name": "full step, synthetic", "images_per_s": rate, "mfu": 0.3, "memory_bytes": peak},
            {"name": "EMA + optimiser", "images_per_s": 9.0, "memory_bytes": peak // 2},
            {"name": "to device", "images_per_s": None},
        ]
        return {"rows": rows, "machine": {"gpu": "x"}, "versions": {"torch": "2"}}

    names = {"base": 100.0, "compile": 150.0, "adamw_fused": 80.0, "adamw_loop": 40.0}
    found = gpu_check.summarise("switches_resnet50", {n: report(r, 2**30) for n, r in names.items()})
    ratios = {name: row["ratio_to_base"] for name, row in found["rows"].items()}
    assert ratios == {"base": 1.0, "compile": 1.5, "adamw_fused": 1.0, "adamw_loop": 0.5}
    assert found["rows"]["base"]["peak_memory_bytes"] == 2**30
    assert found["machine"] == {"gpu": "x"}
    memory = gpu_check.summarise("memory", {"card": report(5.0, 7)})
    assert memory["rows"]["card"] == {
        "images_per_s": 5.0,
        "mfu": 0.3,
        "peak_memory_bytes": 7,
        "ratio_to_base": None,
    }


def test_a_tiny_part_runs_from_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(gpu_check, "ON_CPU", ("base", "ema_loop"))
    tiny = "--model.backbone resnet10_w32 --recipe.size 16 --method.hidden_dim 8 --method.dim 4 --train.device cpu --steps 1"
    argv = [
        "--only",
        "switches_resnet50",
        "--gpu",
        "",
        "--scale",
        "0.03",
        "--out",
        str(tmp_path),
        "--extra",
        tiny,
    ]
    assert gpu_check.main(argv, lambda job: fastssl(list(job.argv))) == 0
    [path] = tmp_path.iterdir()
    assert path.name.endswith("-cpu-switches_resnet50.json")
    rows = json.loads(path.read_text())["rows"]
    assert list(rows) == ["base", "ema_loop"]
    assert rows["base"]["ratio_to_base"] == 1.0
    assert all(row["images_per_s"] > 0 for row in rows.values())
    assert "ema_loop" in capsys.readouterr().out
