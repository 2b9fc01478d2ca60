"""Scenes with one file for each band: stacked in the order asked for, whole or in tiles, and refused where the files disagree."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from fastssl.cli import main
from shards.conversion.convert import convert
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError
from shards.format import layout
from shards.images.pixels import read_npy
from shards.sources.source import Source
from shards.sources.source_kinds import open_source
from shards.sources.source_options import RasterOptions, SourceOptions
from tests import needs
from tests.pictures import fingerprints

needs.module("rasterio")
from tests.shards.sources.test_raster_tiles import TRANSFORM, noise, write  # noqa: E402

BANDS = ("B02", "B03", "B04")


def scene(
    folder: Path, name: str, seed: int = 0, size: tuple[int, int] = (12, 16), bands=BANDS
) -> np.ndarray:
    """Writes `name` followed by each band's name; returns the pixels (C, H, W)."""
    pixels = noise(seed, len(bands), *size)
    for band, values in zip(bands, pixels, strict=True):
        write(folder / f"{name}{band}.tif", values[None])
    return pixels


def opened(folder: Path, bands: str, **options) -> Source:
    return open_source(str(folder), SourceOptions(raster=RasterOptions(bands=bands, **options)))


def made(folder: Path) -> dict[str, np.ndarray]:
    """The pixels (H, W, C) of each sample of a shard folder, by name."""
    shards = ShardSet.open(folder)
    return {shards.name(int(i)): read_npy(bytes(shards.read(int(i)))) for i in shards.ids}


def quarantined(folder: Path) -> dict[str, str]:
    lines = (folder / layout.QUARANTINE).read_text().splitlines()
    return {bad["source"]: bad["reason"] for bad in map(json.loads, lines)}


def test_bands_are_stacked_in_the_order_asked_for(tmp_path: Path):
    folder = tmp_path / "scenes"
    flat = scene(folder, "one_", 1)
    below = scene(folder / "two", "", 2)
    named = scene(folder / "forest" / "T32.2020", "T32.2020-", 3)
    (folder / "two" / "readme.txt").write_text("x")
    write(folder / "two" / "TCI.tif", noise(0, 3, 12, 16))
    source = opened(folder, "b04,B02")
    manifest = convert(source, tmp_path / "out", workers=0)
    assert manifest is not None
    assert (manifest.kind, manifest.channels, manifest.dtypes) == ("bands", [2], ["uint16"])
    assert manifest.classes == ["forest"]
    found = made(tmp_path / "out")
    assert set(found) == {"one", "two", "forest/T32.2020"}
    for name, pixels in {"one": flat, "two": below, "forest/T32.2020": named}.items():
        assert np.array_equal(found[name], np.moveaxis(pixels[[2, 0]], 0, 2))
    rows = {row["source"]: row for row in pq.read_table(tmp_path / "out" / layout.TABLE).to_pylist()}
    assert rows["two"]["files"] == ["two/B04.tif", "two/B02.tif"]
    assert rows["two"]["group"] == "two"
    assert rows["two"]["crs"] == "EPSG:32632"
    assert rows["two"]["transform"] == list(TRANSFORM)
    left, top = TRANSFORM[2], TRANSFORM[5]
    assert rows["two"]["bounds"] == [left, top - 120, left + 160, top]


def test_the_longest_name_of_a_band_counts(tmp_path: Path):
    pixels = scene(tmp_path / "scenes", "LC08_", 1, bands=("B4", "SR_B4", "SR_B5"))
    source = opened(tmp_path / "scenes", "SR_B4,SR_B5")
    convert(source, tmp_path / "out", workers=0)
    assert list(made(tmp_path / "out")) == ["LC08"]
    assert np.array_equal(made(tmp_path / "out")["LC08"], np.moveaxis(pixels[1:], 0, 2))
    convert(opened(tmp_path / "scenes", "B4"), tmp_path / "other", workers=0)
    assert set(made(tmp_path / "other")) == {"LC08", "LC08_SR"}


