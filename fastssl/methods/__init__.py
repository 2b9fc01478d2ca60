"""The methods by name; each is one nn.Module with forward(views), update_teacher(momentum) and backbone."""

from fastssl.methods.moco_v3 import MoCoV3
from fastssl.methods.parts import StepOutput
from shards.errors import UserError, nearest

__all__ = ["METHODS", "MoCoV3", "StepOutput", "get_method"]

METHODS: dict[str, type[MoCoV3]] = {"moco_v3": MoCoV3}


def get_method(name: str) -> type[MoCoV3]:
    """The method class called `name`. Raises UserError with the nearest known name."""
    if name not in METHODS:
        raise UserError(f"There is no method {name!r}.{nearest(name, METHODS)}")
    return METHODS[name]
