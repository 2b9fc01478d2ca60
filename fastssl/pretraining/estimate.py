"""Estimate the time and the memory of a run by trial steps on a few images, before it begins."""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from fastssl.core.distributed import Dist, alone, choose_device
from fastssl.methods.method import Method
from fastssl.pretraining.build import build_method, compute_dtype
from fastssl.pretraining.micro_batch import TrialStep, forgetful, restored, trial_step
from shards.units import human_size, human_time

if TYPE_CHECKING:
    from fastssl.pretraining.run_config import Resolved

# A trial of this many seconds is long enough to be scaled to a batch.
ENOUGH_S = 0.4
# A run of more hours on a CPU is hardly what was meant.
LONG_H = 24
# One thread that is faster than several by this factor tells of a busy machine.
CROWDED = 1.5


@dataclass(frozen=True)
class StepEstimate:
    """What one process of a run takes."""

    step_s: float
    """Seconds of a step, without waiting for data."""
    memory_bytes: int
    """Gradients, optimizer state and what the backward pass keeps, beside what the process holds already."""
    one_thread_s: float = math.inf
    """Seconds of a step with one compute thread, where the process has several."""

    @property
    def crowded(self) -> bool:
        """Whether one compute thread is much faster than several: they wait for cores that other programs use."""
        return self.one_thread_s * CROWDED < self.step_s

    def describe(self, steps: int) -> str:
        """Return a sentence about a run of `steps` steps, such as "About 2 min (0.21 s a step) and 1.1 GB more memory"."""
        return (
            f"About {human_time(self.step_s * steps)} ({self.step_s:.2g} s a step) and "
            f"{human_size(self.memory_bytes)} more memory on this CPU, estimated from a few images"
        )

    def doubts(self, steps: int, free_bytes: int, batch: int) -> list[str]:
        """Return a warning for each of memory and time that the machine or anybody's patience does not have, with the way out."""
        found = []
        if self.crowded:
            found.append(
                f"This machine is busy: a step takes {self.step_s:.2g} s with {torch.get_num_threads()} compute threads, which wait "
                f"for each other, and {self.one_thread_s:.2g} s with one. Stop the run and start it with OMP_NUM_THREADS=1."
            )
        if self.memory_bytes > free_bytes:
            fits = max(2, batch * free_bytes // self.memory_bytes // 2)
            found.append(
                f"The run needs about {human_size(self.memory_bytes)} more memory but {human_size(free_bytes)} are free, and the "
                f"system may kill it: set --train.micro-batch {fits}, --train.checkpointing blocks, or a smaller --train.batch, "
                "--recipe.size or --model.backbone."
            )
        if self.step_s * steps > LONG_H * 3600:
            found.append(
                f"The run takes about {human_time(self.step_s * steps)} on this CPU: a GPU, a smaller --model.backbone (resnet10_w32, "
                "resnet18), a smaller --recipe.size or fewer --train.epochs shorten it. It can be stopped and resumed at any time."
            )
        return found


def estimate_step(method: Method, trial: TrialStep) -> StepEstimate:
    """Measure steps on 2, 4, 8 ... images until one takes `ENOUGH_S`, and scale it to the batch; for CPUs.

    Call it before the method is compiled. Afterwards the method is as it was. The time of a small trial scaled up is rather too long
    than too short. `trial.options.micro_batch` limits what is held for the backward pass.
    """
    chunk = min(trial.options.micro_batch or trial.batch, trial.batch)
    threads, alone_s = torch.get_num_threads(), math.inf
    with alone(), restored(method), forgetful(method), torch.random.fork_rng(devices=[]):
        saved = saved_bytes(method, trial) * chunk
        size = min(max(2, trial.options.group), chunk)
        while True:
            seconds = seconds_of(method, trial, size)
            if size >= chunk or (seconds >= ENOUGH_S and (size > 2 or seconds >= 3 * ENOUGH_S)):
                break
            size = min(2 * size, chunk)
        if threads > 1:
            torch.set_num_threads(1)
            try:
                alone_s = seconds_of(method, trial, size)
            finally:
                torch.set_num_threads(threads)
    trained = sum(p.numel() * p.element_size() for p in method.parameters() if p.requires_grad)
    states = 2 if trial.optim.name == "adamw" else 1
    scale = trial.batch / size
    return StepEstimate(seconds * scale, trained * (1 + states) + saved, alone_s * scale)


def seconds_of(method: Method, trial: TrialStep, size: int) -> float:
    """Return the seconds of a step on `size` images: the mean of two, the first of which also sets the kernels up."""
    began = time.perf_counter()
    replace(trial, batch=size).run(method, size)
    return (time.perf_counter() - began) / 2


def estimate_run(resolved: Resolved) -> StepEstimate | None:
    """Return what a run of one process would take, without its data, or None on a GPU."""
    cfg = resolved.config
    device = choose_device(cfg.train.device)
    if device.type != "cpu":
        return None
    method, _ = build_method(resolved, device)
    dtype = compute_dtype(cfg.train.precision, device)
    return estimate_step(method, trial_step(resolved, Dist(0, 1, 0, device), dtype))


def saved_bytes(method: Method, trial: TrialStep) -> int:
    """Return the bytes for each image that a student's forward keeps for the backward pass, parameters left out.

    What selective checkpointing keeps goes past the hooks that count, so that its blocks count with their inputs only.
    """
    parameters = {p.untyped_storage().data_ptr() for p in method.parameters()}
    found: dict[int, int] = {}
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            found[storage.data_ptr()] = storage.nbytes()
            # A storage that was freed could give its address to another.
            kept.append(tensor)
        return tensor

    images = max(2, trial.options.group)
    views = [torch.zeros(images, *shape, device=trial.device) for shape in trial.view_shapes]
    autocast = torch.autocast(trial.device.type, trial.dtype, enabled=trial.dtype != torch.float32)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with warnings.catch_warnings(), hooks, autocast:
        warnings.filterwarnings("ignore", "A saved_tensors_hooks context", FutureWarning)
        method(views)
    return sum(found.values()) // images
