"""The step's rungs of the ladder: student, teacher and update by themselves, on synthetic views."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastssl.bench.hardware import bytes_of
from fastssl.bench.ladder.verdict import STUDENT, TEACHER, UPDATE
from fastssl.bench.report import Row
from fastssl.bench.step_timer import StepTimer
from fastssl.core import schedules
from fastssl.core.distributed import Dist
from fastssl.core.optimizers import build_optimizer, set_lr
from fastssl.methods import Method
from fastssl.pretraining.build import build_method, compute_dtype, prepare_backend, view_form
from fastssl.pretraining.micro_batch import choose_micro_batch, fill_queues, forgetful
from fastssl.pretraining.run_config import Resolved
from fastssl.pretraining.step import DDPWrapper, Step, StepOptions, chunks
from pipelines.loading.slots import view_shapes
from pipelines.streaming.lazy_views import LazyViews

# In the middle of a run, where a teacher's momentum is neither its first nor its last.
MIDWAY = schedules.Clock(step=49, total=100)


@dataclass(frozen=True)
class Trainee:
    """Everything that a step needs, and its cost per image."""

    method: Method
    optimizer: torch.optim.Optimizer
    step: Step
    device: torch.device
    dtype: torch.dtype
    batch: int
    """Images a step."""
    chunk: int
    """Images on the device at a time."""
    student_flops: int
    """Floating-point operations of a step per image in the student, forward and backward (3 forwards); recomputing does not count."""
    teacher_flops: int
    """Those in the teacher: a forward of the views that it sees."""
    bytes_per_image: float
    """Bytes that the student's and the teacher's operations read and write for an image, each operation by itself."""
    bytes_per_step: float
    """Bytes that they move once a step, for any batch: weights and their gradients."""
    update_bytes: int
    """Bytes that the optimizer and the EMA move."""

    @property
    def flops(self) -> int:
        """Floating-point operations of a step per image: for two views of each network, 8 forwards."""
        return self.student_flops + self.teacher_flops

    @property
    def in_chunks(self) -> bool:
        """Whether a step takes its batch in chunks."""
        return self.chunk < self.batch

    def traffic(self, batch: int) -> float:
        """Return the bytes that a full step of `batch` images moves without fusion."""
        return batch * self.bytes_per_image + self.bytes_per_step + self.update_bytes


def build(resolved: Resolved, device: torch.device) -> Trainee:
    """Return method, optimizer and step as the trainer builds them, uncompiled, with costs counted on a few images."""
    train = resolved.config.train
    prepare_backend(device)
    method, _ = build_method(resolved, device)
    dtype = compute_dtype(train.precision, device)
    optimizer = build_optimizer(method.param_groups(), resolved.config.optim)
    # The same work, but the weights stay unchanged.
    set_lr(optimizer, 0.0)
    shards = resolved.config.data.open() if resolved.config.data.shards else None
    alone = Dist(0, 1, 0, device)
    chunk = choose_micro_batch(train.micro_batch, method, resolved, alone, dtype, shards)
    group = resolved.config.model.bn_block
    options = StepOptions(chunk, train.exact_heads, train.clip_grad, group=group)
    step = Step(method, DDPWrapper(method), optimizer, device, dtype, options)
    fill_queues(method)
    with forgetful(method):
        least = max(2, group)
        few, more = (_moved(step, views(resolved, device, count)) for count in (least, 2 * least))
        step.gradients(views(resolved, device, least))
        update_bytes = bytes_of(lambda: step.update(0.99))
    per_image = (more - few) / least
    images = views(resolved, device, least)
    of_teacher = forward_flops(images, lambda images: method.targets(method.teacher_features(images)))
    size = max(part.stop - part.start for part in chunks(train.batch, chunk, group))
    return Trainee(
        method,
        optimizer,
        step,
        device,
        dtype,
        train.batch,
        size,
        3 * (forward_flops(images, method) - of_teacher),
        of_teacher,
        per_image,
        few - least * per_image,
        update_bytes,
    )


def _moved(step: Step, images: list[Tensor]) -> int:
    moved = bytes_of(lambda: step.gradients(images))
    step.optimizer.zero_grad(set_to_none=True)
    return moved


def views(resolved: Resolved, device: torch.device | str, batch: int) -> list[Tensor]:
    """Return synthetic views as the loader gives them: float32 (batch, C, S, S) each."""
    return [torch.randn((batch, *shape), device=device) for shape in view_shapes(resolved.config.recipe)]


class OneChunk(LazyViews):
    """A chunk of views on the device that stands for every chunk of a batch."""

    def __init__(self, chunk: list[Tensor], num_samples: int) -> None:
        self._chunk, self.num_samples, self.num_views = chunk, num_samples, len(chunk)

    def rows(self, part: slice) -> list[Tensor]:
        """See `LazyViews.rows`; returns at most the images of the chunk, which are made already."""
        return [view[: part.stop - part.start] for view in self._chunk]


def step_views(resolved: Resolved, trainee: Trainee) -> Sequence[Tensor]:
    """Return the synthetic views of a whole step, where the loader would leave them.

    A batch in chunks lies on the host or, where the device makes each chunk's views on demand, is a chunk on the device.
    """
    if not trainee.in_chunks or trainee.device.type == "cpu":
        return _as_loaded(resolved, views(resolved, trainee.device, trainee.batch))
    if resolved.config.data.augment_on == "gpu":
        chunk = _as_loaded(resolved, views(resolved, trainee.device, trainee.chunk))
        return OneChunk(chunk, trainee.batch)
    return [view.pin_memory() for view in views(resolved, "cpu", trainee.batch)]


def _as_loaded(resolved: Resolved, images: list[Tensor]) -> list[Tensor]:
    """Return the views in the dtype and memory format that the loader would give them on their device."""
    data, device = resolved.config.data, images[0].device
    if data.augment_on != "gpu" or data.engine != "fused" or device.type == "cpu":
        return images
    form = view_form(resolved.config.train, device)
    return [view.to(form.dtype, memory_format=form.memory_format) for view in images]


def forward_flops(images: list[Tensor], forward: Callable[[list[Tensor]], Any]) -> int:
    """Return the floating-point operations of `forward` for an image, given views of some; a multiply-add is two."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        forward(images)
    return counter.get_total_flops() // len(images[0])


