"""`open_loader`: one call that yields batches of views from shards, for every engine."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from pipelines.draws import draw, eval_draws
from pipelines.recipe import Recipe
from shards.errors import UserError, nearest
from shards.order import epoch_order, rank_positions, steps_per_epoch
from shards.read import ShardSet

PREFETCH = 2  # batches made ahead: one being filled while one waits
TASKS_PER_THREAD = (
    4  # parts a batch is cut in, per thread: small enough that the last part does not keep others waiting
)


@dataclass(frozen=True)
class Batch:
    """Some samples and their views.

    `views`: float32 (N, 3, S, S) each, normalised; `sample_ids` and `labels`: int64 (N,), label -1 where there is none.
    On a CPU the views lie in buffers that are used again: they are valid until the next batch is asked for.
    """

    views: list[torch.Tensor]
    sample_ids: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class DataConfig:
    """Where the samples come from and how they become views."""

    shards: str = ""
    """Folder of shards that `fastssl shard` made."""
    engine: Literal["fused", "reference"] = "fused"
    """What makes the views: 'fused' is the fast one, 'reference' is PIL and torchvision, one image at a time."""
    threads: int = 0
    """Threads that decode and augment; 0 means one per core that this process may use, divided among the ranks here."""

    def __post_init__(self) -> None:
        if self.threads < 0:
            raise UserError(f"data.threads is {self.threads}, but it must be 0 (one per core) or more.")


def open_loader(
    shards: ShardSet,
    recipe: Recipe,
    *,
    batch: int,
    seed: int,
    rank: int = 0,
    world: int = 1,
    engine: str = "fused",
    threads: int = 0,
    device: torch.device | str = "cpu",
) -> Loader:
    """Open the training stream of one rank.

    Args:
        batch: samples per step over all ranks; must divide by `world`.
        seed: decides order and draws together with the epoch.
        device: where the views go; copies to a GPU overlap with the work on it.

    Raises:
        UserError: the batch does not divide by the ranks, or the data set has fewer samples than one batch, or the engine is
            unknown.
    """
    rank_positions(0, batch, rank, world)  # names both numbers where the batch does not divide
    if shards.num_samples < batch:
        raise UserError(
            f"'{shards.folder}' has {shards.num_samples} samples, fewer than one batch of {batch}: lower the batch size "
            f"(--train.batch) to at most {shards.num_samples}, or convert more images."
        )
    return Loader(
        shards, recipe, batch, seed, rank, world, make_engine(engine, recipe), threads, torch.device(device)
    )


def make_engine(name: str, recipe: Recipe) -> Callable[[memoryview, np.ndarray, np.ndarray], None]:
    """The engine called `name`: a callable (encoded image, DRAW records (V,), float32 out (V, 3, S, S)) -> None."""
    from pipelines.fused_engine import FusedEngine, ReferenceEngine

    engines = {"fused": FusedEngine, "reference": ReferenceEngine}
    if name not in engines:
        raise UserError(f"There is no engine called '{name}'.{nearest(name, engines)}")
    return engines[name](recipe)


def default_threads() -> int:
    """Cores this process may use, shared among the ranks of this machine (torchrun's LOCAL_WORLD_SIZE)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


class Loader:
    """Batches of one rank in the global order; made by `open_loader`."""

    def __init__(self, shards, recipe, batch, seed, rank, world, engine, threads, device):
        self.shards: ShardSet = shards
        self.recipe: Recipe = recipe
        self.batch: int = batch
        self.seed: int = seed
        self.rank: int = rank
        self.world: int = world
        self.threads: int = threads or default_threads()
        self.device: torch.device = device
        self.steps_per_epoch = steps_per_epoch(shards.num_samples, batch)
        self._engine = engine

    def epoch(self, epoch: int, start_step: int = 0) -> Generator[Batch, None, None]:
        """Yield the batches of `epoch` from `start_step` on; a pure function of (seed, epoch, step)."""
        first = epoch * self.steps_per_epoch
        return self.steps(first + start_step, first + self.steps_per_epoch)

    def steps(self, start: int, stop: int) -> Generator[Batch, None, None]:
        """Yield the batches of the global steps start .. stop - 1, on from one epoch to the next without a pause."""

        def ids_and_draws() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            order, ordered = np.empty(0, dtype=np.int64), -1
            for step in range(start, stop):
                epoch, within = divmod(step, self.steps_per_epoch)
                if epoch != ordered:
                    order, ordered = epoch_order(self.shards.num_samples, self.seed, epoch), epoch
                ids = order[rank_positions(within, self.batch, self.rank, self.world)]
                widths, heights = self.shards.widths[ids], self.shards.heights[ids]
                yield ids, draw(self.recipe, self.seed, epoch, ids, widths, heights)

        num_views, size = self.recipe.num_views, self.recipe.size
        shape = (num_views, self.batch // self.world, 3, size, size)
        return stream(self.shards, self._engine, ids_and_draws(), shape, self.threads, self.device)


def eval_batches(
    shards: ShardSet,
    recipe: Recipe,
    sample_ids: np.ndarray,
    *,
    batch: int = 256,
    threads: int = 0,
    device: torch.device | str = "cpu",
) -> Generator[Batch, None, None]:
    """Yield the fixed evaluation view of the given samples, in their order; the last batch may be smaller."""

    def ids_and_draws() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(0, len(sample_ids), batch):
            ids = sample_ids[start : start + batch]
            yield ids, eval_draws(recipe, shards.widths[ids], shards.heights[ids])

    shape = (1, min(batch, len(sample_ids)), 3, recipe.size, recipe.size)
    engine = make_engine("fused", recipe)
    return stream(shards, engine, ids_and_draws(), shape, threads or default_threads(), torch.device(device))


def stream(
    shards: ShardSet,
    engine: Callable[[memoryview, np.ndarray, np.ndarray], None],
    ids_and_draws: Iterator[tuple[np.ndarray, np.ndarray]],
    shape: tuple[int, ...],
    threads: int,
    device: torch.device,
) -> Generator[Batch, None, None]:
    """Make batches in threads, `PREFETCH` ahead and in order.

    Args:
        ids_and_draws: per batch the sample ids (N,) and the DRAW records (V, N), N <= shape[1].
        shape: (V, N, C, H, W) of the largest batch.

    Raises:
        UserError: a sample does not decode; the message names it.
    """
    copies = torch.cuda.Stream(device) if device.type == "cuda" else None
    free: deque[_Buffer] = deque(_Buffer(shape, copies) for _ in range(PREFETCH + 1))
    waiting: deque[tuple[_Buffer, np.ndarray, list[Future]]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="views")

    def fill(buffer: _Buffer, ids: np.ndarray, draws: np.ndarray, part: range) -> None:
        for i in part:
            try:
                # Strided over views in `draws`, contiguous for the compiled kernel.
                engine(shards.read(int(ids[i])), np.ascontiguousarray(draws[:, i]), buffer.pixels[:, i])
            except (RuntimeError, OSError) as fault:
                raise UserError(bad_sample(shards, int(ids[i]))) from fault

    def start_next() -> None:
        for ids, draws in ids_and_draws:
            buffer = free.popleft()
            buffer.wait_until_copied()
            size = max(1, len(ids) // (threads * TASKS_PER_THREAD))
            parts = [range(a, min(a + size, len(ids))) for a in range(0, len(ids), size)]
            waiting.append((buffer, ids, [pool.submit(fill, buffer, ids, draws, part) for part in parts]))
            return

    try:
        for _ in range(PREFETCH):
            start_next()
        while waiting:
            buffer, ids, futures = waiting.popleft()
            for future in futures:
                future.result()
            start_next()  # into the buffer that neither this batch nor the waiting one holds
            yield Batch(buffer.views(len(ids), device), ids, shards.labels[ids])
            free.append(buffer)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _Buffer:
    """Memory for one batch, pinned where it is copied to a GPU."""

    def __init__(self, shape: tuple[int, ...], copies: torch.cuda.Stream | None):
        self.tensor = torch.empty(shape, dtype=torch.float32, pin_memory=copies is not None)
        self.pixels = self.tensor.numpy()
        self._copies = copies
        self._copied = torch.cuda.Event() if copies is not None else None

    def views(self, count: int, device: torch.device) -> list[torch.Tensor]:
        """The first `count` samples of each view on the device.

        The copy runs on a stream of its own, so it overlaps with the step that the GPU is still at; the current stream waits for it,
        the host does not.
        """
        if self._copies is None or self._copied is None:
            return [view[:count] for view in self.tensor]
        with torch.cuda.stream(self._copies):
            views = [view[:count].to(device, non_blocking=True) for view in self.tensor]
            self._copied.record()
        compute = torch.cuda.current_stream(device)
        compute.wait_event(self._copied)
        for view in views:
            view.record_stream(compute)  # its memory was taken on the other stream
        return views

    def wait_until_copied(self) -> None:
        """Return when the memory may be overwritten."""
        if self._copied is not None:
            self._copied.synchronize()


def bad_sample(shards: ShardSet, sample_id: int) -> str:
    """The message about a sample that no longer decodes: which it is, where it lies, how to mend it."""
    return (
        f"sample {sample_id} of '{shards.folder}' (made from '{shards.name(sample_id)}') does not decode, but did when it was "
        f"converted: delete '{shards.shard_path(sample_id)}' and run the same `fastssl shard` command again, which makes it anew."
    )
