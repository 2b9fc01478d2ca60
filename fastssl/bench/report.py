"""What the reports of `fastssl bench` share: rows, the clock, the machine, and the JSON file."""

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

if TYPE_CHECKING:
    import torch

# Distribution names: which DALI is installed depends on the CUDA version it was built for.
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


@dataclass
class Row:
    """One line of a report: a rate, how sure it is, and what it is compared with; or why there is none."""

    name: str
    fidelity: str = ""
    """exact, approximate, or empty where the row does only part of the work."""
    rates: list[float] = field(default_factory=list)
    """Images per second of each repeat; a source image counts once, however many views are made of it."""
    cores: list[float] = field(default_factory=list)
    """Seconds of CPU time of this process and its children per second, in each repeat."""
    error: str = ""
    """Why nothing was measured."""
    failure: bool = False
    """Whether that is a fault or a lack of memory; False for what cannot run here, such as a package that is not installed."""
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
    def cpu_cores(self) -> float | None:
        """Median of the repeats."""
        return statistics.median(self.cores) if self.cores else None

    @property
    def core_ms(self) -> float | None:
        """CPU time for one image, median of the repeats: other work on the machine changes it less than the rate."""
        pairs = zip(self.cores, self.rates, strict=True)
        return statistics.median(1000 * cores / rate for cores, rate in pairs) if self.cores else None

    def add(self, rate: float, cores: float) -> None:
        """Note one repeat."""
        self.rates.append(rate)
        self.cores.append(cores)

    def fail(self, reason: str, *, failure: bool = False) -> None:
        """Give up, with the reason; what was measured before does not count."""
        self.rates.clear()
        self.cores.clear()
        self.error, self.failure = reason, failure

    def compare(self, other: Row | None) -> None:
        """Set the ratio to `other`, where both were measured."""
        if other is not None and self.rates and other.rates:
            self.ratio = statistics.median(self.rates) / statistics.median(other.rates)
            self.ratio_to = other.name

    def spread(self) -> str:
        """Least and greatest repeat, for a table."""
        return f"{brief(min(self.rates))}-{brief(max(self.rates))}" if self.rates else ""

    def as_json(self) -> dict[str, Any]:
        """Plain values; `spread` is [least, greatest] of the repeats."""
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


def brief(rate: float) -> str:
    """A rate in at most six characters: 3.14, 31.4, 3,142, 31k."""
    if rate >= 10_000:
        return f"{rate / 1000:,.0f}k"
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


class Stopwatch:
    """Wall clock and CPU time (this process, its threads, and all processes below it, running or ended) since its making."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), _cpu_s()

    def wall_s(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._wall

    def cores(self) -> float:
        """CPU seconds per second since the start."""
        return max(0.0, _cpu_s() - self._cpu) / self.wall_s()


class PeakMemory:
    """The greatest memory (resident set) of this process and its children together, looked at every `EVERY_S` while it is entered.

    Pages that processes share count in each of them.
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
                with contextlib.suppress(psutil.Error):  # ended just now
                    total += process.memory_info().rss
            self.most_bytes = max(self.most_bytes, total)
            if self._over.wait(self.EVERY_S):
                return


def today() -> str:
    """Date and time of a report, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _cpu_s() -> float:
    import psutil

    own, total = psutil.Process(), 0.0
    for process in (own, *own.children(recursive=True)):
        with contextlib.suppress(
            psutil.Error
        ):  # ended just now: counted by its parent, once that has noticed
            times = process.cpu_times()
            # Those of its children that have ended; macOS does not tell.
            total += times.user + times.system
            total += getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0)
    return total


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that matter for speed; None for those not installed."""
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
    """The processor, the cores this process may use, how busy they were in the last minute, and the GPU in use."""
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
    kind = "not installed" if isinstance(error, ImportError) else type(error).__name__
    text = " ".join(str(error).split())
    if len(text) > 320:
        text = f"{text[:160]} ... {text[-160:]}"
    return f"{kind}: {text}" if text else kind


def tell_failures(console: Any, rows: Iterable[Row]) -> None:
    """Say of each row without a figure why it has none."""
    for row in rows:
        if row.error:
            console.print(f"{row.name} could not be measured: {row.error}", style="yellow", markup=False)


def busy(where: dict[str, Any]) -> str:
    """The load that a report's machine was under before, for its closing line; empty where the system does not tell."""
    load = where["load_average"]
    return "" if load is None else f", load average {load:.1f} before"


def write_report(
    path: str,
    kind: str,
    machine: dict[str, Any],
    settings: dict[str, Any],
    rows: Sequence[Row],
    **more: Any,
) -> None:
    """Write a report as JSON, whole or not at all; UserError where the folder is missing or cannot be written."""
    report = {
        "kind": kind,
        "date": today(),
        "versions": versions(),
        "machine": machine,
        "settings": settings,
        "rows": [row.as_json() for row in rows],
        **more,
    }
    _write(path, report)


def write_rows(path: str, rows: Sequence[dict[str, Any]]) -> None:
    """Write a list of rows as JSON, whole or not at all; UserError where the folder is missing or cannot be written."""
    _write(path, list(rows))


def write_measured(path: str, machine: dict[str, Any], settings: dict[str, Any], rows: Sequence[Row]) -> None:
    """As `write_rows`, each row with the date, versions, machine and settings that it was measured with."""
    shared = {"date": today(), "versions": versions(), "machine": machine, "settings": settings}
    write_rows(path, [row.as_json() | shared for row in rows])


def _write(path: str, values: Any) -> None:
    from shards.errors import UserError
    from shards.storage.atomic_files import atomic_write

    try:
        atomic_write(path, (json.dumps(values, indent=2) + "\n").encode())
    except OSError as error:
        raise UserError(
            f"The report '{path}' cannot be written ({error.strerror}): choose another --json."
        ) from error
