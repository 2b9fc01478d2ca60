"""The judgements of `fastssl doctor` on software and GPUs, and all of them in order: each a pure function of the facts."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fastssl.doctor import host
from fastssl.doctor.facts import Facts
from fastssl.doctor.faults import faults_of
from fastssl.doctor.finding import Finding
from shards.commands.progress import human_size


def examine(facts: Facts) -> list[Finding]:
    """All findings, in the order of the report; every check says at least one thing, or nothing where it does not apply."""
    return [finding for check in CHECKS for finding in check(facts)]


def check_torch(facts: Facts) -> Iterator[Finding]:
    """torch and torchvision fit together and can be imported."""
    torch, vision = facts.packages.get("torch"), facts.packages.get("torchvision")
    found = f"torch {torch}, torchvision {vision}"
    if torch is None or vision is None:
        yield Finding("torch", "bad", found, "install both: pip install torch torchvision")
        return
    wanted = partner(torch)
    if facts.import_fault:
        yield Finding(
            "torch",
            "bad",
            f"{found}: {facts.import_fault}",
            "install the pair of one release, from one place",
        )
    elif wanted and not vision.startswith(f"{wanted}."):
        yield Finding(
            "torch",
            "bad",
            found,
            f"torch {torch} goes with torchvision {wanted}: pip install 'torchvision=={wanted}.*'",
        )
    else:
        yield Finding("torch", "ok", f"{found}, Python {'.'.join(map(str, facts.python))}")


def partner(torch: str) -> str | None:
    """The torchvision that a torch 2 release is made with: 2.14 -> 0.29; None for another major version."""
    major, minor = torch.split(".")[:2]
    return f"0.{int(minor) + 15}" if major == "2" and minor.isdigit() else None


def check_requirements(facts: Facts) -> Iterator[Finding]:
    """The packages' versions are those that the packages ask of each other."""
    from packaging.requirements import Requirement

    for package, lines in facts.requirements.items():
        for requirement in map(Requirement, lines):
            name = requirement.name.lower()
            installed = facts.packages.get(name)
            if installed is None or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
                continue
            if not requirement.specifier.contains(installed, prereleases=True):
                found = f"{package} {facts.packages[package]} wants {name} {requirement.specifier}, found {installed}"
                yield Finding("packages", "bad", found, f"pip install '{name}{requirement.specifier}'")
    have = [
        f"{name} {version}"
        for name, version in facts.packages.items()
        if version and name not in ("torch", "torchvision")
    ]
    missing = [name for name in ("timm", "numba", "pyarrow", "pillow") if not facts.packages.get(name)]
    if missing:
        yield Finding(
            "packages",
            "bad",
            f"missing: {', '.join(missing)}",
            "pip install fastssl-pretrain's requirements again",
        )
    yield Finding("packages", "ok", ", ".join(have))


def check_known_faults(facts: Facts) -> Iterator[Finding]:
    """No installed version has a known fault."""
    for package, version in facts.packages.items():
        for fault in faults_of(package, version) if version else []:
            yield Finding(
                "known fault",
                fault.level,
                f"{package} {version}: {fault.what}",
                f"{fault.way_out}; {fault.source}",
            )


def check_driver(facts: Facts) -> Iterator[Finding]:
    """The driver runs the CUDA that PyTorch was built for."""
    has_gpu = bool(facts.num_gpu_files or facts.driver or facts.driver_cuda)
    if facts.torch_cuda is None:
        if has_gpu:
            found = "this machine has an NVIDIA driver, and PyTorch is a build without CUDA"
            yield Finding("driver", "bad", found, "install a CUDA build of torch and torchvision")
        else:
            yield Finding("driver", "ok", "no NVIDIA driver, PyTorch without CUDA: training runs on the CPU")
        return
    if not has_gpu:
        found = f"no NVIDIA driver, PyTorch for CUDA {facts.torch_cuda}: training runs on the CPU"
        yield Finding(
            "driver", "warn", found, "with a GPU: install its driver, or start the container with --gpus all"
        )
        return
    found = f"driver {facts.driver or 'unknown'}, CUDA {_dotted(facts.driver_cuda)}; PyTorch for CUDA {facts.torch_cuda}"
    built = tuple(map(int, facts.torch_cuda.split(".")[:2]))
    if facts.driver_cuda and facts.driver_cuda[0] < built[0]:
        way_out = f"update the driver to one for CUDA {built[0]}, or install a torch for CUDA {facts.driver_cuda[0]}"
        yield Finding("driver", "bad", found, way_out)
    elif facts.driver_cuda and facts.driver_cuda < built:
        yield Finding(
            "driver", "warn", found, "works by minor version compatibility; Triton may want a newer driver"
        )
    else:
        yield Finding("driver", "ok", found)


