"""What `fastssl bench gpu` sums up, packs and judges, on made-up files."""

import json
import tarfile
from pathlib import Path

import pytest

from fastssl.bench.gpu import goals, results
from fastssl.bench.gpu.processes import TOO_LONG, Ended
from fastssl.bench.gpu.stages import CheckJob
from fastssl.bench.ladder.verdict import END_TO_END, FULL, MOCO_V3


def ended(name: str, out: Path, code: int = 0) -> Ended:
    return Ended(CheckJob(name, (f"{name}.py",), out, "pytest"), code, 1.0)


def test_summary_compares_each_with_its_base(tmp_path):
    def report(name: str, rate: float | None, peak: int, error: str | None = None) -> Ended:
        rows = [
            {"name": FULL, "images_per_s": rate, "mfu": 0.3, "memory_bytes": peak, "error": error},
            {"name": "to device", "images_per_s": None},
        ]
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"rows": rows, "machine": {"gpu": "x"}, "versions": {"torch": "2"}}))
        return ended(name, path)

    rates = {"base": 100.0, "compile": 150.0, "adamw_fused": 80.0, "adamw_loop": 40.0}
    made = {name: report(name, rate, 2**30) for name, rate in rates.items()}
    made["fp32"] = report("fp32", None, 0, "it does not fit")
    made["fp16"] = ended("fp16", tmp_path / "none.json", TOO_LONG)
    found = results.summarise("switches_resnet50", made)
    ratios = {name: row["ratio_to_base"] for name, row in found["rows"].items()}
    assert ratios == {"base": 1.0, "compile": 1.5, "adamw_fused": 1.0, "adamw_loop": 0.5}
    assert found["rows"]["base"]["peak_memory_bytes"] == 2**30
    assert found["machine"] == {"gpu": "x"}
    assert found["failed"] == {"fp32": "it does not fit", "fp16": "'fp16' has no result (took too long)"}
    memory = results.summarise("memory", {"card": report("card", 5.0, 7)})
    row = {"images_per_s": 5.0, "mfu": 0.3, "peak_memory_bytes": 7, "ratio_to_base": None}
    assert memory["rows"] == {"card": row}


def test_further_rows_of_a_model_join_the_first(tmp_path):
    main, more = tmp_path / "ladder.json", tmp_path / "ladder-more.json"

    def write(path: Path, *rows: dict) -> None:
        path.write_text(json.dumps({"kind": "ladder", "rows": rows, "verdict": {"contention": 1.0}}))

    write(main, {"name": FULL, "ms_p50": 100.0}, {"name": MOCO_V3}, {"name": END_TO_END, "step_ms": 101.0})
    write(more, {"name": "end to end, views on the GPU", "step_ms": 110.0}, {"name": "teacher forward"})
    results.merge_ladder(main, [ended("more", more), ended("gone", tmp_path / "gone.json", 1)])
    rows = json.loads(main.read_text())["rows"]
    names = [row["name"] for row in rows]
    assert names == ["teacher forward", FULL, END_TO_END, MOCO_V3, "end to end, views on the GPU"]
    assert rows[4]["contention"] == pytest.approx(1.1)
    assert not more.exists()
    # Rows whose first part is missing are kept all the same.
    main.unlink()
    write(more, {"name": "teacher forward"})
    results.merge_ladder(main, [ended("more", more)])
    assert [row["name"] for row in json.loads(main.read_text())["rows"]] == ["teacher forward"]


def test_tests_are_counted_and_a_file_that_did_not_end_is_a_failure(tmp_path):
    xml = """<testsuites><testsuite><testcase classname="a" name="x"/><testcase classname="a" name="y"><failure/></testcase>
<testcase classname="b" name="z"><skipped message="no GPU"/></testcase>
<testcase classname="b" name="w"><error/></testcase></testsuite></testsuites>"""
    (tmp_path / "a.xml").write_text(xml)
    found = results.count_tests(
        [ended("a", tmp_path / "a.xml", 1), ended("hangs", tmp_path / "b.xml", TOO_LONG)]
    )
    assert found == {
        "passed": 1,
        "skipped": 1,
        "failed": ["a::y", "b::w", "hangs.py (took too long)"],
        "reasons": ["no GPU"],
    }


def test_choices_among_kernels_are_forgotten_and_kernels_kept(tmp_path):
    folder = tmp_path / "inductor" / "ab"
    folder.mkdir(parents=True)
    for name in ("x.best_config", "x.py"):
        (folder / name).touch()
    results.forget_choices(tmp_path)
    assert [path.name for path in folder.iterdir()] == ["x.py"]


def test_the_archive_is_of_this_day_and_device_and_never_half(tmp_path, monkeypatch):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "a.log").write_text("log")
    for name in ("2026-11-24-h100-a.json", "2026-11-23-h100-a.json", "2026-11-24-cpu-a.json"):
        (tmp_path / name).write_text(name)
    archive = results.keep(tmp_path, "2026-11-24-h100", tmp_path / "logs")
    with tarfile.open(archive) as tar:
        assert tar.getnames() == ["2026-11-24-h100-a.json", "logs/a.log"]
    before = archive.read_bytes()

    def fail(*args):
        raise OSError("the disk is full")

    monkeypatch.setattr(tarfile.TarFile, "add", fail)
    with pytest.raises(OSError, match="full"):
        results.keep(tmp_path, "2026-11-24-h100", tmp_path / "logs")
    assert archive.read_bytes() == before


