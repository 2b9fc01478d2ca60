"""Which signals ask a run to stop, and which end it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastssl.core.signals import GRACE_S, StopRequest
from tests.needs import HANGS_S

ROOT = Path(__file__).parents[3]
# The hash is one call of C, in which Python runs no handlers; it would take minutes.
BUSY = """
import hashlib
from fastssl.core.signals import StopRequest
StopRequest.exits = True
with StopRequest(lambda text: print(text, flush=True)):
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""


def test_an_echo_is_ignored_and_a_later_interrupt_is_not_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT
        monkeypatch.setattr("fastssl.core.signals.GRACE_S", -1.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_what_follows_slurms_warning_does_not_disturb_the_save(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastssl.core.signals.GRACE_S", -1.0)
    with StopRequest() as stop:
        for number in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)
            assert stop.signal in (signal.SIGUSR1, number)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_answers_at_once_inside_a_long_operation_and_ends_at_the_second(
    number: signal.Signals,
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", BUSY], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.stdout.readline() == "Stopping after this step; again: at once, unsaved\n"
        time.sleep(GRACE_S + 0.1)
        process.send_signal(number)
        assert process.wait(HANGS_S) == 128 + number
        assert process.stderr.read() == "\nfastssl: interrupted.\n"
        assert process.stdout.read() == ""


def test_each_request_is_answered_once() -> None:
    said: list[str] = []
    with StopRequest(said.append, "within 8 steps"):
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
    assert said == ["Stopping within 8 steps"]
    assert signal.set_wakeup_fd(-1) == -1
