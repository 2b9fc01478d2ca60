"""The processes of a run: who we are, all ranks' keys, means over ranks. World 1 needs no process group."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from shards.errors import UserError


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
    """Where this process computes."""

    @property
    def is_main(self) -> bool:
        """True on the one process that prints and writes."""
        return self.rank == 0


def setup(device: str | None = None, *, timeout_s: float = 600.0) -> Dist:
    """Read torchrun's environment and, for more than one process, join the process group.

    `device` is "cuda", "cpu" or None for CUDA where there is any; the backend is nccl with CUDA and gloo
    without. A process started without torchrun is world 1 and starts no process group. A collective that
    waits longer than `timeout_s` fails. Raises UserError for half an environment, or for more processes than
    GPUs.
    """
    if device not in (None, "cuda", "cpu"):
        raise UserError(f"The device is set to {device!r}, but it must be cuda or cpu.")
    use_cuda = torch.cuda.is_available() if device is None else device == "cuda"
    if use_cuda and not torch.cuda.is_available():
        raise UserError("The device is set to cuda but PyTorch finds no CUDA device: set it to cpu.")
    rank, world, local_rank = _environment()
    if use_cuda:
        num_gpus = torch.cuda.device_count()
        if local_rank >= num_gpus:
            raise UserError(
                f"This is process {local_rank + 1} of this machine, which has {num_gpus} GPUs: "
                f"start torchrun with --nproc-per-node {num_gpus} or fewer."
            )
        torch.cuda.set_device(local_rank)
    place = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if world > 1:
        dist.init_process_group(
            "nccl" if use_cuda else "gloo",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=timeout_s),
            device_id=place if use_cuda else None,
        )
    return Dist(rank, world, local_rank, place)


def _environment() -> tuple[int, int, int]:
    """(rank, world, local rank) as torchrun sets them; (0, 1, 0) where it set none."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    found = {name: os.environ[name] for name in names if name in os.environ}
    if not found:
        return 0, 1, 0
    missing = [name for name in names if name not in found]
    if missing:
        raise UserError(
            f"The environment sets {', '.join(found)} but not {', '.join(missing)}: "
            "start the processes with torchrun, or unset all of them for a single process."
        )
    return int(found["RANK"]), int(found["WORLD_SIZE"]), int(found["LOCAL_RANK"])


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process's rank; 0 where there is no process group."""
    return dist.get_rank() if _joined() else 0


def gather_keys(keys: Tensor) -> Tensor:
    """Every rank's rows in rank order, without gradient: (N, D) on each rank -> (world * N, D).

    All ranks must hold the same N, which whole batches give. At world 1 the rows themselves, detached.
    """
    keys = keys.detach()
    if not _joined():
        return keys
    num_rows, *rest = keys.shape
    gathered = keys.new_empty(dist.get_world_size() * num_rows, *rest)
    dist.all_gather(list(gathered.split(num_rows)), keys.contiguous())
    return gathered


def mean_over_ranks(metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    """Mean over ranks of scalar tensors, in one collective and in float32; every rank gets the same values.

    All ranks must pass the same names in the same order. At world 1 the values themselves.
    """
    if not _joined() or not metrics:
        return dict(metrics)
    stacked = torch.stack([value.detach().float() for value in metrics.values()])
    dist.all_reduce(stacked)
    return dict(zip(metrics, (stacked / dist.get_world_size()).unbind(), strict=True))


def barrier() -> None:
    """Wait for every rank; returns at once at world 1."""
    if _joined():
        dist.barrier()


def cleanup() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
