import dataclasses
import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import RandomErasing, RandomResizedCrop

from pipelines.augment.draws import DRAW, draw, eval_draws
from pipelines.augment.recipe import JITTER, RECIPES, Recipe

GOLDEN_BOX = [129, 155, 215, 219]
GOLDEN_FLAGS = [1, 1, 0, 0, 0, 0]
GOLDEN_ORDER = [2, 3, 0, 1]
GOLDEN_FACTORS = [
    0.7554620504379272,
    1.098181128501892,
    0.8867648243904114,
    -0.05287990719079971,
    1.9974000453948975,
]
GOLDEN_NOISE_SEED = 13453749098129160357
N = 20_000
MANY = RECIPES["satellite"]


def draw_many(recipe: Recipe, width: int = 500, height: int = 375, count: int = N) -> np.ndarray:
    return draw(recipe, 7, 3, np.arange(count), np.full(count, width), np.full(count, height))


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.integers(0, 10**9), min_size=1, max_size=20),
    st.integers(0, 2**31),
    st.integers(0, 1000),
    st.data(),
)
def test_a_sample_gets_the_same_draws_in_any_batch(ids, seed, epoch, data):
    sizes = np.array(ids) % 300 + 1
    whole = draw(MANY, seed, epoch, np.array(ids), sizes, sizes[::-1].copy())
    some = data.draw(st.permutations(range(len(ids))))[: data.draw(st.integers(1, len(ids)))]
    part = draw(MANY, seed, epoch, np.array(ids)[some], sizes[some], sizes[::-1][some])
    assert (whole[:, some] == part).all()


def test_seed_epoch_and_view_change_the_draws():
    base = draw_many(MANY, count=50)
    assert (base[0] != base[1]).any()
    for seed, epoch in ((8, 3), (7, 4)):
        assert (draw(MANY, seed, epoch, np.arange(50), np.full(50, 500), np.full(50, 375)) != base).any()


def test_golden_draw_never_changes():
    """Runs that were interrupted by an update must go on with the views they would have seen."""
    one = draw(RECIPES["moco_v3"], 0, 0, np.array([5]), np.array([500]), np.array([375]))[0, 0]
    box = [int(one[name]) for name in ("top", "left", "height", "width")]
    flags = [int(one[name]) for name in ("jitter", "gray", "solarize", "hflip", "vflip", "turns")]
    factors = [float(one[name]) for name in ("brightness", "contrast", "saturation", "hue", "sigma")]
    assert box == GOLDEN_BOX
    assert flags == GOLDEN_FLAGS
    assert one["order"].tolist() == GOLDEN_ORDER
    assert factors == pytest.approx(GOLDEN_FACTORS, rel=1e-6)
    assert int(one["noise_seed"]) == GOLDEN_NOISE_SEED


# SHA-256 of the first 18 fields of 200 samples, as the version drew them that had no others.
OLD_DRAWS = {
    "moco_v3": "e34fc7a65a80dade11909e6c4128d5b9d0c38236bf88154a85abaeb980dbbc56",
    "moco_v3_resnet": "59437bd6e35d1055b78d947e737e0e5772dacc25f96e012c29f0a384586176ea",
    "satellite": "1d4a5af5b5439b1074832ff86eb4972a65a3d64fdf7d2f686c1ddb70d2101d0c",
}


@pytest.mark.parametrize("changes", [{}, {"erase_p": 1.0}, {"local_views": 3}])
@pytest.mark.parametrize("preset", OLD_DRAWS)
def test_old_draws_are_the_same_to_the_byte(preset, changes):
    """Erasing and local views have counters of their own."""
    ids = np.arange(200) * 7919
    recipe = RECIPES[preset]
    if "local_views" in changes:
        changes = changes | {n: (*getattr(recipe, n), 0.5) for n in ("blur_p", "solarize_p")}
    recipe = dataclasses.replace(recipe, **changes)
    draws = draw(recipe, 11, 3, ids, ids % 400 + 1, (ids * 31) % 300 + 1)[:2]
    old = (np.ascontiguousarray(draws[name]).tobytes() for name in (DRAW.names or ())[:18])
    assert hashlib.sha256(b"".join(old)).hexdigest() == OLD_DRAWS[preset]


