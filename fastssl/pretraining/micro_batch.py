"""Find the largest chunk of a batch that fits in a GPU's memory, by trying whole steps before the training begins."""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastssl.core.distributed import Dist, alone, smallest_over_ranks
from fastssl.core.optimizers import OptimConfig, build_optimizer, set_lr
from fastssl.core.out_of_memory import bracketed_cause, is_out_of_memory
from fastssl.core.schedules import Clock
from fastssl.methods.method import Method
from fastssl.methods.queue import KeyQueue
from fastssl.pretraining.build import view_form
from fastssl.pretraining.step import WHOLE_BATCH, DDPWrapper, Step, StepOptions, chunks
from pipelines.loading.chunk_slot import BlankViews
from pipelines.loading.slots import view_shapes
from pipelines.streaming.batch_stream import SLOTS
from shards.dataset.order import epoch_order
from shards.errors import UserError

if TYPE_CHECKING:
    from fastssl.pretraining.run_config import Resolved
    from shards.dataset.shard_set import ShardSet

# Far into a run: weights that a method freezes at first have gradients and optimizer state by then.
LATE = Clock(step=10**6, total=10**6 + 1, steps_per_epoch=1)


def trial_step(
    resolved: Resolved, ranks: Dist, dtype: torch.dtype, gpu_views: GPUViews | None = None
) -> TrialStep:
    """Return the step that a run takes on each of its ranks, to be tried before it begins."""
    cfg, train = resolved.config, resolved.config.train
    micro_batch = 0 if train.micro_batch == "auto" else train.micro_batch
    return TrialStep(
        cfg.optim,
        ranks.device,
        dtype,
        tuple(view_shapes(cfg.recipe)),
        train.batch // ranks.world,
        ranks.world,
        StepOptions(micro_batch, train.exact_heads, train.clip_grad, group=cfg.model.bn_block),
        gpu_views,
    )


def choose_micro_batch(
    asked: int | str,
    method: Method,
    resolved: Resolved,
    ranks: Dist,
    dtype: torch.dtype,
    shards: ShardSet | None = None,
) -> int:
    """Return the chunk size of this run, the same on every rank: as asked, or for "auto" what fits; 0 where one chunk holds all.

    Args:
        shards: the run's images, to count the memory of views that the GPU makes; None: views come from the host.

    Raises:
        UserError: not even 2 images fit.
    """
    train, share = resolved.config.train, resolved.config.train.batch // ranks.world
    if asked == "auto" and ranks.device.type == "cpu":
        if ranks.is_main:
            warnings.warn(
                "train.micro_batch auto finds what fits in a GPU; on a CPU it takes the whole batch at once.",
                stacklevel=3,
            )
        return 0
    found = (
        int(asked)
        if asked != "auto"
        else find_micro_batch(
            method, trial_step(resolved, ranks, dtype, gpu_views(resolved, shards, ranks, share))
        )
    )
    if not 0 < found < share:
        return 0
    group = resolved.config.model.bn_block
    sizes = sorted({part.stop - part.start for part in chunks(share, found, group)})
    if train.compile and len(sizes) > 1 and ranks.is_main:
        warnings.warn(
            f"train.micro_batch {found} cuts {share} images into chunks of {sizes[0]} and {sizes[1]}, and the compiler makes "
            "faster code for one size: choose a divisor.",
            stacklevel=3,
        )
    return found


