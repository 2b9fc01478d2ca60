"""Parts of every report of `fastssl bench`: rows, stopwatch, peak memory, the machine, and the JSON file."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shards.units import plural

if TYPE_CHECKING:
    import torch

# Names of distributions. DALI has one per CUDA version.
_VERSIONS = {
    "fastssl": ("fastssl-pretrain",),
    "torch": ("torch",),
    "torchvision": ("torchvision",),
    "dali": ("nvidia-dali-cuda120", "nvidia-dali-cuda130", "nvidia-dali-cuda110"),
    "kornia": ("kornia",),
    "numba": ("numba",),
    "pillow": ("pillow",),
    "simplejpeg": ("simplejpeg",),
    "pyarrow": ("pyarrow",),
    "webdataset": ("webdataset",),
    "litdata": ("litdata",),
    "lightly": ("lightly",),
}


NOT_INSTALLED = "not installed"


@dataclass
class Row:
    """One line of a report: its rates and what they are compared with, or the reason why there are none."""

    name: str
    fidelity: str = ""
    """exact, approximate, or empty where the row does only part of the work."""
    rates: list[float] = field(default_factory=list)
    """Images/s of each repeat; a source image counts once, however many views are made of it."""
    cores: list[float] = field(default_factory=list)
    """CPU seconds a second of this process and its children, in each repeat."""
    error: str = ""
    """Reason why nothing was measured."""
    failure: bool = False
    """Whether it failed or lacked memory; False for what cannot run here, such as a package that is not installed."""
    ratio: float | None = None
    """images_per_s over that of the row `ratio_to`."""
    ratio_to: str = ""
    note: str = ""
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def images_per_s(self) -> float | None:
        """Median of the repeats; None where nothing was measured."""
        return statistics.median(self.rates) if self.rates else None

    @property
    def why_not(self) -> str:
        """Return in a word or two why there is no rate, for a table; empty where there is one."""
        if self.rates:
            return ""
        if self.failure:
            return "failed"
        return (
            NOT_INSTALLED
            if self.error.startswith(NOT_INSTALLED)
            else "cannot run"
            if self.error
            else "not reached"
        )

    @property
    def cpu_cores(self) -> float | None:
        """Median of the repeats."""
        return statistics.median(self.cores) if self.cores else None

    @property
    def core_ms(self) -> float | None:
        """CPU milliseconds of an image, median of the repeats; other work on the machine affects it less than the rate."""
        pairs = zip(self.cores, self.rates, strict=True)
        return statistics.median(1000 * cores / rate for cores, rate in pairs) if self.cores else None

    def add(self, rate: float, cores: float) -> None:
        """Add one repeat."""
        self.rates.append(rate)
        self.cores.append(cores)

    def fail(self, reason: str, *, failure: bool = False) -> None:
        """Drop the repeats and store the reason."""
        self.rates.clear()
        self.cores.clear()
        self.error, self.failure = reason, failure

    def compare(self, other: Row | None) -> None:
        """Set the ratio to `other`, if both were measured."""
        if other is not None and self.rates and other.rates:
            self.ratio = statistics.median(self.rates) / statistics.median(other.rates)
            self.ratio_to = other.name

    def spread(self) -> str:
        """Return the least and the greatest repeat, for a table."""
        return f"{brief(min(self.rates))}-{brief(max(self.rates))}" if self.rates else ""

    def as_json(self) -> dict[str, Any]:
        """Return plain values; `spread` is [least, greatest] of the repeats."""
        return {
            "name": self.name,
            "images_per_s": self.images_per_s,
            "spread": [min(self.rates), max(self.rates)] if self.rates else None,
            "ratio": self.ratio,
            "ratio_to": self.ratio_to or None,
            "fidelity": self.fidelity or None,
            "cpu_cores": self.cpu_cores,
            "core_ms_per_image": self.core_ms,
            "error": self.error or None,
            "failure": self.failure,
            "note": self.note or None,
            **self.more,
        }


def turns_told(rows: Iterable[Row]) -> str:
    """Return how many turns were measured, of which Ctrl-C may have cut the last one short."""
    return plural(max((len(row.rates) for row in rows), default=0), "turn")


def brief(rate: float) -> str:
    """Return a rate in at most six characters: 3.14, 31.4, 3,142, 31k."""
    if rate >= 10_000:
        return f"{rate / 1000:,.0f}k"
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def figure(value: float | None) -> str:
    """Return a number other than a rate in at most five characters below a million; empty for None."""
    return "" if value is None else f"{value:.2f}" if value < 10 else brief(value)


class Stopwatch:
    """Wall clock and CPU time since it was made, of this process and all its child processes, running or ended."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), _cpu_s()

    def wall_s(self) -> float:
        """Return the seconds since the start."""
        return time.perf_counter() - self._wall

    def cores(self) -> float:
        """Return the CPU seconds per second since the start."""
        return max(0.0, _cpu_s() - self._cpu) / self.wall_s()


