"""Everything that needs a GPU, in parts of less than ten minutes: `python -m tests.gpu_check --only PART`, by `make gpu-check`.

Makes JPEGs of ImageNet's size, converts them, and measures views, loaders, training steps with their peers, each switch of speed, and
the memory of small cards' configurations. Results are dated JSON files, and at the end each goal of `gpu_goals` stands beside its
figure; nothing is installed. Each job is a process of its own, because a CUDA fault spoils all further work of the process it happens
in; jobs that fail or take too long are listed at the end, and the others go on.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tests import gpu_goals
from tests.gpu_jobs import MODELS, PARTS, WITH_SHARDS, Job, Plan
from tests.pictures import photo

LIMIT_S = 570  # of a part, with what it needs beforehand: some leave a machine after ten minutes
LEAST_S = 15  # that a job is begun with
END_S = 10  # for a process to end in when its time is over


def summarise(part: str, reports: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One file for a part of many jobs: of each the full step's images/s, its ratio to the base, and the peak of memory.

    Args:
        reports: the JSON of each job that has finished, by the switch's or the configuration's name.
    """
    rows = {}
    for name, report in reports.items():
        [full] = [row for row in report["rows"] if row["name"] == "full step, synthetic"]
        peak = max(row["memory_bytes"] for row in report["rows"] if row.get("memory_bytes"))
        rows[name] = {"images_per_s": full["images_per_s"], "mfu": full.get("mfu"), "peak_memory_bytes": peak}
    # The optimisers are compared with the one that is the default on a GPU, all else with the base.
    for name, row in rows.items():
        base = rows.get("adamw_fused" if name.startswith("adamw") else "base") or rows.get("adamw_foreach")
        row["ratio_to_base"] = (
            row["images_per_s"] / base["images_per_s"] if base and part != "memory" else None
        )
    some = next(iter(reports.values()), {})
    return {"part": part, "machine": some.get("machine"), "versions": some.get("versions"), "rows": rows}


def make_photos(folder: Path, count: int) -> None:
    """`count` JPEGs of 500 x 375 pixels; every 50th picture is new, the rest are its crops and flips."""
    folder.mkdir(parents=True)
    for i in range(count):
        if i % 50 == 0:
            base = photo(1000, 750, seed=i)
        x, y = i * 37 % 500, i * 53 % 375
        base.crop((x, y, x + 500, y + 375)).save(folder / f"{i:05d}.jpg", quality=90)


def gpu_name() -> str:
    """The GPU in use, or an empty text; asked in another process, so that this one holds none of its memory."""
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip()


def start(job: Job, limit_s: float = LIMIT_S) -> int:
    """Run a job as a process and return its exit code; 124 where it took too long. What it has started ends with it if it fails."""
    process = subprocess.Popen([sys.executable, "-m", job.module, *job.argv], start_new_session=True)
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return 124
    finally:
        if process.returncode != 0:
            _end(process)


