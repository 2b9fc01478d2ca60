"""`fastssl bench gpu`: a GPU's tests and benchmarks in one command, the most informative first, within a time limit.

This module and `preflight` import the standard library only, so that all missing packages are named at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastssl.bench.gpu.preflight import check_packages, source_tree
from fastssl.bench.gpu.stages import LATER, MEANINGS, STAGES, TINY, WITH_SHARDS, CheckSetup, Sizes, turns
from shards.errors import UserError, check_least, nearest

if TYPE_CHECKING:
    from fastssl.bench.gpu.processes import Ended, Processes

# Limit of --first without --seconds: less than ten minutes, with a machine's start.
FIRST_S = 540.0
# Part of the limit that is kept to end processes and to write the archive.
RESERVE_S = 10.0
# Of a job's last output.
SHOWN_LINES, SHOWN_CHARS = 12, 160
VERDICT = "verdict"


def parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    width = max(map(len, STAGES))
    stages = "\n".join(f"  {name:<{width}}  {text}" for name, text in MEANINGS.items())
    made = argparse.ArgumentParser(
        "fastssl bench gpu",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Run the tests that need a GPU and measure views, loaders, training steps and\n"
        "memory on it, the most informative first. Each stage has its own time limit. A\n"
        "job that fails is named, the others run, and the exit code is 1. Nothing is\n"
        "installed.",
        epilog=f"stages, in the order in which they run:\n{stages}\n\n"
        "Results are dated JSON files in --out, one for each stage, and results.tgz,\n"
        "which holds all of them with the logs and is rewritten after each stage. The\n"
        "last lines show each goal and its figure: met, missed, or why it is not known.",
    )
    made.add_argument(
        "--first",
        action="store_true",
        help=f"for the first minutes on a GPU: short forms, without {', '.join(LATER)}; {FIRST_S:.0f} seconds in all",
    )
    made.add_argument(
        "--only",
        nargs="+",
        metavar="STAGE",
        help="only these stages and those they need; verdict judges the files in --out",
    )
    made.add_argument(
        "--seconds", type=float, metavar="S", help="time limit of the whole command, in seconds"
    )
    made.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        default=Path("docs/benchmarks"),
        help="folder for results (%(default)s)",
    )
    made.add_argument(
        "--work",
        type=Path,
        metavar="FOLDER",
        default=Path(tempfile.gettempdir()) / "fastssl-bench-gpu",
        help="folder for photographs, shards and compiled kernels, which later calls use again (%(default)s)",
    )
    made.add_argument(
        "--shards",
        type=Path,
        metavar="SHARDS",
        help="folder of shards to measure with, instead of generated photographs",
    )
    made.add_argument(
        "--images",
        type=int,
        metavar="N",
        default=Sizes.images,
        help="number of generated photographs (%(default)s)",
    )
    made.add_argument(
        "--scale",
        type=float,
        metavar="SHARE",
        default=1.0,
        help="share of each batch size, such as 0.05 on a CPU",
    )
    made.add_argument(
        "--extra", default="", metavar="SETTINGS", help="settings for every job with a configuration"
    )
    made.add_argument("--tiny", action="store_true", help="smallest sizes, to test the command itself")
    made.add_argument(
        "--gpu",
        metavar="NAME",
        help="with --only verdict: the device that the files were measured on (this machine's)",
    )
    return made


def run(argv: list[str]) -> int:
    """Run the sub-command; return 1 if a job failed."""
    args = parser().parse_args(argv)
    began = time.monotonic()
    names = choose_stages(args)
    root = source_tree()
    for line in check_packages():
        print(line, flush=True)
    out, work = args.out.resolve(), args.work.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if names == {VERDICT}:
        device = slug(args.gpu if args.gpu is not None else _gpu_here())
        return _judge(out, f"{datetime.date.today():%Y-%m-%d}-{device}", device)

    from fastssl.bench.gpu.processes import Processes, ended_by_signals

    logs = work / "logs"
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir(parents=True)
    limit_s = args.seconds or (FIRST_S if args.first else None)
    until = float("inf") if limit_s is None else began + limit_s - RESERVE_S
    env = {"TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"), "TRITON_CACHE_DIR": str(work / "triton")}
    if args.tiny:
        # For such small tensors several threads take longer than one.
        env["OMP_NUM_THREADS"] = "1"
    with ended_by_signals():
        return Check(args, Processes(logs, root, until, env), root, out, work, began).run(names - {VERDICT})


class Check:
    """One run of the command."""

    def __init__(
        self, args: argparse.Namespace, processes: Processes, root: Path, out: Path, work: Path, began: float
    ):
        self._args, self._processes, self._began = args, processes, began
        self._root, self._out, self._work = root, out, work
        self._ended: list[tuple[str, Ended]] = []
        self._failed: list[str] = []

    def run(self, names: set[str]) -> int:
        """Run the stages; the first one finds the name of the device."""
        plan = self._plan("unknown", on_gpu=True)
        self._turn(plan, ("facts",))
        found = self._facts()
        if found is None:
            from fastssl.bench.gpu.results import keep

            archive = keep(self._out, plan.stamp, self._work / "logs")
            raise UserError(
                f"The facts of this machine could not be read, so nothing is measured: see the log in '{archive}'."
            )
        plan = self._plan(slug(found), on_gpu=bool(found))
        shutil.copyfile(self._work / "facts.json", plan.path("facts"))
        for turn in turns(names - {"facts"}):
            self._turn(plan, turn)
            self._save(plan)
        self._save(plan)
        code = _judge(self._out, plan.stamp, slug(found))
        for line in self._failed:
            self._say(f"failed: {line}")
        self._say(f"all results: {self._out / 'results.tgz'}")
        return int(bool(self._failed)) or code

    def _turn(self, plan: CheckSetup, turn: tuple[str, ...]) -> None:
        """Run stages side by side and write their result files."""
        from fastssl.bench.gpu.results import collect

        stages = [plan.stage(name) for name in turn]
        stage_of = {job.name: stage.name for stage in stages for job in stage.jobs}
        for stage in stages:
            for job in stage.jobs:
                if job.out is not None:
                    # Left by an earlier call today.
                    job.out.unlink(missing_ok=True)
        lanes = [lane for stage in stages for lane in stage.lanes]

        def told(ended: Ended) -> None:
            self._ended.append((stage_of[ended.job.name], ended))
            self._tell(ended)
            # A failed warm-up costs time only: the measurement then compiles for itself.
            if ended.failed and stage_of[ended.job.name] != "warm":
                self._failed.append(f"{ended.job.words} ({ended.failed})")

        ended = self._processes.run(lanes, max(stage.limit_s for stage in stages), told)
        for stage in stages:
            own = [each for each in ended if stage_of[each.job.name] == stage.name]
            try:
                collect(stage.name, plan, own)
            # SyntaxError: of XML.
            except (OSError, ValueError, LookupError, SyntaxError) as error:
                self._failed.append(f"the results of {stage.name} ({type(error).__name__}: {error})")

    def _tell(self, ended: Ended) -> None:
        """Print how a job has ended: the rows that it measured, or its last lines of output."""
        from fastssl.bench.gpu.results import rows_told

        self._say(f"{ended.job.name}: {ended.seconds:.0f} s{f', {ended.failed}' if ended.failed else ''}")
        lines = rows_told(ended.job.out) if ended.job.out is not None else []
        log = self._work / "logs" / f"{ended.job.name}.log"
        if log.exists() and (ended.failed or not lines):
            lines += log.read_text(errors="replace").splitlines()[-SHOWN_LINES * (2 if ended.failed else 1) :]
        for line in lines:
            print(f"    {line[:SHOWN_CHARS]}", flush=True)

    def _save(self, plan: CheckSetup) -> None:
        """Write how the jobs ended and the verdict so far, and rewrite the archive."""
        from fastssl.bench.gpu import goals
        from fastssl.bench.gpu.results import keep

        jobs = [
            {
                "stage": stage,
                "name": each.job.name,
                "command": each.job.words,
                "seconds": round(each.seconds, 1),
                "code": each.code,
                "failed": each.failed or None,
            }
            for stage, each in self._ended
        ]
        plan.path("jobs").write_text(json.dumps(jobs, indent=2) + "\n")
        rows = goals.judge(self._out, plan.stamp[len("0000-00-00-") :])
        plan.path(VERDICT).write_text(json.dumps(rows, indent=2) + "\n")
        (self._out / f"{plan.stamp}-{VERDICT}.txt").write_text(goals.told(rows) + "\n")
        keep(self._out, plan.stamp, self._work / "logs")

    def _facts(self) -> str | None:
        """Return the GPU's name, empty for a CPU; None if it could not be read."""
        try:
            found: Any = json.loads((self._work / "facts.json").read_text())["gpu"]
        except (OSError, ValueError, LookupError):
            return None
        return found if isinstance(found, str) else None

    def _plan(self, device: str, *, on_gpu: bool) -> CheckSetup:
        args = self._args
        sizes = Sizes(images=args.images, scale=args.scale, short=args.first, extra=tuple(args.extra.split()))
        if args.first:
            sizes = dataclasses.replace(sizes, repeats=1, seconds=1.0)
        if args.tiny:
            few = {"images": min(args.images, 16), "scale": min(args.scale, 0.01)}
            sizes = dataclasses.replace(
                sizes, **few, steps=1, repeats=1, seconds=0.05, extra=(*TINY, *sizes.extra)
            )
        own = self._work / f"shards-{sizes.images}"
        stamp = f"{datetime.date.today():%Y-%m-%d}-{device}"
        shards = args.shards.resolve() if args.shards else own
        return CheckSetup(self._root, self._work, shards, self._out, stamp, on_gpu, sizes)

    def _say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._began:5.0f} s] {text}", flush=True)


