"""The processes of a run: rank, world size, all-gather, all-reduce. A single process needs no process group."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastssl.core.rendezvous import open_store, read_environment
from shards.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Dist:
    """This process among the run's processes."""

    rank: int
    """0 to world - 1, over all machines."""
    world: int
    """Number of processes in the run."""
    local_rank: int
    """Rank on this machine, which is also the number of the GPU to use."""
    device: torch.device
    """Device that this process computes on."""

    @property
    def is_main(self) -> bool:
        """True on the one process that prints and writes."""
        return self.rank == 0


def choose_device(name: str) -> torch.device:
    """Return the device called auto (a GPU where there is one), cpu or cuda.

    Raises:
        UserError: another name, or cuda where PyTorch finds no CUDA device.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"The device is set to {name!r}, but it must be auto, cpu or cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("The device is set to cuda, but PyTorch finds no CUDA device: use cpu or auto.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def setup(device: str = "auto", *, timeout_s: float = 600.0) -> Dist:
    """Read torchrun's environment and, for more than one process, join the process group.

    The backend is nccl with CUDA and gloo without. A process that was started without torchrun is world 1 and starts no process
    group.

    Args:
        device: as `choose_device` takes it.
        timeout_s: a collective operation that waits longer fails.

    Raises:
        UserError: torchrun's variables are missing or wrong, there are more processes than GPUs, or they do not find each other.
    """
    use_cuda = choose_device(device).type == "cuda"
    rank, world, local_rank = read_environment()
    if use_cuda:
        num_gpus = torch.cuda.device_count()
        if local_rank >= num_gpus:
            raise UserError(
                f"This is process {local_rank + 1} of this machine, which has {num_gpus} GPUs: "
                f"start {num_gpus} processes or fewer (fastssl pretrain --gpus all, torchrun --nproc-per-node {num_gpus})."
            )
        torch.cuda.set_device(local_rank)
    place = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if world > 1:
        dist.init_process_group(
            "nccl" if use_cuda else "gloo",
            store=open_store(rank, world, timeout_s),
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=timeout_s),
            device_id=place if use_cuda else None,
        )
    return Dist(rank, world, local_rank, place)


_alone = False


def _joined() -> bool:
    return not _alone and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def alone() -> Iterator[None]:
    """Let this process act as the only one inside the context: for trials that may fail on one rank and not on another."""
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False


def rank() -> int:
    """Return this process's rank; 0 without a process group."""
    return dist.get_rank() if _joined() else 0


def world() -> int:
    """Return the number of processes; 1 without a process group."""
    return dist.get_world_size() if _joined() else 1


def gather_keys(keys: Tensor) -> Tensor:
    """All-gather the rows of every rank in rank order, without gradient: (N, D) on each rank -> (world * N, D).

    N must be the same on all ranks. At world 1 the rows themselves are returned, detached.
    """
    keys = keys.detach()
    if not _joined():
        return keys
    num_rows, *rest = keys.shape
    gathered = keys.new_empty(dist.get_world_size() * num_rows, *rest)
    dist.all_gather(list(gathered.split(num_rows)), keys.contiguous())
    return gathered


class _Gather(torch.autograd.Function):
    """All-gather with gradient: backward sums, over ranks, what each rank's loss says of this rank's rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.first, ctx.count = dist.get_rank() * len(rows), len(rows)
        return gather_keys(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        summed = grad.contiguous().clone()
        dist.all_reduce(summed)
        return summed[ctx.first : ctx.first + ctx.count]


def gather_with_gradient(rows: Tensor) -> Tensor:
    """All-gather the rows of every rank in rank order, (N, ...) on each rank -> (world * N, ...), with gradient.

    The gradient of a rank's rows is the sum of what all ranks' losses say of them; averaged over ranks by DDP, that is the gradient
    of the mean of the losses. All ranks must run it in the same order. At world 1 the rows themselves are returned.
    """
    return _Gather.apply(rows) if _joined() else rows  # pyright: ignore[reportReturnType]


def mean_over_ranks(metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the means over ranks of scalar tensors, in one collective and in float32; every rank gets the same values.

    All ranks must pass the same names in the same order. At world 1 the values themselves are returned.
    """
    if not _joined() or not metrics:
        return dict(metrics)
    stacked = torch.stack([value.detach().float() for value in metrics.values()])
    dist.all_reduce(stacked)
    return dict(zip(metrics, (stacked / dist.get_world_size()).unbind(), strict=True))


@torch.no_grad()
def average_over_ranks(tensors: Sequence[Tensor]) -> None:
    """Replace floating-point tensors by their means over ranks, in place and in one collective; at world 1 nothing happens.

    All ranks must pass the same shapes in the same order.
    """
    if not _joined() or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


def any_over_ranks(flag: Tensor) -> Tensor:
    """Return whether a boolean scalar is true on any rank, as a tensor on the device, without waiting; at world 1 the flag."""
    if not _joined():
        return flag
    seen = flag.float()
    dist.all_reduce(seen, dist.ReduceOp.MAX)
    return seen > 0


def on_main(function: Callable[[], T]) -> T:
    """Call `function` on the first rank alone and return its result, which must be picklable, on every rank.

    A UserError there ends the other ranks too, without a message of theirs: the first rank shows it.
    """
    if not _joined():
        return function()
    answer: list[Any] = [None, None]
    raised = None
    if dist.get_rank() == 0:
        try:
            answer[0] = function()
        except UserError as error:
            raised = answer[1] = error
    dist.broadcast_object_list(answer)
    if raised is not None:
        raise raised
    if answer[1] is not None:
        raise SystemExit(2)
    return answer[0]


def smallest_over_ranks(value: int, device: torch.device) -> int:
    """Return the smallest of every rank's numbers; waits for all ranks."""
    if not _joined():
        return value
    seen = torch.tensor(value, device=device)
    dist.all_reduce(seen, dist.ReduceOp.MIN)
    return int(seen)


class LargestOverRanks:
    """The largest of every rank's numbers, some steps late, without waiting for the device: for signals, which any rank may receive.

    Every `every` steps the ranks start a reduction between hosts, over gloo, and read the previous one. All ranks poll at the same
    steps, so they read the same number at the same step.
    """

    def __init__(self, every: int = 4) -> None:
        self.every = every
        self._group: Any = dist.new_group(backend="gloo") if _joined() else None
        self._value = torch.zeros((), dtype=torch.int64)
        self._work: Any = None

    def poll(self, step: int, value: int) -> int:
        """Return `value` at world 1; otherwise the largest number of `every` steps ago, and 0 between these steps."""
        if self._group is None:
            return value
        if step % self.every:
            return 0
        seen = self.finish()
        self._value = torch.tensor(value)
        self._work = dist.all_reduce(self._value, dist.ReduceOp.MAX, self._group, async_op=True)
        return seen

    def finish(self) -> int:
        """Wait for the reduction under way and return its number, 0 where none is.

        Call it on every rank before the processes part: one that leaves earlier closes the connection on which another still reduces.
        """
        if self._work is None:
            return 0
        self._work.wait()
        return int(self._value)


def barrier() -> None:
    """Wait for every rank; returns at once at world 1."""
    if _joined():
        dist.barrier()


def cleanup() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
