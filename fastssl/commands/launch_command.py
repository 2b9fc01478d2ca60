"""`fastssl launch slurm CONFIG`: a run as a Slurm job, which saves before its time is up, requeues itself and continues."""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.errors import UserError, check_least

USAGE = """usage: fastssl launch slurm CONFIG [options] [--section.key value ...]

Submit `fastssl pretrain CONFIG --resume` to Slurm, one process per GPU. Before
its time is up the run saves, requeues itself and continues where it was; Slurm
requeues a preempted run. Needs submitit (pip install submitit). In a job of
your own, torchrun passes Slurm's SIGUSR1 on with --signals-to-handle only.
  --nodes N           number of machines (1)
  --gpus N            GPUs of each machine (8)
  --hours H           time limit of one job (24)
  --partition NAME    passed to Slurm unchanged; also --account, --qos and
                      --constraint
  --cpus-per-gpu N    cores of each process (8)
  --save-before S     save this many seconds before the time limit (300)
  --max-requeues N    how often the job is requeued at most (100)
  --setup LINE        a shell line to run first, such as 'module load cuda'; may
                      be repeated
  --folder FOLDER     folder for Slurm's output, seen by all nodes (runs/slurm)
  --dry-run           print the sbatch script, submit nothing
  --local             run on this machine, with submitit's local executor

  fastssl launch slurm moco_v3_vit_base --nodes 8 --gpus 8 \\
      --partition gpu --data.shards imagenet-shards/"""

# Exit code of `fastssl pretrain` after it has saved on Slurm's warning.
REQUEUE = 128 + signal.SIGUSR1
_PLAIN_PATH = re.compile(r"[\w./+=@,:-]+", re.ASCII)
PASSED_ON = ("partition", "account", "qos", "constraint")


@dataclass(frozen=True)
class SlurmJob:
    """What each process of a Slurm job runs; submitit pickles it."""

    argv: tuple[str, ...]
    """Arguments of `fastssl pretrain`."""
    max_requeues: int = 100

    def __call__(self) -> int:
        """Train as the rank that the job's environment gives this process; after Slurm's warning, requeue the job."""
        import submitit

        place = submitit.JobEnvironment()
        os.environ.update(
            torch_environment(
                hostnames=list(place.hostnames),
                job_id=str(place.job_id),
                num_nodes=place.num_nodes,
                rank=place.global_rank,
                local_rank=place.local_rank,
                world=place.num_tasks,
            )
        )
        # As torchrun does: processes that each use all cores stall each other.
        if place.num_tasks > 1:
            os.environ.setdefault("OMP_NUM_THREADS", "1")
        from fastssl.commands.pretrain_command import run  # torch reads the above when it is imported

        code = run([*self.argv, "--resume"])
        if code == REQUEUE:
            if place.global_rank == 0:
                requeue(str(place.job_id), self.max_requeues)
            return 0
        if code:
            sys.exit(code)
        return 0

    def checkpoint(self) -> Any:
        """Return the same job, for submitit, where the warning comes before the run has begun."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def torch_environment(
    *, hostnames: list[str], job_id: str, num_nodes: int, rank: int, local_rank: int, world: int
) -> dict[str, str]:
    """Return the variables that torchrun would set. All processes of a job get the same port; jobs on one machine rarely share one."""
    digits = "".join(filter(str.isdigit, job_id)) or "0"
    return {
        "MASTER_ADDR": hostnames[0] if num_nodes > 1 else "127.0.0.1",
        "MASTER_PORT": str(20_000 + int(digits) % 20_000),
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world // num_nodes),
    }


def requeue(job_id: str, most: int, call: Callable[[list[str]], Any] = subprocess.check_call) -> None:
    """Requeue a Slurm job; raise UserError where Slurm has counted `most` restarts already."""
    turns = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if turns >= most:
        raise UserError(
            f"The job was requeued {turns} times, and --max-requeues is {most}: it is saved; launch it again to continue."
        )
    print(f"Saved; job {job_id} is requeued and will continue.", flush=True)
    call(["scontrol", "requeue", job_id])


def run(argv: list[str]) -> int:
    """Run the command."""
    if not argv or argv[0] in ("-h", "--help") or argv[1:2] in ([], ["-h"], ["--help"]):
        print(USAGE)
        return 0
    if argv[0] != "slurm":
        raise UserError(
            f"There is no 'fastssl launch {argv[0]}': it can launch slurm. Without a scheduler: fastssl pretrain --gpus all, or "
            "torchrun (docs/slurm.md)."
        )
    if argv[1].startswith("-"):
        raise UserError("Give the configuration file first: fastssl launch slurm CONFIG [options].")
    args, overrides = _parser().parse_known_args(argv[2:])
    check(argv[1], overrides, args)
    job = SlurmJob((argv[1], *overrides), args.max_requeues)
    if args.dry_run:
        print(script(args))
        return 0
    if not args.local:
        return _submit(job, args)
    return _run_here(job, args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("fastssl launch slurm CONFIG", usage=USAGE, allow_abbrev=False)
    for name, kind, default in (
        ("nodes", int, 1),
        ("gpus", int, 8),
        ("hours", float, 24.0),
        ("cpus-per-gpu", int, 8),
        ("save-before", int, 300),
        ("max-requeues", int, 100),
        ("folder", str, "runs/slurm"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default)
    for name in PASSED_ON:
        parser.add_argument(f"--{name}")
    parser.add_argument("--setup", action="append", default=[])
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--local", action="store_true")
    return parser


def check(path: str, overrides: list[str], args: argparse.Namespace) -> None:
    """Raise UserError, with the way out, for what would otherwise fail after hours in the queue."""
    from fastssl.commands.pretrain_command import take_resume
    from fastssl.pretraining import run_config

    check_least(args, nodes=1, gpus=1, cpus_per_gpu=1, max_requeues=0)
    if not 0 < args.hours <= 24 * 366:
        raise UserError(
            f"--hours is {args.hours:g}, but it must be above 0 and at most {24 * 366:,} (a year)."
        )
    _check_words(args)
    if not 0 < args.save_before < args.hours * 3600:
        raise UserError(
            f"--save-before is {args.save_before} s, but it must be above 0 and less than --hours {args.hours:g} "
            f"({args.hours * 3600:,.0f} s)."
        )
    cfg = run_config.load(path, take_resume(overrides)[1]).config
    world = args.nodes * args.gpus
    if cfg.train.batch % world:
        near = max(1, round(cfg.train.batch / world)) * world
        raise UserError(
            f"train.batch is {cfg.train.batch}, which {args.nodes} x {args.gpus} = {world} processes cannot share: "
            f"set --train.batch {near}."
        )
    if not cfg.data.shards:
        raise UserError("No shards to train on: give --data.shards SHARDS, which all nodes must see.")
    if args.nodes == 1:
        cfg.data.open()  # raises for shards that are missing or incomplete


def _check_words(args: argparse.Namespace) -> None:
    """Refuse what would become something else in the sbatch script, where submitit writes these words unquoted."""
    for name in (*PASSED_ON, "setup"):
        given = getattr(args, name) or ""
        for text in given if isinstance(given, list) else [given]:
            kind = "spaces, line breaks" if name != "setup" else "line breaks"
            if any(not c.isprintable() or (c.isspace() and name != "setup") for c in text):
                raise UserError(f"--{name} is {text!r}, but it must have no {kind} or control characters.")
    if not _PLAIN_PATH.fullmatch(args.folder):
        raise UserError(
            f"--folder is {args.folder!r}, but Slurm's script takes only letters, digits and _ . / + = @ , : - in it: choose another "
            "folder, or a link to it with such a name."
        )


def parameters(args: argparse.Namespace) -> dict[str, Any]:
    """Return Slurm's parameters, as submitit names them."""
    asked = {name: value for name in PASSED_ON if (value := getattr(args, name))}
    return {
        "job_name": "fastssl",
        "nodes": args.nodes,
        "ntasks_per_node": args.gpus,
        "gpus_per_node": args.gpus,
        "cpus_per_task": args.cpus_per_gpu,
        "time": max(1, round(args.hours * 60)),
        # Slurm must warn with the signal that the trainer, and submitit on the compute nodes, listens to.
        "setup": ["export SUBMITIT_PREEMPT_SIGNAL=USR1", *args.setup],
        "additional_parameters": {"requeue": True, "signal": f"USR1@{args.save_before}"},
        **asked,
    }


