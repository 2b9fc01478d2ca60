"""Telling a lack of GPU memory from other failures."""

from __future__ import annotations

import torch

# PyTorch's allocator raises OutOfMemoryError. What takes memory beside it (the driver, cuBLAS, cuDNN, NCCL) fails with a status,
# which comes as a plain RuntimeError (or AcceleratorError). Where cuDNN gets no workspace, it may also say that an algorithm is not
# supported or fails inside, and cuBLAS may say that it is not initialised.
SIGNS = (
    "CUDA out of memory",
    "HIP out of memory",
    "CUDA error: out of memory",
    "HIP error: out of memory",
    "CUDA driver error: out of memory",
    "Cuda failure 2 'out of memory'",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_NOT_SUPPORTED",
    "CUDNN_STATUS_INTERNAL_ERROR",
    "unable to find an engine to execute this computation",
)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether `error` is what a lack of memory on a GPU looks like, from whichever library it comes.

    cuDNN's and cuBLAS's words may have another cause as well: show them (`bracketed_cause`) with whatever is advised.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    # "DefaultCPUAllocator: not enough memory" is the host's.
    return isinstance(error, RuntimeError) and any(sign.lower() in str(error).lower() for sign in SIGNS)


def bracketed_cause(error: BaseException) -> str:
    """Return the first line of an error in brackets, with a space before, to be added to a sentence.

    It is empty for PyTorch's own error, which says no more than that memory is short.
    """
    text = str(error).strip()
    return "" if isinstance(error, torch.OutOfMemoryError) or not text else f" ({text.splitlines()[0]})"
