"""The parts of a training step, each as a function that is timed: ours, and a plain one to compare with."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastssl.bench.report import Row, Stopwatch
from fastssl.build import build_method, compile_blocks, prepare_backend, use_bf16
from fastssl.config import Resolved
from fastssl.methods import MoCoV3
from fastssl.optim import build_optimizer, set_lr
from pipelines.loader import open_loader

WARM_UP_STEPS = 3  # compiling, cuDNN's choice of algorithms, the allocator's first blocks
FORWARDS = 8  # per image: student 2 views x (forward + backward = 3), teacher 2 x 1
# Dense bf16 multiplications and additions per second, in 10^12; NVIDIA's data sheets.
PEAK_TFLOPS = {
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H200": 989,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100-SXM4-40GB": 312,
}
STUDENT, TEACHER = "student forward + backward", "teacher forward"
UPDATE, FULL = "optimiser + EMA", "full step"
LOADER, END_TO_END, PLAIN = "loader", "end to end", "plain eager step"
EMA, EMA_LOOP = "EMA", "EMA as a Python loop"


@dataclass(frozen=True)
class Trainee:
    """What a step needs."""

    method: MoCoV3
    optimizer: torch.optim.Optimizer
    device: torch.device
    bf16: bool
    compiled: bool
    forward_flops: int
    """Floating-point operations of one forward of one view through backbone and heads."""


def build(resolved: Resolved, device: torch.device) -> Trainee:
    """Method and optimiser as `fastssl.train.pretrain` sets them up."""
    train = resolved.config.train
    prepare_backend(device)
    method, _ = build_method(resolved, device)
    flops = forward_flops(method, views(resolved, device, 2)[0])
    compiled = compile_blocks(method, device) if train.compile else False
    optimizer = build_optimizer(method.parameters(), resolved.config.optim)
    set_lr(optimizer, 0.0)  # the same work, and the weights stay where they are
    return Trainee(method, optimizer, device, use_bf16(train.precision, device), compiled, flops)


def views(resolved: Resolved, device: torch.device, batch: int) -> list[Tensor]:
    """Synthetic views in the form the loader gives: float32 (batch, C, S, S) each."""
    cfg = resolved.config
    shape = (batch, cfg.model.channels, cfg.recipe.size, cfg.recipe.size)
    return [torch.randn(shape, device=device) for _ in range(cfg.recipe.num_views)]


def forward_flops(method: MoCoV3, images: Tensor) -> int:
    """Floating-point operations of one image through backbone, projector and predictor; a multiply-add counts as two."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        method.predictor(method.projector(method.backbone(images)))
    return counter.get_total_flops() // len(images)


def utilisation(images_per_s: float, forward_flops: int, gpu: str | None) -> float | None:
    """Model FLOPs utilisation, 0 to 1, counting 8 forwards an image; None where the peak of the device is not known."""
    peak = PEAK_TFLOPS.get(gpu or "")
    return images_per_s * FORWARDS * forward_flops / (peak * 1e12) if peak else None


