"""`fastssl bench gpu`: the GPU's tests and benchmarks in one command, most telling things first, ended inside a limit.

This module and `preflight` import the standard library only, so that missing packages are named all at once.
"""

from __future__ import annotations

import argparse
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

FIRST_S = 540.0  # of --first, where --seconds does not say: inside ten minutes, with a machine's start
RESERVE_S = 10.0  # of the limit, to end processes and write the archive
SHOWN_LINES, SHOWN_CHARS = 12, 160  # of what a job has printed last
VERDICT = "verdict"


def parser() -> argparse.ArgumentParser:
    """The options."""
    width = max(map(len, STAGES))
    stages = "\n".join(f"  {name:<{width}}  {text}" for name, text in MEANINGS.items())
    made = argparse.ArgumentParser(
        "fastssl bench gpu",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Run the tests that need a GPU and measure views, loaders, training steps and memory on it, the most telling\n"
        "things first. Each stage has a time limit of its own; a job that fails is named, the others go on, and the exit\n"
        "code is 1. Nothing is installed.",
        epilog=f"stages, in the order in which they run:\n{stages}\n\n"
        "Results are dated JSON files in --out, one a stage, and all of them with the logs in results.tgz, which is made\n"
        "anew after each stage. The last lines are each goal beside its figure: met, missed, or why it is not known.",
    )
    made.add_argument(
        "--first",
        action="store_true",
        help=f"what the first minutes on a GPU are for: short forms, without {', '.join(LATER)}; {FIRST_S:.0f} seconds in all",
    )
    made.add_argument(
        "--only",
        nargs="+",
        metavar="STAGE",
        help="these stages, and what they need; verdict judges what is in --out",
    )
    made.add_argument(
        "--seconds", type=float, help="limit of the whole command; everything has ended by then"
    )
    made.add_argument(
        "--out", type=Path, default=Path("docs/benchmarks"), help="folder for results (%(default)s)"
    )
    made.add_argument(
        "--work",
        type=Path,
        default=Path(tempfile.gettempdir()) / "fastssl-bench-gpu",
        help="folder for photographs, shards and compiled kernels, which the next call uses again (%(default)s)",
    )
    made.add_argument("--shards", type=Path, help="images to measure with, instead of generated photographs")
    made.add_argument("--images", type=int, default=Sizes.images, help="generated photographs (%(default)s)")
    made.add_argument(
        "--scale", type=float, default=1.0, help="share of each batch size, such as 0.05 on a CPU"
    )
    made.add_argument("--extra", default="", help="settings for every job with a configuration")
    made.add_argument("--tiny", action="store_true", help="the smallest sizes, to try the command itself")
    made.add_argument("--gpu", help="with --only verdict: the device that the files are of (this machine's)")
    return made


