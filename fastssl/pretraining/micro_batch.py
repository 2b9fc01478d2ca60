"""The largest chunk of a batch that fits in a GPU's memory, found by trying whole steps before the training begins."""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastssl.core.distributed import Dist, alone, smallest_over_ranks
from fastssl.core.memory import is_out_of_memory, reason
from fastssl.core.optimizers import OptimConfig, build_optimizer
from fastssl.methods.method import Method
from fastssl.pretraining.build import view_form
from fastssl.pretraining.step import DDPWrapper, Step, chunks
from pipelines.loading.chunk_slot import BlankViews
from pipelines.streaming.stream import SLOTS
from shards.dataset.order import epoch_order
from shards.errors import UserError

if TYPE_CHECKING:
    from fastssl.pretraining.run_config import Resolved
    from shards.dataset.shard_set import ShardSet


def choose_micro_batch(
    asked: int | str,
    method: Method,
    resolved: Resolved,
    ranks: Dist,
    dtype: torch.dtype,
    view_shape: tuple[int, ...],
    shards: ShardSet | None = None,
) -> int:
    """The chunk size for this run, the same on every rank: as asked, or for "auto" what fits; 0 where one chunk holds all.

    Args:
        view_shape: (C, H, W).
        shards: the images of the run, for what views that the GPU makes take of its memory; without them views come from the host.

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
            source=gpu_source(resolved, shards, ranks, share),
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
    num, why = 1, None
    while (size := -(-count // num)) > 1:
        why = _lack(run, size)
        if why is None:
            return size
        num *= 2
    raise UserError(
        f"Not even 2 images at a time fit in the GPU's memory{why or ''}: try --train.checkpointing blocks, a smaller "
        "--recipe.size, or a smaller --model.backbone."
    )


def _lack(run: Callable[[int], None], size: int) -> str | None:
    """None where `size` fits, else what was said of the lack of memory, as by `memory.reason`."""
    try:
        run(size)
        return None
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return reason(error)
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
    source: Source | None = None,
) -> int:
    """The largest chunk, of `batch` images of this process, with which two whole steps fit in the memory of `device` on every rank.

    Call it before the method is spread over ranks and compiled. The steps are real ones on empty images (C, H, W) with a rate of
    0, so they take an optimiser's memory, a full queue's and DDP's buckets into account, and what the batches take that are on their
    way; weights, statistics and queue are afterwards as before. `source`: where views come from, without it the host.

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
            DDPWrapper(method),
            optimizer,
            device,
            dtype,
            micro_batch=size,
            exact_heads=exact_heads,
            clip_grad=clip_grad,
        )
        # One empty image that poses as many: copied to the device chunk by chunk, or whole where the batch is one chunk.
        views = [torch.zeros(1, *view_shape).expand(batch, *view_shape) for _ in range(2)]
        waiting = source.waiting_bytes(size < batch) if source else 0 if size < batch else nbytes(views)
        ahead = torch.empty(waiting, dtype=torch.uint8, device=device)
        for _ in range(2):
            step.gradients(source.views if source else views)
            step.update(1.0)
        del buckets, ahead

    with alone(), _restored(method):
        found = largest_that_fits(batch, run)
    return smallest_over_ranks(found, device)


@dataclass(frozen=True)
class Source:
    """Views that the GPU makes, and what else it holds for them."""

    views: BlankViews
    view_bytes: int
    """Of a whole batch of views."""
    decoded_there: bool
    """The GPU decodes."""
    cached_there: bool
    """The images lie in a cache on the GPU, which has its memory already."""

    def waiting_bytes(self, in_chunks: bool) -> int:
        """Return the bytes on the device beside the images and views of the step itself, of the batches that are on their way.

        In chunks the images wait on the host, unless the device has decoded them. A batch in one piece has the next one's views beside
        it, and a buffer for the images of every slot, which has grown by a quarter.
        """
        images = self.views.image_bytes
        decoded = SLOTS * images if self.decoded_there else 0
        if in_chunks:
            return decoded
        buffers = 0 if self.cached_there else SLOTS * images * 5 // 4 - images
        return decoded + buffers + self.view_bytes


def gpu_source(resolved: Resolved, shards: ShardSet | None, ranks: Dist, share: int) -> Source | None:
    """The views of the first batch, where the run's GPU makes them chunk by chunk."""
    cfg = resolved.config
    data = cfg.data
    if shards is None or data.augment_on != "gpu" or data.engine != "fused":
        return None
    ids = shards.ids[epoch_order(len(shards), cfg.train.seed, 0)[:share]]
    form, cached = view_form(cfg.train, ranks.device), data.cache == "gpu"
    recipe = cfg.recipe
    views = BlankViews(shards, recipe, ids, ranks.device, form=form, cached=cached)
    pixels = sum(recipe.side(view) ** 2 for view in range(recipe.total_views)) * len(recipe.mean)
    return Source(views, share * pixels * form.dtype.itemsize, data.decode == "gpu", cached)


def nbytes(views: Sequence[Tensor]) -> int:
    """Return the bytes that views take where each image has its own."""
    return sum(view.numel() * view.element_size() for view in views)


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
