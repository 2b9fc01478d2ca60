"""Training goes on, and is saved, whatever happens to what it prints: with the same weights as a run that could print."""

import fcntl
import io
import os
import resource
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from fastssl.core import checkpoint
from fastssl.core.unfailing_output import UnfailingStream, unfailing_output
from fastssl.pretraining.run import train
from tests.fastssl.runs import assert_same_end, newest, resolve, tiny, write_yaml
from tests.needs import HANGS_S

ROOT = Path(__file__).parents[3]


def _start(run: Path, shards: Path, stdout: int, **options) -> subprocess.Popen:
    config = write_yaml(run.parent / "tiny.yaml", tiny(shards, run))
    return subprocess.Popen(
        [sys.executable, "-m", "fastssl", "pretrain", str(config)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"},
        stdin=subprocess.DEVNULL if stdout == subprocess.PIPE else stdout,
        stdout=stdout,
        stderr=subprocess.STDOUT if stdout == subprocess.PIPE else stdout,
        **options,
    )


@pytest.mark.slow
def test_a_reader_that_dies_ends_no_run(shards: Path, finished: Path, tmp_path: Path) -> None:
    """As `fastssl pretrain ... 2>&1 | tee log` whose tee is killed; and what it prints has letters that the output does not know."""
    reader, writer = os.pipe()
    run = tmp_path / "Läufe" / "run"
    run.parent.mkdir()
    process = _start(run, shards, writer)
    os.close(writer)
    with os.fdopen(reader, "rb") as read:
        read.readline()
    assert process.wait(HANGS_S) == 0
    assert_same_end(run, finished)


@pytest.mark.slow
def test_a_terminal_that_is_closed_ends_no_run(shards: Path, finished: Path, tmp_path: Path) -> None:
    """It sends SIGHUP to the run, and each line after that fails."""
    ours, theirs = os.openpty()
    run = tmp_path / "run"

    def take_terminal() -> None:
        os.setsid()
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    process = _start(run, shards, theirs, preexec_fn=take_terminal)
    os.close(theirs)
    log = run / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and '"step": 4' in log.read_text()):
        time.sleep(0.01)
    assert process.poll() is None, os.read(ours, 10_000)
    os.close(ours)
    assert process.wait(HANGS_S) == 0
    assert_same_end(run, finished)


@pytest.mark.slow
def test_a_run_whose_disk_fills_up_ends_in_a_sentence_and_goes_on_later(
    shards: Path, finished: Path, tmp_path: Path
) -> None:
    """After a first checkpoint no file may grow; the run says so, and continues with the same weights when there is room again."""
    run = tmp_path / "run"
    process = _start(run, shards, subprocess.PIPE)
    while process.poll() is None and not checkpoint.list_checkpoints(run):
        time.sleep(0.001)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1000, 1000))
    said, _ = process.communicate(timeout=HANGS_S)
    assert process.returncode == 2, said
    assert b"cannot be written (File too large)" in said
    assert 0 < newest(run)["step"] < newest(finished)["step"]
    assert train(resolve(shards, run), resume=True).interrupted == 0
    assert_same_end(run, finished)


def test_a_full_disk_under_the_log_of_the_shell_ends_no_run(
    shards: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From Python too, where the streams are the caller's and stay so."""
    with open("/dev/full", "w", buffering=1) as full:
        monkeypatch.setattr(sys, "stdout", full)
        monkeypatch.setattr(sys, "stderr", full)
        from fastssl.pretraining.run import pretrain

        assert pretrain(resolve(shards, tmp_path / "run")).interrupted == 0
        assert sys.stdout is full
        monkeypatch.undo()
        with pytest.raises(OSError, match="No space left"):
            full.write("x\n")
        # What was not written fails again when the file is closed.
        os.dup2(os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT), full.fileno())
    assert_same_end(tmp_path / "run", finished)


def test_letters_that_the_output_does_not_know_become_escapes() -> None:
    raw = io.BytesIO()
    stream = UnfailingStream(io.TextIOWrapper(raw, encoding="ascii"))
    assert stream.write("Läufe\n") == 6
    stream.flush()
    assert raw.getvalue() == b"L\\xe4ufe\n"
    assert not stream.failed


def test_a_stream_that_is_closed_or_was_never_there_takes_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stdout", closed)
    monkeypatch.setattr(sys, "stderr", None)
    with unfailing_output():
        print("to nobody", flush=True)
        print("to nobody", file=sys.stderr)
        assert not sys.stdout.isatty()
        assert not sys.stderr.isatty()
    assert sys.stdout is closed
    assert sys.stderr is None
