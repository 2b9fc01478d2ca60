"""BatchNorm: whether a module has it, and a forward that leaves its running statistics alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def depends_on_batch(module: nn.Module) -> bool:
    """Return whether the module has a layer with batch statistics (BatchNorm and its kin).

    Its output for an image then depends on the rest of the batch, so two views may not share one forward.
    """
    has_norm = any(isinstance(m, _BatchNorm) for m in module.modules())
    return has_norm or any(name.endswith("running_var") for name, _ in module.named_buffers())


@contextlib.contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Inside, BatchNorm normalises by the batch, but leaves its running statistics and its number of batches alone.

    The same with groups (`grouped_batch_norm`): a forward inside does not count for the next commit.
    """
    # A momentum of 0 writes the old values back. Without the buffers, fewer tensors would be saved than in the first forward.
    # A grouped layer counts nothing while it has no number of batches.
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
