"""`fastssl launch slurm CONFIG`: a run as a Slurm job that saves before its time is up, is queued again and goes on."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.errors import UserError, check_least

USAGE = """usage: fastssl launch slurm CONFIG [options] [--section.key value ...]

Submit `fastssl pretrain CONFIG --resume` to Slurm, one process per GPU. Ahead of the end of its time the run saves, queues itself
again and goes on where it was; a preempted one is queued again by Slurm. Needs submitit (pip install submitit).
  --nodes N           machines (1)
  --gpus N            GPUs of each (8)
  --hours H           time of one turn (24)
  --partition NAME    also --account, --qos, --constraint: passed on as they are
  --cpus-per-gpu N    cores for each process (8)
  --save-before S     seconds before the end at which the run saves (300)
  --max-requeues N    turns after the first (100)
  --setup LINE        a shell line before the run, such as 'module load cuda'; may be repeated
  --folder DIR        where Slurm's output goes; all nodes must see it (runs/slurm)
  --dry-run           print the sbatch script, submit nothing
  --local             run it here and now with submitit's local executor, to try it

  fastssl launch slurm configs/moco_v3_vit_base.yaml --nodes 8 --gpus 8 --partition gpu --data.shards imagenet-shards/"""

REQUEUE = 128 + signal.SIGUSR1  # what `fastssl pretrain` exits with after it has saved on Slurm's warning
PASSED_ON = ("partition", "account", "qos", "constraint")


@dataclass(frozen=True)
class SlurmJob:
    """What each process of the job does; submitit pickles it."""

    argv: tuple[str, ...]
    """Arguments of `fastssl pretrain`."""
    max_requeues: int = 100

    def __call__(self) -> int:
        """Train in the place that the job's environment gives this process; on Slurm's warning, queue the job again."""
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
        if (
            place.num_tasks > 1
        ):  # torchrun's default: processes that each take all cores for themselves stall each other
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
        """For submitit, where the warning comes before the run has begun: the same again."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def torch_environment(
    *, hostnames: list[str], job_id: str, num_nodes: int, rank: int, local_rank: int, world: int
) -> dict[str, str]:
    """The variables that torchrun would set. All processes of a job agree on the port, and jobs on one machine seldom do."""
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
    """Queue a Slurm job again; UserError where it has had its turns, as Slurm counts them."""
    turns = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if turns >= most:
        raise UserError(
            f"The job was queued again {turns} times, and --max-requeues is {most}: it is saved; launch it again to go on."
        )
    print(f"Saved; job {job_id} is queued again and will go on.", flush=True)
    call(["scontrol", "requeue", job_id])


def run(argv: list[str]) -> int:
    """Run the command."""
    if not argv or argv[0] in ("-h", "--help") or argv[1:2] in ([], ["-h"], ["--help"]):
        print(USAGE)
        return 0
    if argv[0] != "slurm":
        raise UserError(
            f"There is no 'fastssl launch {argv[0]}': it can launch slurm. Without a scheduler: torchrun (docs/slurm.md)."
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
    """Refuse here what would otherwise fail after hours in the queue: UserError, with the way out."""
    from fastssl.pretraining import run_config

    check_least(args, nodes=1, gpus=1, cpus_per_gpu=1, max_requeues=0)
    if not 0 < args.save_before < args.hours * 3600:
        raise UserError(
            f"--save-before is {args.save_before} s, but it must be above 0 and less than --hours {args.hours:g} "
            f"({args.hours * 3600:,.0f} s)."
        )
    cfg = run_config.load(path, [token for token in overrides if token != "--resume"]).config
    world = args.nodes * args.gpus
    if cfg.train.batch % world:
        near = max(1, round(cfg.train.batch / world)) * world
        raise UserError(
            f"train.batch is {cfg.train.batch}, which {args.nodes} x {args.gpus} = {world} processes cannot share: "
            f"set --train.batch {near}."
        )
    if not cfg.data.shards:
        raise UserError("No shards to train on: give --data.shards DIR, which all nodes must see.")
    if args.nodes == 1:
        cfg.data.open()  # says what is wrong with them


def parameters(args: argparse.Namespace) -> dict[str, Any]:
    """Slurm's parameters, as submitit names them."""
    asked = {name: value for name in PASSED_ON if (value := getattr(args, name))}
    return {
        "job_name": "fastssl",
        "nodes": args.nodes,
        "ntasks_per_node": args.gpus,
        "gpus_per_node": args.gpus,
        "cpus_per_task": args.cpus_per_gpu,
        "time": max(1, round(args.hours * 60)),
        # Slurm's warning must be the signal that the trainer listens to, and submitit on the compute nodes, too.
        "setup": ["export SUBMITIT_PREEMPT_SIGNAL=USR1", *args.setup],
        "additional_parameters": {"requeue": True, "signal": f"USR1@{args.save_before}"},
        **asked,
    }


def script(args: argparse.Namespace) -> str:
    """The sbatch script that submitit would submit, where JOB stands for the pickled job."""
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
        raise UserError(f"--local has one machine, and --nodes is {args.nodes}.")
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
        raise UserError(
            "`fastssl launch slurm` needs submitit: pip install submitit (or fastssl-pretrain[slurm])."
        ) from error
    return submitit
