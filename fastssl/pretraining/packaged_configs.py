"""The configurations that come with the package: found by name, from a clone as from an installation."""

from __future__ import annotations

from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from shards.errors import UserError, nearest

# What `fastssl pretrain` runs without a configuration: it suits any machine.
DEFAULT_CONFIG = "laptop"


def packaged() -> dict[str, Traversable]:
    """Return the packaged configurations by name, in alphabetical order."""
    # A link to configs/ in a clone, a folder in an installation.
    folder = files("fastssl").joinpath("configs")
    found = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    return {name.removesuffix(".yaml"): folder.joinpath(name) for name in found}


def is_config(given: str) -> bool:
    """Return whether a word of the command line means a configuration: a .yaml file, or the name of a packaged one."""
    return given.endswith((".yaml", ".yml")) or given in packaged()


def find_config(given: str | Path) -> Traversable:
    """Return the file that a path or a packaged name means; a path wins, and a path of no file is returned as it is.

    Raises:
        UserError: there is no packaged configuration of this name; the nearest one is given.
    """
    path = Path(given)
    if path.is_file() or path.suffix in (".yaml", ".yml") or path.name != str(given):
        return path
    known = packaged()
    if str(given) not in known:
        raise UserError(
            f"There is no configuration called '{given}'.{nearest(str(given), known)} `fastssl configs` lists them; a file's name "
            "ends in .yaml."
        )
    return known[str(given)]
