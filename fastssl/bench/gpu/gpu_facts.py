"""Facts of a machine, with the time of first imports and compiles: python -m fastssl.bench.gpu.gpu_facts OUT.json."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fastssl.bench.report import error_line, machine, today, versions
from shards.storage.atomic_files import atomic_write

COPIED_BYTES = 1 << 28
# Images of a first batch: enough for every kernel to be compiled.
VIEWS = 8


class FactsFile:
    """Facts by name, written to a file one by one; a fact that cannot be found is {"error": reason}."""

    def __init__(self, out: Path):
        self._out, self.found, self.failed = out, {}, False

    def add(self, name: str, find: Callable[[], Any]) -> None:
        """Find a fact, write it to the file and print it."""
        began = time.perf_counter()
        try:
            fact = find()
        except Exception as error:
            # The other facts are still useful.
            traceback.print_exc()
            fact, self.failed = {"error": error_line(error)}, True
        self.found[name] = fact
        self.found.setdefault("seconds", {})[name] = round(time.perf_counter() - began, 2)
        atomic_write(self._out, (json.dumps(self.found, indent=2) + "\n").encode())
        print(f"{name}: {fact}", flush=True)


def imports_s() -> dict[str, float]:
    """Return the seconds of the first import of each large package, which is slow on a machine that has just started."""
    found = {}
    for name in ("torch", "torchvision", "timm", "numba", "pyarrow"):
        began = time.perf_counter()
        importlib.import_module(name)
        found[name] = round(time.perf_counter() - began, 2)
    return found


def gpu() -> str:
    """Return the CUDA name of the GPU, after allocating memory on it; empty without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return ""
    torch.zeros(1, device="cuda").item()
    return torch.cuda.get_device_name()


def driver() -> str | None:
    """Return the output of nvidia-smi on driver, memory, clocks and other work on the GPU; None without nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return None
    return subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=30, check=False).stdout


def rates(device: Any) -> dict[str, Any]:
    """Return TFLOP/s of a matrix product and TB/s of a copy, measured and from the data sheet."""
    import torch

    from fastssl.bench.hardware import measured, sheet
    from fastssl.pretraining.build import compute_dtype

    dtype = compute_dtype("auto", device)
    found: dict[str, Any] = {
        "dtype": str(dtype).removeprefix("torch."),
        "measured": vars(measured(device, dtype)),
    }
    if device.type == "cuda":
        known = sheet(torch.cuda.get_device_name(device))
        found["data sheet"] = vars(known) if known else None
    return found


def copies_gb_per_s(device: Any) -> dict[str, float] | None:
    """Return GB/s between pinned memory and the GPU, the best of three each way; None without a GPU."""
    import torch

    if device.type != "cuda":
        return None
    from fastssl.bench.step_timer import best_s

    host = torch.empty(COPIED_BYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(host, device=device)
    found = {}
    for name, to, source in (("to_gpu", there, host), ("from_gpu", host, there)):
        best = best_s(partial(to.copy_, source, non_blocking=True), device, 3)
        found[name] = COPIED_BYTES / best / 1e9
    return found


def kernels(device: Any) -> dict[str, Any]:
    """Return the kernels that make views on the GPU, chosen after Triton's self-test against torch's, and its warnings."""
    from pipelines.kernels.batched_views import choose_kernels

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        chosen: Any = choose_kernels(device)
    return {"module": chosen.__name__, "warnings": [str(each.message) for each in told]}


def first_views(device: Any) -> dict[str, float]:
    """Return the seconds to the first batch of 224 pixels, with numba's compiles on the CPU and Triton's on a GPU."""
    from fastssl.bench.loaders.augmenters import AUGMENTERS, Decoded
    from pipelines.augment.recipe import get_recipe
    from pipelines.loading.loader import default_threads
    from pipelines.previews.pictures import photographs

    work = Decoded(photographs(VIEWS), get_recipe("moco_v3"), VIEWS, device, default_threads())
    found = {}
    for name in ("fused", "triton") if device.type == "cuda" else ("fused", "torch"):
        began = time.perf_counter()
        with AUGMENTERS[name].open(work) as step:
            sum(float(view.sum()) for view in step())
        found[name] = round(time.perf_counter() - began, 2)
    return found


def main(argv: list[str]) -> int:
    """Find all facts; return 1 if one of them could not be found."""
    facts = FactsFile(Path(argv[0]))
    facts.add("date", today)
    facts.add("versions", versions)
    facts.add("driver", driver)
    facts.add("compiler", lambda: shutil.which("gcc") or shutil.which("cc") or shutil.which("clang"))
    facts.add("imports_s", imports_s)
    facts.add("gpu", gpu)
    name = facts.found["gpu"]
    if not isinstance(name, str):
        return 1
    import torch

    device = torch.device("cuda" if name else "cpu")
    facts.add("machine", lambda: machine(device))
    facts.add("rates", lambda: rates(device))
    facts.add("copies_gb_per_s", lambda: copies_gb_per_s(device))
    facts.add("kernels", lambda: kernels(device))
    facts.add("first_views_s", lambda: first_views(device))
    return int(facts.failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
