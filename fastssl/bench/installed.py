"""Whether a package is installed, asked without importing it; the standard library is enough."""

from __future__ import annotations

import importlib.util


def is_there(module: str) -> bool:
    """Return whether Python finds a module, importing no more than its parents."""
    try:
        return importlib.util.find_spec(module) is not None
    # No parent; or the module is None in sys.modules.
    except (ImportError, ValueError):
        return False