class PeakMemory:
    """The peak memory (resident set) of this process and its children together, sampled every `EVERY_S` inside the context.

    Shared pages count in each process.
    """

    EVERY_S = 0.1

    def __init__(self) -> None:
        self.most_bytes = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        import psutil

        own = psutil.Process()
        while True:
            total = 0
            for process in (own, *own.children(recursive=True)):
                # The process may have just ended.
                with contextlib.suppress(psutil.Error):
                    total += process.memory_info().rss
            self.most_bytes = max(self.most_bytes, total)
            if self._over.wait(self.EVERY_S):
                return


def today() -> str:
    """Return the date and time of a report, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _cpu_s() -> float:
    import psutil

    own, total = psutil.Process(), 0.0
    for process in (own, *own.children(recursive=True)):
        # A process that has just ended is counted by its parent, once that has noticed.
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
            # Of its children that have ended; macOS does not tell.
            total += getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0)
    return total


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of the packages that matter for speed; None for those not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name, distributions in _VERSIONS.items():
        found[name] = next(filter(None, map(_version, distributions)), None)
    return found


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def machine(device: torch.device | str | None = None) -> dict[str, Any]:
    """Return the processor, the cores this process may use, their load in the last minute, and the GPU in use."""
    from pipelines.loading.loader import default_threads

    info: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": default_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "gpu": None,
    }
    if device is not None:
        import torch

        if torch.device(device).type == "cuda":
            info["gpu"] = torch.cuda.get_device_name(device)
    return info


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def error_line(error: Exception) -> str:
    """Return kind and message of an error in one line.

    A long message keeps both ends: DALI gives the cause first, DataLoader's workers give it last.
    """
    kind = NOT_INSTALLED if isinstance(error, ImportError) else type(error).__name__
    text = " ".join(str(error).split())
    if len(text) > 320:
        text = f"{text[:160]} ... {text[-160:]}"
    return f"{kind}: {text}" if text else kind


def busy(where: dict[str, Any]) -> str:
    """Return the machine's load before the report, for its closing line; empty where the system does not tell."""
    load = where["load_average"]
    return "" if load is None else f", load average {load:.1f} before"


def write_report(
    path: str,
    kind: str,
    machine: dict[str, Any],
    settings: dict[str, Any],
    rows: Sequence[Row],
    *,
    complete: bool = True,
    **more: Any,
) -> None:
    """Write a report as JSON, atomically, marked `incomplete` where not all was measured.

    Raises:
        UserError: the folder is missing or cannot be written.
    """
    report = {
        "kind": kind,
        "date": today(),
        "versions": versions(),
        "machine": machine,
        "settings": settings,
        "rows": [row.as_json() for row in rows],
        **more,
        **mark(complete),
    }
    _write(path, report)


def write_rows(path: str, rows: Sequence[dict[str, Any]]) -> None:
    """Write a list of rows as JSON, atomically; raise UserError if the folder is missing or cannot be written."""
    _write(path, list(rows))


def write_measured(
    path: str,
    machine: dict[str, Any],
    settings: dict[str, Any],
    rows: Sequence[Row],
    *,
    complete: bool = True,
) -> None:
    """Write rows as `write_rows` does, each with the date, versions, machine and settings of its measurement.

    Where not all was measured, each is marked `incomplete`.
    """
    shared = {"date": today(), "versions": versions(), "machine": machine, "settings": settings} | mark(
        complete
    )
    write_rows(path, [row.as_json() | shared for row in rows])


def mark(complete: bool) -> dict[str, bool]:
    """Return what marks a report as incomplete; nothing for one that is complete."""
    return {} if complete else {"incomplete": True}


def _write(path: str, values: Any) -> None:
    from shards.errors import UserError
    from shards.storage.atomic_files import atomic_write

    try:
        atomic_write(path, (json.dumps(values, indent=2) + "\n").encode())
    except OSError as error:
        raise UserError(
            f"The report '{path}' cannot be written ({error.strerror}): choose another --json."
        ) from error