def test_scenes_are_cut_into_tiles(tmp_path: Path):
    pixels = scene(tmp_path / "scenes", "a_", 1, (20, 30))
    scene(tmp_path / "scenes", "small_", 2, (5, 5))
    source = opened(tmp_path / "scenes", "B03,B04,B02", tile=8, stride=6, edge="shift")
    convert(source, tmp_path / "out", workers=0)
    found = made(tmp_path / "out")
    corners = [(x, y) for x in (0, 6, 12, 18, 22) for y in (0, 6, 12)]
    assert set(found) == {f"a@{x},{y}" for x, y in corners}
    for x, y in corners:
        assert np.array_equal(found[f"a@{x},{y}"], np.moveaxis(pixels[[1, 2, 0], y : y + 8, x : x + 8], 0, 2))
    assert source.warnings() == ["1 rasters are smaller than a tile and left out: 'small' (5 x 5)"]


@pytest.mark.parametrize("tile", [0, 6])
def test_bands_that_disagree_are_refused_with_both_sizes(tmp_path: Path, tile: int):
    folder = tmp_path / "scenes"
    scene(folder, "good_", 1)
    scene(folder, "size_", 2, bands=("B02", "B03"))
    write(folder / "size_B04.tif", noise(3, 1, 6, 8))
    scene(folder, "lacks_", 4, bands=("B02", "B04"))
    scene(folder, "away_", 5, bands=("B02", "B03"))
    write(folder / "away_B04.tif", noise(6, 1, 12, 16), transform=(*TRANSFORM[:5], TRANSFORM[5] + 40))
    scene(folder, "many_", 7, bands=("B02", "B03"))
    write(folder / "many_B04.tif", noise(8, 2, 12, 16))
    scene(folder, "broken_", 9, bands=("B02", "B03"))
    (folder / "broken_B04.tif").write_bytes(b"II*\0")
    convert(opened(folder, "B02,B03,B04", tile=tile), tmp_path / "out", workers=0)
    assert {name.partition("@")[0] for name in made(tmp_path / "out")} == {"good"}
    found = quarantined(tmp_path / "out")
    assert set(found) == {"size", "lacks", "away", "many", "broken"}
    assert found["size"] == (
        "'size_B04.tif' has 8 x 6 pixels and 'size_B02.tif' 16 x 12; choose bands of one size with --bands, or bring them to one size"
    )
    assert found["lacks"] == "has no file of the band B03"
    assert found["away"] == "'away_B04.tif' lies elsewhere: the transforms differ"
    assert found["many"] == "'many_B04.tif' has 2 bands; one file for each band is wanted"
    assert found["broken"].startswith("cannot be read as a raster")


def test_bands_of_one_size_are_chosen_where_others_differ(tmp_path: Path):
    pixels = scene(tmp_path / "scenes", "a_", 1)
    write(tmp_path / "scenes" / "a_B11.tif", noise(3, 1, 6, 8))
    convert(opened(tmp_path / "scenes", "B04,B03,B02"), tmp_path / "out", workers=0)
    assert np.array_equal(made(tmp_path / "out")["a"], np.moveaxis(pixels[::-1], 0, 2))


def test_types_that_differ_become_one_that_holds_both(tmp_path: Path):
    write(tmp_path / "scenes" / "a_B02.tif", noise(1, 1, 8, 8, "uint8"))
    deep = noise(2, 1, 8, 8) * 300
    write(tmp_path / "scenes" / "a_B03.tif", deep)
    convert(opened(tmp_path / "scenes", "B02,B03"), tmp_path / "out", workers=0)
    found = made(tmp_path / "out")["a"]
    assert found.dtype == np.uint16
    assert np.array_equal(found[:, :, 0], noise(1, 1, 8, 8, "uint8")[0])
    assert np.array_equal(found[:, :, 1], deep[0])


def test_too_little_data_in_all_bands(tmp_path: Path):
    for band, rows in {"B02": 7, "B03": 2}.items():
        pixels = noise(1, 1, 8, 8)
        pixels[:, :rows] = 0
        write(tmp_path / "scenes" / f"full_{band}.tif", pixels, nodata=0)
        write(tmp_path / "scenes" / f"empty_{band}.tif", pixels * (band == "B02"), nodata=0)
    convert(opened(tmp_path / "scenes", "B02,B03"), tmp_path / "out", workers=0)
    assert list(made(tmp_path / "out")) == ["full"]
    assert quarantined(tmp_path / "out") == {"empty": "more than 50% of the scene is without data (87.5%)"}


