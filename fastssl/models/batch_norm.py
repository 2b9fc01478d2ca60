"""BatchNorm, whose output for an image depends on the batch: which modules have it, and running statistics that stay as they are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


def depends_on_batch(module: nn.Module) -> bool:
    """True when the module holds a layer with batch statistics (BatchNorm and its kin).

    Such a module's output for an image depends on the batch it comes with, so two views may not share one
    forward.
    """
    return any(name.endswith("running_var") for name, _ in module.named_buffers())


@contextlib.contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Within, BatchNorm normalises by the batch as before, but leaves its running statistics and its count of batches alone."""
    # A momentum of 0 writes the old values back: without the buffers, fewer tensors would be saved than in the first forward.
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
