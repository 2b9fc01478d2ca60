"""The Kornia engine: what it measures against the reference, in 0..255 levels, and that batches change nothing."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipelines.augment.draws import draw
from pipelines.augment.operations import OPERATIONS
from pipelines.augment.recipe import RECIPES, Recipe
from pipelines.engines.batch_engine import BatchOptions
from pipelines.engines.engine_table import make_engine, refuse_deep, refuse_operations
from pipelines.engines.kornia_engine import KorniaEngine, resize_each, resize_together
from shards.errors import UserError
from tests import needs
from tests.pictures import colours, encoded, photo
from tests.pipelines.alone import in_batch_and_alone
from tests.pipelines.engines.fidelity_check import UNNORMALISED, differences, draws_of

needs.module("kornia")

WHOLE = {"top": 0, "left": 0, "height": 48, "width": 48}
AS_STORED = dataclasses.replace(RECIPES["satellite"], size=48, **UNNORMALISED)


def test_crops_are_within_what_was_measured():
    """Bilinear without antialiasing: small where a crop is shrunk little."""
    made = [differences("kornia", photo(100, 80, seed), draws_of((100, 80), seed), 56) for seed in range(10)]
    assert np.mean(made) < 1.0


def test_both_ways_to_resize_are_one_up_to_rounding():
    """One crop at a time, as on a CPU, and all in one canvas, as on a GPU: enlarged, shrunk, a line of pixels."""
    sizes = ((30, 40), (56, 56), (90, 70), (111, 12), (1, 20))
    crops = [np.array(photo(width, height, height)) for height, width in sizes]
    each, together = resize_each(crops, 56), resize_together(crops, 56, torch.device("cpu"))
    assert each.shape == (5, 3, 56, 56)
    assert (each - together).abs().max() * 255 < 1.02  # weights of 16 bits, and rounded to a level
    assert (each - together).abs().mean() * 255 < 0.3


def test_threads_of_its_own_leave_those_of_others_as_they_were():
    """Each of its threads computes alone; the caller's and later threads keep the number that the user has set."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        recipe = Recipe(size=16)
        engine = KorniaEngine(recipe, BatchOptions(threads=2))
        seen = []
        of_a_view = engine._view
        engine._view = lambda *of: (seen.append(torch.get_num_threads()), of_a_view(*of))[1]
        draws = draw(recipe, 0, 0, np.arange(9), np.full(9, 30), np.full(9, 20))
        engine.render([np.array(photo(30, 20, i)) for i in range(9)], draws)
        assert seen == [1] * 6  # three chunks, two views
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 3
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_large_crops_do_not_alias():
    """Stripes of one pixel, shrunk eightfold, become grey, as the antialiased reference makes them."""
    stripes = np.zeros((320, 320, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    draws = draws_of((320, 320))
    draws["top"] = draws["left"] = 0
    draws["height"] = draws["width"] = 320
    assert differences("kornia", stripes, draws, 40).mean() < 0.5  # only the edges differ


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_flips_and_turns_are_exact(turns):
    for hflip in (0, 1):
        for vflip in (0, 1):
            draws = draws_of((48, 48), **WHOLE, hflip=hflip, vflip=vflip, turns=turns)
            assert differences("kornia", colours(48, turns), draws, 48).max() < 0.01


def test_grey_and_solarise():
    """Grey is not rounded to a level; solarise inverts the same pixels."""
    assert differences("kornia", colours(48), draws_of((48, 48), **WHOLE, gray=1), 48).max() < 0.51
    assert differences("kornia", colours(48), draws_of((48, 48), **WHOLE, solarize=1), 48).max() < 0.01


@pytest.mark.parametrize(
    ("part", "bound"), [("brightness", 1.0), ("contrast", 1.2), ("saturation", 1.1), ("hue", 1.6)]
)
def test_each_part_of_jitter(part, bound):
    neutral = {"brightness": 1, "contrast": 1, "saturation": 1, "hue": 0}
    for value in {"hue": (-0.1, 0.07)}.get(part, (0.6, 1.4)):
        draws = draws_of((48, 48), **WHOLE, jitter=1, **(neutral | {part: value}))
        assert differences("kornia", photo(48, 48), draws, 48).mean() < bound


def test_jitter_in_every_order():
    recipe = Recipe(size=48, **UNNORMALISED)
    for sample in range(24):
        draws = draw(recipe, 0, 0, np.array([sample]), np.array([48]), np.array([48]))[:1, 0].copy()
        draws["jitter"], draws["gray"], draws["sigma"], draws["solarize"], draws["hflip"] = 1, 0, 0, 0, 0
        for name, value in WHOLE.items():
            draws[name] = value
        assert differences("kornia", photo(48, 48, sample), draws, 48).mean() < 2.5


def test_blur():
    for sigma in (0.3, 1.0, 2.0):
        assert differences("kornia", photo(48, 48), draws_of((48, 48), **WHOLE, sigma=sigma), 48).mean() < 1


def test_noise_is_that_of_the_reference():
    draws = draws_of((48, 48), **WHOLE, noise_std=0.05, noise_seed=2**63 + 11)
    assert differences("kornia", photo(48, 48), draws, 48).max() < 0.01


@pytest.mark.parametrize("batch", [8, 20])
def test_a_sample_gets_the_same_view_in_any_batch(shard_set, batch):
    """The batch holds images of many sizes; what stands beside a sample must not change it."""
    for view, expected in in_batch_and_alone(shard_set, "kornia", batch):
        np.testing.assert_allclose(view, expected, atol=2e-4)


def test_other_channels_are_refused():
    with pytest.raises(
        UserError, match="engine 'kornia' makes RGB views, and the recipe's mean and std have 4"
    ):
        make_engine("kornia", Recipe(mean=(0.5,) * 4, std=(0.5,) * 4))  # type: ignore[arg-type]


def test_an_image_that_does_not_decode():
    with pytest.raises(RuntimeError):
        make_engine("kornia", Recipe())(memoryview(b"no image"), draws_of((9, 9)), [])
    assert encoded(photo(9, 9), "PNG")


@pytest.mark.parametrize("value", ["random", "mean", 0.5])
def test_erasing_is_that_of_the_reference(value):
    recipe = Recipe(size=48, num_views=1, blur_p=(0.0,), solarize_p=(0.0,), erase_value=value)
    box = {"erase_top": 5, "erase_left": 30, "erase_height": 20, "erase_width": 7, "erase_seed": 99}
    made, expected = np.empty((2, 1, 3, 48, 48), dtype=np.float32)
    for name, out in (("kornia", made), ("reference", expected)):
        data = memoryview(encoded(colours(48), "PNG"))
        make_engine(name, recipe)(data, draws_of((48, 48), **WHOLE, **box), list(out))
    np.testing.assert_allclose(made, expected, atol=2e-4)


def test_deep_images_are_refused():
    deep = SimpleNamespace(manifest=SimpleNamespace(dtypes=["uint16", "uint8"]), folder="scans")
    with pytest.raises(
        UserError, match="'kornia' decodes to 8 bits a channel, and 'scans' has images of uint16"
    ):
        refuse_deep("kornia", deep)  # type: ignore[arg-type]


def test_operations_that_an_engine_does_not_have_are_refused():
    has = set(OPERATIONS) - {"channel_drop"}
    refuse_operations("kornia", Recipe(), has)
    with pytest.raises(
        UserError, match=r"'kornia' does not have the operation 'channel drop' .*--recipe\.channel-drop-p 0"
    ):
        refuse_operations("kornia", Recipe(channel_drop_p=(0.0, 0.1)), has)


def test_a_dropped_channel_is_that_of_the_reference():
    for channel in (1, 2, 3):
        draws = draws_of((48, 48), **WHOLE, channel_drop=channel, solarize=1, turns=1)
        assert differences("kornia", colours(48, channel), draws, 48).max() < 0.01