# ---------------------------------------------------------------------------------------------- goals and verdict


def ladder(
    full: float, whole: float, plain: float | None, contention: float | None, mfu: float = 0.5
) -> dict:
    rows = [(FULL, full), (END_TO_END, whole), (MOCO_V3, plain)]
    return {
        "rows": [
            {"name": name, "images_per_s": rate, "mfu": mfu, "error": rate is None and "no memory"}
            | ({"contention": contention} if name == END_TO_END else {})
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
    return {row["goal"]: row for row in goals.judge(tmp_path, "h100")}


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
    views = goals.VIEWS
    expected = {
        views: (4.2, True),
        f"{views}, over Kornia's modules": (pytest.approx(60 / 13), False),
        "loader alone, JPEGs of ImageNet's sizes": (11_000, True),
        "ViT-S/16 end to end": (3050, True),
        "ViT-S/16: end to end of the step on synthetic views": (pytest.approx(3050 / 3100), True),
        "ViT-S/16: a step beside the loader takes longer by": (pytest.approx(5), False),
        "ViT-S/16: step over moco-v3's own kind of step, fp16": (pytest.approx(3100 / 1600), False),
        "ViT-B/16 end to end, MFU of 8 forwards": (44, False),
        "ResNet-50, 64 a step": (9, False),
        "ViT-B/16 in chunks": (15, True),
        "tests that want a GPU: failed": (1, False),
    }
    assert {goal: (found[goal]["figure"], found[goal]["met"]) for goal in expected} == expected
    unknown = {
        f"{views}, over DALI": "dali-graph: not installed: nvidia.dali",
        "ViT-B/16: step over moco-v3's own kind of step, fp16": f"{MOCO_V3}: no memory",
        "ViT-B/16: a step beside the loader takes longer by": "the step was not measured beside the loader",
        "ResNet-50 end to end": "not run",
    }
    assert {goal: found[goal]["why"] for goal in unknown} == unknown
    text = goals.told(list(found.values()))
    assert "4.2 ms  met\n" in text
    assert "not known: dali-graph: not installed" in text
    assert "6 met, 6 missed, 8 not known" in text


def test_the_latest_file_of_the_device_counts_and_a_damaged_one_is_told(tmp_path):
    (tmp_path / "2026-11-30-cpu-augment.json").write_text(json.dumps(AUGMENT))
    (tmp_path / "2026-11-20-h100-augment.json").write_text(json.dumps(AUGMENT[:1]))
    assert judged(tmp_path)[f"{goals.VIEWS}, over DALI"]["why"] == "'dali-graph' was not measured"
    slower = [{**AUGMENT[0], "ms_p50": 7.0}, *AUGMENT[1:]]
    assert judged(tmp_path, augment=slower)[goals.VIEWS]["met"] is False
    found = judged(tmp_path, augment={"rows": 3})
    assert found[goals.VIEWS]["why"].startswith("no figure in the file (TypeError")


def test_figures_of_other_sizes_or_of_a_cpu_meet_and_miss_no_goal(tmp_path):
    def at(**changes) -> dict:
        of_run = {"backbone": "moco_vit_small", "size": 224, "batch": 512} | changes
        tree = {
            "model": {"backbone": of_run["backbone"]},
            "recipe": {"size": of_run["size"]},
            "train": {"batch": of_run["batch"]},
        }
        return ladder(4000, 3950, 1000, 1.0) | {"settings": {"config": tree}, "machine": {"gpu": "H100"}}

    def judged_as(report: dict, goal: str = "ViT-S/16 end to end", name: str = "ladder-vit_small"):
        row = judged(tmp_path, **{name: report})[goal]
        return row["met"], row["why"]

    assert judged_as(at()) == (True, None)
    slow = ladder(4000, 2950, 1000, 1.0)
    elsewhere = {"name": f"{END_TO_END}, decoded on the GPU", "images_per_s": 3010.0}
    assert judged_as(at() | slow) == (False, None)
    assert judged_as(at() | slow | {"rows": [*slow["rows"], elsewhere]}) == (True, None)
    assert judged_as(at(backbone="resnet10_w32")) == (
        None,
        "measured with backbone resnet10_w32, not moco_vit_small",
    )
    assert judged_as(at(batch=8)) == (None, "measured with batch 8, not 512")
    assert judged_as(at() | {"machine": {"gpu": None}}) == (None, "measured on a CPU")
    settings = {"settings": {"size": 224, "batch": 64}, "machine": {"gpu": "H100"}}
    rows = [AUGMENT[0] | settings, *AUGMENT[1:]]
    assert judged_as(rows, goals.VIEWS, "augment") == (None, "measured with batch 64, not 256")


def test_skipped_tests_are_not_taken_for_passed_ones(tmp_path):
    goal = "tests that want a GPU: failed"
    none = {"passed": 0, "skipped": 82, "failed": [], "reasons": ["no CUDA device"]}
    assert judged(tmp_path, tests=none)[goal]["why"] == "no test ran, 82 were skipped: no CUDA device"
    assert judged(tmp_path, tests=none | {"passed": 80})[goal]["met"] is True
    assert judged(tmp_path, tests=none | {"failed": ["x.py (took too long)"]})[goal]["met"] is False
