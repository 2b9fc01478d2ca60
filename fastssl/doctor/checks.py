"""What `fastssl doctor` makes of the facts: each check is a pure function of them, and names a way out of what it finds.

Only what people cannot see otherwise is checked. Versions are the installer's matter: pyproject.toml excludes those with known faults.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from fastssl.doctor.facts import JPEG_DECODERS, Facts, Gpu
from shards.commands.progress import human_size
from shards.units import plural

GB = 10**9


@dataclass(frozen=True)
class Diagnosis:
    """One line of the report."""

    check: str
    level: Literal["ok", "warn", "bad"]
    """bad will fail or give wrong results; warn is worth a look."""
    found: str
    way_out: str = ""
    """What to do about it; empty where nothing need be done."""


def examine(facts: Facts) -> list[Diagnosis]:
    """Return all lines of the report in their order; a check says at least one thing, or nothing where it does not apply."""
    return [line for check in CHECKS for line in check(facts)]


def check_torch(facts: Facts) -> Iterator[Diagnosis]:
    """torch and torchvision can be imported together."""
    found = ", ".join(f"{name} {version}" for name, version in facts.packages.items() if name != "rasterio")
    if facts.import_error:
        way_out = (
            "install torch and torchvision of one release, from one place: pip install torch torchvision"
        )
        yield Diagnosis("torch", "bad", f"{found}: {facts.import_error}", way_out)
    else:
        yield Diagnosis("torch", "ok", found)


def check_driver(facts: Facts) -> Iterator[Diagnosis]:
    """The driver runs the CUDA that PyTorch was built for."""
    if facts.import_error:  # nothing is known about PyTorch's build then
        return
    has_gpu = bool(facts.num_gpu_files or facts.driver or facts.driver_cuda)
    if facts.torch_cuda is None:
        if has_gpu:
            found = "this machine has an NVIDIA driver, but PyTorch is a build without CUDA"
            yield Diagnosis("driver", "bad", found, "install a CUDA build of torch and torchvision")
        else:
            found = "no NVIDIA driver, PyTorch without CUDA: training runs on the CPU"
            yield Diagnosis("driver", "ok", found)
        return
    if not has_gpu:
        found = (
            f"no GPU, PyTorch for CUDA {facts.torch_cuda}: training runs on the CPU. If the machine has a GPU, install its driver, or "
            "start the container with --gpus all"
        )
        yield Diagnosis("driver", "ok", found)
        return
    runs = ".".join(map(str, facts.driver_cuda)) if facts.driver_cuda else "unknown"
    found = f"driver {facts.driver or 'unknown'}, CUDA {runs}; PyTorch for CUDA {facts.torch_cuda}"
    built = tuple(map(int, facts.torch_cuda.split(".")[:2]))
    if facts.driver_cuda and facts.driver_cuda[0] < built[0]:
        way_out = f"update the driver to one for CUDA {built[0]}, or install a torch for CUDA {facts.driver_cuda[0]}"
        yield Diagnosis("driver", "bad", found, way_out)
    elif facts.driver_cuda and facts.driver_cuda < built:
        way_out = "this works by minor version compatibility; Triton may need a newer driver"
        yield Diagnosis("driver", "warn", found, way_out)
    else:
        yield Diagnosis("driver", "ok", found)


def check_gpus(facts: Facts) -> Iterator[Diagnosis]:
    """The GPUs are visible, free and known to this PyTorch."""
    if facts.torch_cuda and not facts.gpus and (facts.num_gpu_files or facts.driver):
        if facts.visible_devices is not None and facts.visible_devices.strip() in ("", "-1"):
            found, way_out = f"CUDA_VISIBLE_DEVICES is '{facts.visible_devices}'", "unset it"
        else:
            found = f"PyTorch finds no GPU{f': {facts.cuda_error}' if facts.cuda_error else ''}"
            way_out = "compare with nvidia-smi; in a container, start it with --gpus all"
        yield Diagnosis("GPU", "bad", found, way_out)
    for index, gpu in enumerate(facts.gpus):
        name, lines = f"GPU {index}", list(_gpu_lines(f"GPU {index}", gpu, facts))
        found = f"{gpu.name}, {human_size(gpu.memory_bytes)}, {human_size(gpu.free_bytes)} free"
        yield from lines or [Diagnosis(name, "ok", found)]


def _gpu_lines(name: str, gpu: Gpu, facts: Facts) -> Iterator[Diagnosis]:
    if facts.torch_archs and not runs_on(facts.torch_archs, gpu.capability):
        arch, held = "sm_{}{}".format(*gpu.capability), ", ".join(facts.torch_archs)
        found = f"{gpu.name} is {arch}, but this PyTorch holds code for {held}"
        yield Diagnosis(name, "bad", found, "install a PyTorch build that supports it")
    if gpu.free_bytes < 0.8 * gpu.memory_bytes:
        found = f"{gpu.name}, only {human_size(gpu.free_bytes)} of {human_size(gpu.memory_bytes)} free"
        yield Diagnosis(name, "warn", found, "another process holds memory: nvidia-smi shows which")
    if gpu.capability >= (12, 0) and any(package.startswith(JPEG_DECODERS) for package in facts.packages):
        found = "its JPEG engine may skip an image and report success, which leaves the image black"
        source = "https://github.com/MrNeRF/LichtFeld-Studio/pull/1924"
        yield Diagnosis(
            name, "warn", found, f"leave --data.decode cpu, or compare some images first; {source}"
        )


def runs_on(archs: tuple[str, ...], capability: tuple[int, int]) -> bool:
    """Return whether code for `archs` runs on a GPU: binaries within a major version, PTX (compute_..) on anything newer."""
    major, minor = capability
    for arch in archs:
        kind, _, digits = arch.rstrip("af").partition("_")
        of = (int(digits[:-1]), int(digits[-1]))
        if (kind == "sm" and of[0] == major and of[1] <= minor) or (kind == "compute" and of <= capability):
            return True
    return False


def check_compiler(facts: Facts) -> Iterator[Diagnosis]:
    """torch.compile finds what it needs: a C compiler, Python's headers and Triton on a GPU; a C++ compiler on a CPU."""
    on_gpu = bool(facts.gpus)
    compiler, package = (facts.c_compiler, "gcc") if on_gpu else (facts.cpp_compiler, "g++")
    if compiler is None:
        found = "none: train.compile falls back to eager"
        yield Diagnosis("compiler", "warn", found, f"apt-get install {package}")
    elif on_gpu and "triton" not in facts.packages:
        found = f"{compiler}, but no Triton: train.compile fails"
        yield Diagnosis("compiler", "warn", found, "pip install triton, in the version that torch asks for")
    elif on_gpu and not facts.python_headers:
        found = f"{compiler}, but no Python.h: Triton cannot build its launcher"
        version = "{}.{}".format(*sys.version_info)
        yield Diagnosis("compiler", "warn", found, f"apt-get install python{version}-dev")
    else:
        yield Diagnosis("compiler", "ok", compiler)