def step_rows(resolved: Resolved, trainee: Trainee, timer: StepTimer) -> dict[str, Callable[[], Row]]:
    """Return functions that measure student, teacher and update by themselves, each on as many images as a chunk has."""
    method, step, chunk = trainee.method, trainee.step, trainee.chunk
    synthetic = _as_loaded(resolved, views(resolved, trainee.device, chunk))
    # Without a micro batch: a chunk is all it is given.
    options = StepOptions(group=step.group)
    whole = Step(method, DDPWrapper(method), trainee.optimizer, trainee.device, trainee.dtype, options)

    def teacher() -> Any:
        if method.targets_from == "student":
            return None
        with _autocast(trainee):
            return method.targets(method.teacher_features(synthetic))

    def student() -> None:
        whole.gradients(synthetic)
        trainee.optimizer.zero_grad(set_to_none=True)

    def student_row() -> Row:
        with forgetful(method), _given_targets(whole, teacher()):
            return timer.row(STUDENT, student, batch=chunk)

    def teacher_row() -> Row:
        if not method.plan.teacher:
            return Row(TEACHER, error=f"{resolved.method_name} has no teacher")
        with forgetful(method):
            return timer.row(TEACHER, teacher, batch=chunk)

    def update_row() -> Row:
        grads = [(p, torch.randn_like(p)) for p in method.parameters() if p.requires_grad]

        def update() -> None:
            # A step clears the gradients.
            for parameter, grad in grads:
                parameter.grad = grad
            step.update(method.teacher_momentum(MIDWAY))

        return timer.row(UPDATE, update, batch=trainee.batch)

    return {STUDENT: student_row, TEACHER: teacher_row, UPDATE: update_row}


def _autocast(trainee: Trainee) -> torch.autocast:
    return torch.autocast(trainee.device.type, dtype=trainee.dtype, enabled=trainee.dtype != torch.float32)


@contextlib.contextmanager
def _given_targets(step: Step, targets: Any) -> Iterator[None]:
    """Let the step inside the context use these targets, so that the teacher does not run."""
    vars(step)["_targets"] = lambda views, parts: targets
    try:
        yield
    finally:
        del vars(step)["_targets"]


def is_cnn(method: nn.Module) -> bool:
    """Return whether most of the weights belong to convolutions."""
    sizes = [
        (isinstance(m, nn.Conv2d), m.weight.numel())
        for m in method.modules()
        if isinstance(m, nn.Conv2d | nn.Linear)
    ]
    return sum(n for conv, n in sizes if conv) > sum(n for conv, n in sizes if not conv)
