"""How far an engine's views are from those of the per-image reference with the same draws, in levels of 0..255.

Each operation is measured alone, on pictures that have the view's size already, so that nothing else hides or adds to its difference;
the crop and the whole recipe on the encoded images as they are.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from pipelines.augment.draws import draw
from pipelines.augment.operation import Operation
from pipelines.augment.operations import JITTER, OPERATIONS
from pipelines.augment.recipe import Recipe
from pipelines.engines.engine_table import make_engine, operations_of, whole_batches
from pipelines.kernels import reference

# The operations that are measured together, by row, in the table's order. Each row keeps their fields of a DRAW record; all others
# are 0, which is nothing.
ROWS: dict[str, list[Operation]] = {}
for _operation in OPERATIONS.values():
    if _operation.row:
        ROWS.setdefault(_operation.row, []).append(_operation)
WHOLE = "whole recipe"
# Half a level is what rounding to 8 bits may do; a few levels are another filter or another colour space.
_CLASSES = ((0.5, "exact"), (2.0, "close"))


@dataclass(frozen=True)
class Difference:
    """|engine - reference| over all values of some views, in levels of 0..255."""

    mean: float
    p99: float
    most: float


def classify(mean_levels: float) -> str:
    """Return the class of an engine whose whole recipe differs by so many levels on average: exact (0.5), close (2) or approximate."""
    return next((name for bound, name in _CLASSES if mean_levels <= bound), "approximate")


def measure(
    engine: str, recipe: Recipe, images: Sequence[bytes], rows: Sequence[str] = (*ROWS, WHOLE)
) -> dict[str, Difference]:
    """Return the difference of an engine to the reference, by row; without those of operations that the engine does not have.

    Args:
        recipe: its ranges are drawn from; operations alone are drawn always, whatever their probability is.
        images: encoded, 8-bit; each is one sample.

    Raises:
        UserError: the engine cannot make the recipe's views, or its package is not installed.
    """
    plain = replace(recipe, mean=(0.0,) * 3, std=(1.0,) * 3)
    has = operations_of(engine)
    measured = [op for op in OPERATIONS.values() if op.row and op.name in has]
    chances = {name: 1.0 for op in measured for name in op.settings if name.endswith("_p")}
    always = replace(
        plain,
        num_views=1,
        local_views=0,
        erase_p=0.0,
        **{name: max(recipe.values(name)) for name in JITTER},
        **(chances | {"hflip_p": 0.5, "vflip_p": 0.5}),
        quarter_turns=True,
        noise_std=recipe.noise_std if recipe.noise_std[1] > 0 else (0.0, 0.05),
    )
    pictures = [reference.decode(data) for data in images]
    sized = [_encode(picture.resize((recipe.size, recipe.size))) for picture in pictures]
    sizes = np.array([picture.size for picture in pictures])
    draws = draw(always, 0, 0, np.arange(len(images)), sizes[:, 0], sizes[:, 1])
    alone = _Pair(engine, always, len(images))
    made = {}
    for name in rows:
        if name == WHOLE:
            drawn = draw(plain, 0, 0, np.arange(len(images)), sizes[:, 0], sizes[:, 1])
            made[name] = _Pair(engine, plain, len(images)).difference(images, drawn)
        elif any(operation in measured for operation in ROWS[name]):
            where = images if OPERATIONS["crop"] in ROWS[name] else sized
            made[name] = alone.difference(where, _only(draws, name, recipe.size))
    return made


def _only(draws: np.ndarray, row: str, size: int) -> np.ndarray:
    """Return DRAW records that keep the operations of one row, on pictures of the view's size but for the crop."""
    out = np.zeros_like(draws)
    out["height"] = out["width"] = size
    for operation in ROWS[row]:
        for name in operation.fields:
            out[name] = draws[name]
    return out


class _Pair:
    """An engine and the reference for one recipe."""

    def __init__(self, engine: str, recipe: Recipe, count: int):
        from pipelines.engines.batch_engine import BatchOptions

        options = BatchOptions(batch=count, threads=2) if whole_batches(engine) else None
        self._recipe, self._engine = recipe, make_engine(engine, recipe, options)
        self._reference = make_engine("reference", recipe)

    def difference(self, images: Sequence[bytes], draws: np.ndarray) -> Difference:
        """Return the difference over all views of N images, by DRAW records (V, N)."""
        shares = []
        wanted, made = self._views(self._reference, images, draws), self._views(self._engine, images, draws)
        for expected, view in zip(wanted, made, strict=True):
            shares.append(np.abs(view - expected).ravel())
        levels = np.concatenate(shares) * 255
        return Difference(float(levels.mean()), float(np.quantile(levels, 0.99)), float(levels.max()))

    def _views(self, engine, images: Sequence[bytes], draws: np.ndarray) -> list[np.ndarray]:
        """Return the views, float32 (N, 3, S, S) each."""
        from pipelines.engines.batch_engine import BatchEngine

        if isinstance(engine, BatchEngine):
            items = [engine.prepare(memoryview(data)) for data in images]
            return [view.cpu().numpy() for view in engine.render(items, draws)]
        sides = [self._recipe.side(view) for view in range(len(draws))]
        views = [np.empty((len(images), 3, side, side), dtype=np.float32) for side in sides]
        for i, data in enumerate(images):
            engine(memoryview(data), np.ascontiguousarray(draws[:, i]), [view[i] for view in views])
        return views


def encode(pixels: np.ndarray) -> bytes:
    """Return pixels uint8 (H, W, 3) as a PNG."""
    return _encode(Image.fromarray(pixels))


def _encode(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()