def check_gpus(facts: Facts) -> Iterator[Finding]:
    """The GPUs are visible, free, known to this PyTorch, and at full clock."""
    if facts.torch_cuda and not facts.gpus and (facts.num_gpu_files or facts.driver):
        if facts.visible_devices is not None and facts.visible_devices.strip() in ("", "-1"):
            found, way_out = f"CUDA_VISIBLE_DEVICES is '{facts.visible_devices}'", "unset it"
        else:
            found = f"PyTorch finds no GPU{f': {facts.cuda_fault}' if facts.cuda_fault else ''}"
            way_out = "compare with nvidia-smi; in a container, start it with --gpus all"
        yield Finding("GPU", "bad", found, way_out)
    for index, gpu in enumerate(facts.gpus):
        name = f"GPU {index}"
        found = f"{gpu.name}, {human_size(gpu.memory_bytes)}, {human_size(gpu.free_bytes)} free"
        faults = 0
        if facts.torch_archs and not runs_on(facts.torch_archs, gpu.capability):
            faults += 1
            held = ", ".join(facts.torch_archs)
            found_here = (
                f"{gpu.name} is sm_{gpu.capability[0]}{gpu.capability[1]}, this PyTorch holds code for {held}"
            )
            yield Finding(name, "bad", found_here, "install a PyTorch build that supports it")
        if gpu.free_bytes < 0.8 * gpu.memory_bytes:
            faults += 1
            yield Finding(name, "warn", found, "another process holds memory: nvidia-smi tells which")
        if gpu.throttled:
            faults += 1
            yield Finding(
                name,
                "warn",
                f"its clock is held down: {gpu.throttled}",
                "look at cooling and power; timings are worth little",
            )
        if gpu.capability < (8, 0):
            faults += 1
            yield Finding(
                name,
                "warn",
                f"{gpu.name} has no bf16",
                "train.precision auto takes fp16 with a scaled loss there",
            )
        if gpu.capability >= (12, 0) and any(
            p.startswith("nvidia-nvimgcodec") for p, v in facts.packages.items() if v
        ):
            faults += 1
            source = "https://github.com/MrNeRF/LichtFeld-Studio/pull/1924"
            found_here = "its JPEG engine may skip an image and report success, which leaves it black"
            yield Finding(
                name, "warn", found_here, f"decode on the CPU, or compare some images with it first; {source}"
            )
        if not faults:
            yield Finding(name, "ok", found)


def runs_on(archs: tuple[str, ...], capability: tuple[int, int]) -> bool:
    """Whether code for `archs` runs on a GPU: binaries within a major version, PTX (compute_..) on anything newer."""
    major, minor = capability
    for arch in archs:
        kind, _, digits = arch.rstrip("af").partition("_")
        of = (int(digits[:-1]), int(digits[-1]))
        if (kind == "sm" and of[0] == major and of[1] <= minor) or (kind == "compute" and of <= capability):
            return True
    return False


def check_compiler(facts: Facts) -> Iterator[Finding]:
    """torch.compile finds what it needs: a C compiler, headers and Triton on a GPU; a C++ compiler on a CPU."""
    on_gpu = bool(facts.gpus)
    compiler, package = (facts.c_compiler, "gcc") if on_gpu else (facts.cpp_compiler, "g++")
    version = ".".join(map(str, facts.python))
    if compiler is None:
        yield Finding(
            "compiler", "warn", "none: train.compile falls back to eager", f"apt-get install {package}"
        )
    elif on_gpu and not facts.packages.get("triton"):
        yield Finding(
            "compiler",
            "warn",
            f"{compiler}, no Triton: train.compile fails",
            "pip install triton, as torch's build asks",
        )
    elif on_gpu and not facts.python_headers:
        found = f"{compiler}, no Python.h: Triton cannot build its launcher"
        yield Finding("compiler", "warn", found, f"apt-get install python{version}-dev")
    else:
        yield Finding("compiler", "ok", compiler)


CHECKS: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    check_torch,
    check_driver,
    check_gpus,
    check_compiler,
    check_requirements,
    check_known_faults,
    host.check_cores,
    host.check_memory,
    host.check_numa,
    host.check_shared_memory,
    host.check_open_files,
    host.check_disks,
    host.check_clock,
    host.check_data,
)


def _dotted(version: tuple[int, int] | None) -> str:
    return ".".join(map(str, version)) if version else "unknown"
