"""Jobs of `fastssl bench gpu`: what they print and how they end is kept, and none outlives its time or the command."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastssl.bench.gpu import processes
from fastssl.bench.gpu.processes import NO_TIME, TOO_LONG, Ended, Processes
from fastssl.bench.gpu.stages import CheckJob
from tests.needs import HANGS_S

ROOT = Path(__file__).parents[4]


@pytest.fixture
def runner(tmp_path):
    """Makes runners whose jobs are scripts in tmp_path."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "quick.py").write_text("import sys\nprint('said', sys.argv[1])\nsys.exit(int(sys.argv[1]))\n")
    (tmp_path / "fault.py").write_text("import os\nos.kill(os.getpid(), 11)\n")
    # It starts another process, as loaders and compilers do, and waits for long.
    (tmp_path / "nap.py").write_text(
        "import subprocess, sys, time\n"
        "left = subprocess.Popen([sys.executable, '-c', 'import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(5000)'])\n"
        "open(sys.argv[1], 'w').write(str(left.pid))\n"
        "time.sleep(float(sys.argv[2]))\n"
    )
    return lambda seconds=HANGS_S: Processes(tmp_path / "logs", tmp_path, time.monotonic() + seconds, {})


def job(module: str, *argv: str) -> CheckJob:
    return CheckJob("-".join((module, *argv)).replace("/", "_"), argv, module=module)


def gone(file: Path) -> bool:
    """Whether the process of a number in a file has ended; as a zombie where nothing collects it."""
    for _ in range(20 * int(HANGS_S)):
        try:
            stat = Path(f"/proc/{int(file.read_text())}/stat").read_text()
        except OSError:
            return True
        if stat.rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


def test_a_failing_job_is_told_and_does_not_stop_the_next(runner, tmp_path):
    told = []
    lanes = [[job("quick", "3"), job("quick", "0")], [job("fault")]]
    ended = runner().run(lanes, HANGS_S, lambda each: told.append(each.job.name))
    assert {each.job.name: each.failed for each in ended} == {
        "quick-3": "exit code 3",
        "quick-0": "",
        "fault": "signal 11",
    }
    assert sorted(told) == ["fault", "quick-0", "quick-3"]
    log = (tmp_path / "logs" / "quick-3.log").read_text()
    assert log == "$ quick 3\nsaid 3\n"
    assert "Segmentation fault" in (tmp_path / "logs" / "fault.log").read_text()


def test_a_job_that_takes_too_long_ends_with_all_that_it_has_started(runner, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "TERM_S", 0.3)
    monkeypatch.setattr(processes, "LEAST_S", 0.1)
    left = tmp_path / "left"
    began = time.monotonic()
    lanes = [[job("nap", str(left), "5000"), job("quick", "0")]]
    first, second = runner().run(lanes, 4.0, lambda each: None)
    assert time.monotonic() - began < 5000, "it waited for the job"
    assert (first.code, first.failed) == (TOO_LONG, "took too long")
    assert (second.code, second.failed) == (NO_TIME, "not begun: no time was left")
    assert gone(left)


def test_what_a_job_leaves_behind_ends_with_it(runner, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "TERM_S", 0.3)
    [ended] = runner().run([[job("nap", str(tmp_path / "left"), "0")]], HANGS_S, lambda each: None)
    assert ended.failed == ""
    assert gone(tmp_path / "left")


def test_nothing_is_begun_in_the_last_seconds(runner):
    [ended] = runner(10.0).run([[job("quick", "0")]], HANGS_S, lambda each: None)
    assert ended.code == NO_TIME


def test_jobs_end_when_the_command_is_asked_to_end(tmp_path, runner):
    runner()
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from fastssl.bench.gpu.processes import Processes, ended_by_signals\nfrom fastssl.bench.gpu.stages import CheckJob\n"
        f"root = Path({str(tmp_path)!r})\n"
        "with ended_by_signals():\n"
        "    job = CheckJob('nap', (str(root / 'left'), '5000'), module='nap')\n"
        "    Processes(root / 'logs', root, time.monotonic() + 1200, {}).run([[job]], 1200, print)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    for _ in range(20 * int(HANGS_S)):
        if (tmp_path / "left").exists() and (tmp_path / "left").read_text():
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(HANGS_S) == 128 + signal.SIGTERM
    assert gone(tmp_path / "left")


def test_no_tests_to_run_are_no_failure():
    assert Ended(CheckJob("t", (), module="pytest"), 5, 1.0).failed == ""
    assert Ended(CheckJob("t", (), module="pytest"), 1, 1.0).failed == "exit code 1"
