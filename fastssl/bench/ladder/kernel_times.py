"""The device's time in a step by kind of kernel, from torch.profiler: the ground for every decision on what to make faster."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch.profiler import ProfilerActivity, profile

from fastssl.bench.report import Row, Stopwatch

if TYPE_CHECKING:
    from fastssl.bench.step_timer import StepTimer

# Kinds of kernels by a part of their names, the first that fits: of cuDNN, cuBLAS, CUTLASS, PyTorch and Inductor on a GPU, and of
# PyTorch's operations on a CPU.
KINDS = {
    "optimizer, EMA": r"multi_tensor_apply|adam|_foreach",
    "attention": r"flash|fmha|attention|sdpa",
    "convolutions": r"conv|fprop|dgrad|wgrad|nchwtonhwc|nhwctonchw",
    "matrix products": r"gemm|nvjet|cutlass|splitk|mm$|linear|cublas",
    "compiled reductions": r"triton_(red|per|mix)",
    "compiled elementwise": r"triton_|cpp_fused",
    "normalization": r"batch_norm|layer_norm|bn_[fb]w|layernorm|batchnorm|rowwisemoments|gammabeta",
    "copies": r"memcpy|memset|copy",
    "elementwise": r"elementwise|add|sub|mul|div|sqrt|lerp|norm|gelu|relu|softmax|reduce|sum",
}
OTHER = "other"
# Spans that carry the time of the kernels inside them a second time.
_SPANS = re.compile(r"^(Optimizer\.|## Call|Torch-Compiled|ProfilerStep|autograd::)|#")
# Kernels listed one by one.
TOP = 40


def kind_of(kernel: str) -> str:
    """Return the kind of a kernel, or of an operation on a CPU, by its name."""
    found = (kind for kind, pattern in KINDS.items() if re.search(pattern, kernel, re.IGNORECASE))
    return next(found, OTHER)


def profiled_row(name: str, step: Callable[[], Any], timer: StepTimer, steps: int = 3) -> Row:
    """Return a row with the device's milliseconds of a step, `kinds_ms` by kind and `kernels` one by one: [name, calls, ms].

    On a GPU these are the durations of its kernels, which overlap where streams do; on a CPU each operation's own time. `device_ms` is
    their sum, and `wall_ms` the time of a step under the profiler.
    """
    on_gpu = timer.device.type == "cuda"
    activities = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    for _ in range(2):
        step()
    timer.wait()
    with profile(activities=activities) as profiler:
        watch = Stopwatch()
        for _ in range(steps):
            step()
        timer.wait()
        wall_s, cores = watch.wall_s(), watch.cores()
    row = Row(name)
    row.add(timer.batch * steps / wall_s, cores)
    kernels = [
        (event.key, event.count / steps, _own_us(event, on_gpu) / 1000 / steps)
        for event in profiler.key_averages()
        if _counts(event, on_gpu)
    ]
    kinds: dict[str, float] = defaultdict(float)
    for key, _, ms in kernels:
        kinds[kind_of(key)] += ms
    kernels.sort(key=lambda kernel: -kernel[2])
    row.more = {
        "wall_ms": 1000 * wall_s / steps,
        "device_ms": sum(kinds.values()),
        "kinds_ms": dict(sorted(kinds.items(), key=lambda kind: -kind[1])),
        "kernels": [list(kernel) for kernel in kernels[:TOP]],
    }
    return row


def _counts(event: Any, on_gpu: bool) -> bool:
    """Return whether an entry of the profile is work of the device, and not a span around such work."""
    if getattr(event, "is_user_annotation", False) or _SPANS.search(event.key):
        return False
    return (event.device_type.name == "CUDA") == on_gpu


def _own_us(event: Any, on_gpu: bool) -> float:
    return event.self_device_time_total if on_gpu else event.self_cpu_time_total


def told(row: Row) -> str:
    """Return the kinds of a profiled row as a sentence."""
    parts = ", ".join(f"{kind} {ms:,.3g}" for kind, ms in row.more["kinds_ms"].items())
    return (
        f"Milliseconds of a step by kind of work: {parts}; together {row.more['device_ms']:,.4g}, "
        f"of {row.more['wall_ms']:,.4g} in all."
    )
