"""Training steps as others write them, measured beside ours on the same model, optimizer and synthetic views."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.bench.ladder.verdict import LIGHTLY, MOCO_V3, TODAY
from fastssl.bench.report import Row
from fastssl.core.optimizers import OptimConfig, build_optimizer, set_lr
from fastssl.methods import Method, MoCoV3
from fastssl.pretraining.build import build_method
from fastssl.pretraining.run_config import Resolved

if TYPE_CHECKING:
    from fastssl.bench.step_timer import StepTimer

STEP_PEERS = (MOCO_V3, TODAY, LIGHTLY)
GROUPS = {"plain": (MOCO_V3, TODAY), "lightly": (LIGHTLY,)}
"""The steps of each group of `--rows`."""


def peer_rows(resolved: Resolved, timer: StepTimer, groups: Iterable[str]) -> dict[str, Callable[[], Row]]:
    """Return functions that measure each peer of the groups, by its name; goals are judged against MOCO_V3."""
    half = "fp16 autocast and GradScaler" if timer.device.type == "cuda" else "float32"
    plain = f"NCHW, eager, a forward per view, {half}, EMA as a Python loop, two .item() a step"
    update = "multi-tensor LARS (ours)" if resolved.config.optim.name == "lars" else "PyTorch's fastest AdamW"
    notes = {
        MOCO_V3: (
            f"as in MoCo v3's published code: {plain}, attention as products and a softmax, the optimizer as a Python loop",
            moco_v3_step,
        ),
        TODAY: (f"the same with PyTorch's later additions: fused attention, {update}", todays_step),
        LIGHTLY: (
            f"lightly's heads, NTXentLoss (more negatives than MoCo v3's) and update_momentum in an eager step, {half}",
            lightly_step,
        ),
    }

    def measured(name: str) -> Callable[[], Row]:
        note, make = notes[name]

        def row() -> Row:
            try:
                made = timer.row(name, make(resolved, timer.device, timer.batch), warm_up=2)
            finally:
                if timer.device.type == "cuda":
                    torch.cuda.empty_cache()
            made.note = note
            return made

        return row

    return {name: measured(name) for group in groups if group in GROUPS for name in GROUPS[group]}


def ema_pairs(method: Method) -> list[tuple[Tensor, Tensor]]:
    """Return (teacher, student) of every averaged parameter: module `teacher_x` follows module `x`."""
    pairs: list[tuple[Tensor, Tensor]] = []
    for name, teacher in method.named_children():
        if name.startswith("teacher_"):
            student = method.get_submodule(name.removeprefix("teacher_"))
            pairs += zip(teacher.parameters(), student.parameters(), strict=True)
    return pairs


def ema_loop(pairs: list[tuple[Tensor, Tensor]], momentum: float) -> None:
    """Update the EMA as it is often written: one tensor after the other, into new memory."""
    for teacher, student in pairs:
        teacher.data = teacher.data * momentum + student.data * (1 - momentum)


class LoopLARS(torch.optim.Optimizer):
    """LARS as in MoCo v3's code: one parameter after the other, by the rules of `fastssl.core.optimizers.LARS`."""

    def __init__(self, params: Iterable[nn.Parameter], cfg: OptimConfig):
        defaults = {"lr": cfg.lr, "weight_decay": cfg.weight_decay, "momentum": cfg.momentum}
        super().__init__(params, defaults | {"trust_coefficient": cfg.trust_coefficient})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take one step; `closure` is not used."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = p.grad
                if p.ndim > 1:
                    update = update.add(p, alpha=group["weight_decay"])
                    weight_norm, norm = torch.norm(p), torch.norm(update)
                    one = torch.ones_like(weight_norm)
                    ratio = group["trust_coefficient"] * weight_norm / norm
                    update = update.mul(torch.where(weight_norm > 0, torch.where(norm > 0, ratio, one), one))
                state = self.state[p]
                if "mu" not in state:
                    state["mu"] = torch.zeros_like(p)
                state["mu"].mul_(group["momentum"]).add_(update)
                p.add_(state["mu"], alpha=-group["lr"])


def _as(resolved: Resolved, attention: Literal["sdpa", "explicit"]) -> Resolved:
    """Return the configuration with that attention, NCHW, and without activation checkpointing."""
    cfg = resolved.config
    train = dataclasses.replace(cfg.train, channels_last=False, checkpointing="none")
    model = dataclasses.replace(cfg.model, attention=attention)
    return dataclasses.replace(resolved, config=dataclasses.replace(cfg, train=train, model=model))


def start(
    resolved: Resolved, device: torch.device, batch: int, implementation: Literal["auto", "loop"] = "auto"
) -> tuple[MoCoV3, Any, Any, list[Tensor]]:
    """Return method, optimizer with a learning rate of 0, scaler and synthetic views.

    `implementation`: of the optimizer, LARS included.
    """
    from fastssl.bench.ladder.step_rungs import views

    with warnings.catch_warnings():
        # The peers' attention is said for all backbones, and ResNets have none.
        warnings.filterwarnings("ignore", "model.attention has no effect")
        method, _ = build_method(resolved, device)
    if not isinstance(method, MoCoV3):
        raise NotImplementedError(f"this step is MoCo v3's, and the run trains {resolved.method_name}")
    optim = resolved.config.optim
    if optim.name == "lars" and implementation == "loop":
        optimizer: torch.optim.Optimizer = LoopLARS(
            [p for p in method.parameters() if p.requires_grad], optim
        )
    else:
        how = "auto" if optim.name == "lars" else implementation
        optimizer = build_optimizer(method.parameters(), dataclasses.replace(optim, implementation=how))
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


def moco_v3_step(resolved: Resolved, device: torch.device, batch: int) -> Callable[[], None]:
    """Return a step as in MoCo v3's published code: as `todays_step`, with the attention and optimizer of that code."""
    return _plain(*start(_as(resolved, "explicit"), device, batch, "loop"))


def todays_step(resolved: Resolved, device: torch.device, batch: int) -> Callable[[], None]:
    """Return a step in MoCo v3's manner with PyTorch's fused attention and fastest optimizer.

    NCHW, one forward per view, float32 on a CPU and fp16 autocast with a GradScaler on CUDA, the EMA tensor by tensor before the
    teacher's forward, and two numbers read by the host at every step.
    """
    return _plain(*start(_as(resolved, "sdpa"), device, batch))


def _plain(
    method: MoCoV3, optimizer: torch.optim.Optimizer, scaler: Any, images: list[Tensor]
) -> Callable[[], None]:
    device = images[0].device
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
    """Return a step of the same model built from lightly's parts, as in its examples; raise ImportError without lightly."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    method, _, scaler, images = start(_as(resolved, "sdpa"), device, batch)
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
