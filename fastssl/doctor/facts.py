"""What `fastssl doctor` knows of a machine: gathered here, judged in `fastssl.doctor.checks`. Nothing here raises."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sysconfig
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from shards.cpus import cpu_cores, cpu_quota

# Distributions that this project uses, whose versions and requirements are looked at; which DALI is installed depends on CUDA.
PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "kornia",
    "numpy",
    "numba",
    "pyarrow",
    "pillow",
    "webdataset",
    "triton",
)
FAMILIES = ("nvidia-dali-cuda", "nvidia-nvimgcodec-cu", "nvidia-nvjpeg-cu")


@dataclass(frozen=True)
class Gpu:
    """One GPU that PyTorch may use."""

    name: str
    capability: tuple[int, int]
    memory_bytes: int
    free_bytes: int
    numa_node: int | None = None
    throttled: str = ""
    """Why its clock is held down, as the driver says; empty where it is not, or where that is unknown."""


@dataclass(frozen=True)
class DataSet:
    """A folder of shards, looked at without reading images."""

    folder: str
    fault: str = ""
    """Why it cannot be opened; empty where it can."""
    num_samples: int = 0
    num_shards: int = 0
    bytes: int = 0
    table_rows: int = 0
    wrong: tuple[str, ...] = ()
    """Shards that are missing or of another size than the manifest says."""
    no_index: tuple[str, ...] = ()
    """DALI index files that are missing."""
    max_pixels: int = 0
    written_s: float = 0.0
    """When the manifest was written, seconds since 1970."""


@dataclass(frozen=True)
class Facts:
    """Everything that the checks judge."""

    python: tuple[int, int] = (3, 11)
    system: str = "Linux"
    packages: dict[str, str | None] = field(default_factory=dict)
    """Distribution -> version; None where it is not installed."""
    requirements: dict[str, list[str]] = field(default_factory=dict)
    """Distribution -> what it says it requires, of those distributions that are looked at."""
    import_fault: str = ""
    """Why torch and torchvision cannot be imported together."""
    torch_cuda: str | None = None
    """The CUDA version that PyTorch was built for; None for a build without CUDA."""
    torch_archs: tuple[str, ...] = ()
    """sm_90 and so on, which this PyTorch holds code for."""
    driver: str | None = None
    driver_cuda: tuple[int, int] | None = None
    """The newest CUDA version that the driver runs."""
    num_gpu_files: int = 0
    """/dev/nvidia0 and so on."""
    visible_devices: str | None = None
    """CUDA_VISIBLE_DEVICES."""
    gpus: tuple[Gpu, ...] = ()
    cuda_fault: str = ""
    """Why PyTorch finds no GPU, in CUDA's words."""
    c_compiler: str | None = None
    cpp_compiler: str | None = None
    python_headers: bool = True
    shm_bytes: int | None = None
    """Size of /dev/shm."""
    open_files: tuple[int, int] | None = None
    """Soft and hard limit; -1 for none."""
    disks: dict[str, int] = field(default_factory=dict)
    """Folder -> free bytes."""
    cpus: int = 1
    """Cores that the scheduler lets this process use."""
    cpu_quota: float | None = None
    """Cores' worth of time that the control group allows; None for no limit."""
    memory_bytes: int = 0
    """Of the machine, or of the control group where that is less."""
    numa_nodes: int = 1
    process_node: int | None = None
    """The one NUMA node of all cores this process may use; None where they lie on several."""
    now_s: float = 0.0
    """The system's clock, seconds since 1970."""
    newest_package_s: float = 0.0
    """When the newest of the packages was installed: no clock can rightly be before it."""
    data: DataSet | None = None


def gather(shards: str = "", out: str = ".") -> Facts:
    """Look at this machine, and at the folder `shards` where it is given; `out` is where a run would be written."""
    packages, requirements, newest_s = _packages()
    limits = _open_files()
    driver, throttled = _nvidia_smi()
    values: dict[str, Any] = {
        "python": tuple(map(int, platform.python_version_tuple()[:2])),
        "system": platform.system(),
        "packages": packages,
        "requirements": requirements,
        "driver": driver,
        "driver_cuda": _driver_cuda(),
        "num_gpu_files": len(list(Path("/dev").glob("nvidia[0-9]*"))),
        "visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "c_compiler": _compiler("CC", "gcc", "cc", "clang"),
        "cpp_compiler": _compiler("CXX", "g++", "c++", "clang++"),
        "python_headers": Path(sysconfig.get_paths()["include"], "Python.h").exists(),
        "shm_bytes": shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else None,
        "open_files": limits,
        "disks": {} if (free := _free_bytes(out)) is None else {out: free},
        "cpus": cpu_cores(),
        "cpu_quota": cpu_quota(),
        "memory_bytes": _memory_bytes(),
        "now_s": time.time(),
        "newest_package_s": newest_s,
        "data": look_at(shards) if shards else None,
        **_numa(),
        **_torch(throttled),
    }
    return Facts(**values)


def _packages() -> tuple[dict[str, str | None], dict[str, list[str]], float]:
    installed = {d.name.lower(): d for d in metadata.distributions() if d.name}
    families = [name for name in installed if name.startswith(FAMILIES)]
    names = [*PACKAGES, *sorted(families)]
    versions = {name: installed[name].version if name in installed else None for name in names}
    required = {name: list(installed[name].requires or []) for name in names if name in installed}
    dates = [_date_s(installed[name]) for name in names if name in installed]
    return versions, required, max(dates, default=0.0)


