"""The results of a stage in one dated JSON file, and the archive of all results, rewritten after each stage."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from fastssl.bench.gpu.processes import Ended
from fastssl.bench.gpu.stages import MODELS, CheckSetup
from fastssl.bench.ladder.verdict import FULL, RUNGS

ARCHIVE = "results.tgz"


def collect(stage: str, plan: CheckSetup, ended: list[Ended]) -> None:
    """Merge the results of a stage's jobs into its one file and remove the jobs' own files.

    Raises:
        OSError, ValueError, LookupError, ElementTree.ParseError: a job has left a damaged file.
    """
    if stage == "tests":
        _write(plan.path("tests"), count_tests(ended))
        _remove(ended)
    elif stage == "warm":
        _remove(ended)
        forget_choices(plan.work)
    elif stage.removesuffix("_more") in MODELS and stage.endswith("_more"):
        merge_ladder(plan.path(f"ladder-{stage.removesuffix('_more')}"), ended)
    elif stage == "memory" or stage.startswith("switches_"):
        prefix = "memory-" if stage == "memory" else f"{stage.replace('switches_', 'switch-')}-"
        if ended:
            _write(
                plan.path(stage),
                summarise(stage, {e.job.name.removeprefix(prefix): e for e in ended})
                | {"extra": list(plan.sizes.extra)},
            )
            _remove(ended)


def count_tests(ended: Iterable[Ended]) -> dict[str, Any]:
    """Return how many tests passed and were skipped, the reasons, and which failed, from the JUnit report of each file.

    A file whose process did not finish counts as a failure, with how it ended.
    """
    passed, skipped, failed, reasons = 0, 0, [], {}
    for each in ended:
        out = each.job.out
        cases = list(ElementTree.parse(out).iter("testcase")) if out is not None and out.exists() else []
        wrong = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
        idle = [found for case in cases if (found := case.find("skipped")) is not None]
        reasons |= dict.fromkeys(found.get("message") or "no reason given" for found in idle)
        failed += [f"{case.get('classname')}::{case.get('name')}" for case in wrong]
        skipped += len(idle)
        passed += len(cases) - len(wrong) - len(idle)
        if each.failed and not wrong:
            failed.append(f"{each.job.argv[-1]} ({each.failed})")
    return {"passed": passed, "skipped": skipped, "failed": failed, "reasons": list(reasons)}


def merge_ladder(main: Path, ended: Iterable[Ended]) -> None:
    """Add the rows of a model's second measurement to the file of its first."""
    for each in ended:
        out = each.job.out
        if out is None or not out.exists():
            continue
        more = json.loads(out.read_text())
        report = json.loads(main.read_text()) if main.exists() else more
        rows = {row["name"]: row for row in [*report["rows"], *more["rows"]]}
        full = rows.get(FULL, {}).get("ms_p50")
        for row in rows.values():
            if full and row.get("step_ms"):
                row["contention"] = row["step_ms"] / full
        places = {name: place for place, name in enumerate(RUNGS)}
        report["rows"] = sorted(rows.values(), key=lambda row: places.get(row["name"], len(places)))
        _write(main, report)
        out.unlink()


def summarise(stage: str, ended: dict[str, Ended]) -> dict[str, Any]:
    """Return one report for a stage of many jobs: the full step's images/s, the ratio to the base, and the peak of memory.

    Args:
        ended: the jobs by the name of the switch or configuration; jobs without a figure are listed with the reason.
    """
    rows, failed, some = {}, {}, {}
    for name, each in ended.items():
        out = each.job.out
        report = json.loads(out.read_text()) if out is not None and out.exists() else {"rows": []}
        full = next((row for row in report["rows"] if row["name"] == FULL), None)
        if full is None or full["images_per_s"] is None:
            failed[name] = full["error"] if full else f"'{name}' has no result ({each.failed or 'no file'})"
            continue
        some = report
        rows[name] = {
            "images_per_s": full["images_per_s"],
            "mfu": full.get("mfu"),
            "peak_memory_bytes": full["memory_bytes"],
        }
    # Optimizers are compared with the default on a GPU, everything else with the base.
    for name, row in rows.items():
        base = rows.get("adamw_fused" if name.startswith("adamw") else "base") or rows.get("adamw_foreach")
        row["ratio_to_base"] = (
            row["images_per_s"] / base["images_per_s"] if base and stage != "memory" else None
        )
    about = {"machine": some.get("machine"), "versions": some.get("versions")}
    return {"part": stage, **about, "rows": rows, "failed": failed}


def rows_told(out: Path) -> list[str]:
    """Return a line for each row of a benchmark's file: the rate, or the reason why there is none; empty without rows."""
    try:
        report = json.loads(out.read_text())
        rows = report["rows"] if isinstance(report, dict) else report
        return [_row_told(row) for row in rows]
    except (OSError, ValueError, LookupError, TypeError):
        return []


def _row_told(row: dict[str, Any]) -> str:
    if row["images_per_s"] is None:
        return f"{row['name']:34} {row['error']}"
    told = f"{row['name']:34}{row['images_per_s']:12,.1f} images/s"
    for key, form in (("ms_p50", "{:,.2f} ms"), ("mfu", "MFU {:.1%}"), ("contention", "contention {:.3f}")):
        if row.get(key) is not None:
            told += f"{form.format(row[key]):>22}"
    return told


def forget_choices(work: Path) -> None:
    """Remove the compiler's choices of kernels, made while other work ran on the GPU; compiled kernels stay."""
    for path in (work / "inductor").rglob("*.best_config"):
        path.unlink()


def keep(out: Path, stamp: str, logs: Path) -> Path:
    """Rewrite the archive atomically: the results of this device and day, and the output of each job."""
    archive, part = out / ARCHIVE, out / f".{ARCHIVE}"
    with tarfile.open(part, "w:gz") as tar:
        for path in sorted(out.glob(f"{stamp}-*")):
            tar.add(path, path.name)
        for path in sorted(logs.glob("*.log")):
            tar.add(path, f"logs/{path.name}")
    part.replace(archive)
    return archive


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _remove(ended: Iterable[Ended]) -> None:
    for each in ended:
        if each.job.out is not None:
            each.job.out.unlink(missing_ok=True)
