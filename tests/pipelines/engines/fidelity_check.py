"""What the tests of the engines share: draws with chosen values, and the difference of an engine to the reference."""

import numpy as np
from PIL import Image

from pipelines.augment.draws import draw
from pipelines.augment.recipe import Recipe
from pipelines.engines.engine_table import make_engine
from tests.pictures import encoded

UNNORMALISED = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def draws_of(size: tuple[int, int], sample: int = 0, **fields) -> np.ndarray:
    """DRAW records (1,) for an image of `size` (width, height): a random crop and nothing else, but for the fields given."""
    made = draw(Recipe(), 0, 0, np.array([sample]), np.array(size[:1]), np.array(size[1:]))[:1, 0].copy()
    for name in made.dtype.names:
        if name not in ("top", "left", "height", "width"):
            made[name] = fields.get(name, 0)
        elif name in fields:
            made[name] = fields[name]
    if "order" not in fields:
        made["order"] = range(4)
    return made


def differences(engine: str, image: Image.Image | np.ndarray, draws: np.ndarray, size: int) -> np.ndarray:
    """|engine - reference| of the first view of an image, in levels: float32 (3, S, S)."""
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    views = []
    for name in (engine, "reference"):
        out = np.empty((len(draws), 3, size, size), dtype=np.float32)
        recipe = Recipe(size=size, num_views=len(draws), blur_p=(0.5,), solarize_p=(0.5,), **UNNORMALISED)
        make_engine(name, recipe)(memoryview(encoded(picture, "PNG")), draws, list(out))
        views.append(out[0] * 255)
    return np.abs(views[0] - views[1])