def largest_that_fits(count: int, run: Callable[[int], None]) -> int:
    """Return the first of `count`, a half, a quarter ... of it (rounded up) with which `run` does not run out of memory.

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
    """Return None where `size` fits, else the cause of the lack of memory, as `bracketed_cause` writes it."""
    try:
        run(size)
        return None
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return bracketed_cause(error)
    finally:
        # Frees what the failed step held: its traceback kept it alive until here.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class GPUViews:
    """Views that the GPU makes, and the memory that it holds for them beside the step."""

    views: BlankViews
    view_bytes: int
    """Of a whole batch of views."""
    decoded_there: bool
    """The GPU decodes."""
    cached_there: bool
    """The images lie in a cache on the GPU, whose memory is taken already."""

    def waiting_bytes(self, in_chunks: bool) -> int:
        """Return the bytes on the device of the batches that wait, beside the images and views of the step itself.

        In chunks the images wait on the host, unless the device has decoded them. A batch in one piece has the next one's views beside
        it, and for every slot a buffer of images, which has grown by a quarter.
        """
        images = self.views.image_bytes
        decoded = SLOTS * images if self.decoded_there else 0
        if in_chunks:
            return decoded
        buffers = 0 if self.cached_there else SLOTS * images * 5 // 4 - images
        return decoded + buffers + self.view_bytes


@dataclass(frozen=True)
class TrialStep:
    """The step that `find_micro_batch` tries on one process, as the run will take it."""

    optim: OptimConfig
    device: torch.device
    dtype: torch.dtype
    view_shapes: tuple[tuple[int, ...], ...]
    """(C, H, W) of each view."""
    batch: int
    """Images of this process."""
    world: int = 1
    options: StepOptions = WHOLE_BATCH
    """`micro_batch` is what is searched."""
    gpu_views: GPUViews | None = None
    """Views that the GPU makes; None: views come from the host."""

    def run(self, method: Method, size: int) -> None:
        """Take two whole steps on empty images in chunks of `size`, at a learning rate of 0."""
        optimizer = build_optimizer(method.param_groups(), self.optim)
        set_lr(optimizer, 0.0)
        trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
        buckets = torch.empty(trained if self.world > 1 else 0, device=self.device)
        options = replace(self.options, micro_batch=size)
        step = Step(method, DDPWrapper(method), optimizer, self.device, self.dtype, options)
        # One empty image that poses as many: copied to the device chunk by chunk, or whole where the batch is one chunk.
        views = [torch.zeros(1, *shape).expand(self.batch, *shape) for shape in self.view_shapes]
        in_chunks = size < self.batch
        from_host = 0 if in_chunks else nbytes(views)
        waiting = self.gpu_views.waiting_bytes(in_chunks) if self.gpu_views else from_host
        ahead = torch.empty(waiting, dtype=torch.uint8, device=self.device)
        for _ in range(2):
            step.gradients(self.gpu_views.views if self.gpu_views else views, LATE)
            step.update(1.0)
        del buckets, ahead


def find_micro_batch(method: Method, trial: TrialStep) -> int:
    """Return the largest chunk with which two whole steps fit in the device's memory on every rank.

    Call it before the method is spread over ranks and compiled. The steps are real ones, so they take the optimizer's memory, a full
    queue, DDP's buckets and the batches that wait into account. Weights, statistics and queue are restored afterwards.

    Raises:
        UserError: not even 2 images fit.
    """
    with alone(), restored(method):
        found = largest_that_fits(trial.batch, partial(trial.run, method))
    return smallest_over_ranks(found, trial.device)


def gpu_views(resolved: Resolved, shards: ShardSet | None, ranks: Dist, share: int) -> GPUViews | None:
    """Return the views of the first batch where the run's GPU makes them, chunk by chunk; None elsewhere."""
    cfg = resolved.config
    data = cfg.data
    if shards is None or data.augment_on != "gpu" or data.engine != "fused":
        return None
    ids = shards.ids[epoch_order(len(shards), cfg.train.seed, 0)[:share]]
    form, cached = view_form(cfg.train, ranks.device), data.cache == "gpu"
    recipe = cfg.recipe
    views = BlankViews(shards, recipe, ids, ranks.device, form=form, cached=cached)
    pixels = sum(recipe.side(view) ** 2 for view in range(recipe.total_views)) * len(recipe.mean)
    return GPUViews(views, share * pixels * form.dtype.itemsize, data.decode == "gpu", cached)


def nbytes(views: Sequence[Tensor]) -> int:
    """Return the bytes that views take where each image has its own."""
    return sum(view.numel() * view.element_size() for view in views)


@contextlib.contextmanager
def forgetful(method: Method) -> Iterator[None]:
    """Keep steps inside the context from filling the queue of keys, which takes whole batches only."""
    vars(method)["remember"] = lambda targets, applied=None: None
    try:
        yield
    finally:
        del vars(method)["remember"]


@contextlib.contextmanager
def restored(method: nn.Module) -> Iterator[None]:
    """Restore buffers and gradients at the end; inside, a queue counts as full."""
    before: dict[str, Tensor] = {name: buffer.cpu().clone() for name, buffer in method.named_buffers()}
    queues = [m for m in method.modules() if isinstance(m, KeyQueue)]
    counts = [queue.count for queue in queues]
    fill_queues(method)
    try:
        yield
    finally:
        for parameter in method.parameters():
            parameter.grad = None
        for name, buffer in method.named_buffers():
            buffer.copy_(before[name])
        for queue, count in zip(queues, counts, strict=True):
            queue.count = count


def fill_queues(method: nn.Module) -> None:
    """Let every queue of keys count as full, as in all but a run's first steps."""
    for module in method.modules():
        if isinstance(module, KeyQueue):
            module.count = module.size
