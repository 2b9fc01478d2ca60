"""Which signals ask a run to stop, and which end it."""

import os
import signal

import pytest

from fastssl.core.signals import StopRequest


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
