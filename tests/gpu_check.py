"""Everything that needs a GPU, in pieces of less than ten minutes: `python -m tests.gpu_check --only PART`, by `make gpu-check`.

Makes JPEGs of ImageNet's size, converts them, and measures loaders, training steps with their peers, each switch of speed, and the
memory of small cards' configurations. Results are dated JSON files; nothing is installed. Each job is a process of its own, because a
CUDA fault spoils all further work of the process it happens in; jobs that fail or take too long are listed at the end.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.pictures import photo

LIMIT_S = 570  # of one job: some leave a machine after ten minutes

# Configuration and images per step that an 80 GB card holds.
MODELS = {
    "resnet50": ("configs/moco_v3_resnet50.yaml", 256),
    "vit_small": ("configs/moco_v3_vit_small.yaml", 512),
    "vit_base": ("configs/moco_v3_vit_base.yaml", 256),
}
# What each switch is set to, from a base of bf16, eager, and the defaults.
BASE = ["--train.compile", "False", "--train.precision", "bf16"]
ADAMW = ["--optim.name", "adamw", "--optim.lr", "1e-4", "--optim.weight_decay", "0.1"]
SWITCHES = {
    "base": [],
    "fp16": ["--train.precision", "fp16"],
    "fp32": ["--train.precision", "fp32"],
    "compile": ["--train.compile", "True"],
    "channels_first": ["--train.channels_last", "False"],
    "checkpointing_blocks": ["--train.checkpointing", "blocks"],
    "checkpointing_selective": ["--train.checkpointing", "selective"],
    "ema_loop": ["--method.ema", "loop"],
    "adamw_fused": [*ADAMW, "--optim.implementation", "fused"],
    "adamw_foreach": [*ADAMW, "--optim.implementation", "foreach"],
    "adamw_loop": [*ADAMW, "--optim.implementation", "loop"],
    "attention_explicit": ["--model.attention", "explicit"],
    "side_stream_off": ["--data.side_stream", "False"],
}
ON_CPU = (
    "base",
    "compile",
    "channels_first",
    "ema_loop",
    "adamw_foreach",
    "adamw_loop",
    "attention_explicit",
)
# Configurations of small cards: the batch is cut to two chunks, which is what decides the peak.
CARDS = {
    "card_8gb_resnet50": 64,
    "card_8gb_vit_small": 64,
    "card_8gb_vit_base": 32,
    "card_16gb_resnet50": 128,
    "card_16gb_vit_small": 128,
    "card_16gb_vit_base": 64,
    "card_24gb_resnet50": 192,
    "card_24gb_vit_small": 256,
    "card_24gb_vit_base": 128,
    "card_80gb_resnet50": 512,
    "card_80gb_vit_small": 512,
    "card_80gb_vit_base": 256,
}
PARTS = ("tests", "loader", *MODELS, *(f"switches_{name}" for name in ("resnet50", "vit_small")), "memory")


@dataclass(frozen=True)
class Job:
    """One process."""

    argv: tuple[str, ...]
    """Arguments of `fastssl`, or of pytest where `module` says so."""
    out: Path | None = None
    """The JSON file it writes."""
    module: str = "fastssl"


@dataclass(frozen=True)
class Plan:
    """What all jobs share."""

    shards: Path
    out: Path
    stamp: str
    """Begins the names of files: the date and the device."""
    on_gpu: bool
    scale: float = 1.0
    """Share of each batch size."""
    extra: tuple[str, ...] = ()
    """Further settings for every job with a configuration, such as tiny sizes for a trial."""

    def jobs(self, part: str) -> list[Job]:
        """The jobs of a part."""
        if part == "tests":
            return [Job(("-m", "gpu", "tests"), module="pytest")]
        if part == "loader":
            out = self.path("loader")
            return [Job(("bench", "loader", str(self.shards), "--json", str(out)), out)]
        if part == "memory":
            return [self._card(name, chunk) for name, chunk in CARDS.items()] if self.on_gpu else []
        if part.startswith("switches_"):
            model = part.removeprefix("switches_")
            names = SWITCHES if self.on_gpu else ON_CPU
            return [self._switch(model, name) for name in names if _concerns(name, model)]
        path, batch = MODELS[part]
        flags = ["--data.shards", str(self.shards), "--train.batch", self.batch(batch)]
        jobs = [self._bench(f"ladder-{part}", path, flags)]
        if self.on_gpu:  # its end to end beside the ladder's
            off = [*flags, *SWITCHES["side_stream_off"], "--quick", "--steps", "20"]
            jobs.append(self._bench(f"ladder-{part}-side_stream_off", path, off))
        return jobs

    def path(self, name: str) -> Path:
        """The file of a result."""
        return self.out / f"{self.stamp}-{name}.json"

    def batch(self, images: int) -> str:
        """A batch size, scaled."""
        return str(max(4, int(images * self.scale)))

    def _bench(self, name: str, path: str, flags: list[str]) -> Job:
        out = self.path(name)
        return Job(("bench", path, *flags, *self.extra, "--json", str(out)), out)

    def _switch(self, model: str, name: str) -> Job:
        path, batch = MODELS[model]
        flags = ["--train.batch", self.batch(batch // 2), *BASE, *SWITCHES[name], "--quick", "--steps", "10"]
        return self._bench(f"switch-{model}-{name}", path, flags)

    def _card(self, name: str, chunk: int) -> Job:
        flags = [
            "--train.batch",
            str(2 * chunk),
            "--method.queue",
            "0",
            "--train.compile",
            "False",
            "--quick",
        ]
        return self._bench(f"memory-{name}", f"configs/{name}.yaml", flags)


def _concerns(switch: str, model: str) -> bool:
    """Whether a switch has an effect on a model's step; the side stream is measured with the ladder, which has a loader."""
    if switch == "side_stream_off":
        return False
    return not (
        (switch == "channels_first" and "vit" in model)
        or (switch == "attention_explicit" and "vit" not in model)
    )


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
    """Run a job as a process and return its exit code; 124 where it took too long."""
    try:
        return subprocess.run([sys.executable, "-m", job.module, *job.argv], timeout=limit_s).returncode
    except subprocess.TimeoutExpired:
        return 124


