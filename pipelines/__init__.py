"""Shards to augmented views: recipes, draws and the engines that apply them.

from pipelines import open_loader

for batch in open_loader("photo-shards/", "moco_v3", batch=256):
    first, second = batch.views
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.augment.recipe import RECIPES, Recipe, get_recipe
    from pipelines.loading.evaluation_views import eval_batches
    from pipelines.loading.loader import Loader, open_loader
    from pipelines.loading.loader_options import LoaderOptions
    from pipelines.streaming.batch import Batch

__all__ = [
    "RECIPES",
    "Batch",
    "Loader",
    "LoaderOptions",
    "Recipe",
    "eval_batches",
    "get_recipe",
    "open_loader",
]

# Imported when they are first asked for: the command line must not wait for torch.
_HOMES = {
    "RECIPES": "augment.recipe",
    "Batch": "streaming.batch",
    "Loader": "loading.loader",
    "LoaderOptions": "loading.loader_options",
    "Recipe": "augment.recipe",
    "eval_batches": "loading.evaluation_views",
    "get_recipe": "augment.recipe",
    "open_loader": "loading.loader",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
