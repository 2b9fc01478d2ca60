"""`fastssl pretrain --processes 2`: one log, one error, one Ctrl-C; and nothing is left when anything is killed."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fastssl.commands import local_ranks
from fastssl.commands.local_ranks import choose_gpus, take_processes
from fastssl.core.distributed import Dist, cleanup
from fastssl.core.signals import GRACE_S
from fastssl.pretraining.run import train
from fastssl.pretraining.run_config import load
from shards.errors import UserError
from tests.fastssl.runs import STEPS, assert_same_end, newest, rows
from tests.gloo import _free_port, run_ranks
from tests.needs import HANGS_S

ROOT = Path(__file__).parents[3]
# Long enough to be stopped in its midst.
LONG = {"train": {"epochs": 1000, "save_every_steps": 0}, "knn": {"every": 0}}
SHORT = {"train": {"epochs": 1}, "knn": {"every": 0}}


# In place of the training, in the ranks alone; `busy` is one call of C that takes minutes.
STUB = """
import os
if "RANK" in os.environ:
    import hashlib, sys, time, types
    from pathlib import Path
    from shards.errors import UserError
    rank, folder = int(os.environ["RANK"]), Path({folder!r})
    def ready():
        (folder / f"ready-{{rank}}").touch()
    def busy():
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
    def run(argv):
{body}
        return 0
    name = "fastssl.commands.pretrain_command"
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].run = run
"""


class Command:
    """`fastssl pretrain CONFIG --processes 2 ...` in a process of its own.

    `stub` is the body of a function that each of the two runs in place of the training; it knows `rank` and `folder`.
    """

    def __init__(self, config: Path, *flags: str, stub: str = "") -> None:
        self.run = config.parent / "run"
        environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        if stub:
            site = config.parent / "site" / "sitecustomize.py"
            site.parent.mkdir()
            site.write_text(STUB.format(folder=str(config.parent), body=textwrap.indent(stub, 8 * " ")))
            environment["PYTHONPATH"] = f"{site.parent}{os.pathsep}{ROOT}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fastssl", "pretrain", str(config), "--processes", "2", *flags],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def logged(self, step: int) -> bool:
        """Whether a row of this step or a later one is logged."""
        path = self.run / "metrics.jsonl"
        return path.exists() and max([row["step"] for row in rows(self.run)], default=0) >= step

    def until(self, moment: Callable[[], bool]) -> None:
        while not moment():
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.02)

    def until_both_run(self) -> list[int]:
        """Wait until both have called `ready`, and return their process ids, the first one's first."""
        self.until(lambda: all((self.run.parent / f"ready-{rank}").exists() for rank in "01"))
        return self.ranks()

    def ranks(self) -> list[int]:
        """The process ids of the ranks, the first one first."""
        return [int(pid) for pid in _children(self.process.pid)]

    def end(self) -> tuple[int, str, str]:
        """The exit code and what was printed, without the note that BatchNorm is not synchronised here."""
        out, err = self.process.communicate(timeout=HANGS_S)
        return (
            self.process.returncode,
            out,
            "".join(line for line in err.splitlines(True) if "SyncBatchNorm" not in line),
        )


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def _wait_gone(pids: list[int]) -> None:
    """Wait until the processes have ended; a machine without an init process keeps them as zombies."""
    until = time.monotonic() + HANGS_S
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < until, "a process was left"
        time.sleep(0.02)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _train(here: Dist, port: int, config: str) -> None:
    cleanup()  # pretrain joins the group itself
    os.environ["MASTER_PORT"] = str(port)
    train(load(config))


