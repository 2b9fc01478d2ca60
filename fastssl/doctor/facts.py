"""What `fastssl doctor` knows about a machine: gathered here, judged in `fastssl.doctor.checks`. Nothing here raises."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sysconfig
import warnings
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from shards.control_groups import cpu_quota, memory_limit
from shards.cpus import cpu_cores

# Distributions that the report names; which of the nvImageCodec ones is installed depends on CUDA.
PACKAGES = ("torch", "torchvision", "timm", "kornia", "nvidia-dali-cuda120", "triton", "rasterio")
JPEG_DECODERS = "nvidia-nvimgcodec-cu"


@dataclass(frozen=True)
class Gpu:
    """One GPU that PyTorch may use."""

    name: str
    capability: tuple[int, int]
    memory_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class DataSet:
    """A folder of shards, opened as training opens it; images are not read."""

    folder: str
    error: str = ""
    """Why it cannot be opened; empty where it can."""
    num_samples: int = 0
    num_shards: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Facts:
    """Everything that the checks judge."""

    packages: dict[str, str] = field(default_factory=dict)
    """Distribution -> version, of those that are installed."""
    import_error: str = ""
    """Why torch and torchvision cannot be imported together."""
    torch_cuda: str | None = None
    """The CUDA version that PyTorch was built for; None for a build without CUDA."""
    torch_archs: tuple[str, ...] = ()
    """sm_90 and so on: the GPUs that this PyTorch holds code for."""
    driver: str | None = None
    """The driver's version, as nvidia-smi reports it."""
    driver_cuda: tuple[int, int] | None = None
    """The newest CUDA version that the driver runs."""
    num_gpu_files: int = 0
    """Device files: /dev/nvidia0 and so on."""
    visible_devices: str | None = None
    """CUDA_VISIBLE_DEVICES."""
    gpus: tuple[Gpu, ...] = ()
    cuda_error: str = ""
    """Why PyTorch finds no GPU, in CUDA's words."""
    c_compiler: str | None = None
    cpp_compiler: str | None = None
    python_headers: bool = True
    shm_bytes: int | None = None
    """Size of /dev/shm."""
    open_files: tuple[int, int] | None = None
    """Soft and hard limit of open files; -1 for none."""
    disks: dict[str, int] = field(default_factory=dict)
    """Folder -> free bytes."""
    cpus: int = 1
    """Cores that the scheduler lets this process use."""
    cpu_quota: float | None = None
    """Cores' worth of time that the control group allows; None for no limit."""
    memory_bytes: int = 0
    """Of the machine, or of the control group where that is less."""
    kernel_cache: str = ""
    """Folder where compiled kernels are kept; empty: none can be written."""
    kernel_cache_lasts: bool = True
    """Whether that is one of Numba's usual places, not a temporary folder."""
    numba_error: str = ""
    """Why Numba cannot be imported."""
    data: DataSet | None = None


def gather(shards: str = "", out: str = ".") -> Facts:
    """Return the facts of this machine, and of the folder `shards` where it is given; `out` is where a run would be written."""
    values: dict[str, Any] = {
        "packages": _packages(),
        "driver": _driver(),
        "driver_cuda": _driver_cuda(),
        "num_gpu_files": len(list(Path("/dev").glob("nvidia[0-9]*"))),
        "visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "c_compiler": _compiler("CC", "gcc", "cc", "clang"),
        "cpp_compiler": _compiler("CXX", "g++", "c++", "clang++"),
        "python_headers": Path(sysconfig.get_paths()["include"], "Python.h").exists(),
        "shm_bytes": shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else None,
        "open_files": _open_files(),
        "disks": {} if (free := _free_bytes(out)) is None else {out: free},
        "cpus": cpu_cores(),
        "cpu_quota": cpu_quota(),
        "memory_bytes": _memory_bytes(),
        "data": open_data_set(shards) if shards else None,
        **_kernel_cache(),
        **_torch(),
    }
    return Facts(**values)


def open_data_set(folder: str) -> DataSet:
    """Open a folder of shards as training does, and return what it holds, or the error."""
    from shards.dataset.shard_set import ShardSet
    from shards.errors import UserError

    try:
        shards = ShardSet.open(folder)
    except (UserError, OSError) as error:
        return DataSet(folder, error=str(error).strip().splitlines()[0])
    manifest = shards.manifest
    return DataSet(
        folder, num_samples=len(shards), num_shards=len(manifest.shards), bytes=int(manifest.bytes)
    )


def _packages() -> dict[str, str]:
    installed = {d.name.lower(): d.version for d in metadata.distributions() if d.name}
    decoders = sorted(name for name in installed if name.startswith(JPEG_DECODERS))
    return {name: installed[name] for name in (*PACKAGES, *decoders) if name in installed}


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def _torch() -> dict[str, Any]:
    try:
        import torch
        import torchvision  # noqa: F401 - a mismatch shows at its import
    except Exception as error:  # whatever it is, it is what the user needs to read
        return {"import_error": _first_line(error)}
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
            gpus.append(Gpu(about.name, (about.major, about.minor), about.total_memory, free))
        found["gpus"] = tuple(gpus)
    except (RuntimeError, AssertionError) as error:
        found["cuda_error"] = str(error).strip().splitlines()[0]
    return found


def _kernel_cache() -> dict[str, Any]:
    try:
        from pipelines.kernel_cache import found_place

        with warnings.catch_warnings():
            # The report says the same.
            warnings.simplefilter("ignore")
            folder, lasts = found_place()
    except Exception as error:
        return {"numba_error": _first_line(error)}
    return {"kernel_cache": folder, "kernel_cache_lasts": lasts}


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return next(iter(done.stdout.split()), None) if done.returncode == 0 else None


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
    return resource.getrlimit(resource.RLIMIT_NOFILE)


def _free_bytes(folder: str) -> int | None:
    here = Path(folder).absolute()
    there = next((path for path in (here, *here.parents) if path.exists()), None)
    return shutil.disk_usage(there).free if there else None


def _memory_bytes() -> int:
    found = re.search(r"MemTotal:\s+(\d+) kB", _read(Path("/proc/meminfo")) or "")
    total = int(found[1]) * 1024 if found else 0
    return min(total, memory_limit())


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