@pytest.mark.parametrize(("scale", "ratio"), [((0.02, 0.33), (0.3, 3.3)), ((0.2, 0.9), (0.2, 5.0))])
def test_rectangles_are_distributed_as_torchvisions(scale, ratio):
    count, side = 6000, 64
    recipe = Recipe(size=side, erase_p=1.0, erase_scale=scale, erase_ratio=ratio)
    ours = draw_many(recipe, count=count)[0]
    torch.manual_seed(0)
    view = torch.empty(3, side, side)
    theirs = np.array(
        [RandomErasing.get_params(view, list(scale), list(ratio), [0.0])[:4] for _ in range(count)]
    )
    # Where no try fits, torchvision erases nothing and returns the whole view.
    theirs[theirs[:, 2] == side] = 0
    for column, name in enumerate(("top", "left", "height", "width")):
        kolmogorov_smirnov(ours[f"erase_{name}"], theirs[:, column], name)


def test_erasing_has_the_rate_asked_for():
    draws = draw_many(Recipe(erase_p=0.25))
    assert abs((draws["erase_height"] > 0).mean() - 0.25) < 3 * np.sqrt(0.25 * 0.75 / draws.size)
    assert not draw_many(Recipe())["erase_height"].any()


def test_local_views_cover_less():
    draws = draw_many(RECIPES["dino"], 300, 300, 2000)
    assert draws.shape == (10, 2000)
    area = draws["height"].astype(np.float64) * draws["width"] / 300**2
    assert 0.39 < area[:2].min() < area[:2].max() <= 1
    assert 0.048 < area[2:].min() < area[2:].max() < 0.405
    rates = (draws["sigma"] > 0).mean(axis=1)
    assert rates[0] == 1
    assert rates[1] == pytest.approx(0.1, abs=0.03)
    assert rates[2:] == pytest.approx([0.5] * 8, abs=0.05)
    assert (draws["solarize"].mean(axis=1)[[0, 1, 5]] > 0).tolist() == [False, True, False]


def test_the_centre_instead_of_a_random_crop_is_the_view_of_evaluation():
    recipe, sizes = RECIPES["eval"], (np.array([500, 31]), np.array([375, 80]))
    got = draw(recipe, 0, 0, np.arange(2), *sizes)
    for name in ("top", "left", "height", "width"):
        assert got[name].tolist() == eval_draws(recipe, *sizes)[name].tolist()


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 3000), st.integers(1, 3000), st.floats(0.01, 1), st.floats(0.05, 1))
def test_boxes_lie_inside_the_image(width, height, scale, ratio):
    recipe = Recipe(crop_scale=(scale, 1.0), crop_ratio=(ratio, 1 / ratio))
    boxes = draw_many(recipe, width, height, 64)
    assert (boxes["width"] >= 1).all()
    assert (boxes["height"] >= 1).all()
    assert (boxes["left"] >= 0).all()
    assert (boxes["top"] >= 0).all()
    assert (boxes["left"] + boxes["width"] <= width).all()
    assert (boxes["top"] + boxes["height"] <= height).all()


@pytest.mark.parametrize(("width", "height"), [(500, 375), (96, 96), (1000, 120)])
def test_boxes_are_distributed_as_torchvisions(width, height):
    """Kolmogorov-Smirnov distance below the 0.1 % critical value, 1.95 sqrt(2 / n), for each of the box's four numbers."""
    count = 6000
    ours = draw(
        Recipe(num_views=1, blur_p=(0.0,), solarize_p=(0.0,)),
        1,
        1,
        np.arange(count),
        np.full(count, width),
        np.full(count, height),
    )[0]
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array(
        [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(count)]
    )
    for column, name in enumerate(("top", "left", "height", "width")):
        kolmogorov_smirnov(ours[name], theirs[:, column], name)


def kolmogorov_smirnov(ours: np.ndarray, theirs: np.ndarray, name: str) -> None:
    values = np.unique(np.concatenate([ours, theirs]))
    cdfs = [np.searchsorted(np.sort(x), values, side="right") / len(x) for x in (ours, theirs)]
    assert np.abs(cdfs[0] - cdfs[1]).max() < 1.95 * np.sqrt(2 / len(ours)), name