class Clock:
    """Times a function that does one step, always in the same way."""

    def __init__(self, device: torch.device, batch: int, steps: int, repeats: int, console: Console):
        self.device, self.batch, self.console = device, batch, console
        self.steps, self.repeats = steps, repeats

    def row(self, name: str, step: Callable[[], Any]) -> Row:
        """Rates per repeat over wall time, and the times of single steps; between CUDA events, so that the host does not wait."""
        row, times_ms = Row(name), []
        with self.console.status(f"measuring {name}"):
            for _ in range(WARM_UP_STEPS):
                step()
            for _ in range(self.repeats):
                self._wait()
                watch, marks = Stopwatch(), [self._mark()]
                for _ in range(self.steps):
                    step()
                    marks.append(self._mark())
                self._wait()
                row.add(self.batch * self.steps / watch.wall_s(), watch.cores())
                times_ms += [self._between_ms(a, b) for a, b in itertools.pairwise(marks)]
        times_ms.sort()
        row.more = {
            "ms_median": statistics.median(times_ms),
            "ms_p95": times_ms[max(0, -(-95 * len(times_ms) // 100) - 1)],
        }
        return row

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between_ms(self, a: Any, b: Any) -> float:
        return a.elapsed_time(b) if self.device.type == "cuda" else 1000 * (b - a)


def measure(resolved: Resolved, trainee: Trainee, clock: Clock) -> dict[str, Row]:
    """All rows of ours, by name."""
    method, optimizer, device = trainee.method, trainee.optimizer, trainee.device
    clip = resolved.config.train.clip_grad
    synthetic = views(resolved, device, clock.batch)
    rows: dict[str, Row] = {}

    def forward_backward(images: list[Tensor]) -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=trainee.bf16):
            output = method(images)
        output.loss.backward()

    def teacher() -> list[Tensor]:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=trainee.bf16):
            return method.keys(synthetic)

    def student() -> None:
        forward_backward(synthetic)
        optimizer.zero_grad(set_to_none=True)

    def update() -> None:
        if clip:
            torch.nn.utils.clip_grad_norm_(method.parameters(), clip)
        optimizer.step()
        method.update_teacher(method.teacher_momentum(0.5))

    def full(images: list[Tensor]) -> None:
        forward_backward(images)
        update()
        optimizer.zero_grad(set_to_none=True)

    def add(name: str, step: Callable[[], Any]) -> None:
        rows[name] = clock.row(name, step)

    with _given_keys(method, teacher()):
        add(STUDENT, student)
    add(TEACHER, teacher)
    forward_backward(synthetic)  # leaves the gradients that the optimiser needs
    add(UPDATE, update)
    optimizer.zero_grad(set_to_none=True)
    add(FULL, lambda: full(synthetic))
    pairs = ema_pairs(method)
    add(EMA, lambda: method.update_teacher(0.99))
    add(EMA_LOOP, lambda: ema_loop(pairs, 0.99))
    rows[EMA].compare(rows[EMA_LOOP])
    if resolved.config.data.shards:
        with contextlib.closing(_endless(resolved, device)) as batches:  # pyright: ignore[reportArgumentType]
            add(LOADER, lambda: next(batches))
            add(END_TO_END, lambda: full(next(batches)))
    return rows


@contextlib.contextmanager
def _given_keys(method: MoCoV3, keys: list[Tensor]) -> Iterator[None]:
    """Within, the method compares with these keys and its teacher rests."""
    vars(method)["keys"] = lambda views: keys
    try:
        yield
    finally:
        del vars(method)["keys"]


def _endless(resolved: Resolved, device: torch.device) -> Iterator[list[Tensor]]:
    cfg = resolved.config
    shards = cfg.data.open()
    options = cfg.data.options()
    loader = open_loader(
        shards, cfg.recipe, batch=cfg.train.batch, seed=cfg.train.seed, device=device, **options
    )
    for epoch in itertools.count():
        for made in loader.epoch(epoch):
            yield made.views


def ema_pairs(method: MoCoV3) -> list[tuple[Tensor, Tensor]]:
    """(teacher, student) of every averaged parameter: module `teacher_x` follows module `x`."""
    pairs: list[tuple[Tensor, Tensor]] = []
    for name, teacher in method.named_children():
        if name.startswith("teacher_"):
            student = method.get_submodule(name.removeprefix("teacher_"))
            pairs += zip(teacher.parameters(), student.parameters(), strict=True)
    return pairs


def ema_loop(pairs: list[tuple[Tensor, Tensor]], momentum: float) -> None:
    """The average as it is often written: one tensor after the other, into new memory."""
    for teacher, student in pairs:
        teacher.data = teacher.data * momentum + student.data * (1 - momentum)


def _in_nchw(resolved: Resolved) -> Resolved:
    train = dataclasses.replace(resolved.config.train, channels_last=False)
    return dataclasses.replace(resolved, config=dataclasses.replace(resolved.config, train=train))


def plain_row(resolved: Resolved, clock: Clock) -> Row:
    """The same model and optimiser in a plain eager step, in MoCo v3's manner, or why it did not run.

    NCHW, one forward per view, float32 on a CPU and fp16 autocast with a GradScaler on CUDA, the average tensor by tensor before the
    teacher's forward, and two numbers read by the host at every step.
    """
    device = clock.device
    note = (
        "plain PyTorch in MoCo v3's manner: NCHW, no compiling, a forward per view, "
        f"{'fp16 autocast and GradScaler' if device.type == 'cuda' else 'float32'}, EMA as a Python loop, two .item() a step"
    )
    try:
        method, _ = build_method(_in_nchw(resolved), device)
        optimizer = build_optimizer(method.parameters(), resolved.config.optim)
        set_lr(optimizer, 0.0)
        scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")
        images, pairs = views(resolved, device, clock.batch), ema_pairs(method)

        def side(query: Tensor, key: Tensor) -> Tensor:
            temperature = method.cfg.temperature
            logits = F.normalize(query, dim=1) @ F.normalize(key, dim=1).T / temperature
            return 2 * temperature * F.cross_entropy(logits, torch.arange(len(logits), device=device))

        def step() -> None:
            with torch.autocast(device.type, dtype=torch.float16, enabled=device.type == "cuda"):
                queries = [method.predictor(method.projector(method.backbone(view))) for view in images]
                with torch.no_grad():
                    ema_loop(pairs, 0.99)
                    keys = [method.teacher_projector(method.teacher_backbone(view)) for view in images]
                loss = side(queries[0], keys[1]) + side(queries[1], keys[0])
            loss.item()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            torch.isfinite(loss).item()

        row = clock.row(PLAIN, step)
    except torch.OutOfMemoryError:
        row = Row(PLAIN, error=f"a batch of {clock.batch} does not fit in the memory of the device")
    row.note = note
    return row