def test_masks_of_scenes(tmp_path: Path):
    scene(tmp_path / "scenes", "a.b_", 1)
    mask = noise(5, 1, 12, 16, "uint8")
    write(tmp_path / "masks" / "a.b_mask.tif", mask)
    options = SourceOptions(
        raster=RasterOptions(bands="B02,B03"), masks=str(tmp_path / "masks"), mask_suffix="_mask"
    )
    manifest = convert(open_source(str(tmp_path / "scenes"), options), tmp_path / "out", workers=0)
    assert manifest is not None
    assert manifest.num_masks == 1


def test_two_files_of_one_band(tmp_path: Path):
    scene(tmp_path / "scenes", "a_", 1)
    write(tmp_path / "scenes" / "a_B02.tiff", noise(3, 1, 12, 16))
    with pytest.raises(
        UserError, match=r"a_B02\.tiff?' and '.*a_B02\.tiff?' are both the band B02 of 'a': move"
    ):
        list(opened(tmp_path / "scenes", "B02,B03").entries())
    (tmp_path / "scenes" / "a_B02.tiff").unlink()
    scene(tmp_path / "scenes" / "a", "", 2)  # the same scene from another folder
    with pytest.raises(UserError, match="'a' is listed twice in the source"):
        convert(opened(tmp_path / "scenes", "B02"), tmp_path / "out", workers=0)


def test_options_that_do_not_fit(tmp_path: Path):
    scene(tmp_path / "scenes", "a_", 1)
    with pytest.raises(
        UserError,
        match=r"holds no raster whose name ends with a band of --bands \(B8A\), only files such as 'a_B0",
    ):
        list(opened(tmp_path / "scenes", "B8A").entries())
    with pytest.raises(UserError, match="--stride 4 goes with --tile N"):
        opened(tmp_path / "scenes", "B02", stride=4)
    with pytest.raises(UserError, match="--edge pad goes with --tile N"):
        opened(tmp_path / "scenes", "B02", edge="pad")
    with pytest.raises(
        UserError, match=r"--bands B02,B03 names the files of a folder .*a_B02\.tif' is no folder"
    ):
        opened(tmp_path / "scenes" / "a_B02.tif", "B02,B03")
    with pytest.raises(UserError, match="There is no folder"):
        list(opened(tmp_path / "none", "B02").entries())
    for bands in ("B02,3", "B02,,B03", "B 2"):
        with pytest.raises(
            UserError, match="must be numbers from 1 on with commas, such as 4,3,2, or the names"
        ):
            RasterOptions(bands=bands)
    with pytest.raises(UserError, match="a name can stand in it once only"):
        RasterOptions(bands="B02,b02")


def test_the_command_and_the_same_bytes_from_any_number_of_workers(tmp_path: Path):
    for i in range(6):
        scene(tmp_path / "scenes" / f"s{i}", f"x{i}_", i)
    for out, workers in (("one", "0"), ("two", "2")):
        words = ["--bands", "B03,B02", "--workers", workers, "--samples-per-shard", "2"]
        assert main(["shard", str(tmp_path / "scenes"), str(tmp_path / out), *words]) == 0
    assert fingerprints(tmp_path / "one") == fingerprints(tmp_path / "two")
    assert len(made(tmp_path / "one")) == 6
    assert main(["verify", str(tmp_path / "one"), "--decode", "--workers", "0"]) == 0
    damaged = tmp_path / "two" / "shard-000001.tar"
    damaged.write_bytes(damaged.read_bytes()[:-2000])
    words = ["--repair", "--source", str(tmp_path / "scenes"), "--bands", "B03,B02", "--workers", "0"]
    assert main(["verify", str(tmp_path / "two"), *words]) == 0
    assert fingerprints(tmp_path / "one") == fingerprints(tmp_path / "two")