def _end(process: subprocess.Popen) -> None:
    """End a process that still runs, and all that it has left behind."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, kind)
            process.wait(END_S)
        except ProcessLookupError:  # none is left
            return
        except subprocess.TimeoutExpired:
            continue


def run_jobs(
    jobs: list[Job], run: Callable[[Job, float], int] = start, limit_s: float = LIMIT_S
) -> list[str]:
    """Run the jobs one after the other, for `limit_s` together; returns a line for each that failed or did not get its turn."""
    failed, began = [], time.monotonic()
    for job in jobs:
        words = f"{job.module} {' '.join(job.argv)}"
        left_s = limit_s - (time.monotonic() - began)
        if left_s < LEAST_S:
            failed.append(f"{words} (no time was left in its part)")
            continue
        print(f"\n$ {words}", flush=True)
        code = run(job, left_s)
        if code and not (job.module == "pytest" and code == 5):  # 5: there was no test to run
            how = f"signal {-code}" if code < 0 else "took too long" if code == 124 else f"exit code {code}"
            failed.append(f"{words} ({how})")
    return failed


def finish(part: str, plan: Plan, jobs: list[Job]) -> None:
    """Put the results of a part of many jobs into one file, and take their own away."""
    made = {job.out: job for job in jobs if job.out is not None and job.out.exists()}
    if not made:
        return
    if part == "tests":
        for out in made:
            counts = count_tests(ElementTree.parse(out).getroot())
            plan.path(part).write_text(json.dumps(counts, indent=2) + "\n")
            out.unlink()
    elif part in MODELS:
        fold_variants(plan.path(f"ladder-{part}"), list(made))
    elif part == "memory" or part.startswith("switches_"):
        prefix = f"{plan.stamp}-{'memory' if part == 'memory' else part.replace('switches_', 'switch-')}-"
        reports = {out.stem.removeprefix(prefix): json.loads(out.read_text()) for out in made}
        summary = summarise(part, reports)
        plan.path(part).write_text(json.dumps(summary, indent=2) + "\n")
        for out in made:
            out.unlink()
        for name, row in summary["rows"].items():
            ratio = f"{row['ratio_to_base']:.2f}" if row["ratio_to_base"] else ""
            print(
                f"{name:28}{row['images_per_s']:10,.1f} images/s{ratio:>8}{row['peak_memory_bytes'] / 2**30:9.2f} GiB"
            )


def count_tests(suites: ElementTree.Element) -> dict[str, Any]:
    """How many tests of a JUnit report passed and were skipped, and which failed."""
    cases = list(suites.iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    names = [f"{case.get('classname')}::{case.get('name')}" for case in failed]
    return {"passed": len(cases) - len(failed) - skipped, "skipped": skipped, "failed": names}


def fold_variants(main: Path, files: list[Path]) -> None:
    """Put the figures of a model's further ladders into that of its own settings, where it was made, and take their files away."""
    if main not in files:
        return
    report = json.loads(main.read_text())
    report["variants"] = {}
    for out in files:
        if out != main:
            other = json.loads(out.read_text())
            rates = {row["name"]: row["images_per_s"] for row in other["rows"]}
            figures = {name: rates.get(name) for name in ("loader", gpu_goals.FULL, gpu_goals.END_TO_END)}
            report["variants"][out.stem.removeprefix(f"{main.stem}-")] = {
                **figures,
                "contention": other["verdict"]["contention"],
            }
            out.unlink()
    main.write_text(json.dumps(report, indent=2) + "\n")


def verdict(out: Path, stamp: str, device: str) -> None:
    """Print each goal beside its figure, from the latest files of the device, and write that down."""
    rows = gpu_goals.judge(out, device)
    print(f"\n{gpu_goals.told(rows)}")
    (out / f"{stamp}-verdict.json").write_text(json.dumps(rows, indent=2) + "\n")


def main(argv: list[str] | None = None, run: Callable[[Job, float], int] = start) -> int:
    """Run the parts that are asked for; the exit code is 1 where a job failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only",
        nargs="*",
        choices=[*PARTS, "verdict"],
        default=list(PARTS),
        metavar="PART",
        help=f"{', '.join(PARTS)}; verdict runs nothing and judges what is in --out",
    )
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument(
        "--scale", type=float, default=1.0, help="share of each batch size; small for a trial on a CPU"
    )
    parser.add_argument("--extra", default="", help="settings for every job with a configuration")
    parser.add_argument("--gpu", help="the device's name, where it is known")
    parser.add_argument(
        "--within", type=float, help="seconds for all parts together; what is left then is named"
    )
    args = parser.parse_args(argv)
    started = began = time.monotonic()
    gpu = gpu_name() if args.gpu is None else args.gpu
    device = "-".join((gpu or "cpu").lower().split())
    stamp = f"{datetime.date.today():%Y-%m-%d}-{device}"
    args.out.mkdir(parents=True, exist_ok=True)
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as tmp:
        shards = Path(tmp) / "shards"
        plan = Plan(shards, args.out, stamp, bool(gpu), args.scale, tuple(args.extra.split()))
        if set(args.only) & set(WITH_SHARDS):
            make_photos(Path(tmp) / "photos", args.images)
            failed += run_jobs([Job(("shard", str(Path(tmp) / "photos"), str(shards)))], run)
        for part in dict.fromkeys(args.only):
            if part == "verdict":
                continue
            jobs = plan.jobs(part)
            for job in jobs:
                if job.out is not None:  # of an earlier run today
                    job.out.unlink(missing_ok=True)
            now = time.monotonic()
            left_s = started + args.within - now if args.within is not None else LIMIT_S
            failed += run_jobs(jobs, run, min(left_s, began + LIMIT_S - now))
            try:
                finish(part, plan, jobs)
            except (OSError, ValueError, LookupError, ElementTree.ParseError) as fault:
                failed.append(f"the results of {part} ({type(fault).__name__}: {fault})")
            began = time.monotonic()
    verdict(args.out, stamp, device)
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
