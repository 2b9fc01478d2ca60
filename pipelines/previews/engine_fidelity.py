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
from pipelines.augment.recipe import JITTER, Recipe
from pipelines.engines.engine_table import make_engine, whole_batches
from pipelines.kernels import reference

# Operation: the fields of a DRAW record that it keeps; all others are 0, which is nothing. The recipe keeps them all.
OPERATIONS: dict[str, tuple[str, ...]] = {
    "crop": (),
    "flips and turns": ("hflip", "vflip", "turns"),
    "jitter": ("jitter", "order", "brightness", "contrast", "saturation", "hue"),
    "grey": ("gray",),
    "blur": ("sigma",),
    "solarise": ("solarize",),
    "noise": ("noise_std", "noise_seed"),
}
WHOLE = "whole recipe"
_BOX = ("top", "left", "height", "width")
# Half a level is what rounding to 8 bits may do; a few levels are another filter or another colour space.
_CLASSES = ((0.5, "exact"), (2.0, "close"))


@dataclass(frozen=True)
class Difference:
    """|engine - reference| over all values of some views, in levels of 0..255."""

    mean: float
    p99: float
    most: float


def classify(mean_levels: float) -> str:
    """The class of an engine whose whole recipe differs by so many levels on average: exact (0.5), close (2) or approximate."""
    return next((name for bound, name in _CLASSES if mean_levels <= bound), "approximate")


def measure(
    engine: str, recipe: Recipe, images: Sequence[bytes], operations: Sequence[str] = (*OPERATIONS, WHOLE)
) -> dict[str, Difference]:
    """The difference of an engine to the reference, by operation.

    Args:
        recipe: its ranges are drawn from; operations alone are drawn always, whatever their probability is.
        images: encoded, 8-bit; each is one sample.

    Raises:
        UserError: the engine cannot make the recipe's views, or its package is not installed.
    """
    plain = replace(recipe, mean=(0.0,) * 3, std=(1.0,) * 3)
    always = replace(
        plain,
        num_views=1,
        local_views=0,
        **{name: max(recipe.values(name)) for name in JITTER},
        jitter_p=1.0,
        gray_p=1.0,
        blur_p=(1.0,),
        solarize_p=(1.0,),
        vflip_p=0.5,
        quarter_turns=True,
        noise_p=1.0,
        noise_std=recipe.noise_std if recipe.noise_std[1] > 0 else (0.0, 0.05),
        erase_p=0.0,
    )
    pictures = [reference.decode(data) for data in images]
    sized = [_encode(picture.resize((recipe.size, recipe.size))) for picture in pictures]
    sizes = np.array([picture.size for picture in pictures])
    draws = draw(always, 0, 0, np.arange(len(images)), sizes[:, 0], sizes[:, 1])
    alone = _Pair(engine, always, len(images))
    made = {}
    for name in operations:
        if name == WHOLE:
            drawn = draw(plain, 0, 0, np.arange(len(images)), sizes[:, 0], sizes[:, 1])
            made[name] = _Pair(engine, plain, len(images)).difference(images, drawn)
        else:
            made[name] = alone.difference(
                images if name == "crop" else sized, _only(draws, name, recipe.size)
            )
    return made


def _only(draws: np.ndarray, operation: str, size: int) -> np.ndarray:
    """DRAW records that keep one operation, on pictures of the view's size but for the crop."""
    kept = OPERATIONS[operation]
    out = np.zeros_like(draws)
    for name in kept or _BOX:
        out[name] = draws[name]
    if kept:
        out["height"] = out["width"] = size
    return out


class _Pair:
    """An engine and the reference for one recipe."""

    def __init__(self, engine: str, recipe: Recipe, count: int):
        from pipelines.engines.batch_engine import BatchOptions

        options = BatchOptions(batch=count, threads=2) if whole_batches(engine) else None
        self._recipe, self._engine = recipe, make_engine(engine, recipe, options)
        self._reference = make_engine("reference", recipe)

    def difference(self, images: Sequence[bytes], draws: np.ndarray) -> Difference:
        """Of all views: DRAW records (V, N) of N images."""
        shares = []
        wanted, made = self._views(self._reference, images, draws), self._views(self._engine, images, draws)
        for expected, view in zip(wanted, made, strict=True):
            shares.append(np.abs(view - expected).ravel())
        levels = np.concatenate(shares) * 255
        return Difference(float(levels.mean()), float(np.quantile(levels, 0.99)), float(levels.max()))

    def _views(self, engine, images: Sequence[bytes], draws: np.ndarray) -> list[np.ndarray]:
        """The views, float32 (N, 3, S, S) each."""
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
    """Pixels uint8 (H, W, 3) as a PNG."""
    return _encode(Image.fromarray(pixels))


def _encode(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()
