"""Processes of a run find each other, also when torchrun starts them again; what cannot work is one sentence."""

import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch.distributed as dist

from fastssl.core.distributed import cleanup, setup
from fastssl.core.rendezvous import agree, read_environment
from shards.errors import UserError
from tests.needs import HANGS_S

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")
SLURM = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS")
ROOT = Path(__file__).parents[3]


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch):
    for name in (*NAMES, *SLURM):
        monkeypatch.delenv(name, raising=False)

    def put(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return put


TWO = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"WORLD_SIZE": "two"}, "sets WORLD_SIZE to 'two', which is no number"),
        ({"RANK": "-1"}, "sets RANK to '-1', which is no number"),
        ({"RANK": "2"}, "sets RANK to 2 and WORLD_SIZE to 2, but ranks count from 0 to 1"),
        ({"MASTER_ADDR": ""}, "sets WORLD_SIZE to 2 but not MASTER_ADDR, where the processes meet"),
        ({"MASTER_PORT": "http"}, "sets MASTER_PORT to 'http', but a port is a number from 1 to 65535"),
        ({"MASTER_PORT": "70000"}, "sets MASTER_PORT to '70000', but a port is"),
    ],
)
def test_what_cannot_work_is_one_sentence_from_one_process(changes: dict, message: str, environment) -> None:
    environment(**{**TWO, **changes})
    with pytest.raises(UserError, match=re.escape(message)):
        setup("cpu")
    if "RANK" not in changes:
        environment(RANK="1")
        with pytest.raises(SystemExit) as ended:
            setup("cpu")
        assert ended.value.code == 2


def test_several_processes_of_srun_do_not_train_alone(environment) -> None:
    environment(SLURM_PROCID="0", SLURM_NTASKS="4")
    with pytest.raises(UserError, match="Slurm started 4 processes without RANK and WORLD_SIZE"):
        read_environment()
    environment(SLURM_PROCID="3")
    with pytest.raises(SystemExit):
        read_environment()
    # One process of a job that has room for four, and a batch script's own process.
    environment(SLURM_STEP_NUM_TASKS="1")
    assert read_environment() == (0, 1, 0)
    environment(
        SLURM_STEP_NUM_TASKS="4", RANK="3", WORLD_SIZE="4", LOCAL_RANK="1", MASTER_ADDR="a", MASTER_PORT="1"
    )
    assert read_environment() == (3, 4, 1)


def test_a_port_in_use_is_named(environment) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        environment(**{**TWO, "MASTER_PORT": str(port)})
        with pytest.raises(UserError, match=f"The port 127.0.0.1:{port} is in use"):
            setup("cpu")
    cleanup()


def _agree_all(store: dist.Store, world: int, order: list[int]) -> dict[int, str]:
    """The words of all ranks, which start one after the other."""
    words: dict[int, str] = {}
    waits = threading.Event()
    threads = []
    for rank in order:
        run = threading.Thread(target=lambda rank=rank: words.update({rank: agree(store, rank, world, 60)}))
        run.start()
        threads.append(run)
        waits.wait(0.1)
    for run in threads:
        run.join(60)
    return words


def test_each_start_has_a_word_of_its_own_in_a_store_that_stays() -> None:
    """Whoever comes first finds what earlier starts left, and a process that died before it was welcomed."""
    store, seen = dist.HashStore(), set()
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2], [0, 2, 1]):
        words = _agree_all(store, 3, order)
        assert set(words) == {0, 1, 2}
        [word] = set(words.values())
        assert word not in seen
        seen.add(word)
        # A start that failed before all had come.
        with pytest.raises(UserError, match="Process 2 of 3 has waited 0 s for the first process"):
            agree(store, 2, 3, 0.05)
        with pytest.raises(UserError, match="Process 0 of 3 has waited 0 s for process 1 of 3"):
            agree(store, 0, 3, 0.05)


WORKER = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
import torch
from fastssl.core.distributed import cleanup, mean_over_ranks, setup
attempt, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
# Whichever comes first must not take what the start before has left.
time.sleep(2.0 * (rank == attempt % 2))
setup("cpu", timeout_s=60)
for step in range(3):
    mean = mean_over_ranks({{"x": torch.tensor(float(rank))}})["x"].item()
    assert mean == 0.5, mean
    if attempt < 2 and rank == 1 - attempt and step == 1:
        os.kill(os.getpid(), signal.SIGKILL)
os.write(1, f"done {{rank}}\\n".encode())  # at once: both write to one pipe
cleanup()
"""


@pytest.mark.slow
def test_a_killed_process_is_started_again_by_torchrun(tmp_path: Path) -> None:
    """Twice, and each time another one is late."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(root=str(ROOT)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run(
        [*command, "--max-restarts", "2", str(script)],
        capture_output=True,
        text=True,
        timeout=HANGS_S,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 0, ended.stderr
    assert sorted(ended.stdout.split("\n"))[-2:] == ["done 0", "done 1"]
