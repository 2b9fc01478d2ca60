"""The methods by name; each is one nn.Module that follows `method.Method`."""

from fastssl.methods.method import Method, StepOutput
from fastssl.methods.moco_v3 import MoCoV3
from shards.errors import UserError, nearest

__all__ = ["METHODS", "Method", "MoCoV3", "StepOutput", "get_method"]

METHODS: dict[str, type[MoCoV3]] = {"moco_v3": MoCoV3}


def get_method(name: str) -> type[MoCoV3]:
    """The method class called `name`. Raises UserError with the nearest known name."""
    if name not in METHODS:
        raise UserError(f"There is no method {name!r}.{nearest(name, METHODS)}")
    return METHODS[name]
