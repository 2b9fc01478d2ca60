"""fastssl: pretrain a vision backbone on unlabelled images, then test, use and export what it learned.

    from fastssl import evaluate_knn, load_backbone, pretrain

    summary = pretrain("configs/moco_v3_vit_small.yaml", {"data.shards": "photo-shards", "train.batch": 256})
    report = evaluate_knn(summary.checkpoint, "labelled-shards")
    backbone = load_backbone(summary.checkpoint)

Nothing heavy is imported before a name is used: `import fastssl` takes milliseconds.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastssl.commands.evaluate_checkpoint import evaluate_knn
    from fastssl.models.pretrained import load_backbone
    from fastssl.pretraining.run import pretrain
    from fastssl.pretraining.run_config import load_config
    from pipelines import LoaderOptions, Recipe, eval_batches, get_recipe, open_loader
    from shards import MixedShardSet, ShardSet, SplitRule, UserError, convert, open_split, split, verify

# GNU OpenMP, which PyTorch brings, reads this when it is loaded. By default a thread spins for about a millisecond at each of a step's
# thousands of barriers, also when the thread that it waits for has lost its core to the loader or to another program: a step takes
# twice as long and more (measured on 2 cores: 4.1 s against 2.0 s on a busy machine, 0.66 s against 0.67 s on an idle one).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")

__version__ = "0.1.0"
__all__ = [
    "LoaderOptions",
    "MixedShardSet",
    "Recipe",
    "ShardSet",
    "SplitRule",
    "UserError",
    "__version__",
    "convert",
    "eval_batches",
    "evaluate_knn",
    "get_recipe",
    "load_backbone",
    "load_config",
    "open_loader",
    "open_split",
    "pretrain",
    "split",
    "verify",
]

_HOMES = {
    "evaluate_knn": "fastssl.commands.evaluate_checkpoint",
    "load_backbone": "fastssl.models.pretrained",
    "load_config": "fastssl.pretraining.run_config",
    "pretrain": "fastssl.pretraining.run",
    **dict.fromkeys(
        ("MixedShardSet", "ShardSet", "SplitRule", "UserError", "convert", "open_split", "split", "verify"),
        "shards",
    ),
    **dict.fromkeys(("LoaderOptions", "Recipe", "eval_batches", "get_recipe", "open_loader"), "pipelines"),
}


def _refuse_hidden() -> None:
    """Raise ImportError where a package of the user's hides one of ours of the same name, whose modules would not be found."""
    home = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    for name in ("shards", "pipelines"):
        spec = getattr(sys.modules.get(name), "__spec__", None) or find_spec(name)
        found = spec.origin if spec is not None else None
        if found and os.path.dirname(os.path.dirname(os.path.realpath(found))) != home:
            raise ImportError(
                f"'{found}' hides fastssl's own package '{name}', which lies in '{home}': rename it, or start from another folder."
            )


_refuse_hidden()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastssl' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
