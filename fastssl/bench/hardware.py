"""The peak rates of a device: from its data sheet where it is known, else of a measured matrix product and copy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastssl.bench.step_timer import best_s

# Measurements of a product or a copy, of which the fastest counts.
TIMES = 6


@dataclass(frozen=True)
class Peak:
    """The peak rates of a device."""

    tflops: float
    """10^12 dense multiplications and additions a second, in the precision of the run."""
    tb_per_s: float
    """10^12 bytes a second read from or written to its memory."""
    source: str
    """"data sheet" or "measured"."""


# TFLOP/s of dense bf16 and fp16 and TB/s, from NVIDIA's data sheets, by the beginning of CUDA's device name.
SHEETS = {
    "NVIDIA B200": (2250, 8.0),
    "NVIDIA H200": (989, 4.8),
    "NVIDIA H100 80GB HBM3": (989, 3.35),
    "NVIDIA H100 NVL": (835, 3.9),
    "NVIDIA H100 PCIe": (756, 2.0),
    "NVIDIA A100-SXM4-80GB": (312, 2.04),
    "NVIDIA A100-SXM4-40GB": (312, 1.56),
    "NVIDIA A100-PCIE-40GB": (312, 1.56),
    "NVIDIA A100 80GB PCIe": (312, 1.94),
    "NVIDIA L40S": (362, 0.86),
    "NVIDIA L4": (121, 0.30),
    "NVIDIA A10G": (70, 0.60),
    "NVIDIA A10": (125, 0.60),
    "NVIDIA GeForce RTX 4090": (165, 1.01),
    "NVIDIA GeForce RTX 3090": (71, 0.94),
    "Tesla V100-SXM2-32GB": (125, 0.90),
    "Tesla T4": (65, 0.32),
}


def sheet(gpu: str) -> Peak | None:
    """Return the data sheet of a GPU by its CUDA name; None where it is not listed."""
    found = [
        name for name in sorted(SHEETS, key=len, reverse=True) if gpu == name or gpu.startswith(f"{name} ")
    ]
    return Peak(*SHEETS[found[0]], "data sheet") if found else None


def peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """Return the device's peak for products in `dtype`: the data sheet's for 16 bits on a known GPU, else the measured one."""
    known = sheet(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return known if known and dtype != torch.float32 else measured(device, dtype)


def measured(device: torch.device, dtype: torch.dtype, side: int = 0) -> Peak:
    """Return the peak that the fastest of some products of square matrices and of some copies of large tensors reach."""
    on_gpu = device.type == "cuda"
    side = side or (8192 if on_gpu else 1024)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    # On a CPU 32 MB: more than most caches hold.
    block = torch.empty(side * side * (4 if on_gpu else 8), device=device)
    target = torch.empty_like(block)
    product_s = best_s(lambda: a @ b, device, TIMES)
    copy_s = best_s(lambda: target.copy_(block), device, TIMES)
    return Peak(2 * side**3 / product_s / 1e12, 2 * block.nbytes / copy_s / 1e12, "measured")


class Traffic(TorchDispatchMode):
    """Count the bytes that operations read and write inside the context, each operation by itself: the traffic without fusion."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.is_view or func._schema.name in (
            "aten::detach",
            "aten::alias",
            "aten::empty_like",
            "aten::empty",
        ):
            return out
        written = [
            arg
            for formal, arg in zip(func._schema.arguments, args, strict=False)
            if formal.alias_info is not None and formal.alias_info.is_write
        ]
        moved = [*tree_leaves(args), *tree_leaves(kwargs), *tree_leaves(written)]
        # An operation in place also returns what it has written.
        if not written:
            moved += tree_leaves(out)
        self.bytes += sum(x.nbytes for x in moved if isinstance(x, torch.Tensor))
        return out


def bytes_of(run: Any) -> int:
    """Return the bytes that `Traffic` counts for `run()`."""
    with Traffic() as traffic:
        run()
    return traffic.bytes
