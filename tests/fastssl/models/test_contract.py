"""The contract of a backbone: what it says, what its pixels become, and what is refused."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from fastssl.models.contract import Contract, DataFacts, TrainingData, channel_names, make_contract
from pipelines.augment.channels import fit_recipe
from pipelines.augment.recipe import IMAGENET_MEAN, IMAGENET_STD, Recipe
from pipelines.loading.evaluation_views import eval_batches
from shards.conversion.convert import convert
from shards.dataset.mixed_set import MixedShardSet
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError
from shards.sources.source_kinds import open_source
from shards.sources.source_options import RasterOptions, SourceOptions
from tests import needs
from tests.pictures import photo
from tests.pipelines.augment.test_channels import bands, save

SIDE = 24
PHOTOS = Contract(
    backbone="resnet18",
    num_features=512,
    channels=3,
    size=SIDE,
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    value_low=(),
    value_high=(),
    eval_crop=1.0,
    interpolation="bilinear",
    patch_size=None,
    num_heads=None,
    method="moco_v3",
    evaluated="backbone",
    step=1200,
    data=TrainingData(96, "0123456789abcdef" * 4, source="photos"),
    channel_names=("red", "green", "blue"),
    dtypes=("uint8",),
)
TILES = dataclasses.replace(
    PHOTOS,
    channels=4,
    mean=(0.5, 0.25, 0.5, 0.5),
    std=(0.1, 0.2, 0.25, 0.5),
    value_low=(0.0, 0.1, 0.0, 0.0),
    value_high=(0.5, 0.3, 1.0, 0.25),
    channel_names=("B02", "B03", "B04", "B08"),
    dtypes=("uint16",),
    patch_size=8,
    num_heads=(3, 6),
    data=TrainingData(48, "f" * 64, "train", "e" * 64, "scenes"),
)


@pytest.mark.parametrize("contract", [PHOTOS, TILES])
def test_a_contract_is_json_and_comes_back(contract: Contract):
    values = json.loads(json.dumps(contract.to_json()))
    assert values == contract.to_json()
    assert Contract.from_json(values) == contract
    newer = {**values, "licence": "?", "data": {**values["data"], "place": "?"}}
    assert Contract.from_json(newer) == contract


def test_what_a_contract_says():
    assert repr(PHOTOS) == "<Contract resnet18: (N, 3, 24, 24) -> (N, 512), moco_v3, 1,200 steps>"
    assert str(PHOTOS) == PHOTOS.describe()
    photos, tiles = (dict(_lines(contract)) for contract in (PHOTOS, TILES))
    assert photos["channels"] == "red, green, blue"
    assert photos["values"] == "uint8, 0 to 255 as 0 to 1"
    assert photos["weights"] == "backbone of moco_v3 after 1,200 steps"
    assert photos["data"] == "96 samples of 'photos' (conversion 0123456789ab)"
    assert {"patch", "heads"}.isdisjoint(photos)
    # 0.1 of 65535 is 6,553.5.
    assert tiles["values"] == "uint16, 0, 6554, 0, 0 as 0 and 3.277e+04, 1.966e+04, 6.554e+04, 1.638e+04 as 1"
    assert (tiles["patch"], tiles["heads"]) == ("8 px", "3, 6")
    assert tiles["data"] == "48 samples of 'scenes', split train (conversion ffffffffffff)"
    unknown = dict(_lines(dataclasses.replace(TILES, channel_names=None, dtypes=None)))
    assert unknown["channels"] == "4, unnamed"
    assert unknown["values"].startswith("shares of the type's range, 0, 0.1, 0, 0 as 0 and 0.5")


def _lines(contract: Contract) -> list[tuple[str, str]]:
    name, *lines = contract.describe().splitlines()
    assert name == contract.backbone
    return [(line[2:13].strip(), line[13:]) for line in lines]


# ---------------------------------------------------------------- pixels


def test_pixels_become_shares_of_the_range_then_are_normalised():
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).repeat(3, 1)[None, :, None]  # (1, 3, 1, 3)
    expected = torch.stack(
        [(torch.tensor([0.0, 0.2, 1.0]) - m) / s for m, s in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)]
    )[None, :, None]
    torch.testing.assert_close(PHOTOS.normalize(pixels), expected)
    torch.testing.assert_close(PHOTOS.normalize(pixels / 255), expected)
    torch.testing.assert_close(PHOTOS.normalize((pixels / 255).half()), expected, atol=2e-3, rtol=0)
    torch.testing.assert_close(PHOTOS.normalize(pixels[0]), expected[0])
    deep = torch.tensor([13107, 6554, 60000, 100], dtype=torch.int32).to(torch.uint16)[:, None, None]
    shares = torch.tensor([0.2 / 0.5, (6554 / 65535 - 0.1) / 0.2, 60000 / 65535, 100 / 65535 / 0.25])
    wanted = (shares - torch.tensor(TILES.mean)) / torch.tensor(TILES.std)
    torch.testing.assert_close(TILES.normalize(deep).flatten(), wanted, atol=1e-5, rtol=1e-5)
    # Beyond the range: clamped, as in the views.
    brightest = TILES.normalize(torch.full((4, 1, 1), 65535, dtype=torch.int32).to(torch.uint16)).flatten()
    torch.testing.assert_close(brightest, (1 - torch.tensor(TILES.mean)) / torch.tensor(TILES.std))


@pytest.mark.parametrize(("channels", "dtype"), [(3, "uint8"), (4, "uint16"), (2, "float32")])
@pytest.mark.parametrize("value_range", ["type", "percentiles"])
def test_normalised_pixels_are_the_evaluation_views(channels, dtype, value_range, tmp_path: Path):
    """Of images that need neither crop nor resize."""
    images = [bands(channels, dtype, SIDE, SIDE, seed=i) for i in range(3)]
    shards = save(tmp_path, images)
    recipe = fit_recipe(Recipe(size=SIDE, eval_crop=1.0), shards, value_range)
    view = {name: getattr(recipe, name) for name in ("mean", "std", "value_low", "value_high")}
    contract = dataclasses.replace(PHOTOS, channels=channels, dtypes=(dtype,), channel_names=None, **view)
    [batch] = eval_batches(shards, contract.eval_recipe(), batch=3)
    stored = torch.stack([torch.from_numpy(shards[i].pixels().copy()) for i in range(3)])
    found = contract.normalize(stored.movedim(3, 1))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, batch.views[0], atol=2e-5, rtol=2e-5)


def test_the_evaluation_recipe_is_of_one_view_and_for_any_channels():
    recipe = TILES.eval_recipe()
    assert (recipe.size, recipe.total_views, recipe.mean, recipe.value_high) == (
        SIDE,
        1,
        TILES.mean,
        TILES.value_high,
    )


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 4, 8, 8), r"\(2, 4, 8, 8\) have 4 channels, but resnet18 takes 3 channels \(red, gr"),
        (torch.zeros(8, 8), r"\(8, 8\) have 0 channels, but resnet18 takes 3"),
        (torch.full((1, 3, 2, 2), 200.0), "floats from 200 to 200, but floats are shares .* divide by 255"),
        (torch.linspace(-2, 2, 12).reshape(3, 2, 2), "floats from -2 to 2, .* do not normalise them before"),
        (torch.zeros(3, 2, 2, dtype=torch.int64), "images are torch.int64, but they must be uint8, uint16"),
    ],
)
def test_pixels_that_do_not_fit_are_refused(images, message):
    with pytest.raises(UserError, match=message):
        PHOTOS.normalize(images)


def test_floats_of_any_range_are_taken_where_the_training_had_them():
    radar = dataclasses.replace(
        TILES, dtypes=("float32",), value_low=(-25.0,) * 4, value_high=(5.0,) * 4, mean=(0.5,) * 4
    )
    found = radar.normalize(torch.full((4, 1, 1), -10.0)).flatten()
    torch.testing.assert_close(found, torch.zeros(4), atol=1e-5, rtol=0)


# ---------------------------------------------------------------- channels


def images(folder: Path, mode: str = "RGB", count: int = 3) -> ShardSet:
    (folder / "source").mkdir(parents=True)
    for i in range(count):
        photo(20, 20, seed=i).convert(mode).save(folder / "source" / f"{i}.png")
    convert(folder / "source", folder / "shards", workers=0)
    return ShardSet.open(folder / "shards")


def tiles(folder: Path, chosen: str, count: int = 3) -> ShardSet:
    """A raster of `count` bands of 8 bits, or a file for each band, of which --bands takes some."""
    needs.module("rasterio")
    from tests.shards.sources.test_band_files import scene
    from tests.shards.sources.test_raster_tiles import noise, write

    if chosen[:1].isalpha():
        scene(folder / "source", "a_")
    else:
        write(folder / "source" / "a.tif", noise(0, count, 12, 16, "uint8"))
    options = RasterOptions(tile=8, bands=chosen)
    convert(open_source(str(folder / "source"), SourceOptions(raster=options)), folder / "shards", workers=0)
    return ShardSet.open(folder / "shards")


def test_names_of_channels_are_what_the_shards_know(tmp_path: Path):
    photos, gray = images(tmp_path / "rgb"), images(tmp_path / "gray", "L")
    chosen, every = tiles(tmp_path / "chosen", "3,2,1", 4), tiles(tmp_path / "every", "")
    assert channel_names(photos) == channel_names(gray) == ("red", "green", "blue")
    assert channel_names(chosen) == ("band 3", "band 2", "band 1")
    assert channel_names(tiles(tmp_path / "files", "B04,b02")) == ("B04", "b02")
    # The first of three bands may be anything.
    assert channel_names(every) is None
    assert channel_names(save(tmp_path / "deep", [bands(3, "uint16")])) is None
    assert channel_names(save(tmp_path / "five", [bands(5, "uint8")])) is None
    assert channel_names(MixedShardSet([photos, gray])) == ("red", "green", "blue")
    assert channel_names(MixedShardSet([photos, chosen])) is None
    convert(tmp_path / "chosen" / "shards", tmp_path / "again", workers=0)
    assert channel_names(ShardSet.open(tmp_path / "again")) is None
    (tmp_path / "chosen" / "shards" / "plan.parquet").unlink()
    assert channel_names(chosen) is None
    assert DataFacts.of(photos) == ("source", ("uint8",), ("red", "green", "blue"))


def test_shards_of_other_channels_are_refused(tmp_path: Path):
    photos, wide = images(tmp_path / "rgb"), save(tmp_path / "wide", [bands(4, "uint16")])
    PHOTOS.check_shards(photos)
    TILES.check_shards(wide)
    with pytest.raises(
        UserError, match=r"on 3 channels \(red, green, blue\), and the images of .* views of 4"
    ):
        PHOTOS.check_shards(wide)
    with pytest.raises(UserError, match=r"on 4 channels \(B02, B03, B04, B08\), and .* make views of 3"):
        TILES.check_shards(photos)


def test_swapped_bands_are_refused_and_other_names_are_not(tmp_path: Path):
    shards = tiles(tmp_path / "a", "3,2,1")
    names = ("band 1", "band 2", "band 3")
    with pytest.raises(
        UserError, match=r"on band 1, band 2, band 3, and .* in another order: band 3, band 2, band 1"
    ):
        dataclasses.replace(PHOTOS, channel_names=names).check_shards(shards)
    named = tiles(tmp_path / "b", "B03,b02,B04")
    with pytest.raises(UserError, match=r"on b04, B03, B02, and .* in another order: B03, b02, B04"):
        dataclasses.replace(PHOTOS, channel_names=("b04", "B03", "B02")).check_shards(named)
    dataclasses.replace(PHOTOS, channel_names=("b03", "B02", "b04")).check_shards(named)
    for same in (names[::-1], ("red", "green", "blue"), None):
        dataclasses.replace(PHOTOS, channel_names=same).check_shards(shards)


def test_settings_that_a_checkpoint_does_not_have_are_todays_defaults():
    shape = {"name": "a", "num_features": 4, "channels": 3, "patch_size": None, "num_heads": [2, 4]}
    state = {
        "step": 7,
        "architecture": shape,
        "config": {"data": {}, "recipe": {"size": 32}, "method": {"name": "m"}},
        "shards": {"num_samples": 3, "options_sha256": "ab"},
    }
    found = make_contract(state)
    assert (found.size, found.eval_crop, found.mean, found.value_low) == (32, 0.875, IMAGENET_MEAN, ())
    assert (found.num_heads, found.method, found.evaluated, found.step) == ((2, 4), "m", "backbone", 7)
    assert found.data == TrainingData(3, "ab")
    assert found.channel_names is found.dtypes is None
