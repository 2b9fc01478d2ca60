"""Methods by name: METHODS. Each is a subclass of `method.Method` in a file of its own; a line here adds one."""

from fastssl.methods.moco_v3 import MoCoV3
from shards.errors import UserError, nearest

METHODS: dict[str, type[MoCoV3]] = {"moco_v3": MoCoV3}


def get_method(name: str) -> type[MoCoV3]:
    """Return the method class called `name`; raise UserError, with the nearest known name, where there is none."""
    if name not in METHODS:
        raise UserError(f"There is no method {name!r}.{nearest(name, METHODS)}")
    return METHODS[name]
