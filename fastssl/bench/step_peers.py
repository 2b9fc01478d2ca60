"""Training steps as others write them, measured beside ours on the same model, optimiser and synthetic views."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.bench.report import Row
from fastssl.core.memory import is_out_of_memory, reason
from fastssl.core.optimizers import build_optimizer, set_lr
from fastssl.methods import MoCoV3
from fastssl.pretraining.build import build_method
from fastssl.pretraining.run_config import Resolved

if TYPE_CHECKING:
    from fastssl.bench.parts import Clock

PLAIN, LIGHTLY = "plain eager step", "lightly's blocks"


def peer_rows(resolved: Resolved, clock: Clock) -> list[Row]:
    """One row for each peer, or why it did not run; memory is freed between them."""
    half = "fp16 autocast and GradScaler" if clock.device.type == "cuda" else "float32"
    plain = f"plain PyTorch in MoCo v3's manner: NCHW, eager, a forward per view, {half}, EMA as a Python loop, two .item() a step"
    blocks = f"lightly's heads, NTXentLoss (more negatives than MoCo v3's) and update_momentum in an eager step, {half}"
    return [
        _row(PLAIN, plain, plain_step, resolved, clock),
        _row(LIGHTLY, blocks, lightly_step, resolved, clock),
    ]


def _row(name: str, note: str, make: Callable, resolved: Resolved, clock: Clock) -> Row:
    try:
        row = clock.row(name, make(resolved, clock.device, clock.batch), warm_up=2)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        row = Row(
            name, error=f"a batch of {clock.batch} does not fit in the memory of the device{reason(error)}"
        )
    except ImportError as fault:
        row = Row(name, error=f"not installed: {fault}")
    row.note = note
    if clock.device.type == "cuda":
        torch.cuda.empty_cache()
    return row


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


def _unrefined(resolved: Resolved) -> Resolved:
    train = dataclasses.replace(resolved.config.train, channels_last=False, checkpointing="none")
    return dataclasses.replace(resolved, config=dataclasses.replace(resolved.config, train=train))


def _start(resolved: Resolved, device: torch.device, batch: int) -> tuple[MoCoV3, Any, Any, list[Tensor]]:
    """Method, optimiser with a rate of 0, scaler and synthetic views."""
    from fastssl.bench.parts import views

    method, _ = build_method(_unrefined(resolved), device)
    optimizer = build_optimizer(method.parameters(), resolved.config.optim)
    set_lr(optimizer, 0.0)
    scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")
    return method, optimizer, scaler, views(resolved, device, batch)


def _half(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.float16, enabled=device.type == "cuda")


def _apply(loss: Tensor, optimizer: torch.optim.Optimizer, scaler: Any) -> None:
    loss.item()
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()


def plain_step(resolved: Resolved, device: torch.device, batch: int) -> Callable[[], None]:
    """A step in MoCo v3's manner.

    NCHW, one forward per view, float32 on a CPU and fp16 autocast with a GradScaler on CUDA, the average tensor by tensor before the
    teacher's forward, and two numbers read by the host at every step.
    """
    method, optimizer, scaler, images = _start(resolved, device, batch)
    pairs, temperature = ema_pairs(method), method.cfg.temperature

    def side(query: Tensor, key: Tensor) -> Tensor:
        logits = F.normalize(query, dim=1) @ F.normalize(key, dim=1).T / temperature
        return 2 * temperature * F.cross_entropy(logits, torch.arange(len(logits), device=device))

    def step() -> None:
        with _half(device):
            queries = [method.predictor(method.projector(method.backbone(view))) for view in images]
            with torch.no_grad():
                ema_loop(pairs, 0.99)
                keys = [method.teacher_projector(method.teacher_backbone(view)) for view in images]
            loss = side(queries[0], keys[1]) + side(queries[1], keys[0])
        _apply(loss, optimizer, scaler)
        torch.isfinite(loss).item()

    return step


def lightly_step(resolved: Resolved, device: torch.device, batch: int) -> Callable[[], None]:
    """The same model in lightly's parts, as its examples put them together. Raises ImportError where it is not installed."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    method, _, scaler, images = _start(resolved, device, batch)
    cfg, backbone = method.cfg, method.backbone
    layers = 3 if "vit" in resolved.config.model.backbone else 2

    def head(num_in: int, num_layers: int) -> torch.nn.Module:
        return MoCoProjectionHead(num_in, cfg.hidden_dim, cfg.dim, num_layers=num_layers, batch_norm=True).to(
            device
        )

    width: Any = backbone.num_features
    projector, predictor = head(width, layers), head(cfg.dim, 2)
    teacher, teacher_projector = copy.deepcopy(backbone), copy.deepcopy(projector)
    deactivate_requires_grad(teacher)
    deactivate_requires_grad(teacher_projector)
    del method
    trained = [*backbone.parameters(), *projector.parameters(), *predictor.parameters()]
    optimizer = build_optimizer(trained, resolved.config.optim)
    set_lr(optimizer, 0.0)
    criterion = NTXentLoss(temperature=cfg.temperature)

    def step() -> None:
        update_momentum(backbone, teacher, 0.99)
        update_momentum(projector, teacher_projector, 0.99)
        with _half(device):
            queries = [predictor(projector(backbone(view))) for view in images]
            with torch.no_grad():
                keys = [teacher_projector(teacher(view)) for view in images]
            loss = 0.5 * (criterion(queries[0], keys[1]) + criterion(queries[1], keys[0]))
        _apply(loss, optimizer, scaler)

    return step
