"""Optimizers: LARS, with which MoCo v3 trains ResNets, AdamW, with which it trains ViTs, and SGD."""

# pyright: reportPrivateImportUsage=false
# torch's multi-tensor operations (torch._foreach_*) have no public name; its own optimizers use them too.

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastssl.core.schedules import Clock, Schedule, cosine_between, lr_at
from shards.errors import UserError


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedules (warm-up of the learning rate, then a cosine).

    The defaults are MoCo v3's for ViTs. For ResNets the published settings are name lars, lr 0.6 (100 epochs)
    or 0.3 (300 and more), weight_decay 1e-6 (1.5e-6 for 1000 epochs), warmup_epochs 10.
    """

    name: Literal["lars", "adamw", "sgd"] = "adamw"
    """adamw for ViTs, lars for ResNets at large batches, sgd for small ones."""
    lr: float = 1.5e-4
    """Base learning rate per 256 images: the rate in use is lr * batch / 256."""
    final_lr: float = 0.0
    """Learning rate at the end of the run, whatever the batch."""
    weight_decay: float = 0.1
    """Weight decay: adamw and sgd apply it to every parameter that the method does not exempt, lars to weights of two and more
    dimensions."""
    final_weight_decay: float = -1.0
    """Weight decay at the end of the run, which half a cosine leads to; -1: it stays the same."""
    momentum: float = 0.9
    """lars and sgd: momentum."""
    betas: tuple[float, float] = (0.9, 0.999)
    """adamw: decay rates of the two moments."""
    trust_coefficient: float = 1e-3
    """lars: length of a step relative to the length of the weight, before the learning rate."""
    warmup_epochs: float = 40
    """Epochs of linear warm-up from 0."""
    implementation: Literal["auto", "fused", "foreach", "loop"] = "auto"
    """adamw and sgd: one fused kernel, multi-tensor operations, or (for comparison) a loop over the tensors. auto: fused on a GPU,
    foreach on a CPU. lars always uses multi-tensor operations."""

    def __post_init__(self) -> None:
        for name in ("lr", "trust_coefficient"):
            # `not`, so that nan is refused too.
            if not getattr(self, name) > 0:
                raise UserError(f"optim.{name} is {getattr(self, name):g} but must be greater than 0.")
        for name in ("weight_decay", "warmup_epochs", "final_lr"):
            if not getattr(self, name) >= 0:
                raise UserError(f"optim.{name} is {getattr(self, name):g} but must be 0 or more.")
        if not (self.final_weight_decay >= 0 or self.final_weight_decay == -1):
            raise UserError(
                f"optim.final_weight_decay is {self.final_weight_decay:g} but must be 0 or more, or -1 for no change."
            )
        for name in ("momentum", "betas"):
            value = getattr(self, name)
            if not all(0 <= x < 1 for x in (value if isinstance(value, tuple) else (value,))):
                raise UserError(f"optim.{name} is {value} but must be at least 0 and less than 1.")
        if self.name == "lars" and self.implementation in ("fused", "loop"):
            raise UserError(
                f"optim.implementation is {self.implementation}, but lars has multi-tensor operations only: leave it at auto, or set "
                "--optim.name adamw."
            )


def scaled_lr(cfg: OptimConfig, batch: int) -> float:
    """Return the peak learning rate for a global batch of `batch` images: cfg.lr * batch / 256 (arXiv 1706.02677)."""
    return cfg.lr * batch / 256


def learning_rate(clock: Clock, cfg: OptimConfig, batch: int) -> float:
    """Return the learning rate of a step on the schedule of `cfg`, for a global batch of `batch` images.

    A warm-up longer than the run is cut to the run's length.
    """
    epochs = clock.total / clock.steps_per_epoch
    return lr_at(
        clock.step,
        base_lr=scaled_lr(cfg, batch),
        steps_per_epoch=clock.steps_per_epoch,
        epochs=epochs,
        warmup_epochs=min(cfg.warmup_epochs, epochs),
        final_lr=cfg.final_lr,
    )


def weight_decay(clock: Clock, cfg: OptimConfig) -> float:
    """Return the weight decay of a step on the schedule of `cfg`."""
    if cfg.final_weight_decay < 0:
        return cfg.weight_decay
    return cosine_between(cfg.weight_decay, cfg.final_weight_decay, clock.before)


def unchanged(clock: Clock) -> float:
    """Return 1: the factor of a parameter group that follows the run's schedule."""
    return 1.0