def run(argv: list[str]) -> int:
    """Run the sub-command; 1 where a job failed."""
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
    if args.tiny:  # tensors so small that a team of threads takes longer
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
        """Run the stages; the first tells which device the results are of."""
        plan = self._plan("unknown", on_gpu=True)
        self._turn(plan, ("facts",))
        found = self._facts()
        if found is None:
            from fastssl.bench.gpu.results import keep

            archive = keep(self._out, plan.stamp, self._work / "logs")
            raise UserError(
                f"This machine's facts could not be had, so nothing is measured: the log is in '{archive}'."
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
        """Run stages side by side, and put their results into their files."""
        from fastssl.bench.gpu.results import collect

        stages = [plan.stage(name) for name in turn]
        stage_of = {job.name: stage.name for stage in stages for job in stage.jobs}
        for stage in stages:
            for job in stage.jobs:
                if job.out is not None:  # of an earlier call today
                    job.out.unlink(missing_ok=True)
        lanes = [lane for stage in stages for lane in stage.lanes]

        def told(ended: Ended) -> None:
            self._ended.append((stage_of[ended.job.name], ended))
            self._tell(ended)
            # Without a warm-up, the measurement compiles for itself.
            if ended.failed and stage_of[ended.job.name] != "warm":
                self._failed.append(f"{ended.job.words} ({ended.failed})")

        ended = self._processes.run(lanes, max(stage.limit_s for stage in stages), told)
        for stage in stages:
            own = [each for each in ended if stage_of[each.job.name] == stage.name]
            try:
                collect(stage.name, plan, own)
            except (OSError, ValueError, LookupError, SyntaxError) as error:  # SyntaxError: of XML
                self._failed.append(f"the results of {stage.name} ({type(error).__name__}: {error})")

    def _tell(self, ended: Ended) -> None:
        """Say how a job has ended: the rows that it measured, or the last of what it printed."""
        from fastssl.bench.gpu.results import rows_told

        self._say(f"{ended.job.name}: {ended.seconds:.0f} s{f', {ended.failed}' if ended.failed else ''}")
        lines = rows_told(ended.job.out) if ended.job.out is not None else []
        log = self._work / "logs" / f"{ended.job.name}.log"
        if log.exists() and (ended.failed or not lines):
            lines += log.read_text(errors="replace").splitlines()[-SHOWN_LINES * (2 if ended.failed else 1) :]
        for line in lines:
            print(f"    {line[:SHOWN_CHARS]}", flush=True)

    def _save(self, plan: CheckSetup) -> None:
        """Write down how the jobs ended and the verdict so far, and make the archive anew."""
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
        """The GPU's name, empty for a CPU; None where it could not be had."""
        try:
            found: Any = json.loads((self._work / "facts.json").read_text())["gpu"]
        except (OSError, ValueError, LookupError):
            return None
        return found if isinstance(found, str) else None

    def _plan(self, device: str, *, on_gpu: bool) -> CheckSetup:
        args = self._args
        sizes = Sizes(images=args.images, scale=args.scale, short=args.first, extra=tuple(args.extra.split()))
        if args.first:
            sizes = _with(sizes, repeats=1, seconds=1.0)
        if args.tiny:
            few = {"images": min(args.images, 16), "scale": min(args.scale, 0.01)}
            sizes = _with(sizes, **few, steps=1, repeats=1, seconds=0.05, extra=(*TINY, *sizes.extra))
        own = self._work / f"shards-{sizes.images}"
        stamp = f"{datetime.date.today():%Y-%m-%d}-{device}"
        shards = args.shards.resolve() if args.shards else own
        return CheckSetup(self._root, self._work, shards, self._out, stamp, on_gpu, sizes)

    def _say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._began:5.0f} s] {text}", flush=True)


def _with(sizes: Sizes, **changes: Any) -> Sizes:
    import dataclasses

    return dataclasses.replace(sizes, **changes)


def choose_stages(args: argparse.Namespace) -> set[str]:
    """Return the stages to run, with what they need. Raises UserError for what is out of range, or unknown."""
    check_least(args, images=1)
    if not 0 < args.scale <= 1:
        raise UserError(f"--scale is {args.scale:g}, but it must be above 0 and at most 1.")
    if args.seconds is not None and args.seconds <= 2 * RESERVE_S:
        raise UserError(
            f"--seconds is {args.seconds:g}, but it must be above {2 * RESERVE_S:g}: {RESERVE_S:g} are kept to end all processes."
        )
    if args.shards is not None and not args.shards.is_dir():
        raise UserError(f"There is no folder '{args.shards}' for --shards.")
    for name in args.only or ():
        if name not in (*STAGES, VERDICT):
            raise UserError(f"There is no stage called '{name}'.{nearest(name, [*STAGES, VERDICT])}")
    if args.gpu is not None and args.only != [VERDICT]:
        raise UserError("--gpu names the device of files that are judged: give it with --only verdict.")
    left_out = set(LATER) if args.first else set()
    names = set(args.only) if args.only else set(STAGES) - left_out
    if args.shards is not None:
        names -= {"images"}
    elif names & WITH_SHARDS:
        names |= {"images"}
    return names


def slug(gpu: str) -> str:
    """A device's name as it stands in those of files: lower case, with hyphens; cpu for the empty name."""
    return "-".join((gpu or "cpu").lower().split())


def _gpu_here() -> str:
    from fastssl.bench.gpu.gpu_facts import gpu

    return gpu()


def _judge(out: Path, stamp: str, device: str) -> int:
    """Print each goal beside its figure, from the latest files of a device, and write that down."""
    from fastssl.bench.gpu import goals

    rows = goals.judge(out, device)
    print(f"\n{goals.told(rows)}\n", flush=True)
    (out / f"{stamp}-{VERDICT}.json").write_text(json.dumps(rows, indent=2) + "\n")
    return 0