def _date_s(distribution: metadata.Distribution) -> float:
    try:
        return os.path.getctime(str(distribution.locate_file("")))
    except OSError:
        return 0.0


def _torch(throttled: list[str]) -> dict[str, Any]:
    try:
        import torch
        import torchvision  # noqa: F401 - a mismatch shows at its import
    except Exception as fault:  # whatever it is, it is what the user needs to read
        return {
            "import_fault": f"{type(fault).__name__}: {str(fault).strip().splitlines()[0] if str(fault) else ''}"
        }
    found: dict[str, Any] = {
        "torch_cuda": torch.version.cuda,
        "torch_archs": tuple(torch.cuda.get_arch_list()),
    }
    if torch.version.cuda is None:
        return found
    try:
        torch.cuda.init()
        gpus = []
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            free, _ = torch.cuda.mem_get_info(index)
            reason = throttled[index] if index < len(throttled) else ""
            node = _gpu_node(about)
            capability = (about.major, about.minor)
            gpus.append(Gpu(about.name, capability, about.total_memory, free, node, reason))
        found["gpus"] = tuple(gpus)
    except (RuntimeError, AssertionError) as fault:
        found["cuda_fault"] = str(fault).strip().splitlines()[0]
    return found


def _gpu_node(about: Any) -> int | None:
    place = [getattr(about, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]
    if None in place:
        return None
    text = _read(Path(f"/sys/bus/pci/devices/{place[0]:04x}:{place[1]:02x}:{place[2]:02x}.0/numa_node"))
    return int(text) if text and int(text) >= 0 else None


def _nvidia_smi() -> tuple[str | None, list[str]]:
    """The driver's version, and for each GPU why its clock is held down."""
    query = "driver_version,clocks_event_reasons.hw_slowdown,clocks_event_reasons.sw_thermal_slowdown"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None, []
    if done.returncode:
        return None, []
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.strip().splitlines()]
    whys = ("hardware slowdown (power or heat)", "thermal slowdown")
    held = [", ".join(w for w, on in zip(whys, row[1:], strict=False) if on == "Active") for row in rows]
    return (rows[0][0] if rows else None), held


def _driver_cuda() -> tuple[int, int] | None:
    try:
        library, version = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
        if library.cuDriverGetVersion(ctypes.byref(version)):
            return None
    except OSError:
        return None
    return version.value // 1000, version.value % 1000 // 10


def _compiler(variable: str, *names: str) -> str | None:
    return os.environ.get(variable) or next(filter(None, map(shutil.which, names)), None)


def _open_files() -> tuple[int, int] | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft, hard


def _free_bytes(folder: str) -> int | None:
    here = Path(folder).absolute()
    there = next((path for path in (here, *here.parents) if path.exists()), None)
    return shutil.disk_usage(there).free if there else None


def _memory_bytes() -> int:
    found = re.search(r"MemTotal:\s+(\d+) kB", _read(Path("/proc/meminfo")) or "")
    total = int(found[1]) * 1024 if found else 0
    limits = [_read(Path("/sys/fs/cgroup", name)) for name in ("memory.max", "memory/memory.limit_in_bytes")]
    return min([total, *(int(limit) for limit in limits if limit and limit.isdigit())])


def _numa() -> dict[str, Any]:
    nodes = {
        int(path.name[4:]): numbers(_read(path / "cpulist") or "")
        for path in Path("/sys/devices/system/node").glob("node[0-9]*")
    }
    mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    homes = [node for node, cores in nodes.items() if cores & mine]
    return {"numa_nodes": max(1, len(nodes)), "process_node": homes[0] if len(homes) == 1 else None}


def numbers(text: str) -> set[int]:
    """`0-3,8` -> {0, 1, 2, 3, 8}, as the kernel lists cores."""
    spans = [span.partition("-") for span in text.strip().split(",") if span]
    return {n for first, _, last in spans for n in range(int(first), int(last or first) + 1)}


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def look_at(folder: str) -> DataSet:
    """What the manifest, the table's footer and the sizes of the files say of a folder of shards."""
    import pyarrow.parquet as pq

    from shards.errors import UserError
    from shards.format.layout import MANIFEST, TABLE, Manifest, index_name
    from shards.storage.place import open_place

    try:
        place = open_place(folder)
        manifest = Manifest.load(place)
        with place.open(TABLE) as file:
            rows = pq.read_metadata(file).num_rows
        written = Path(folder, MANIFEST)
        return DataSet(
            folder,
            num_samples=manifest.num_samples,
            num_shards=len(manifest.shards),
            bytes=manifest.bytes,
            table_rows=rows,
            wrong=tuple(shard.name for shard in manifest.shards if place.size(shard.name) != shard.bytes),
            no_index=tuple(
                name for i in range(len(manifest.shards)) if place.size(name := index_name(i)) is None
            ),
            max_pixels=manifest.max_width * manifest.max_height,
            written_s=written.stat().st_mtime if written.exists() else 0.0,
        )
    except (UserError, OSError, ValueError) as fault:
        return DataSet(folder, fault=str(fault).strip().splitlines()[0])
