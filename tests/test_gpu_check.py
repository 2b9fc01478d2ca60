"""`make gpu-check`: which jobs each part has, how it goes on after a failure, what it sums up; a tiny part run for real."""

import json
import os
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fastssl.cli import main as fastssl
from fastssl.pretraining import run_config
from tests import gpu_check, gpu_goals, gpu_jobs
from tests.gpu_jobs import Job, Plan

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
    fault.write_text(
        f'#!/bin/sh\n[ "$3" = wait ] || kill -SEGV $$\nsleep 60 & echo $! > {tmp_path}/left\nexec sleep 60\n'
    )
    fault.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fault))
    assert gpu_check.run_jobs([Job(("demo",))]) == ["fastssl demo (signal 11)"]
    late = gpu_check.run_jobs([Job(("wait",))], lambda job, _: gpu_check.start(job, limit_s=1.5))
    assert late == ["fastssl wait (took too long)"]
    left = int((tmp_path / "left").read_text())
    for _ in range(100):  # what it had started has ended, too; as a zombie where nothing collects it
        try:
            os.kill(left, 0)
            if Path(f"/proc/{left}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                break
        except (ProcessLookupError, FileNotFoundError):
            break
        time.sleep(0.05)
    else:
        pytest.fail("a process that the job started still runs")
    assert gpu_check.run_jobs([Job((), module="pytest")], lambda job, _: 5) == []


def test_jobs_share_the_time_of_their_part():
    given = []

    def run(job, left_s):
        given.append(left_s)
        return 0

    assert gpu_check.run_jobs([Job(("a",)), Job(("b",))], run, limit_s=100) == []
    assert 99 < given[1] <= given[0] <= 100
    assert gpu_check.run_jobs([Job(("a",))], run, limit_s=10) == ["fastssl a (no time was left in its part)"]
    assert len(given) == 2


@pytest.mark.parametrize("on_gpu", [True, False])
@pytest.mark.parametrize("part", gpu_jobs.PARTS)
def test_every_job_has_settings_that_exist_and_a_file_of_its_own(part, on_gpu, monkeypatch):
    monkeypatch.chdir(ROOT)
    jobs = plan(on_gpu).jobs(part)
    assert jobs or (part == "memory" and not on_gpu)
    outs = [job.out for job in jobs if job.out]
    assert len(set(outs)) == len(outs)
    for job in jobs:
        if job.argv[0] == "bench" and job.argv[1].endswith(".yaml"):
            flags = list(job.argv[2:])
            for ours in ("--json", "--steps"):
                if ours in flags:
                    at = flags.index(ours)
                    del flags[at : at + 2]
            cfg = run_config.load(job.argv[1], [flag for flag in flags if flag != "--quick"]).config
            assert cfg.train.batch < 4096
            if part == "memory":
                assert cfg.train.batch == 2 * int(cfg.train.micro_batch)


def test_every_switch_of_the_page_is_measured_and_the_other_way_round():
    page = (ROOT / "docs" / "speed.md").read_text()
    measured = {word for flags in gpu_jobs.SWITCHES.values() for word in flags if word.startswith("--")}
    for flag in measured - {"--optim.name", "--optim.lr", "--optim.weight_decay"}:
        assert f"`{flag.removeprefix('--')}" in page
    for name in [*gpu_jobs.SWITCHES, *gpu_jobs.VARIANTS]:
        assert f"| {name} |" in page or f"`{name}`" in page


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
    monkeypatch.setattr(gpu_jobs, "ON_CPU", ("base", "ema_loop"))
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
    assert gpu_check.main(argv, lambda job, _: fastssl(list(job.argv))) == 0
    path, verdict = sorted(tmp_path.iterdir())
    assert path.name.endswith("-cpu-switches_resnet50.json")
    assert verdict.name.endswith("-cpu-verdict.json")
    rows = json.loads(path.read_text())["rows"]
    assert list(rows) == ["base", "ema_loop"]
    assert rows["base"]["ratio_to_base"] == 1.0
    assert all(row["images_per_s"] > 0 for row in rows.values())
    out = capsys.readouterr().out
    assert "ema_loop" in out
    assert f"0 met, 0 missed, {len(gpu_goals.GOALS)} not known" in out


def test_options_of_the_benchmarks_exist():
    """Of those without a configuration: their parsers take them."""
    import tyro

    from fastssl.bench.augment import BenchAugment
    from fastssl.bench.loader import BenchLoader, choose
    from fastssl.bench.peers import PEERS
    from pipelines.engines.engine_table import engine_names

    kinds = {"augment": BenchAugment, "loader": BenchLoader}
    for part in ("augment", "loader", "loader_peers"):
        [job] = plan().jobs(part)
        made = tyro.cli(kinds[job.argv[1]], args=list(job.argv[2:]))
        assert made.json == str(job.out)
        assert made.batch == 256
        if isinstance(made, BenchLoader):
            assert "fused" in choose(made.engines, {name: name for name in engine_names()}, "engine")
            choose(made.peers, PEERS, "peer")
    [job] = plan().jobs("tests")
    files = [arg for arg in job.argv if arg.endswith(".py")]
    assert "tests/pipelines/loading/test_gpu_views.py" in files
    assert "tests/fastssl/pretraining/test_gpu_step.py" in files
    assert all((ROOT / name).exists() for name in files)


def test_all_parts_can_be_given_one_time_together(tmp_path, capsys):
    given = []

    def run(job, left_s):
        given.append(left_s)
        return 0

    argv = ["--gpu", "H100", "--out", str(tmp_path), "--only", "tests", "switches_resnet50", "--within"]
    assert gpu_check.main([*argv, "60"], run) == 0
    assert len(given) > 5
    assert max(given) <= 60
    given.clear()
    assert gpu_check.main([*argv, "5"], run) == 1
    assert given == []
    assert "(no time was left in its part)" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- goals and verdict


def ladder(
    full: float, whole: float, plain: float | None, contention: float | None, mfu: float = 0.5
) -> dict:
    rows = [("full step, synthetic", full), ("end to end", whole), ("plain eager step", plain)]
    return {
        "rows": [
            {"name": name, "images_per_s": rate, "mfu": mfu, "error": rate is None and "no memory"}
            for name, rate in rows
        ],
        "verdict": {"contention": contention},
    }


AUGMENT = [
    {"name": "triton", "images_per_s": 60_000.0, "ms_p50": 4.2, "error": None},
    {"name": "torch", "images_per_s": 9000.0, "ms_p50": 28.0, "error": None},
    {"name": "kornia-modules", "images_per_s": 13_000.0, "ms_p50": 20.0, "error": None},
    {"name": "dali-graph", "images_per_s": None, "error": "not installed: nvidia.dali"},
]


def judged(tmp_path: Path, **files) -> dict[str, dict]:
    for name, content in files.items():
        (tmp_path / f"2026-11-24-h100-{name}.json").write_text(json.dumps(content))
    return {row["goal"]: row for row in gpu_goals.judge(tmp_path, "h100")}


def test_verdict_on_figures(tmp_path):
    files = {
        "ladder-vit_small": ladder(3100, 3050, 1600, 1.05),
        "ladder-vit_base": ladder(900, 890, None, None, 0.44),
    }
    rows = [
        {"name": "fused", "images_per_s": 15_000, "error": None},
        {"name": "fused to GPU", "images_per_s": 9000, "error": None},
        {"name": "fused on GPU", "images_per_s": 11_000, "error": None},
        {"name": "fused all on GPU", "images_per_s": None, "error": "no decoder"},
    ]
    cards = {
        "card_8gb_resnet50": {"peak_memory_bytes": 9e9},
        "card_16gb_vit_base": {"peak_memory_bytes": 15e9},
    }
    found = judged(
        tmp_path,
        augment=AUGMENT,
        loader=rows,
        memory={"part": "memory", "rows": cards},
        tests={"passed": 30, "skipped": 1, "failed": ["a::b"]},
        **files,
    )
    views = gpu_goals.VIEWS
    expected = {
        views: (4.2, True),
        f"{views}, over Kornia's modules": (pytest.approx(60 / 13), False),
        "loader alone, JPEGs of 500 x 375": (11_000, True),
        "ViT-S/16 end to end": (3050, True),
        "ViT-S/16: end to end of the step on synthetic views": (pytest.approx(3050 / 3100), True),
        "ViT-S/16: a step beside the loader takes longer by": (pytest.approx(5), False),
        "ViT-S/16: step over moco-v3's plain fp16 step": (pytest.approx(3100 / 1600), False),
        "ViT-B/16 end to end, MFU of 8 forwards": (44, False),
        "ResNet-50, 64 a step": (9, False),
        "ViT-B/16 in chunks": (15, True),
        "tests that want a GPU: failed": (1, False),
    }
    assert {goal: (found[goal]["figure"], found[goal]["met"]) for goal in expected} == expected
    unknown = {
        f"{views}, over DALI": "dali-graph: not installed: nvidia.dali",
        "ViT-B/16: step over moco-v3's plain fp16 step": "plain eager step: no memory",
        "ViT-B/16: a step beside the loader takes longer by": "the step was not measured beside the loader",
        "ResNet-50 end to end": "not run",
    }
    assert {goal: found[goal]["why"] for goal in unknown} == unknown
    text = gpu_goals.told(list(found.values()))
    assert "4.2 ms  met\n" in text
    assert "not known: dali-graph: not installed" in text
    assert "6 met, 6 missed, 7 not known" in text


def test_the_latest_file_of_the_device_counts_and_a_damaged_one_is_told(tmp_path):
    (tmp_path / "2026-11-30-cpu-augment.json").write_text(json.dumps(AUGMENT))
    (tmp_path / "2026-11-20-h100-augment.json").write_text(json.dumps(AUGMENT[:1]))
    assert judged(tmp_path)[f"{gpu_goals.VIEWS}, over DALI"]["why"] == "'dali-graph' was not measured"
    slower = [{**AUGMENT[0], "ms_p50": 7.0}, *AUGMENT[1:]]
    assert judged(tmp_path, augment=slower)[gpu_goals.VIEWS]["met"] is False
    found = judged(tmp_path, augment={"rows": 3})
    assert found[gpu_goals.VIEWS]["why"].startswith("no figure in the file (TypeError")


def test_each_goal_s_file_is_one_that_its_part_leaves():
    for goal in gpu_goals.GOALS:
        jobs = plan().jobs(goal.part)
        made = {job.out.stem.removeprefix("day-h100-") for job in jobs if job.out}
        assert goal.file in made | ({goal.part} if goal.part in ("memory", "tests") else set())
        if goal.part == "memory":
            assert {"memory-card_8gb_resnet50", "memory-card_16gb_vit_base"} <= made


def test_further_ladders_are_folded_into_the_first(tmp_path):
    files = [
        tmp_path / f"day-h100-ladder-resnet50{end}.json"
        for end in ("", "-side_stream_off", "-augment_on_gpu")
    ]
    for path, rate in zip(files, (100, 80, 90), strict=True):
        path.write_text(json.dumps(ladder(110, rate, 50, 1.01)))
    job = Job((), files[0])
    gpu_check.finish("resnet50", plan(out=tmp_path), [job, *(Job((), path) for path in files[1:])])
    assert list(tmp_path.iterdir()) == files[:1]
    variants = json.loads(files[0].read_text())["variants"]
    assert variants["side_stream_off"]["end to end"] == 80
    assert variants["augment_on_gpu"] == {
        "loader": None,
        "full step, synthetic": 110,
        "end to end": 90,
        "contention": 1.01,
    }


def test_tests_are_counted():
    xml = """<testsuites><testsuite><testcase classname="a" name="x"/><testcase classname="a" name="y"><failure/></testcase>
<testcase classname="b" name="z"><skipped/></testcase>
<testcase classname="b" name="w"><error/></testcase></testsuite></testsuites>"""
    found = gpu_check.count_tests(ElementTree.fromstring(xml))
    assert found == {"passed": 1, "skipped": 1, "failed": ["a::y", "b::w"]}


def test_a_failing_part_is_told_and_the_verdict_comes_all_the_same(tmp_path, capsys):
    def run(job, _):
        if job.out is not None:
            job.out.write_text("no json")
        return 1

    argv = ["--only", "switches_vit_small", "tests", "--gpu", "H100", "--out", str(tmp_path)]
    assert gpu_check.main(argv, run) == 1
    shown = capsys.readouterr()
    assert "failed: the results of switches_vit_small (JSONDecodeError" in shown.err
    assert "failed: the results of tests (ParseError" in shown.err
    assert "not known" in shown.out
    assert list(tmp_path.glob("*-h100-verdict.json"))
    assert gpu_check.main(["--only", "verdict", "--gpu", "H100", "--out", str(tmp_path)], run) == 0
