"""Images of other than three channels of 8 bits: kernels against the reference, value ranges, and what is refused."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from pipelines.augment.channels import check_operations, fit_recipe, num_channels
from pipelines.augment.draws import draw
from pipelines.augment.recipe import RECIPES, Recipe
from pipelines.engines.engine_table import make_engine
from pipelines.loading.evaluation_views import eval_batches
from pipelines.loading.loader import open_loader
from pipelines.loading.slots import view_shapes
from shards.conversion.convert import convert
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError
from shards.images.pixels import write_npy
from tests.pictures import photo

SPECTRAL = dataclasses.replace(
    RECIPES["multispectral"],
    size=24,
    erase_p=0.5,
    solarize_p=(0.3,),
    erase_value=0.5,
    value_range="type",
)


def bands(channels: int, dtype: str, width: int = 40, height: int = 32, seed: int = 0) -> np.ndarray:
    """Textured pixels (H, W, C); 16 bits stay below 20,000, as reflectances do."""
    planes = [np.asarray(photo(width, height, seed * 100 + c))[:, :, c % 3] for c in range(channels)]
    pixels = np.stack(planes, axis=2).astype(np.float32)
    fine = np.random.default_rng(seed).random(pixels.shape, dtype=np.float32)
    if dtype == "uint8":
        return pixels.astype(np.uint8)
    return (pixels * 70 + 70 * fine).astype(np.uint16) if dtype == "uint16" else (pixels + fine) / 256


def save(folder: Path, images: list[np.ndarray]) -> ShardSet:
    (folder / "source").mkdir(parents=True)
    for i, pixels in enumerate(images):
        (folder / "source" / f"{i:03d}.npy").write_bytes(write_npy(pixels))
    convert(folder / "source", folder / "shards", workers=0)
    return ShardSet.open(folder / "shards")


def flat(channels: int) -> dict[str, tuple[float, ...]]:
    return {"mean": (0.0,) * channels, "std": (1.0,) * channels}


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("channels", [1, 2, 4, 13])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_fused_equals_the_reference_for_any_channels(channels, dtype, interpolation):
    made = 3 if channels == 1 else channels
    recipe = dataclasses.replace(SPECTRAL, interpolation=interpolation, **flat(made))
    compare(recipe, bands(channels, dtype), 3 if dtype == "uint8" and made == 3 else 1e-4)


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_three_deep_channels_have_all_colour_operations(dtype):
    recipe = dataclasses.replace(RECIPES["satellite"], size=24, gray_p=0.5, hue=0.5, **flat(3))
    compare(recipe, bands(3, dtype), 1e-4)


def test_a_value_range_stretches_each_channel():
    low, high = (0.02, 0.05, 0.1, 0.0), (0.2, 0.25, 0.28, 0.3)
    recipe = dataclasses.replace(SPECTRAL, value_low=low, value_high=high, **flat(4))
    compare(recipe, bands(4, "uint16"), 1e-4)
    plain = dataclasses.replace(recipe, jitter_p=0, blur_p=(0.0,), solarize_p=(0.0,), noise_p=0, erase_p=0)
    views = render("fused", plain, bands(4, "uint16"), 0)
    assert [float(channel.max()) for channel in views[0]] == pytest.approx([1] * 4, abs=0.2)


def test_what_is_no_number_is_zero():
    pixels = bands(4, "float32")
    pixels[3:9, 3:20, 1] = np.nan
    pixels[12:14, :, 2] = np.inf
    recipe = dataclasses.replace(SPECTRAL, **flat(4))
    compare(recipe, pixels, 1e-4)
    assert all(np.isfinite(view).all() for view in render("fused", recipe, pixels, 0))


def test_contrast_moves_towards_the_mean_of_all_channels():
    pixels = np.zeros((8, 8, 4), dtype=np.float32)
    pixels[..., 0] = 0.8  # the grey version is 0.2 everywhere
    recipe = dataclasses.replace(
        SPECTRAL, size=8, erase_p=0, noise_p=0, blur_p=(0.0,), solarize_p=(0.0,), **flat(4)
    )
    fields = {"jitter": 1, "brightness": 1, "contrast": 0.5}
    [view, _] = render("fused", recipe, pixels, 0, fields)
    assert view[:, 0, 0].tolist() == pytest.approx([0.5, 0.1, 0.1, 0.1])


def compare(recipe: Recipe, pixels: np.ndarray, most: float) -> None:
    for sample in range(8):
        for ours, theirs in zip(
            *(render(e, recipe, pixels, sample) for e in ("fused", "reference")), strict=True
        ):
            assert np.abs(ours - theirs).max() < most


def render(
    engine: str, recipe: Recipe, pixels: np.ndarray, sample: int, fields: dict | None = None
) -> list[np.ndarray]:
    made = make_engine(engine, recipe)
    draws = draw(recipe, 0, 0, np.array([sample]), np.array([pixels.shape[1]]), np.array([pixels.shape[0]]))
    draws = draws[:, 0].copy()
    for name, value in (fields or {}).items():
        draws[name] = value
    out = [np.empty(shape, dtype=np.float32) for shape in view_shapes(recipe)]
    made(memoryview(write_npy(pixels)), draws, out)
    return out


# ---------------------------------------------------------------- data sets


def test_mean_and_std_come_from_the_data_set(tmp_path):
    images = [bands(5, "uint16", seed=seed) for seed in range(6)]
    shards = save(tmp_path, images)
    recipe = fit_recipe(SPECTRAL, shards)
    stacked = np.concatenate([image.reshape(-1, 5) for image in images]) / 65535
    assert recipe.mean == pytest.approx(stacked.mean(axis=0), rel=0.01)
    assert recipe.std == pytest.approx(stacked.std(axis=0), rel=0.01)
    assert fit_recipe(recipe, shards) == recipe
    [batch] = open_loader(shards, SPECTRAL, batch=6, seed=0).epoch(0)
    assert batch.views[0].shape == (6, 5, 24, 24)
    [batch] = eval_batches(shards, SPECTRAL, np.arange(6))
    assert batch.views[0].mean().abs() < 0.3
    assert batch.views[0].std() == pytest.approx(1, abs=0.3)


def test_percentiles_of_the_data_set_become_0_and_1(tmp_path):
    shards = save(tmp_path, [bands(4, "uint16", seed=seed) for seed in range(6)])
    recipe = fit_recipe(SPECTRAL, shards, "percentiles")
    facts = shards.manifest.statistics["uint16/4"]
    assert (recipe.value_low, recipe.value_high) == (tuple(facts["p1"]), tuple(facts["p99"]))
    span = np.array(facts["p99"]) - facts["p1"]
    assert recipe.mean == pytest.approx((np.array(facts["mean"]) - facts["p1"]) / span)
    assert recipe.std == pytest.approx(np.array(facts["std"]) / span)
    assert fit_recipe(recipe, shards) == recipe, "evaluation keeps the range of the training"
    [batch] = open_loader(shards, SPECTRAL, batch=6, seed=0, value_range="percentiles").epoch(0)
    assert batch.views[0].shape == (6, 4, 24, 24)


def test_reflectances_in_16_bits_are_stretched_by_the_multispectral_preset(tmp_path):
    """They fill 4 % of the type's range, in which the preset's noise would be as large as they are."""
    draw = np.random.default_rng(0)
    images = [draw.integers(300, 3100, (20, 24, 4), dtype=np.uint16) for _ in range(6)]
    shards = save(tmp_path, images)
    facts = shards.manifest.statistics["uint16/4"]
    stretched = fit_recipe(RECIPES["multispectral"], shards)
    assert (stretched.value_low, stretched.value_high) == (tuple(facts["p1"]), tuple(facts["p99"]))
    assert fit_recipe(stretched, shards) == stretched
    assert min(stretched.std) > 0.2
    with pytest.warns(
        UserWarning,
        match=r"lie between 3\d\d.* and 30\d\d.*, 4\.\d% of the range from 0 to 65535 .*percentiles",
    ):
        told = fit_recipe(RECIPES["multispectral"], shards, "type")
    assert told.value_low == ()
    assert max(told.std) < 0.02 < told.noise_std[1]


def test_three_channels_of_8_bits_stay_as_they_are(shard_set):
    assert num_channels(shard_set) == 3
    assert fit_recipe(RECIPES["moco_v3"], shard_set) == RECIPES["moco_v3"]


def test_grey_of_16_bits_is_repeated(tmp_path):
    shards = save(tmp_path, [bands(1, "uint16", seed=seed) for seed in range(4)])
    [batch] = open_loader(shards, Recipe(size=16, jitter_p=0, solarize_p=(0.0,)), batch=4, seed=0).epoch(0)
    mean, std = (np.array(values)[:, None, None] for values in (Recipe().mean, Recipe().std))
    levels = batch.views[0].numpy() * std + mean
    assert np.abs(levels[:, 0] - levels[:, 2]).max() < 1e-5


@pytest.mark.parametrize(
    ("preset", "named"),
    [("satellite", "--recipe.saturation 0 --recipe.hue 0 --recipe.gray-p 0"), ("finetune", "")],
)
def test_colour_operations_on_other_channels_are_refused_by_name(preset, named):
    recipe = dataclasses.replace(RECIPES[preset], **flat(4))
    if not named:
        check_operations(recipe)
        return
    with pytest.raises(
        UserError, match=rf"4 channels, and recipe.saturation and .*: set {named}, or .*multispectral"
    ):
        check_operations(recipe)
    check_operations(dataclasses.replace(recipe, saturation=0.0, hue=0.0, gray_p=0.0))


def test_data_sets_that_make_no_batch_are_refused(tmp_path):
    mixed = save(tmp_path / "mixed", [bands(4, "uint8"), bands(5, "uint8")])
    with pytest.raises(UserError, match="holds images of 4, 5 channels"):
        open_loader(mixed, SPECTRAL, batch=2, seed=0)
    floats = save(tmp_path / "floats", [bands(4, "float32") * 30 - 3])
    with pytest.raises(UserError, match=r"not 0 and 1: set --data\.value-range percentiles"):
        open_loader(floats, SPECTRAL, batch=1, seed=0)
    [batch] = open_loader(floats, SPECTRAL, batch=1, seed=0, value_range="percentiles").epoch(0)
    assert batch.views[0].shape == (1, 4, 24, 24)
    with pytest.raises(UserError, match=r"recipe\.mean has 2 values and the views .* have 4 channels"):
        open_loader(
            floats, dataclasses.replace(SPECTRAL, **flat(2)), batch=1, seed=0, value_range="percentiles"
        )
