"""The largest chunk of a batch that fits in a GPU's memory, found by trying whole steps before the training begins."""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastssl.core.distributed import Dist, alone, smallest_over_ranks
from fastssl.core.optimizers import OptimConfig, build_optimizer
from fastssl.methods.method import Method
from fastssl.pretraining.step import Door, Step, chunks
from shards.errors import UserError

if TYPE_CHECKING:
    from fastssl.pretraining.run_config import Resolved


def choose_micro_batch(
    asked: int | str,
    method: Method,
    resolved: Resolved,
    ranks: Dist,
    dtype: torch.dtype,
    view_shape: tuple[int, ...],
) -> int:
    """The chunk size for this run, the same on every rank: as asked, or for "auto" what fits; 0 where one chunk holds all.

    Raises:
        UserError: not even 2 images fit.
    """
    cfg, share = resolved.config, resolved.config.train.batch // ranks.world
    if asked == "auto" and ranks.device.type == "cpu":
        if ranks.is_main:
            warnings.warn(
                "train.micro_batch auto looks for what fits in a GPU; on a CPU it takes the whole batch at once.",
                stacklevel=3,
            )
        return 0
    found = (
        int(asked)
        if asked != "auto"
        else find_micro_batch(
            method,
            cfg.optim,
            ranks.device,
            dtype,
            view_shape=view_shape,
            batch=share,
            world=ranks.world,
            exact_heads=cfg.train.exact_heads,
            clip_grad=cfg.train.clip_grad,
        )
    )
    if not 0 < found < share:
        return 0
    sizes = sorted({part.stop - part.start for part in chunks(share, found)})
    if cfg.train.compile and len(sizes) > 1 and ranks.is_main:
        warnings.warn(
            f"train.micro_batch {found} cuts {share} images into chunks of {sizes[0]} and {sizes[1]}, and the compiler makes "
            "faster code for one size: choose a divisor.",
            stacklevel=3,
        )
    return found


def largest_that_fits(count: int, run: Callable[[int], None]) -> int:
    """The first of `count`, a half, a quarter ... of it, rounded up, with which `run` does not run out of memory.

    Raises:
        UserError: not even 2 fit.
    """
    num = 1
    while (size := -(-count // num)) > 1:
        if _fits(run, size):
            return size
        num *= 2
    raise UserError(
        "Not even 2 images at a time fit in the GPU's memory: try --train.checkpointing blocks, a smaller --recipe.size, or a smaller "
        "--model.backbone."
    )


def _fits(run: Callable[[int], None], size: int) -> bool:
    try:
        run(size)
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        gc.collect()  # what the failed step held, which its traceback kept alive until here
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def find_micro_batch(
    method: Method,
    optim: OptimConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    view_shape: tuple[int, ...],
    batch: int,
    world: int,
    exact_heads: bool,
    clip_grad: float,
) -> int:
    """The largest chunk, of `batch` images of this process, with which two whole steps fit in the memory of `device` on every rank.

    Call it before the method is spread over ranks and compiled. The steps are real ones on empty images (C, H, W) with a rate of
    0, so they take an optimiser's memory, a full queue's and DDP's buckets into account; weights, statistics and queue are afterwards
    as before.

    Raises:
        UserError: not even 2 images fit.
    """

    def run(size: int) -> None:
        optimizer = build_optimizer(method.parameters(), optim)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
        buckets = torch.empty(trained if world > 1 else 0, device=device)
        step = Step(
            method,
            Door(method),
            optimizer,
            device,
            dtype,
            micro_batch=size,
            exact_heads=exact_heads,
            clip_grad=clip_grad,
        )
        # One empty image that poses as many: copied to the device chunk by chunk, or whole where the batch is one chunk.
        views = [torch.zeros(1, *view_shape).expand(batch, *view_shape) for _ in range(2)]
        for _ in range(2):
            step.gradients(views)
            step.update(1.0)
        del buckets

    with alone(), _restored(method):
        found = largest_that_fits(batch, run)
    return smallest_over_ranks(found, device)


@contextlib.contextmanager
def _restored(method: nn.Module) -> Iterator[None]:
    """Afterwards buffers and gradients are as before; a queue counts as full within."""
    before: dict[str, Tensor] = {name: buffer.cpu().clone() for name, buffer in method.named_buffers()}
    queue = getattr(method, "queue", None)
    count = queue.count if queue is not None else 0
    if queue is not None:
        queue.count = queue.size
    try:
        yield
    finally:
        for parameter in method.parameters():
            parameter.grad = None
        for name, buffer in method.named_buffers():
            buffer.copy_(before[name])
        if queue is not None:
            queue.count = count
