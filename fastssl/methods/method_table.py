"""Methods by name: METHODS. Each is a subclass of `method.Method` in a file of its own; a line here adds one."""

import dataclasses
import importlib
import sys
from pathlib import Path

from fastssl.methods.dino import DINO
from fastssl.methods.method import Method
from fastssl.methods.moco_v3 import MoCoV3
from fastssl.methods.simclr import SimCLR
from shards.errors import UserError, nearest

METHODS: dict[str, type[Method]] = {
    "moco_v3": MoCoV3,
    "simclr": SimCLR,
    "dino": DINO,
}


def get_method(name: str) -> type[Method]:
    """Return the method class called `name`, or the class of a name such as my_module:MyMethod.

    Raises:
        UserError: there is no such method (with the nearest known name), the module cannot be imported, or the class is no method.
    """
    if ":" in name:
        return _imported(name)
    if name not in METHODS:
        raise UserError(f"There is no method {name!r}.{nearest(name, METHODS)}")
    return METHODS[name]


def _imported(name: str) -> type[Method]:
    module_name, _, class_name = name.partition(":")
    # As with `python -m`: a module beside the run's own files.
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    # Whatever the module's own code raises.
    except Exception as error:
        raise UserError(
            f"The method's module '{module_name}' cannot be imported ({type(error).__name__}: {error}): it must lie in the current "
            "folder or be installed."
        ) from error
    # Not the base class, which such a module imports.
    classes = {
        n: value
        for n, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Method) and value is not Method
    }
    if class_name not in classes:
        there = (
            nearest(class_name, classes)
            if classes
            else " The module holds no subclass of fastssl.methods.Method."
        )
        raise UserError(f"There is no method '{class_name}' in the module '{module_name}'.{there}")
    found = classes[class_name]
    config = getattr(found, "Config", None)
    if not (dataclasses.is_dataclass(config) and config.__dataclass_params__.frozen):  # pyright: ignore[reportAttributeAccessIssue]
        raise UserError(
            f"The method '{name}' needs a class attribute Config, a frozen dataclass of its settings."
        )
    return found