@dataclass(frozen=True)
class ParamGroup:
    """Parameters that share a schedule; a method's `param_groups` returns one or several."""

    parameters: Sequence[nn.Parameter]
    rate: Schedule = unchanged
    """Factor on the run's learning rate."""
    decay: Schedule = unchanged
    """Factor on the run's weight decay; 0 for none."""
    trust: bool = True
    """lars: scale the updates of weights by the trust ratio."""
    clip: float = 0.0
    """Clip the gradient of each parameter by itself to this L2 norm; 0: no clipping."""


def trained_groups(groups: Iterable[ParamGroup | nn.Parameter]) -> list[ParamGroup]:
    """Return the groups with those parameters that require a gradient; parameters by themselves make one group.

    Raises:
        UserError: every parameter is frozen.
    """
    given = list(groups)
    alone = ParamGroup([p for p in given if isinstance(p, nn.Parameter)])
    made = [
        replace(group, parameters=[p for p in group.parameters if p.requires_grad])
        for group in (*(group for group in given if isinstance(group, ParamGroup)), alone)
    ]
    trained = [group for group in made if group.parameters]
    if not trained:
        raise UserError("There is nothing to optimize: every parameter of the model is frozen.")
    return trained


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def set_schedules(
    optimizer: torch.optim.Optimizer, groups: Sequence[ParamGroup], clock: Clock, cfg: OptimConfig, batch: int
) -> None:
    """Set learning rate and weight decay of a step; `groups`: those of `trained_groups` when the optimizer was built."""
    rate, decay = learning_rate(clock, cfg, batch), weight_decay(clock, cfg)
    for settings, group in zip(optimizer.param_groups, groups, strict=True):
        settings["lr"] = rate * group.rate(clock)
        settings["weight_decay"] = decay * group.decay(clock)


def build_optimizer(groups: Iterable[ParamGroup | nn.Parameter], cfg: OptimConfig) -> torch.optim.Optimizer:
    """Return the optimizer that `cfg` names, over the `trained_groups` of these groups.

    The learning rate starts at cfg.lr; set it before each step with `set_schedules` or `set_lr`.

    Raises:
        UserError: every parameter is frozen.
    """
    trained = trained_groups(groups)
    at_start = Clock()
    made = [
        {
            "params": list(group.parameters),
            "weight_decay": cfg.weight_decay * group.decay(at_start),
            "clip": group.clip,
        }
        for group in trained
    ]
    if cfg.name == "lars":
        for settings, group in zip(made, trained, strict=True):
            settings["trust"] = group.trust
        return LARS(made, lr=cfg.lr, momentum=cfg.momentum, trust_coefficient=cfg.trust_coefficient)
    how = {
        "auto": {"fused": True}
        if all(p.is_cuda for group in trained for p in group.parameters)
        else {"foreach": True},
        "fused": {"fused": True},
        "foreach": {"foreach": True},
        "loop": {"foreach": False},
    }[cfg.implementation]
    if cfg.name == "adamw":
        return torch.optim.AdamW(made, lr=cfg.lr, betas=cfg.betas, **how)
    return torch.optim.SGD(made, lr=cfg.lr, momentum=cfg.momentum, **how)


