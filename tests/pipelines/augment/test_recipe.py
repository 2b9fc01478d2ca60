import dataclasses

import pytest

from pipelines.augment.recipe import JITTER, RECIPES, Recipe, get_recipe
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


def changed(name: str, base: str = "moco_v3") -> dict[str, object]:
    """The settings in which a preset differs from another one."""
    ours, theirs = (dataclasses.asdict(get_recipe(n)) for n in (name, base))
    return {key: value for key, value in ours.items() if value != theirs[key]}


def test_published_recipes_differ_from_moco_v3_in_what_their_sources_say():
    """The numbers of facebookresearch/moco, google-research/simclr, BYOL's table 6, facebookresearch/dino and /swav."""
    assert changed("moco_v2") == {
        "crop_scale": (0.2, 1.0),
        "saturation": 0.4,
        "blur_p": (0.5,),
        "solarize_p": (0.0,),
    }
    strong = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2}
    assert changed("simclr") == strong | {
        "interpolation": "bicubic",
        "blur_p": (0.5,),
        "solarize_p": (0.0,),
    }
    assert changed("byol") == {"interpolation": "bicubic"}
    assert changed("dino") == {
        "crop_scale": (0.4, 1.0),
        "interpolation": "bicubic",
        "local_views": 8,
        "blur_p": (1.0, 0.1, 0.5),
        "solarize_p": (0.0, 0.2, 0.0),
    }
    assert changed("swav") == strong | {
        "crop_scale": (0.14, 1.0),
        "local_views": 6,
        "local_crop_scale": (0.05, 0.14),
        "blur_p": (0.5,),
        "solarize_p": (0.0,),
        "std": (0.228, 0.224, 0.225),
    }


def test_multi_crop_makes_two_groups_of_views():
    dino = get_recipe("dino")
    assert dino.groups() == [range(2), range(2, 10)]
    assert [dino.side(view) for view in range(10)] == [224] * 2 + [96] * 8
    assert [dino.scale(view) for view in (0, 1, 2, 9)] == [(0.4, 1.0)] * 2 + [(0.05, 0.4)] * 2
    assert [dino.per_view("blur_p", view) for view in range(10)] == [1.0, 0.1] + [0.5] * 8
    assert get_recipe("moco_v3").groups() == [range(2)]


def test_supervised_recipes_are_those_of_their_sources():
    """MoCo v3's linear probe is crop and mirror only; DeiT's table 9 erases a quarter of the views, as timm does in 'pixel' mode."""
    linear = get_recipe("linear")
    colourless = {"num_views": 1, "jitter_p": 0.0, "gray_p": 0.0, "blur_p": (0.0,), "solarize_p": (0.0,)}
    assert changed("linear") == colourless
    assert (linear.crop_scale, linear.hflip_p, linear.eval_crop) == ((0.08, 1.0), 0.5, 224 / 256)
    assert changed("eval", "linear") == {"crop": "center", "hflip_p": 0.0}
    assert changed("finetune", "linear") == {
        "interpolation": "bicubic",
        "erase_p": 0.25,
        "erase_scale": (0.02, 1 / 3),
        "erase_ratio": (0.3, 1 / 0.3),
        "erase_value": "random",
    }
    segmentation = changed("segmentation", "linear")
    assert segmentation == {
        "size": 480,
        "crop_scale": (pytest.approx(0.213, abs=1e-4), 1.0),
        "eval_crop": 1.0,
    }


def test_what_fills_an_erased_rectangle():
    assert Recipe().erased() == (0.0, 0.0, 0.0)
    assert Recipe(erase_value="random").erased() == ()
    black = tuple(-m / s for m, s in zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True))
    assert Recipe(erase_value=0.0).erased() == pytest.approx(black)


def test_multispectral_is_satellite_without_red_green_and_blue():
    without = {"saturation": 0.0, "hue": 0.0, "gray_p": 0.0}
    assert changed("multispectral", "satellite") == {**without, "value_range": "percentiles"}


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
        ("local_views", -1),
        ("local_crop_scale", (0.4, 0.05)),
        ("erase_p", -0.1),
        ("erase_scale", (0.0, 0.1)),
        ("erase_ratio", (0.0, 1.0)),
        ("erase_value", 1.5),
    ],
)
def test_impossible_values_are_refused_by_name(field, value):
    with pytest.raises(UserError, match=rf"recipe\.{field} is "):
        Recipe(**{field: value})


def test_as_many_probabilities_as_views_or_one_for_all_local_ones():
    for count in (1, 3, 4):
        Recipe(local_views=2, solarize_p=(0.1,), blur_p=(0.1,) * count)
    with pytest.raises(
        UserError, match=r"one value, or 4 \(one per view\), or 3 \(the last for all local views\)"
    ):
        Recipe(local_views=2, solarize_p=(0.1,), blur_p=(0.1, 0.1))


COLOURS = ("jitter_p", *JITTER, "gray_p")


def test_colours_of_each_view():
    recipe = Recipe(jitter_p=(1.0, 0.0), hue=(0.1, 0.5), gray_p=(0.0, 1.0), brightness=(0.4,))
    assert [recipe.per_view("jitter_p", view) for view in (0, 1)] == [1.0, 0.0]
    assert [recipe.strengths(view) for view in (0, 1)] == [(0.4, 0.4, 0.2, 0.1), (0.4, 0.4, 0.2, 0.5)]
    assert [recipe.reach("hue", view) for view in (0, 1)] == [0.1, 0.0]
    crops = dataclasses.replace(RECIPES["dino"], local_views=2, jitter_p=(0.8, 0.5, 0.0))
    assert [crops.per_view("jitter_p", view) for view in range(4)] == [0.8, 0.5, 0.0, 0.0]


@pytest.mark.parametrize("name", COLOURS)
def test_colours_of_too_many_views_or_out_of_range_are_told(name):
    with pytest.raises(
        UserError, match=rf"recipe.{name} is \(0.1, 0.1, 0.1\), but it must be one value, or 2"
    ):
        Recipe(**{name: (0.1, 0.1, 0.1)})
    with pytest.raises(UserError, match=rf"recipe.{name} is \(\)"):
        Recipe(**{name: ()})
    for values in ((0.1, -0.1), -0.1):
        with pytest.raises(UserError, match=rf"recipe.{name} is "):
            Recipe(**{name: values})