def test_fallback_takes_the_largest_centred_box():
    """A 1000 x 10 image with crops of its whole area never fits a ratio in [1, 4/3]: the centre, 13 x 10, is taken."""
    boxes = draw(
        Recipe(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 4 / 3)),
        0,
        0,
        np.arange(4),
        np.full(4, 1000),
        np.full(4, 10),
    )
    assert {tuple(int(box[n]) for n in ("top", "left", "height", "width")) for box in boxes.ravel()} == {
        (0, 493, 10, 13)
    }


def test_rates_and_ranges():
    draws = draw_many(MANY)
    view1, view2 = draws
    three_sigma = 3 * np.sqrt(0.25 / N)
    for name, rate in (("jitter", 0.8), ("gray", 0.2), ("hflip", 0.5), ("vflip", 0.5)):
        assert abs(draws[name].mean() - rate) < three_sigma, name
    assert abs((view1["sigma"] > 0).mean() - 0.5) < three_sigma
    assert abs((view2["sigma"] > 0).mean() - 0.1) < three_sigma
    assert view1["solarize"].sum() == 0
    assert abs(view2["solarize"].mean() - 0.2) < three_sigma
    assert abs((draws["noise_std"] > 0).mean() - 0.5) < three_sigma
    assert np.abs(np.bincount(draws["turns"].ravel(), minlength=4) / draws.size - 0.25).max() < three_sigma
    for name, low, high in (
        ("brightness", 0.6, 1.4),
        ("contrast", 0.6, 1.4),
        ("saturation", 0.8, 1.2),
        ("hue", -0.05, 0.05),
    ):
        values = draws[name].astype(np.float64)
        assert low - 1e-6 <= values.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < values.max() <= high + 1e-6
        assert abs(values.mean() - (low + high) / 2) < 4 * (high - low) / np.sqrt(12 * values.size)
    orders, counts = np.unique(draws["order"].reshape(-1, 4), axis=0, return_counts=True)
    assert len(orders) == 24
    assert np.abs(counts / draws.size - 1 / 24).max() < three_sigma


def test_evaluation_takes_the_centred_square():
    got = eval_draws(Recipe(eval_crop=0.875), np.array([500, 256, 10]), np.array([375, 256, 300]))
    assert got.shape == (1, 3)
    assert got["height"][0].tolist() == [328, 224, 9]
    assert (got["height"] == got["width"]).all()
    assert got["top"][0].tolist() == [23, 16, 145]
    assert got["left"][0].tolist() == [86, 16, 0]
    changing = [name for name in DRAW.names if name not in ("top", "left", "height", "width")]
    assert all(not got[name].any() for name in changing)


COLOURS = ("jitter_p", *JITTER, "gray_p")


def test_colours_said_for_each_view_are_drawn_as_if_said_for_all():
    same = {name: (MANY.per_view(name, 0),) * 2 for name in COLOURS}
    assert (draw_many(dataclasses.replace(MANY, **same), count=500) == draw_many(MANY, count=500)).all()


def test_colours_of_one_view_leave_the_other_and_the_rest_alone():
    base = draw_many(MANY)
    weak = dataclasses.replace(
        MANY,
        jitter_p=(0.8, 0.3),
        gray_p=(0.2, 0.0),
        hue=(0.05, 0.2),
        brightness=(0.4, 0.1),
        contrast=(0.4, 0.9),
    )
    found = draw_many(weak)
    assert (found[0] == base[0]).all()
    assert found[1]["jitter"].mean() == pytest.approx(0.3, abs=0.015)
    assert not found[1]["gray"].any()
    for name, middle, reach in (
        ("hue", 0, 0.2),
        ("brightness", 1, 0.1),
        ("contrast", 1, 0.9),
        ("saturation", 1, 0.2),
    ):
        away = np.abs(found[1][name] - middle)
        assert 0.99 * reach < away.max() <= reach * 1.0001
        # The same random number, spread over another range.
        np.testing.assert_allclose(
            (found[1][name] - middle) / reach, (base[1][name] - middle) / MANY.per_view(name, 1), atol=1e-4
        )
    colours = {"jitter", "gray", *JITTER}
    for name in set(DRAW.names or ()) - colours:
        np.testing.assert_array_equal(found[1][name], base[1][name])