def check_kernel_cache(facts: Facts) -> Iterator[Diagnosis]:
    """Our kernels for the CPU are compiled once, not at each start."""
    if facts.numba_error:
        yield Diagnosis("kernel cache", "bad", facts.numba_error, "pip install numba")
        return
    if facts.kernel_cache and facts.kernel_cache_lasts:
        yield Diagnosis("kernel cache", "ok", facts.kernel_cache)
        return
    found = "neither the folder of the program nor the home folder can be written: "
    found += f"temporary, '{facts.kernel_cache}'" if facts.kernel_cache else "each start compiles the kernels"
    way_out = (
        "set NUMBA_CACHE_DIR to a folder that can be written and lasts, such as a volume of the container"
    )
    yield Diagnosis("kernel cache", "warn", found, way_out)


def check_rasters(facts: Facts) -> Iterator[Diagnosis]:
    """Rasters can be read; who has none needs nothing."""
    version = facts.packages.get("rasterio")
    missing = "not installed; for GeoTIFF scenes: pip install rasterio"
    yield Diagnosis("rasterio", "ok", version or missing)


def check_cores(facts: Facts) -> Iterator[Diagnosis]:
    """The control group allows as much time as there are cores, and there are some for each GPU."""
    found = plural(facts.cpus, "core") + (
        "" if facts.cpu_quota is None else f", a quota of {facts.cpu_quota:g}"
    )
    usable = min(facts.cpus, facts.cpu_quota or facts.cpus)
    if facts.cpu_quota is not None and facts.cpu_quota < facts.cpus - 0.5:
        threads = max(1, int(facts.cpu_quota))
        way_out = f"set OMP_NUM_THREADS={threads}: more threads than the quota stall each other (our own threads respect it)"
        yield Diagnosis("cores", "warn", found, way_out)
    elif facts.gpus and usable < 4 * len(facts.gpus):
        way_out = "decoding may be the limit: convert with --short-side 256, or set --data.augment-on gpu"
        yield Diagnosis("cores", "warn", f"{found} for {len(facts.gpus)} GPUs", way_out)
    else:
        yield Diagnosis("cores", "ok", found)