def clip_each(optimizer: torch.optim.Optimizer) -> None:
    """Scale each gradient of the groups with a `clip` to that L2 norm where it is longer: by clip / (norm + 1e-6), as DINO does."""
    for group in optimizer.param_groups:
        grads = [p.grad for p in group["params"] if p.grad is not None]
        if group.get("clip") and grads:
            scales = (group["clip"] / (torch.stack(torch._foreach_norm(grads)) + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(grads, list(scales.unbind()))


def match_layout(optimizer: torch.optim.Optimizer) -> None:
    """Give loaded state the strides of its parameters: fused kernels refuse tensors of different memory formats."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if (
                torch.is_tensor(value)
                and value.shape == parameter.shape
                and value.stride() != parameter.stride()
            ):
                state[name] = torch.empty_like(parameter).copy_(value)


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al., arXiv 1708.03888) with MoCo v3's rules.

    Weights of two and more dimensions: d = grad + weight_decay * p, times trust_coefficient * |p| / |d|, or
    times 1 where either norm is 0. Biases and norm parameters (one dimension or none): d = grad, neither
    decayed nor scaled. Then mu = momentum * mu + d and p = p - lr * mu: the rate stays outside the buffer, so
    a new rate acts on all of it. There is no epsilon and no Nesterov term. A step waits for nothing on the
    device, not even under a GradScaler: whether gradients overflowed, and nothing may change, is decided there.
    """

    # GradScaler then sets `grad_scale` and `found_inf` for the time of a step, and reads nothing itself.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust_coefficient: float = 1e-3,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "trust_coefficient": trust_coefficient,
            "trust": True,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take one step. `closure`, if given, recomputes the loss with gradient; its value is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            scale: Tensor | None = getattr(self, "grad_scale", None)
            overflow: Tensor | None = getattr(self, "found_inf", None)
            if scale is not None:
                torch._foreach_div_([p.grad for p in params if p.grad is not None], scale)
            updates = _lars_updates(
                params,
                group["weight_decay"],
                group["trust_coefficient"] if group.get("trust", True) else None,
            )
            buffers = [self.state[p]["momentum_buffer"] for p in params]
            if overflow is None:
                torch._foreach_mul_(buffers, group["momentum"])
                torch._foreach_add_(buffers, updates)
                torch._foreach_add_(params, buffers, alpha=-group["lr"])
                continue
            usable = overflow == 0
            moved = torch._foreach_mul(buffers, group["momentum"])
            torch._foreach_add_(moved, updates)
            for buffer, value in zip(buffers, moved, strict=True):
                torch.where(usable, value, buffer, out=buffer)
            torch._foreach_sub_(params, torch._foreach_mul(buffers, usable * group["lr"]))
        return loss


def _lars_updates(params: list[Tensor], weight_decay: float, trust_coefficient: float | None) -> list[Tensor]:
    """Return each parameter's update, decayed and scaled by LARS's rules (None: not scaled); the gradients stay as they are."""
    updates: list[Tensor] = [p.grad for p in params if p.grad is not None]
    scaled = [i for i, p in enumerate(params) if p.ndim > 1]
    if not scaled:
        return updates
    weights = [params[i] for i in scaled]
    directions = torch._foreach_add([updates[i] for i in scaled], weights, alpha=weight_decay)
    if trust_coefficient is not None:
        _scale_by_trust(directions, weights, trust_coefficient)
    for i, direction in zip(scaled, directions, strict=True):
        updates[i] = direction
    return updates


def _scale_by_trust(
    directions: tuple[Tensor, ...] | list[Tensor], weights: list[Tensor], trust_coefficient: float
) -> None:
    """Scale each direction by trust_coefficient * |weight| / |direction|, or by 1 where either norm is 0; in place."""
    weight_norms = torch.stack(torch._foreach_norm(weights))
    norms = torch.stack(torch._foreach_norm(directions))
    # torch.where keeps the decision on the device; the division's inf or nan is not chosen.
    usable = (weight_norms > 0) & (norms > 0)
    ratios = torch.where(usable, trust_coefficient * weight_norms / norms, torch.ones_like(norms))
    torch._foreach_mul_(directions, ratios.unbind())
