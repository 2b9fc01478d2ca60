"""Channel drop: its draws, its pixels, what it leaves alone, and who refuses it."""

import dataclasses

import numpy as np
import pytest

from pipelines.augment import pointwise
from pipelines.augment.draws import DRAW, draw
from pipelines.augment.recipe import RECIPES, Recipe
from pipelines.engines.engine_table import make_engine
from pipelines.loading.loader import open_loader
from shards.errors import UserError
from tests.pipelines.augment.test_channels import bands, flat

N = 20_000
BANDS = dataclasses.replace(RECIPES["multispectral"], size=16, channel_drop_p=0.3, **flat(5))


def drawn(recipe: Recipe, count: int = N) -> np.ndarray:
    return draw(recipe, 7, 3, np.arange(count), np.full(count, 50), np.full(count, 40))


def test_one_channel_each_equally_likely_with_the_probability_asked_for():
    found = drawn(BANDS)["channel_drop"]
    assert abs((found > 0).mean() - 0.3) < 3 * np.sqrt(0.21 / found.size)
    counts = np.bincount(found[found > 0] - 1, minlength=5)
    assert len(counts) == 5
    assert np.abs(counts / counts.sum() - 0.2).max() < 3 * np.sqrt(0.16 / counts.sum())


def test_views_may_have_probabilities_of_their_own():
    found = drawn(dataclasses.replace(BANDS, channel_drop_p=(0.0, 1.0)))["channel_drop"]
    assert not found[0].any()
    assert found[1].all()


def test_it_is_off_by_default_and_leaves_all_other_draws_as_they_are():
    without, always = (
        drawn(RECIPES["satellite"], 500),
        dataclasses.replace(RECIPES["satellite"], channel_drop_p=1.0),
    )
    assert not without["channel_drop"].any()
    for name in set(DRAW.names or ()) - {"channel_drop"}:
        np.testing.assert_array_equal(drawn(always, 500)[name], without[name])


@pytest.mark.parametrize("engine", ["fused", "reference"])
@pytest.mark.parametrize(("dtype", "channels"), [("uint8", 3), ("uint8", 5), ("uint16", 4)])
def test_the_channel_is_the_lower_end_of_its_range_and_the_others_stay(engine, dtype, channels):
    plain = dataclasses.replace(
        RECIPES["multispectral"],
        size=16,
        num_views=1,
        noise_p=0.0,
        blur_p=(0.5,),
        solarize_p=(0.5,),
        mean=(0.5,) * channels,
        std=(0.25,) * channels,
    )
    pixels, maker = bands(channels, dtype), make_engine(engine, plain)
    one = draw(plain, 0, 0, np.array([3]), np.array([40]), np.array([32]))[0].copy()
    whole, made = np.empty((2, channels, 16, 16), np.float32)
    maker.render(pixels, one, [whole])  # type: ignore[union-attr,arg-type,call-arg]
    for channel in range(channels):
        one["channel_drop"] = channel + 1
        maker.render(pixels, one, [made])  # type: ignore[union-attr,arg-type,call-arg]
        assert (made[channel] == -2).all()
        others = [c for c in range(channels) if c != channel]
        np.testing.assert_allclose(made[others], whole[others], atol=1e-6)
        assert (whole[channel] != -2).any()


def test_where_nothing_is_drawn_no_operation_is_called(monkeypatch):
    monkeypatch.setattr(pointwise, "compiled", lambda name: pytest.fail(f"{name} was called"))
    recipe = dataclasses.replace(BANDS, channel_drop_p=0.0)
    draws = np.ascontiguousarray(drawn(recipe, 1)[:, 0])
    out = [np.empty((5, 16, 16), np.float32) for _ in draws]
    make_engine("fused", recipe).render(bands(5, "uint16", 50, 40), draws, out)  # type: ignore[union-attr,arg-type,call-arg]
    assert pointwise.drawn_fields(draws) == {}


def test_a_batch_of_a_loader_has_it(shard_set):
    recipe = Recipe(size=16, channel_drop_p=1.0, noise_p=0.0)
    ours, theirs = (
        next(open_loader(shard_set, recipe, batch=8, seed=1, engine=engine).steps(0, 1)).views
        for engine in ("fused", "reference")
    )
    lowest = -np.array(recipe.mean) / np.array(recipe.std)
    for view, expected in zip(ours, theirs, strict=True):
        gone = (np.abs(view.numpy() - lowest[:, None, None]) < 1e-4).all(axis=(2, 3))
        assert (gone.sum(axis=1) >= 1).all()
        assert (view - expected).abs().mean() * 0.225 * 255 < 0.5


def test_dali_refuses_it_before_the_run(shard_set):
    with pytest.raises(
        UserError,
        match=r"'dali' does not have the operation 'channel drop' .* --data.engine fused, or set --recipe.channel-drop-p 0",
    ):
        open_loader(shard_set, Recipe(size=16, channel_drop_p=0.1), batch=8, seed=1, engine="dali")


@pytest.mark.parametrize("bad", [1.5, -0.1, (0.1, 2.0)])
def test_probabilities_are_checked(bad):
    with pytest.raises(UserError, match=r"recipe\.channel_drop_p is .* probabilities between 0 and 1"):
        Recipe(channel_drop_p=bad)


def test_a_view_of_one_channel_keeps_it():
    one = {"mean": (0.5,), "std": (0.5,)}
    Recipe(**one)
    with pytest.raises(
        UserError, match=r"channel_drop_p is 0\.5, but it must be 0 for images of one channel"
    ):
        Recipe(channel_drop_p=0.5, **one)
