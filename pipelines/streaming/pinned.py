"""Page-locked host memory of the size that is asked for.

PyTorch's own (`pin_memory=True`) rounds each allocation up to a power of two, and keeps it for later ones: 4,096 views of
3 x 224 x 224 floats are 2.47 GB and take 4.29 GB. PyTorch 2.14 has a threshold for that (pinned_max_round_threshold_mb in
PYTORCH_ALLOC_CONF), but it changes every allocation of the process, and below pinned_max_cached_size_mb it could hand out a block that
is too small (github.com/pytorch/pytorch/pull/192722). Registering memory of our own works with all versions, and concerns it alone.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import warnings
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
PORTABLE = 1  # cudaHostRegisterPortable: page-locked for every device


def pinned_empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return an uninitialised tensor in page-locked memory, for copies to a GPU that do not wait.

    It takes its own bytes, rounded up to pages, and gives them back when the last tensor over it is gone. Before that, the holder sees
    to it that no copy is under way: PyTorch does not know of this memory. Where the driver refuses, the memory is PyTorch's, with a
    warning.
    """
    count = math.prod(shape) * dtype.itemsize
    if not count:
        return torch.empty(shape, dtype=dtype)
    size = -(-count // PAGE) * PAGE
    # Pages of its own: none is shared with other memory, which might be registered too.
    memory = np.empty(size + PAGE, dtype=np.uint8)
    skipped = -memory.ctypes.data % PAGE
    pages = memory[skipped : skipped + size]
    cudart: Any = torch.cuda.cudart()
    error = int(cudart.cudaHostRegister(pages.ctypes.data, size, PORTABLE))
    if error:
        with contextlib.suppress(RuntimeError):  # or the next kernel would be told of this error
            torch.zeros(1, device="cuda")
        warnings.warn(
            f"cudaHostRegister refuses {size:,} bytes (error {error}): PyTorch page-locks them, rounded up to a power of two.",
            stacklevel=2,
        )
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    # At the end of the process the system takes everything back.
    weakref.finalize(pages, _release, pages.ctypes.data, memory).atexit = False
    return torch.from_numpy(pages)[:count].view(dtype).view(shape)


def _release(address: int, memory: np.ndarray) -> None:
    """Unlock the pages at `address`, within `memory`, which lives until then."""
    # After an error of the device every call fails.
    with contextlib.suppress(RuntimeError):
        torch.cuda.synchronize()
        cudart: Any = torch.cuda.cudart()
        cudart.cudaHostUnregister(address)
    del memory