@pytest.mark.slow
def test_two_processes_end_as_those_that_something_else_started(config, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    path = config(SHORT)
    other = tmp_path / "other" / "tiny.yaml"
    other.write_text(path.read_text().replace(str(tmp_path / "run"), str(tmp_path / "other" / "run")))
    run_ranks(_train, _free_port(), str(other), timeout_s=HANGS_S)
    code, out, err = Command(path).end()
    assert (code, err) == (0, "")
    assert_same_end(tmp_path / "run", tmp_path / "other" / "run")
    assert out.count(f"Done: {STEPS} steps") == out.count("on 2 x cpu") == 1


@pytest.mark.parametrize(
    ("stub", "code", "expected"),
    [
        ("raise UserError('No shards.')", 2, "fastssl: No shards.\n"),
        # As `distributed.on_main` does.
        (
            "time.sleep(0.5 * (rank == 0))\nif rank == 0:\n    raise UserError('Full.')\nraise SystemExit(2)",
            2,
            "fastssl: Full.\n",
        ),
        # What the first one then says of the lost connection is no cause.
        (
            "if rank:\n    raise UserError('Bad.')\ntime.sleep(0.5)\nraise RuntimeError('lost')",
            2,
            "fastssl: Bad.\n",
        ),
        # One that waits for the others for good.
        ("if rank:\n    raise UserError('Bad.')\nbusy()", 2, "fastssl: Bad.\n"),
        (
            "if rank:\n    print('a last word')\n    os._exit(3)\nbusy()",
            3,
            "fastssl: Process 1 of 2 (counted from 0) ended with exit code 3, and the others were ended: add --resume to continue "
            "from the last checkpoint.\na last word\n",
        ),
        # As tyro does, on each rank, for a value of the wrong type.
        ("print('a box', file=sys.stderr)\nraise SystemExit(2)", 2, "a box\n"),
        # `fastssl pretrain ... | head`
        ("if rank == 0:\n    raise BrokenPipeError\nbusy()", 141, ""),
    ],
)
def test_a_mistake_is_one_sentence(stub: str, code: int, expected: str, config) -> None:
    stub = stub.replace("os._exit", "sys.stdout.flush(); os._exit")
    assert Command(config(), stub=stub).end() == (code, "", expected)


def test_a_fault_is_one_traceback(config) -> None:
    stub = "if rank:\n    raise ZeroDivisionError('here')\ntime.sleep(0.5)\nraise RuntimeError('lost')"
    code, out, err = Command(config(), stub=stub).end()
    assert (code, out) == (1, "")
    assert err.startswith(
        "fastssl: Process 1 of 2 (counted from 0) failed:\nTraceback (most recent call last):\n"
    )
    assert err.endswith("ZeroDivisionError: here\n")
    assert err.count("Traceback") == 1


@pytest.mark.slow
def test_one_ctrl_c_saves_and_resume_continues(config) -> None:
    command = Command(config(LONG))
    command.until(lambda: command.logged(4))
    command.process.send_signal(signal.SIGINT)
    code, out, err = command.end()
    step = newest(command.run)["step"]
    assert (code, err) == (128 + signal.SIGINT, "")
    assert step >= 4
    assert out.count("Stopping within 8 steps; again: at once, unsaved\n") == 1
    assert out.count(f"Stopped after step {step}, saved as ") == 1
    epochs = step // STEPS + 1
    code, out, err = Command(config(LONG), "--resume", "--train.epochs", str(epochs)).end()
    assert code == 0, err
    assert f"resuming after step {step} of {epochs * STEPS}" in out
    assert newest(command.run)["step"] == epochs * STEPS


def test_a_signal_reaches_each_once(config) -> None:
    stub = """
import signal
got = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: got.append(number))
ready()
while signal.SIGTERM not in got:
    time.sleep(0.01)
(folder / f"got-{rank}").write_text(" ".join(map(str, got)))
return 128 + 15
"""
    command = Command(config(), stub=stub)
    command.until_both_run()
    for number in (signal.SIGUSR1, signal.SIGTERM):
        command.process.send_signal(number)
        time.sleep(0.5)
    assert command.end() == (128 + signal.SIGTERM, "", "")
    for rank in (0, 1):
        assert (command.run.parent / f"got-{rank}").read_text() == f"{signal.SIGUSR1:d} {signal.SIGTERM:d}"


def test_a_second_ctrl_c_ends_what_hangs(config) -> None:
    command = Command(
        config(), stub="import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nready()\nbusy()"
    )
    pids = command.until_both_run()
    for _ in range(2):
        command.process.send_signal(signal.SIGINT)
        # So that the second is no echo of the first.
        time.sleep(2 * GRACE_S)
    assert command.end() == (128 + signal.SIGINT, "", "fastssl: interrupted.\n")
    assert not any(map(_runs, pids))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_run_has_begun_ends_it(number: signal.Signals, config) -> None:
    command = Command(
        config(),
        stub="ready()\nbusy()" if number == signal.SIGTERM else "ready()\nwhile True: time.sleep(0.01)",
    )
    pids = command.until_both_run()
    command.process.send_signal(number)
    assert command.end() == (128 + number, "", "fastssl: interrupted.\n")
    assert not any(map(_runs, pids))


def test_nothing_outlives_the_command(config) -> None:
    command = Command(config(), stub="ready()\nbusy()")
    pids = command.until_both_run()
    assert len(pids) == 2
    command.process.kill()
    command.process.communicate()
    _wait_gone(pids)


def test_a_killed_rank_ends_the_others(config) -> None:
    command = Command(config(), stub="ready()\nbusy()")
    pids = command.until_both_run()
    os.kill(pids[1], signal.SIGKILL)
    assert command.end() == (
        128 + signal.SIGKILL,
        "",
        "fastssl: Process 1 of 2 (counted from 0) was killed by SIGKILL, as the system does when memory runs out, and the others were "
        "ended: add --resume to continue from the last checkpoint.\n",
    )
    assert not any(map(_runs, pids))


# ---------------------------------------------------------------- flags


def test_what_each_process_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(local_ranks, "available_cpus", lambda: 7)
    argv = ["c.yaml", "--processes", "3", "--resume", "--train.batch", "9"]
    environments, rest = take_processes(argv)
    assert rest == ["c.yaml", "--resume", "--train.batch", "9"]
    assert [(e["RANK"], e["LOCAL_RANK"]) for e in environments] == [("0", "0"), ("1", "1"), ("2", "2")]
    for environment in environments:
        assert (environment["WORLD_SIZE"], environment["LOCAL_WORLD_SIZE"]) == ("3", "3")
        assert environment["OMP_NUM_THREADS"] == "2"
        assert local_ranks.VISIBLE not in environment
    assert len({e["MASTER_PORT"] for e in environments}) == 1
    assert take_processes(["--processes=9"])[0][0]["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert "OMP_NUM_THREADS" not in take_processes(argv)[0][0]
    assert take_processes(["c.yaml", "--train.device", "cpu"]) == ((), ["c.yaml", "--train.device", "cpu"])


def test_gpus_are_a_process_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setenv(local_ranks.VISIBLE, "4,5,7")
    environments, rest = take_processes(["c.yaml", "--gpus", "0,2"])
    assert [e[local_ranks.VISIBLE] for e in environments] == ["4,7", "4,7"]
    assert rest == ["c.yaml", "--train.device", "cuda"]
    assert len(take_processes(["c.yaml", "--gpus", "all"])[0]) == 3


@pytest.mark.parametrize(
    ("asked", "found", "visible", "chosen"),
    [
        ("all", 2, None, ["0", "1"]),
        ("1", 2, None, ["0"]),
        ("1,0", 2, None, ["1", "0"]),
        ("2", 3, "6,GPU-a,2", ["6", "GPU-a"]),
        # PyTorch finds fewer than are named: the last ones do not exist.
        ("all", 1, "0,9", ["0"]),
    ],
)
def test_which_gpus_are_taken(asked: str, found: int, visible: str | None, chosen: list[str]) -> None:
    assert choose_gpus(asked, found, visible) == chosen


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--gpus", "4"], r"--gpus 4 asks for 4 GPUs, but PyTorch finds 2 \(CUDA_VISIBLE_DEVICES is '1,3'\)"),
        (["--gpus", "0,2"], r"--gpus 0,2 asks for GPU 2, but PyTorch finds 2"),
        (["--gpus", "0"], r"must be at least 1\. GPU 0 alone: CUDA_VISIBLE_DEVICES=0 --gpus 1"),
        (["--gpus", "1,1"], "names a GPU twice"),
        (["--gpus", "both"], "--gpus is 'both', but it must be all, a number of GPUs, or a list such as 0,1"),
        (["--gpus"], "--gpus is '', but it must be all"),
        (["--gpus", "all", "--processes", "2"], "leave out --processes"),
        (["--gpus", "all", "--train.device", "cpu"], "on a CPU, give --processes N"),
        (["--processes", "0"], "--processes is '0', but it must be a number of at least 1"),
        (["--processes", "--resume"], "--processes is ''"),
    ],
)
def test_what_cannot_be_started(argv: list[str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv(local_ranks.VISIBLE, "1,3")
    with pytest.raises(UserError, match=words):
        take_processes(["c.yaml", *argv])


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.delenv(local_ranks.VISIBLE, raising=False)
    with pytest.raises(
        UserError, match=r"--gpus all, but PyTorch finds no GPU: on a CPU, give --processes N"
    ):
        take_processes(["--gpus", "all"])
    with pytest.raises(UserError, match="--gpus 2 asks for 2 GPUs, but PyTorch finds 0, counted"):
        take_processes(["--gpus", "2"])


def test_under_torchrun_it_is_refused(told, config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert told("pretrain", config(), "--gpus", "all") == (
        "--gpus starts all processes itself, but the environment sets RANK, WORLD_SIZE, as torchrun does: leave out --gpus, or start "
        "without torchrun."
    )
