"""Locks in remote stores: a small file whose holder keeps touching it; one that is not touched any more belongs to a dead process.

Stores have no locks that the system frees when a process is killed. No clocks are compared: whoever wants a lock watches the file.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Protocol

from shards.errors import UserError

BEAT_S = 15.0
DEAD_S = 60.0  # without a beat
LOOK_S = 1.0


class Store(Protocol):
    """What a lock needs of the place in which it lies."""

    url: str

    def names(self, folder: str = "") -> list[str]: ...
    def read(self, name: str, listed_bytes: int = 0) -> bytes: ...
    def write(self, name: str, content: bytes) -> object: ...
    def create(self, name: str, content: bytes) -> bool: ...
    def remove(self, name: str) -> None: ...


@contextlib.contextmanager
def hold(place: Store, name: str, *, shared: bool = False) -> Iterator[None]:
    """Hold the lock `name`, or, `shared`, makes sure that nobody holds it.

    An exclusive lock also waits for none of the locks that begin with its name and a hyphen. Raise UserError where a living process
    holds one; that of a killed one is taken over, which takes `DEAD_S` where it ran on another machine.
    """
    if shared:
        _refuse_living(place, name)
        yield
        return
    for other in place.names():
        if other.startswith(f"{name}-"):
            _refuse_living(place, other)
    me = {
        "process": _process(os.getpid()),
        "host": platform.node(),
        "pid": os.getpid(),
        "id": uuid.uuid4().hex,
    }
    while not place.create(name, _text(me, 0)):
        _refuse_living(place, name)
        place.remove(name)
    done = threading.Event()
    beating = threading.Thread(target=_beat, args=(place, name, me, done), daemon=True)
    beating.start()
    try:
        yield
    finally:
        done.set()
        beating.join()
        if (_read(place, name) or {}).get("id") == me["id"]:
            place.remove(name)


def _beat(place: Store, name: str, me: dict, done: threading.Event) -> None:
    count = 0
    while not done.wait(BEAT_S):
        count += 1
        with contextlib.suppress(UserError, OSError):  # the conversion itself will say that the store is away
            place.write(name, _text(me, count))


def _refuse_living(place: Store, name: str) -> None:
    """Return when nobody holds the lock any more, or its holder is dead; raise UserError when it is seen to live."""
    first = _read(place, name)
    end_s = time.monotonic() + DEAD_S
    while first is not None:
        host, pid = first.get("host"), first.get("pid")
        alive = _lives(first)
        if alive is False:
            return
        now = _read(place, name)
        if alive or (now is not None and now != first):
            raise UserError(
                f"Another conversion is at work in '{place.url}' (process {pid} on {host}); wait for it, or give another DEST."
            )
        if now is None or time.monotonic() > end_s:
            return
        time.sleep(LOOK_S)


def _lives(holder: dict) -> bool | None:
    """Whether the process that holds a lock lives; None where it ran on another machine, or what runs there now may be another."""
    pid = holder.get("pid", 0)
    if holder.get("process", "").partition(" ")[0] != _process(os.getpid()).partition(" ")[0]:
        return None
    return _process(pid) == holder["process"]


def _process(pid: int) -> str:
    """A name of a process that no other has, on any machine, now or later; without its time of start where it is gone."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            machine = f"{file.read().strip()}-{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return uuid.uuid4().hex  # no /proc: always as of another machine
    try:
        with open(f"/proc/{pid}/stat") as file:
            start = file.read().rpartition(")")[2].split()[19]
    except OSError:
        start = "ended"
    return f"{machine} {pid} {start}"


def _read(place: Store, name: str) -> dict | None:
    try:
        return json.loads(place.read(name))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}


def _text(me: dict, count: int) -> bytes:
    return json.dumps(me | {"beat": count}).encode()
