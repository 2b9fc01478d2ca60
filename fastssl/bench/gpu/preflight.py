"""Check the packages that `bench gpu` needs, all at once, before anything runs on a GPU machine."""

from __future__ import annotations

import sys
from pathlib import Path

from fastssl.bench.installed import is_there
from shards.errors import UserError

# Import name: distribution. Includes dependencies, because wheels are often copied without them.
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
# Packages for comparisons. Import name: distribution, and what is missing without it.
WANTED = {
    "kornia": ("kornia", "Kornia's views, the goal of 5 times them, and the engine kornia"),
    "kornia_rs": ("kornia-rs", "kornia, which imports it"),
    "nvidia.nvimgcodec": ("nvidia-nvimgcodec-cu12 nvidia-nvjpeg-cu12", "decoding on the GPU"),
    "nvidia.dali": ("nvidia-dali-cuda120", "DALI's views and loader"),
    "webdataset": ("webdataset", "its loader"),
    "lightly": ("lightly", "its loader and its step"),
    "pytest_timeout": ("pytest-timeout", "a time limit for each test: those of a file share one"),
}


def check_packages() -> list[str]:
    """Return a line for each missing package that some of the measurements need.

    Raises:
        UserError: packages that every measurement needs are missing; the message names all of them.
    """
    missing = [package for module, package in NEEDED.items() if not is_there(module)]
    if missing:
        names = " ".join(missing)
        raise UserError(
            f"`fastssl bench gpu` needs these packages, which are not installed: {', '.join(missing)}. Install them: "
            f"{sys.executable} -m pip install {names}. For a machine without a network, fetch the wheels elsewhere with the same "
            f"Python and system (pip download --dest wheels {names}), and there: pip install --no-index --find-links wheels {names}."
        )
    return [
        f"{package.split()[0]} is not installed: without {what} (pip install {package})"
        for module, (package, what) in WANTED.items()
        if not is_there(module)
    ]


def source_tree() -> Path:
    """Return the folder that holds configs/ and tests/ beside this package; raise UserError if there is none."""
    root = Path(__file__).resolve().parents[3]
    wanted = [root / "configs" / "moco_v3_vit_small.yaml", root / "tests"]
    for path in wanted:
        if not path.exists():
            raise UserError(
                f"'{path}' is missing: `fastssl bench gpu` uses the project's configurations and tests, so run it from a clone of the "
                "repository."
            )
    return root
