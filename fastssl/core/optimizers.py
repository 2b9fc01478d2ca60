"""Optimizers: LARS, with which MoCo v3 trains ResNets, AdamW, with which it trains ViTs, and SGD."""

# pyright: reportPrivateImportUsage=false
# torch's multi-tensor operations (torch._foreach_*) have no public name; its own optimizers use them too.

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shards.errors import UserError


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and the schedule of its learning rate (warm-up, then cosine to 0).

    The defaults are MoCo v3's for ViTs. For ResNets the published settings are name lars, lr 0.6 (100 epochs)
    or 0.3 (300 and more), weight_decay 1e-6 (1.5e-6 for 1000 epochs), warmup_epochs 10.
    """

    name: Literal["lars", "adamw", "sgd"] = "adamw"
    """adamw for ViTs, lars for ResNets at large batches, sgd for small ones."""
    lr: float = 1.5e-4
    """Base learning rate per 256 images: the rate in use is lr * batch / 256."""
    weight_decay: float = 0.1
    """Weight decay: adamw and sgd apply it to every parameter, lars to weights of two and more dimensions."""
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
        for name in ("weight_decay", "warmup_epochs"):
            if not getattr(self, name) >= 0:
                raise UserError(f"optim.{name} is {getattr(self, name):g} but must be 0 or more.")
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


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def build_optimizer(parameters: Iterable[nn.Parameter], cfg: OptimConfig) -> torch.optim.Optimizer:
    """Return the optimizer that `cfg` names, over those of `parameters` that require a gradient, in one group.

    The learning rate starts at cfg.lr; set it before each step with `set_lr`.

    Raises:
        UserError: every parameter is frozen.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:
        raise UserError("There is nothing to optimize: every parameter of the model is frozen.")
    if cfg.name == "lars":
        return LARS(
            trained,
            lr=cfg.lr,
            weight_decay=cfg.weight_decay,
            momentum=cfg.momentum,
            trust_coefficient=cfg.trust_coefficient,
        )
    how = {
        "auto": {"fused": True} if all(parameter.is_cuda for parameter in trained) else {"foreach": True},
        "fused": {"fused": True},
        "foreach": {"foreach": True},
        "loop": {"foreach": False},
    }[cfg.implementation]
    if cfg.name == "adamw":
        return torch.optim.AdamW(trained, lr=cfg.lr, betas=cfg.betas, weight_decay=cfg.weight_decay, **how)
    return torch.optim.SGD(trained, lr=cfg.lr, momentum=cfg.momentum, weight_decay=cfg.weight_decay, **how)


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
            updates = _lars_updates(params, group["weight_decay"], group["trust_coefficient"])
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


def _lars_updates(params: list[Tensor], weight_decay: float, trust_coefficient: float) -> list[Tensor]:
    """Return each parameter's update, decayed and scaled by LARS's rules; the gradients stay as they are."""
    updates: list[Tensor] = [p.grad for p in params if p.grad is not None]
    scaled = [i for i, p in enumerate(params) if p.ndim > 1]
    if not scaled:
        return updates
    weights = [params[i] for i in scaled]
    directions = torch._foreach_add([updates[i] for i in scaled], weights, alpha=weight_decay)
    weight_norms = torch.stack(torch._foreach_norm(weights))
    norms = torch.stack(torch._foreach_norm(directions))
    # torch.where keeps the decision on the device; the division's inf or nan is not chosen.
    usable = (weight_norms > 0) & (norms > 0)
    ratios = torch.where(usable, trust_coefficient * weight_norms / norms, torch.ones_like(norms))
    torch._foreach_mul_(directions, ratios.unbind())
    for i, direction in zip(scaled, directions, strict=True):
        updates[i] = direction
    return updates
