"""What has to be installed before anything runs on a GPU machine, told all at once: a package a try would take the whole visit."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from shards.errors import UserError

# By what Python imports: what an installer calls it. With what these need themselves, as wheels are often brought without it.
NEEDED = {
    "torch": "torch",
    "torchvision": "torchvision",
    "timm": "timm",
    "numpy": "numpy",
    "numba": "numba",
    "pyarrow": "pyarrow",
    "PIL": "pillow",
    "simplejpeg": "simplejpeg",
    "xxhash": "xxhash",
    "yaml": "pyyaml",
    "tyro": "tyro",
    "docstring_parser": "docstring-parser",
    "typeguard": "typeguard",
    "typing_extensions": "typing-extensions",
    "rich": "rich",
    "psutil": "psutil",
    "pytest": "pytest",
}
# What is measured with others: distribution, and what is missing without it.
WANTED = {
    "kornia": ("kornia", "Kornia's views, the goal of 5 times them, and the engine kornia"),
    "kornia_rs": ("kornia-rs", "kornia, which imports it"),
    "nvidia.nvimgcodec": ("nvidia-nvimgcodec-cu12 nvidia-nvjpeg-cu12", "decoding on the GPU"),
    "nvidia.dali": ("nvidia-dali-cuda120", "DALI's views and loader"),
    "webdataset": ("webdataset", "its loader"),
    "lightly": ("lightly", "its loader and its step"),
    "pytest_timeout": ("pytest-timeout", "a time limit for each test: those of a file share one"),
}


def is_there(module: str) -> bool:
    """Whether Python finds a module; nothing is imported but its parents."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # no parent; or struck out in sys.modules
        return False


def check_packages() -> list[str]:
    """Return a line for each package that a part of the measurements lacks.

    Raises:
        UserError: packages are missing without which nothing can be measured; the message names all of them.
    """
    missing = [package for module, package in NEEDED.items() if not is_there(module)]
    if missing:
        names = " ".join(missing)
        raise UserError(
            f"There can be no measurement without these packages, which are not installed: {', '.join(missing)}. Install them: "
            f"{sys.executable} -m pip install {names}. For a machine without a network, fetch the wheels elsewhere with the same "
            f"Python and system (pip download --dest wheels {names}), and there: pip install --no-index --find-links wheels {names}."
        )
    return [
        f"{package.split()[0]} is not installed: without {what} (pip install {package})"
        for module, (package, what) in WANTED.items()
        if not is_there(module)
    ]


def source_tree() -> Path:
    """Return the folder that holds configs/ and tests/ beside this package. Raises UserError where there is none."""
    root = Path(__file__).resolve().parents[3]
    wanted = [root / "configs" / "moco_v3_vit_small.yaml", root / "tests"]
    for path in wanted:
        if not path.exists():
            raise UserError(
                f"'{path}' is not there: bench gpu uses the project's configurations and tests, so run it from a clone of the "
                "repository."
            )
    return root
