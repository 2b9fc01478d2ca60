"""The engines by name: what turns encoded images and DRAW records into views. They differ in speed and in how near they come to
the reference, never in what is drawn.

An engine makes views either one image at a time (`stream.Renderer`) or a batch at a time (`batch_engine.BatchEngine`); both are
also callable for one image.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from pipelines.augment.operations import OPERATIONS, POINTWISE
from shards.errors import UserError, nearest

if TYPE_CHECKING:  # the command line asks for the names only, and must not wait for torch
    import numpy as np

    from pipelines.augment.recipe import Recipe
    from pipelines.engines.batch_engine import BatchEngine, BatchOptions
    from shards.dataset.shard_set import ShardSet

EngineName = Literal["fused", "dali", "kornia", "reference"]
# The operations that every engine has in its own way. Those of files of their own are called from there, but are no nodes of DALI.
_FUSED = frozenset(
    ["crop", "jitter", "gray", "blur", "solarize", "hflip", "vflip", "turn", "noise", "normalize", "erase"]
)


class ImageEngine(Protocol):
    """An engine that makes views one image at a time; a `stream.Renderer`."""

    def decode(self, data: memoryview) -> np.ndarray:
        """Return the pixels (H, W, C) of an encoded image; RuntimeError where it does not decode."""
        ...

    def render(self, pixels: np.ndarray, draws: np.ndarray, out: Sequence[np.ndarray]) -> None:
        """Write the view of each DRAW record (V,) to `out`, V arrays of float32 (C, S, S)."""

    def __call__(self, data: memoryview, draws: np.ndarray, out: Sequence[np.ndarray]) -> None:
        """Decode one image and write the view of each DRAW record (V,) to `out`, V arrays of float32 (C, S, S).

        Raises:
            RuntimeError: the image does not decode.
        """


@dataclass(frozen=True)
class _Place:
    """Where an engine is found; its module is imported when it is first asked for."""

    module: str
    name: str
    whole_batches: bool = False
    needs: str = ""
    """The package that it needs beyond torch, and how to install it."""
    operations: frozenset[str] = _FUSED | frozenset(POINTWISE)
    """The operations that it has, by their names in OPERATIONS; a recipe with any other is refused."""


_PLACES: Mapping[str, _Place] = MappingProxyType(
    {
        "fused": _Place("pipelines.engines.fused_engine", "FusedEngine"),
        "dali": _Place(
            "pipelines.engines.dali_engine",
            "DaliEngine",
            True,
            "NVIDIA DALI (pip install nvidia-dali-cuda120)",
            _FUSED,
        ),
        "kornia": _Place(
            "pipelines.engines.kornia_engine", "KorniaEngine", True, "Kornia (pip install kornia)"
        ),
        "reference": _Place("pipelines.engines.fused_engine", "ReferenceEngine"),
    }
)


def engine_names() -> list[str]:
    """Return the engines of this version, the default first."""
    return [name for name in get_args(EngineName) if name in _PLACES]


def whole_batches(name: str) -> bool:
    """Return whether that engine is a `batch_engine.BatchEngine`. UserError for an unknown name."""
    return _place(name).whole_batches


def operations_of(name: str) -> frozenset[str]:
    """Return the operations that an engine has, by their names in OPERATIONS. Raise UserError for an unknown name."""
    return _place(name).operations


def make_engine(name: str, recipe: Recipe, options: BatchOptions | None = None) -> ImageEngine | BatchEngine:
    """Return the engine called `name`.

    Args:
        options: how it works; only for those of `whole_batches`.

    Raises:
        UserError: no engine has that name, its package is not installed, or it cannot make the recipe's views.
    """
    place = _place(name)
    refuse_operations(name, recipe, place.operations)
    try:
        engine: Any = getattr(import_module(place.module), place.name)
    except ImportError as error:
        if not place.needs:
            raise
        raise UserError(
            f"The engine '{name}' needs {place.needs}, which cannot be imported here ({error}): choose --data.engine fused."
        ) from error
    return engine(recipe) if options is None else engine(recipe, options)


def _place(name: str) -> _Place:
    if name not in _PLACES:
        raise UserError(f"There is no engine called '{name}'.{nearest(name, _PLACES)}")
    return _PLACES[name]


def refuse_channels(engine: str, recipe: Recipe) -> None:
    """Raise UserError where views do not have three channels over their full range, for an engine whose operations mean 8-bit RGB."""
    if recipe.value_low:
        raise UserError(
            f"The engine '{engine}' takes pixels over the full range of their type, and the recipe has a value range: choose "
            "--data.engine fused."
        )
    if len(recipe.mean) != 3:
        raise UserError(
            f"The engine '{engine}' makes RGB views, and the recipe's mean and std have {len(recipe.mean)} channels: choose "
            "--data.engine fused."
        )


def refuse_bicubic(engine: str, recipe: Recipe) -> None:
    """Raise UserError where a recipe's crops are bicubic, for an engine that samples them bilinearly."""
    if recipe.interpolation != "bilinear":
        raise UserError(
            f"The engine '{engine}' has bilinear crops only: set --recipe.interpolation bilinear, or choose --data.engine fused."
        )


def refuse_deep(engine: str, shards: ShardSet) -> None:
    """Raise UserError where a data set has other than 8-bit images, for an engine that decodes to 8 bits."""
    others = [kind for kind in shards.manifest.dtypes if kind != "uint8"]
    if others:
        raise UserError(
            f"The engine '{engine}' decodes to 8 bits a channel, and '{shards.folder}' has images of {', '.join(others)}: choose "
            "--data.engine fused."
        )


def refuse_operations(engine: str, recipe: Recipe, has: Collection[str]) -> None:
    """Raise UserError where a recipe has an operation that is not among those `has` of an engine, by their names in OPERATIONS."""
    missing = [op for name, op in OPERATIONS.items() if name not in has and op.possible(recipe)]
    if missing:
        named = " and ".join(f"'{operation.title}'" for operation in missing)
        off = " ".join(f"--recipe.{name.replace('_', '-')} 0" for op in missing for name in op.settings[:1])
        raise UserError(
            f"The engine '{engine}' does not have the operation {named} that the recipe asks for: choose --data.engine fused, or set "
            f"{off}."
        )
