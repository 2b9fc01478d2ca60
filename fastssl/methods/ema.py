"""The teacher as an exponential moving average (EMA) of the student."""

# pyright: reportPrivateImportUsage=false
# torch's multi-tensor operations (torch._foreach_*) have no public name; its own optimizers use them too.

import copy
from collections.abc import Iterable, Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def teacher_of(student: Module) -> Module:
    """Return a frozen copy of a part of the student: its teacher at the start of a run.

    It skips no blocks: stochastic depth regularises the student, and would make the teacher's answers noisy.
    """
    teacher = copy.deepcopy(student).requires_grad_(False)
    for module in teacher.modules():
        if isinstance(getattr(module, "drop_prob", None), float):
            module.drop_prob = 0.0  # pyright: ignore[reportArgumentType]
    return teacher


@torch.no_grad()
def ema_update(
    teacher: Iterable[Tensor],
    student: Iterable[Tensor],
    momentum: float | Tensor,
    how: Literal["foreach", "loop"] = "foreach",
) -> None:
    """Set teacher = momentum * teacher + (1 - momentum) * student, in place, in one multi-tensor operation or tensor by tensor.

    A momentum on the device (a scalar tensor) takes three operations and a little memory, since lerp reads its weight on the host.
    """
    old, new = list(teacher), list(student)
    if isinstance(momentum, Tensor):
        for first in range(0, len(old), 32):
            some = old[first : first + 32]
            change = torch._foreach_sub(new[first : first + 32], some)
            torch._foreach_mul_(change, 1 - momentum)
            torch._foreach_add_(some, change)
    elif how == "foreach":
        torch._foreach_lerp_(old, new, 1 - momentum)
    else:
        for average, value in zip(old, new, strict=True):
            average.lerp_(value, 1 - momentum)


@torch.no_grad()
def relative_distance(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> Tensor:
    """Return |teacher - student| / |student|, L2 norms over all elements: a scalar on the device, 0 where they are equal."""
    differences = [torch.linalg.vector_norm(t - s) for t, s in zip(teacher, student, strict=True)]
    lengths = torch._foreach_norm(list(student))
    tiny = torch.finfo(lengths[0].dtype).tiny
    return torch.stack(differences).norm() / torch.stack(list(lengths)).norm().clamp(min=tiny)
