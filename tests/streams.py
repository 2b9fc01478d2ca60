"""Streams of a GPU that only write down what they are asked for, and CPU tensors in the place of the device's."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipelines.loading.gpu_slot import GpuSlot


class Log:
    """What happened, in order: (what, on which stream) of operations on tensors, (what, event or stream) of the rest."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []
        self.current = "compute"

    def add(self, what: str, where: str = "") -> None:
        self.lines.append((what, where or self.current))

    def kinds(self) -> list[str]:
        return [what for what, _ in self.lines]


class FakeStream:
    cuda_stream = 7

    def __init__(self, log: Log, name: str):
        self.log, self.name = log, name

    def wait_event(self, event) -> None:
        self.log.add(f"wait for {event.recorded_on}", self.name)

    def wait_stream(self, other) -> None:
        self.log.add(f"wait for {other.name}", self.name)


def pretend_streams(monkeypatch: pytest.MonkeyPatch) -> Log:
    """Streams and events only write down what they are asked for; everything runs at once, on the CPU."""
    log = Log()

    class FakeEvent:
        recorded_on = ""

        def record(self, on=None) -> None:
            self.recorded_on = on.name if on else log.current
            log.add("record", self.recorded_on)

        def synchronize(self) -> None:
            log.add(f"host waits for {self.recorded_on or 'nothing'}")

    @contextlib.contextmanager
    def within(on):
        before, log.current = log.current, on.name if on is not None else log.current
        yield
        log.current = before

    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: FakeStream(log, log.current))
    monkeypatch.setattr(
        torch.Tensor,
        "record_stream",
        lambda self, on: log.add("in use by", on.name),
        raising=False,
    )
    # Pinned memory needs a driver.
    monkeypatch.setattr(GpuSlot, "_memory", lambda self, count: torch.empty(count, dtype=torch.uint8))
    return log


class Operations(TorchDispatchMode):
    """Within, the log holds every operation that reads or writes pixels."""

    def __init__(self, log: Log):
        super().__init__()
        self.log = log

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.log.add(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))
