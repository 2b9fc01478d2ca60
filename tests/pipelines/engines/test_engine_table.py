"""The fused engine against the per-image reference, in 0..255 levels; the bounds are far inside what the design allows."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.augment.channels import check_operations
from pipelines.augment.draws import draw
from pipelines.augment.recipe import RECIPES, Recipe
from pipelines.engines.engine_table import make_engine
from pipelines.loading.loader import open_loader
from pipelines.loading.slots import view_shapes
from shards.errors import UserError
from tests import needs
from tests.pictures import colours, encoded, photo

UNNORMALISED = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def both(
    recipe: Recipe, data: bytes, size: tuple[int, int], sample: int, **fields
) -> tuple[np.ndarray, np.ndarray]:
    """The global views of one image by both engines, in levels: float32 (V, 3, S, S) each."""
    draws = draw(recipe, 0, 0, np.array([sample]), np.array([size[0]]), np.array([size[1]]))[:, 0].copy()
    for name, value in fields.items():
        draws[name] = value
    views = []
    for name in ("fused", "reference"):
        out = [np.empty(shape, dtype=np.float32) for shape in view_shapes(recipe)]
        make_engine(name, recipe)(memoryview(data), draws, out)
        views.append(np.stack(out[: recipe.num_views]) * 255)
    return views[0], views[1]


@pytest.mark.parametrize("preset", RECIPES)
@pytest.mark.parametrize(("width", "height"), [(160, 120), (33, 47)])
def test_whole_recipes_stay_within_a_level_on_average(preset, width, height):
    recipe = dataclasses.replace(RECIPES[preset], size=64, local_size=32, **UNNORMALISED)
    data = encoded(photo(width, height), "JPEG", quality=90)
    errors = [
        np.abs(np.subtract(*both(recipe, data, (width, height), sample))).mean(axis=(1, 2, 3))
        for sample in range(12)
    ]
    assert np.mean(errors) < 0.25
    assert np.max(errors) < 1.0


@pytest.mark.parametrize(("interpolation", "most"), [("bilinear", 1), ("bicubic", 3)])
def test_crop_and_resize_differ_by_rounding(interpolation, most):
    """Both filter with the same weights; torch's 8-bit weights round another way than Pillow's."""
    recipe = Recipe(size=56, interpolation=interpolation, **UNNORMALISED)
    still = {"jitter": 0, "gray": 0, "sigma": 0, "solarize": 0, "noise_std": 0}
    for sample in range(20):
        fused, reference = both(recipe, encoded(photo(200, 150, sample), "JPEG"), (200, 150), sample, **still)
        assert np.abs(fused - reference).max() < most + 0.01
        assert np.abs(fused - reference).mean() < 0.35


def test_everything_after_the_crop_is_exact():
    """At its own size a view is not resampled, so what remains are the kernels: equal up to float32 rounding."""
    recipe = dataclasses.replace(RECIPES["satellite"], size=48, **UNNORMALISED)
    whole = {"top": 0, "left": 0, "height": 48, "width": 48}
    for sample in range(30):
        image = colours(48, sample) if sample % 2 else photo(48, 48, sample)
        fused, reference = both(recipe, encoded(image, "PNG"), (48, 48), sample, **whole)
        np.testing.assert_allclose(fused, reference, atol=2e-4)


def test_grey_files_become_three_equal_channels():
    gray = photo(40, 40).convert("L")
    recipe = Recipe(size=32, hue=0.0, **UNNORMALISED)
    fused, reference = both(recipe, encoded(gray, "PNG"), (40, 40), 3, jitter=0)
    assert (fused[:, 0] == fused[:, 1]).all()
    assert np.abs(fused - reference).max() < 2.5


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_formats_decode_as_pil_does(kind):
    recipe = Recipe(
        size=48,
        num_views=1,
        blur_p=(0.0,),
        solarize_p=(0.0,),
        jitter_p=0,
        gray_p=0,
        hflip_p=0,
        **UNNORMALISED,
    )
    whole = {"top": 0, "left": 0, "height": 48, "width": 48}
    fused, reference = both(recipe, encoded(photo(48, 48), kind, quality=80), (48, 48), 0, **whole)
    np.testing.assert_allclose(fused, reference, atol=2e-4)


def test_normalisation_is_the_last_step():
    white = encoded(Image.new("RGB", (8, 8), (255, 255, 255)), "PNG")
    recipe = Recipe(size=8, num_views=1, blur_p=(0.0,), solarize_p=(0.0,), jitter_p=0)
    out = np.empty((1, 3, 8, 8), dtype=np.float32)
    make_engine("fused", recipe)(
        memoryview(white), draw(recipe, 0, 0, np.array([0]), np.array([8]), np.array([8]))[:, 0].copy(), out
    )
    for channel in range(3):
        assert out[0, channel] == pytest.approx((1 - recipe.mean[channel]) / recipe.std[channel], rel=1e-5)


def test_unknown_engine_names_the_nearest():
    with pytest.raises(UserError, match=r"no engine called 'fussed'. Did you mean 'fused'?"):
        make_engine("fussed", Recipe())


@pytest.mark.parametrize(("engine", "most"), [("fused", 0.4), ("dali", 0.6), ("kornia", 2.0)])
def test_every_engine_gives_each_view_its_own_colours(shard_set, engine, most):
    if engine != "fused":
        needs.module({"dali": "nvidia.dali"}.get(engine, engine))
    recipe = dataclasses.replace(
        RECIPES["moco_v3"], size=24, jitter_p=(1.0, 0.0), hue=(0.3, 0.0), gray_p=(0.0, 1.0), blur_p=(0.0,)
    )
    made, expected = (
        next(open_loader(shard_set, recipe, batch=20, seed=1, engine=name).steps(0, 1)).views
        for name in (engine, "reference")
    )
    for view, reference in zip(made, expected, strict=True):
        assert (view - reference).abs().mean() * 0.225 * 255 < most
    mean, std = (torch.tensor(x)[:, None, None] for x in (recipe.mean, recipe.std))
    coloured, grey = (np.ptp((view * std + mean).numpy(), axis=1).mean() for view in made)
    assert grey < 1e-4 < 0.05 < coloured


def test_colours_of_any_view_need_three_channels():
    flat = {"mean": (0.5,) * 4, "std": (0.5,) * 4}
    for name in ("saturation", "hue", "gray_p"):
        with pytest.raises(UserError, match=f"recipe.{name} need"):
            check_operations(dataclasses.replace(RECIPES["multispectral"], **flat, **{name: (0.0, 0.1)}))
    unused = {"jitter_p": (0.8, 0.0), "hue": (0.0, 0.1)}  # where the hue would move there is no jitter
    check_operations(dataclasses.replace(RECIPES["multispectral"], **flat, **unused))
