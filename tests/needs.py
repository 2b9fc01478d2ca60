"""How long tests wait; and skips that must not hide a test: what a test of equality needs is there in `make test`, or it fails."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any, NoReturn

import pytest

# No verdict depends on time: a test that waits so long for a process hangs, on however slow and busy a machine.
HANGS_S = 1200.0


def complete() -> bool:
    """Whether nothing may be missing: `make test` and CI, on Linux, where all dependencies have packages."""
    asked = os.environ.get("CI") == "true" or os.environ.get("FASTSSL_TEST_ALL") == "1"
    return asked and sys.platform == "linux"


def lacking(what: str) -> NoReturn:
    """Skip a test, or a whole module of tests, for want of something; fail where nothing may be missing."""
    if complete():
        pytest.fail(f"{what} (not skipped: CI is true, or FASTSSL_TEST_ALL is 1, as in `make test`)")
    pytest.skip(what, allow_module_level=True)


def module(name: str) -> Any:
    """Import a module that the dependencies of the package or of its tests bring."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        lacking(f"no {name}: {error}")
