import dataclasses

import pytest

from pipelines.recipe import RECIPES, Recipe, get_recipe
from shards.errors import UserError


def test_moco_v3_is_the_published_asymmetric_recipe():
    recipe = get_recipe("moco_v3")
    assert recipe.crop_scale == (0.08, 1.0)
    assert recipe.crop_ratio == (3 / 4, 4 / 3)
    assert (recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue, recipe.jitter_p) == (
        0.4,
        0.4,
        0.2,
        0.1,
        0.8,
    )
    assert (recipe.gray_p, recipe.hflip_p, recipe.vflip_p, recipe.quarter_turns, recipe.noise_p) == (
        0.2,
        0.5,
        0,
        False,
        0,
    )
    assert [recipe.per_view("blur_p", view) for view in (0, 1)] == [1.0, 0.1]
    assert [recipe.per_view("solarize_p", view) for view in (0, 1)] == [0.0, 0.2]
    assert recipe.blur_sigma == (0.1, 2.0)
    assert recipe.mean == (0.485, 0.456, 0.406)
    assert recipe.std == (0.229, 0.224, 0.225)
    assert get_recipe("moco_v3_resnet") == dataclasses.replace(recipe, crop_scale=(0.2, 1.0))


def test_satellite_has_all_symmetries_of_the_square_and_noise():
    recipe = RECIPES["satellite"]
    assert recipe.quarter_turns
    assert (recipe.hflip_p, recipe.vflip_p) == (0.5, 0.5)
    assert recipe.noise_p > 0


def test_one_probability_serves_every_view():
    recipe = Recipe(blur_p=(0.3,), num_views=4, solarize_p=(0.0,))
    assert [recipe.per_view("blur_p", view) for view in range(4)] == [0.3] * 4


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(UserError, match=r"no recipe called 'satelite'. Did you mean 'satellite'?"):
        get_recipe("satelite")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", 0),
        ("num_views", 0),
        ("crop_scale", (0.0, 1.0)),
        ("crop_scale", (0.5, 0.4)),
        ("crop_scale", (0.5, 1.1)),
        ("crop_ratio", (2.0, 1.0)),
        ("jitter_p", 1.5),
        ("hue", 0.6),
        ("brightness", -0.1),
        ("blur_p", (0.1, 0.2, 0.3)),
        ("solarize_p", (2.0,)),
        ("blur_sigma", (0.1, 3.0)),
        ("noise_std", (0.2, 0.1)),
        ("std", (1.0, 0.0, 1.0)),
        ("eval_crop", 0.0),
    ],
)
def test_impossible_values_are_refused_by_name(field, value):
    with pytest.raises(UserError, match=rf"recipe\.{field} is "):
        Recipe(**{field: value})
