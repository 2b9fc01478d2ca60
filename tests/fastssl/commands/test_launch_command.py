"""`fastssl launch slurm`: its script, its checks, the environment it gives, its queueing again, and a real job run here."""

import os
import signal
from pathlib import Path

import pytest

from fastssl.commands import launch_command
from fastssl.commands.launch_command import SlurmJob, requeue, torch_environment
from fastssl.commands.pretrain_command import take_resume
from fastssl.core import checkpoint
from shards.errors import UserError
from tests import needs

needs.module("submitit")


def test_the_script_asks_for_what_was_asked(config, capsys):
    flags = ["--nodes", "2", "--gpus", "2", "--hours", "1.5", "--partition", "gpu", "--save-before", "90"]
    flags += ["--setup", "module load cuda"]
    assert launch_command.run(["slurm", str(config()), *flags, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "#!/bin/bash"
    asked = {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")}
    assert {
        "nodes=2",
        "ntasks-per-node=2",
        "gpus-per-node=2",
        "cpus-per-task=8",
        "time=90",
        "partition=gpu",
        "signal=USR1@90",
        "requeue",
        "open-mode=append",
    } <= asked
    assert not any(line.startswith(("account", "qos", "constraint")) for line in asked)
    setup = lines.index("export SUBMITIT_PREEMPT_SIGNAL=USR1")
    assert lines[setup + 1] == "module load cuda"
    [command] = [line for line in lines if line.startswith("srun")]
    assert "-m submitit.core._submit" in command


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["pbs", "CONFIG"], "it can launch slurm"),
        (["slurm", "--nodes", "2"], "configuration file first"),
        (["slurm", "CONFIG", "--gpus", "0"], "--gpus is 0"),
        (
            ["slurm", "CONFIG", "--gpus", "3"],
            r"train.batch is 8, which 1 x 3 = 3 processes cannot share: set --train.batch 9",
        ),
        (["slurm", "CONFIG", "--hours", "0.01"], "--save-before is 300 s"),
        (["slurm", "CONFIG", "--hours", "inf"], "--hours is inf, but it must be above 0"),
        (["slurm", "CONFIG", "--hours", "nan"], "--hours is nan"),
        (
            ["slurm", "CONFIG", "--partition", "gpu\nrm -rf x"],
            r"--partition is 'gpu\\nrm -rf x', but it must have no",
        ),
        (["slurm", "CONFIG", "--qos", "a b"], "--qos is 'a b', but it must have no spaces"),
        (["slurm", "CONFIG", "--setup", "true", "--setup", "a\rb"], "--setup is .* no line breaks"),
        (
            ["slurm", "CONFIG", "--folder", "x;touch y"],
            "--folder is 'x;touch y', but Slurm's script takes only",
        ),
        (["slurm", "CONFIG", "--folder", "a\nb"], "--folder is "),
        (["slurm", "CONFIG", "--folder", "$(id)"], "--folder is "),
        (["slurm", "CONFIG", "--train.bach", "8"], "Did you mean 'train.batch'"),
        (["slurm", "CONFIG", "--gpus", "2", "--data.shards", "nowhere"], "no folder 'nowhere'"),
        (
            ["slurm", "CONFIG", "--gpus", "2", "--nodes", "2", "--local"],
            "--local runs on one machine, but --nodes is 2",
        ),
        (["slurm", "CONFIG", "--gpus", "2"], 'Could not detect "srun".*--dry-run'),
    ],
)
def test_mistakes_are_named_before_the_queue(config, argv, words, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        launch_command.run([str(config()) if token == "CONFIG" else token for token in argv])


def test_a_job_may_continue_another_run(config, capsys):
    """The job adds its own --resume, which then means the folder of the job; the checks read over both."""
    argv = ["slurm", str(config()), "--gpus", "2", "--resume", "runs/old", "--dry-run"]
    assert launch_command.run(argv) == 0
    assert "#SBATCH" in capsys.readouterr().out
    flags = ["--resume", "runs/old", "--train.batch", "8", "--resume"]
    assert take_resume(flags) == (Path("runs/old"), ["--train.batch", "8"])
    assert take_resume(["--resume"]) == (True, [])
    assert take_resume(["--train.batch", "8"]) == (False, ["--train.batch", "8"])


def test_no_shards_are_a_mistake(config):
    with pytest.raises(UserError, match="all nodes must see"):
        launch_command.run(["slurm", str(config(data="")), "--gpus", "2"])


def test_environment_of_each_process():
    found = torch_environment(
        hostnames=["a", "b"], job_id="123_4", num_nodes=2, rank=5, local_rank=1, world=8
    )
    assert found == {
        "MASTER_ADDR": "a",
        "MASTER_PORT": str(20_000 + 1234),
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "8",
        "LOCAL_WORLD_SIZE": "4",
    }
    alone = torch_environment(hostnames=["a"], job_id="DEBUG", num_nodes=1, rank=0, local_rank=0, world=1)
    assert alone["MASTER_ADDR"] == "127.0.0.1"


def test_requeue_counts_its_turns(monkeypatch, capsys):
    calls = []
    requeue("77", 2, calls.append)
    assert calls == [["scontrol", "requeue", "77"]]
    assert "job 77 is requeued and will continue" in capsys.readouterr().out
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    with pytest.raises(UserError, match="requeued 2 times, and --max-requeues is 2"):
        requeue("77", 2, calls.append)
    assert len(calls) == 1


@pytest.fixture
def here(tmp_path):
    """Run a job in this process, with submitit's debug executor; its environment is put back afterwards."""
    import submitit

    def go(job: SlurmJob) -> int:
        executor = submitit.DebugExecutor(folder=tmp_path / "jobs")
        return executor.submit(job).result()

    return go


# submitit's debug executor leaves its log files open.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_warned_run_is_queued_again_and_others_are_not(here, monkeypatch):
    seen, codes = [], [launch_command.REQUEUE, 0]

    def pretrain(argv: list[str]) -> int:
        seen.append((argv, os.environ["RANK"], os.environ["WORLD_SIZE"]))
        return codes.pop(0)

    queued = []
    monkeypatch.setattr("fastssl.commands.pretrain_command.run", pretrain)
    monkeypatch.setattr(launch_command, "requeue", lambda job_id, most: queued.append(most))
    job = SlurmJob(("c.yaml", "--train.batch", "8"), 5)
    assert here(job) == 0
    assert queued == [5]
    assert here(job) == 0
    assert queued == [5]
    assert seen == [(["c.yaml", "--train.batch", "8", "--resume"], "0", "1")] * 2
    assert launch_command.REQUEUE == 128 + signal.SIGUSR1


def test_a_warning_before_the_run_begins_queues_the_same_job():
    job = SlurmJob(("c.yaml",), 5)
    assert job.checkpoint().function is job


@pytest.mark.slow  # two more processes import torch
def test_a_job_of_two_processes_runs_here(config, tmp_path, capfd):
    path = config({"train": {"epochs": 1}, "knn": {"every": 0}})
    flags = ["--gpus", "2", "--folder", str(tmp_path / "jobs"), "--local"]
    assert launch_command.run(["slurm", str(path), *flags]) == 0
    [*_, last] = checkpoint.list_checkpoints(tmp_path / "run")
    assert checkpoint.load(last)["step"] == 7
    out = capfd.readouterr().out
    assert "on 2 x cpu" in out