def run_jobs(jobs: list[Job], run: Callable[[Job], int] = start) -> list[str]:
    """Run the jobs one after the other; returns a line for each that failed."""
    failed = []
    for job in jobs:
        words = f"{job.module} {' '.join(job.argv)}"
        print(f"\n$ {words}", flush=True)
        code = run(job)
        if code and not (job.module == "pytest" and code == 5):  # 5: there was no test to run
            how = f"signal {-code}" if code < 0 else "took too long" if code == 124 else f"exit code {code}"
            failed.append(f"{words} ({how})")
    return failed


def finish(part: str, plan: Plan, jobs: list[Job]) -> None:
    """Put the results of a part of many jobs into one file, and take their own away."""
    made = {job: job.out for job in jobs if job.out is not None and job.out.exists()}
    if (part not in ("memory",) and not part.startswith("switches_")) or not made:
        return
    prefix = f"{plan.stamp}-{'memory' if part == 'memory' else part.replace('switches_', 'switch-')}-"
    reports = {out.stem.removeprefix(prefix): json.loads(out.read_text()) for out in made.values()}
    summary = summarise(part, reports)
    plan.path(part).write_text(json.dumps(summary, indent=2) + "\n")
    for out in made.values():
        out.unlink()
    for name, row in summary["rows"].items():
        ratio = f"{row['ratio_to_base']:.2f}" if row["ratio_to_base"] else ""
        print(
            f"{name:28}{row['images_per_s']:10,.1f} images/s{ratio:>8}{row['peak_memory_bytes'] / 2**30:9.2f} GiB"
        )


def main(argv: list[str] | None = None, run: Callable[[Job], int] = start) -> int:
    """Run the parts that are asked for; the exit code is 1 where a job failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", nargs="*", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS)
    )
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument(
        "--scale", type=float, default=1.0, help="share of each batch size; small for a trial on a CPU"
    )
    parser.add_argument("--extra", default="", help="settings for every job with a configuration")
    parser.add_argument("--gpu", help="the device's name, where it is known")
    args = parser.parse_args(argv)
    gpu = gpu_name() if args.gpu is None else args.gpu
    stamp = f"{datetime.date.today():%Y-%m-%d}-{'-'.join((gpu or 'cpu').lower().split())}"
    args.out.mkdir(parents=True, exist_ok=True)
    failed = []
    with tempfile.TemporaryDirectory() as tmp:
        shards = Path(tmp) / "shards"
        plan = Plan(shards, args.out, stamp, bool(gpu), args.scale, tuple(args.extra.split()))
        if set(args.only) & {"loader", *MODELS}:
            make_photos(Path(tmp) / "photos", args.images)
            failed += run_jobs([Job(("shard", str(Path(tmp) / "photos"), str(shards)))], run)
        for part in dict.fromkeys(args.only):
            jobs = plan.jobs(part)
            failed += run_jobs(jobs, run)
            finish(part, plan, jobs)
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