def check_memory(facts: Facts) -> Iterator[Diagnosis]:
    """The host, or the control group, has memory for batches on their way and better for the shards in the page cache, too."""
    found = human_size(facts.memory_bytes)
    data = facts.data.bytes if facts.data else 0
    if facts.memory_bytes < 4 * GB:
        way_out = "keep train.batch small: three batches of views wait in host memory"
        yield Diagnosis("memory", "warn", found, way_out)
    elif data > 0.8 * facts.memory_bytes:
        way_out = "use fast local disks, --data.order blocks, or smaller images (--short-side 256)"
        yield Diagnosis(
            "memory", "warn", f"{found}; the shards' {human_size(data)} do not fit in it", way_out
        )
    else:
        yield Diagnosis("memory", "ok", found)


def check_shared_memory(facts: Facts) -> Iterator[Diagnosis]:
    """/dev/shm holds what DataLoader workers and NCCL put there."""
    if facts.shm_bytes is None:
        return
    found = f"/dev/shm has {human_size(facts.shm_bytes)}"
    if facts.shm_bytes < GB:
        way_out = "start the container with --shm-size 8g (or --ipc host): NCCL and the peers of `bench loader` need it"
        yield Diagnosis("shared memory", "warn", found, way_out)
    else:
        yield Diagnosis("shared memory", "ok", found)


def check_open_files(facts: Facts) -> Iterator[Diagnosis]:
    """Every shard is a mapped file: we raise the soft limit as needed, but the hard one is the system's."""
    if facts.open_files is None:
        return
    hard = facts.open_files[1]
    soft_text, hard_text = ("no limit" if count == -1 else f"{count:,}" for count in facts.open_files)
    found = f"{soft_text} (at most {hard_text})"
    needed = (facts.data.num_shards if facts.data else 0) + 512
    if hard != -1 and hard < needed:
        way_out = "raise the hard limit (ulimit -Hn, limits.conf, or --ulimit nofile), or convert to fewer, larger shards"
        yield Diagnosis("open files", "bad", f"{found}, but {needed:,} are needed", way_out)
    elif hard != -1 and hard < 4096:
        way_out = "raise the hard limit before there are thousands of shards: ulimit -Hn 65536"
        yield Diagnosis("open files", "warn", found, way_out)
    else:
        yield Diagnosis("open files", "ok", found)


def check_disks(facts: Facts) -> Iterator[Diagnosis]:
    """There is room for checkpoints (a few GB each for large models) where a run writes."""
    for folder, free in facts.disks.items():
        found = f"{human_size(free)} free in '{folder}'"
        if free < GB:
            yield Diagnosis("disk", "bad", found, "make room: one checkpoint of a ViT-B takes 1.5 GB")
        elif free < 20 * GB:
            yield Diagnosis("disk", "warn", found, "lower train.keep_last, or write elsewhere: --train.out")
        else:
            yield Diagnosis("disk", "ok", found)


def check_data(facts: Facts) -> Iterator[Diagnosis]:
    """The shards open as training opens them: every file is there and has the size that the manifest states."""
    data = facts.data
    if data is None:
        return
    if data.error:
        way_out = "`fastssl verify` names everything that is wrong with a folder of shards"
        yield Diagnosis("shards", "bad", data.error, way_out)
        return
    found = (
        f"{plural(data.num_samples, 'image')} in {plural(data.num_shards, 'shard')}, {human_size(data.bytes)}; "
        "every shard has its size"
    )
    yield Diagnosis("shards", "ok", found)


CHECKS: tuple[Callable[[Facts], Iterator[Diagnosis]], ...] = (
    check_torch,
    check_driver,
    check_gpus,
    check_compiler,
    check_kernel_cache,
    check_rasters,
    check_cores,
    check_memory,
    check_shared_memory,
    check_open_files,
    check_disks,
    check_data,
)