def choose_stages(args: argparse.Namespace) -> set[str]:
    """Return the stages to run and those they need; raise UserError for a value out of range or an unknown name."""
    check_least(args, images=1)
    if not 0 < args.scale <= 1:
        raise UserError(f"--scale is {args.scale:g}, but it must be greater than 0 and at most 1.")
    if args.seconds is not None and args.seconds <= 2 * RESERVE_S:
        raise UserError(
            f"--seconds is {args.seconds:g}, but it must be greater than {2 * RESERVE_S:g}: "
            f"{RESERVE_S:g} are kept to end all processes."
        )
    if args.shards is not None and not args.shards.is_dir():
        raise UserError(f"There is no folder '{args.shards}' for --shards.")
    for name in args.only or ():
        if name not in (*STAGES, VERDICT):
            raise UserError(f"There is no stage called '{name}'.{nearest(name, [*STAGES, VERDICT])}")
    if args.gpu is not None and args.only != [VERDICT]:
        raise UserError("--gpu names the device whose files are judged: give it with --only verdict.")
    left_out = set(LATER) if args.first else set()
    names = set(args.only) if args.only else set(STAGES) - left_out
    if args.shards is not None:
        names -= {"images"}
    elif names & WITH_SHARDS:
        names |= {"images"}
    return names


def slug(gpu: str) -> str:
    """Return a device's name as it stands in file names: lower case, with hyphens; cpu for the empty name."""
    return "-".join((gpu or "cpu").lower().split())


def _gpu_here() -> str:
    from fastssl.bench.gpu.gpu_facts import gpu

    return gpu()


def _judge(out: Path, stamp: str, device: str) -> int:
    """Print and write each goal beside its figure, from the latest files of a device."""
    from fastssl.bench.gpu import goals

    rows = goals.judge(out, device)
    print(f"\n{goals.told(rows)}\n", flush=True)
    (out / f"{stamp}-{VERDICT}.json").write_text(json.dumps(rows, indent=2) + "\n")
    return 0