def script(args: argparse.Namespace) -> str:
    """Return the sbatch script that submitit would submit."""
    slurm = _submitit().slurm.slurm
    folder = Path(args.folder).absolute()
    command = f"{sys.executable} -u -m submitit.core._submit {folder}"
    return slurm._make_sbatch_string(command=command, folder=folder, **parameters(args))


def _submit(job: SlurmJob, args: argparse.Namespace) -> int:
    submitit = _submitit()
    try:
        executor = submitit.SlurmExecutor(folder=args.folder)
    except RuntimeError as error:
        raise UserError(
            f"{str(error).rstrip('?.')}? --dry-run prints the script, --local tries it here."
        ) from error
    executor.update_parameters(**parameters(args))
    submitted = executor.submit(job)
    print(f"Submitted job {submitted.job_id}. Its output: {submitted.paths.stdout}")
    return 0


def _run_here(job: SlurmJob, args: argparse.Namespace) -> int:
    submitit = _submitit()
    if args.nodes != 1:
        raise UserError(f"--local runs on one machine, but --nodes is {args.nodes}: leave it at 1.")
    executor = submitit.LocalExecutor(folder=args.folder)
    minutes = max(1, round(args.hours * 60))
    executor.update_parameters(
        tasks_per_node=args.gpus, timeout_min=minutes, setup=["export SUBMITIT_PREEMPT_SIGNAL=USR1"]
    )
    running = executor.submit(job)
    print(f"Running as local job {running.job_id}: {running.paths.stdout}", flush=True)
    try:
        running.results()
    except (submitit.core.utils.FailedJobError, submitit.core.utils.UncompletedJobError) as error:
        print(running.stdout() or "", running.stderr() or "", sep="\n", file=sys.stderr)
        last = str(error).strip().splitlines()[-1] if str(error).strip() else "it left no result"
        raise UserError(f"The job failed: {last}") from error
    print(running.stdout() or "")
    return 0


def _submitit() -> Any:
    try:
        import submitit
        import submitit.slurm.slurm
    except ImportError as error:
        raise UserError("`fastssl launch slurm` needs submitit: pip install submitit.") from error
    return submitit
