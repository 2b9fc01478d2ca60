"""Rasters: every tile where it belongs, with its pixels, place on Earth, mask and share of data."""

import io
import json
import tarfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from shards.conversion.convert import convert
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError
from shards.format import layout
from shards.images.mask_images import MaskFolder
from shards.images.pixels import BadImage, read_npy
from shards.sources.raster_reader import NO_INDEX
from shards.sources.raster_tiles import RasterSource, starts
from shards.sources.source_kinds import check_apart, open_source
from shards.sources.source_options import ListOptions, RasterOptions, SourceOptions
from shards.storage.opening import open_place
from tests import needs
from tests.pictures import fingerprints

rasterio = needs.module("rasterio")
TRANSFORM = (10.0, 0.0, 500_000.0, 0.0, -10.0, 5_200_000.0)


def write(
    path: Path, pixels: np.ndarray, *, transform: tuple | None = TRANSFORM, crs: Any = "EPSG:32632", **options
) -> Path:
    """Pixels (C, H, W) as a GeoTIFF."""
    path.parent.mkdir(parents=True, exist_ok=True)
    bands, height, width = pixels.shape
    if transform:
        options |= {"transform": rasterio.Affine(*transform), "crs": crs}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with rasterio.open(
            path, "w", driver="GTiff", height=height, width=width, count=bands, dtype=pixels.dtype, **options
        ) as file:
            file.write(pixels)
    return path


def noise(seed: int, bands: int, height: int, width: int, dtype: str = "uint16") -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 200, (bands, height, width)).astype(dtype)


def listed(source: RasterSource) -> dict[str, dict]:
    return {row["source"]: row for batch in source.entries() for row in batch.to_pylist()}


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 25), st.sampled_from(["drop", "pad", "shift"]))
def test_where_tiles_begin(size: int, tile: int, stride: int, edge: str):
    found = starts(size, tile, stride, edge).tolist()
    assert found == sorted(set(found))
    regular = [start for start in range(0, size, stride) if start + tile <= size]
    if edge == "drop":
        assert found == regular
        return
    if edge == "shift" and size < tile:
        assert found == []
        return
    assert found[: len(regular)] == regular
    assert all(0 <= start < size for start in found)
    covered = {pixel for start in found for pixel in range(start, start + tile)}
    if stride <= tile:
        assert covered >= set(range(size))
    if edge == "shift":
        assert all(start + tile <= size for start in found)
        assert len(found) == len(starts(size, tile, stride, "pad")) or stride > tile
    else:
        assert all(start % stride == 0 for start in found)
        # none lies wholly in the one before it and past the edge
        assert all(start == 0 or start - stride + tile < size for start in found)


def test_tiles_hold_their_pixels_and_their_place(tmp_path: Path):
    pixels = noise(0, 4, 50, 70)
    write(tmp_path / "scenes" / "deep" / "a.tif", pixels)
    write(
        tmp_path / "scenes" / "b.tif",
        noise(1, 4, 32, 32),
        transform=(0.5, 0.25, 7.0, 0.125, -1.0, 9.0),
        crs="EPSG:4326",
    )
    source = RasterSource(
        str(tmp_path / "scenes"), RasterOptions(tile=32, stride=24, edge="shift", bands="4,3,2")
    )
    manifest = convert(source, tmp_path / "out")
    assert manifest is not None
    assert (manifest.kind, manifest.num_samples, manifest.channels, manifest.dtypes) == (
        "rasters",
        7,
        [3],
        ["uint16"],
    )
    rows = {row["source"]: row for row in pq.read_table(tmp_path / "out" / layout.TABLE).to_pylist()}
    grid = [(x, y) for x in (0, 24, 38) for y in (0, 18)]
    assert set(rows) == {f"deep/a.tif@{x},{y}" for x, y in grid} | {"b.tif@0,0"}
    opened = ShardSet.open(tmp_path / "out")
    for x, y in grid:
        row = rows[f"deep/a.tif@{x},{y}"]
        assert row["group"] == "deep/a.tif"
        assert row["crs"] == "EPSG:32632"
        left, top = 500_000 + 10 * x, 5_200_000 - 10 * y
        assert row["transform"] == [10, 0, left, 0, -10, top]
        assert row["bounds"] == [left, top - 320, left + 320, top]
        assert np.array_equal(
            read_npy(bytes(opened.read(row["sample_id"]))),
            np.moveaxis(pixels[[3, 2, 1], y : y + 32, x : x + 32], 0, 2),
        )
    turned = rows["b.tif@0,0"]
    assert turned["crs"] == "EPSG:4326"
    assert turned["transform"] == [0.5, 0.25, 7, 0.125, -1, 9]
    assert turned["bounds"] == [7, 9 - 32, 7 + 16 + 8, 9 + 4]
    with tarfile.open(tmp_path / "out" / layout.shard_name(0)) as tar:
        about = json.load(tar.extractfile(f"{turned['key']}.json"))
    assert about["transform"] == turned["transform"]
    assert (about["crs"], about["nodata_share"]) == ("EPSG:4326", 0)


@pytest.mark.parametrize(
    ("pixels", "ext"),
    [
        (noise(0, 1, 8, 8, "uint8"), "png"),
        (noise(0, 3, 8, 8, "uint8"), "png"),
        (noise(0, 2, 8, 8, "uint8"), "npy"),
        (noise(0, 3, 8, 8, "uint16"), "npy"),
        (noise(0, 5, 8, 8, "float32") / 7, "npy"),
        (noise(0, 1, 8, 8, "int16") - 100, "npy"),
    ],
)
def test_every_type_is_stored_without_loss(tmp_path: Path, pixels: np.ndarray, ext: str):
    path = write(tmp_path / "a.tif", pixels, transform=None)
    convert(RasterSource(str(path), RasterOptions(tile=8)), tmp_path / "out")
    [row] = pq.read_table(tmp_path / "out" / layout.TABLE).to_pylist()
    assert (row["ext"], row["crs"], row["transform"], row["bounds"]) == (ext, None, None, None)
    data = bytes(ShardSet.open(tmp_path / "out").read(0))
    found = read_npy(data) if ext == "npy" else np.asarray(Image.open(io.BytesIO(data))).reshape(8, 8, -1)
    assert np.array_equal(found, np.moveaxis(pixels, 0, 2))


def test_padding_and_tiles_without_data(tmp_path: Path):
    pixels = noise(0, 2, 12, 20, "int16")
    pixels[:, :8, :4] = -9  # half of the first tile
    pixels[1, :8, 8:12] = -9  # of one band only: there is data
    path = write(tmp_path / "a.tif", pixels, nodata=-9)
    options = RasterOptions(tile=8, edge="pad", nodata_max=0.5)
    source = RasterSource(str(path), options)
    rows = listed(source)
    assert set(rows) == {f"a.tif@{x},{y}" for x in (0, 8, 16) for y in (0, 8)}
    shares = {}
    for name, row in rows.items():
        try:
            picture = source.read(row)
        except BadImage as fault:
            shares[name] = fault.reason
        else:
            shares[name] = picture.facts["nodata_share"]
            assert isinstance(picture.data, np.ndarray)
            assert picture.data.shape == (8, 8, 2)
    assert shares == {
        "a.tif@0,0": 0.5,
        "a.tif@8,0": 0.0,
        "a.tif@16,0": 0.5,
        "a.tif@0,8": 0.5,
        "a.tif@8,8": 0.5,
        "a.tif@16,8": "more than 50% of the tile is without data (75.0%)",
    }
    edge = source.read(rows["a.tif@16,0"]).data
    assert isinstance(edge, np.ndarray)
    assert np.array_equal(edge[:, :4], np.moveaxis(pixels[:, :8, 16:], 0, 2))
    assert (edge[:, 4:] == -9).all()


def test_nan_and_alpha_are_no_data(tmp_path: Path):
    pixels = noise(0, 1, 8, 8, "float32")
    pixels[0, :4] = np.nan
    source = RasterSource(str(write(tmp_path / "nan.tif", pixels)), RasterOptions(tile=8))
    assert source.read(listed(source)["nan.tif@0,0"]).facts == {"nodata_share": 0.5}
    pixels = noise(0, 4, 8, 8, "uint8")
    pixels[3, :, :2] = 0
    path = write(tmp_path / "alpha.tif", pixels, photometric="rgb", alpha="yes")
    source = RasterSource(str(path), RasterOptions(tile=8, bands="1,2,3"))
    assert source.read(listed(source)["alpha.tif@0,0"]).facts == {"nodata_share": 0.25}


def test_masks_are_cut_with_the_same_windows(tmp_path: Path):
    for name, seed in (("a.tif", 0), ("other.tif", 1), ("small.tif", 2), ("colour.tif", 3)):
        write(tmp_path / "scenes" / name, noise(seed, 3, 20, 20, "uint8"))
    classes = noise(9, 1, 20, 20, "uint16") * 5
    write(tmp_path / "masks" / "a.tif", classes)
    write(tmp_path / "masks" / "other.tif", classes, transform=(*TRANSFORM[:5], TRANSFORM[5] - 5))
    write(tmp_path / "masks" / "small.tif", classes[:, :19])
    write(tmp_path / "masks" / "colour.tif", noise(9, 3, 20, 20))
    masks = MaskFolder(open_place(tmp_path / "masks"))
    source = RasterSource(str(tmp_path / "scenes"), RasterOptions(tile=16, stride=4, edge="pad"), masks)
    manifest = convert(source, tmp_path / "out")
    assert manifest is not None
    assert (manifest.num_samples, manifest.num_masks, manifest.num_quarantined) == (4, 4, 3)
    bad = map(json.loads, (tmp_path / "out" / layout.QUARANTINE).read_text().splitlines())
    assert {row["source"]: row["reason"] for row in bad} == {
        "other.tif": "its mask 'other.tif' lies elsewhere: the transforms differ",
        "small.tif": "its mask 'small.tif' has 20 x 19 pixels, the raster 20 x 20",
        "colour.tif": "its mask 'colour.tif' has 3 bands; one of class indices is wanted",
    }
    assert any("3 rasters cannot be used" in text for text in source.warnings())
    opened = ShardSet.open(tmp_path / "out")
    for i in range(4):
        x, y = map(int, opened.name(i).partition("@")[2].split(","))
        mask = opened.read_mask(i)
        assert mask is not None
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(mask))), classes[0, y : y + 16, x : x + 16])


def test_the_padding_of_a_mask_is_no_class(tmp_path: Path):
    write(tmp_path / "scenes" / "a.tif", noise(0, 3, 6, 6, "uint8"))
    write(tmp_path / "masks" / "a.tif", np.full((1, 6, 6), 3, np.uint8))
    masks = MaskFolder(open_place(tmp_path / "masks"))
    source = RasterSource(str(tmp_path / "scenes"), RasterOptions(tile=8, edge="pad"), masks)
    mask = source.read(listed(source)["a.tif@0,0"]).mask
    assert isinstance(mask, np.ndarray)
    assert (mask[:6, :6] == 3).all()
    assert (mask[6:] == NO_INDEX).all()


def test_scenes_that_cannot_be_used_are_quarantined(tmp_path: Path):
    scenes = tmp_path / "scenes"
    write(scenes / "good.tif", noise(0, 4, 16, 16))
    write(scenes / "three.tif", noise(1, 3, 16, 16))
    write(scenes / "tiny.tif", noise(2, 4, 7, 16))
    (scenes / "text.tif").write_text("text")
    cut = write(scenes / "cut.tif", noise(3, 4, 16, 16))
    cut.write_bytes(cut.read_bytes()[:1000])
    source = RasterSource(str(scenes), RasterOptions(tile=8, bands="4"))
    manifest = convert(source, tmp_path / "out")
    assert manifest is not None
    assert manifest.num_samples == 4
    quarantine = (tmp_path / "out" / layout.QUARANTINE).read_text()
    assert str(tmp_path) not in quarantine
    bad = [row["source"].partition("@")[0] for row in map(json.loads, quarantine.splitlines())]
    assert sorted(set(bad)) == ["cut.tif", "text.tif", "three.tif"]
    assert "has no band 4, only 3" in quarantine
    assert any("smaller than a tile and left out: 'tiny.tif' (16 x 7)" in text for text in source.warnings())
    source = RasterSource(str(scenes), RasterOptions(tile=8))
    listed(source)
    assert any("differ in their number of bands" in text for text in source.warnings())
    assert source.describe()[0].startswith("Rasters: 1 of 3 x uint16, 2 of 4 x uint16. 12 tiles of 8 x 8")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tile": -1}, "--tile is -1, but it must be between 1 and"),
        ({"tile": 8, "stride": -1}, "--stride is -1"),
        ({"tile": 8, "edge": "cut"}, "no --edge 'cut'. Known: drop, pad, shift"),
        ({"tile": 8, "nodata_max": 1.5}, "--nodata-max is 1.5, but it must be between 0 and 1"),
        ({"tile": 8, "bands": "1;2"}, "--bands is '1;2'"),
        ({"tile": 8, "bands": "0"}, "--bands is '0'"),
        ({"tile": 99}, r"smaller than a tile of 99 x 99, such as 'a\.tif' \(8 x 8\)"),
        ({"tile": 8, "bands": "3"}, r"No raster .* can be used, such as 'a\.tif' \(has no band 3, only 2\)"),
    ],
)
def test_mistakes(tmp_path: Path, options: dict, words: str):
    write(tmp_path / "scenes" / "a.tif", noise(0, 2, 8, 8))
    with pytest.raises(UserError, match=words):
        listed(RasterSource(str(tmp_path / "scenes"), RasterOptions(**options)))


def test_a_source_that_is_none_or_went_away(tmp_path: Path):
    options = RasterOptions(tile=8)
    with pytest.raises(UserError, match="There is no folder"):
        listed(RasterSource(str(tmp_path / "none"), options))
    with pytest.raises(UserError, match="There is no file"):
        listed(RasterSource(str(tmp_path / "none.tif"), options))
    (tmp_path / "scenes").mkdir()
    (tmp_path / "scenes" / "a.txt").write_text("x")
    with pytest.raises(
        UserError, match=r"holds no rasters, only 1 other file \(1 \.txt\); rasters are files named \.tif"
    ):
        listed(RasterSource(str(tmp_path / "scenes"), options))
    write(tmp_path / "scenes" / "b.tif", noise(0, 1, 8, 8))
    source = RasterSource(str(tmp_path / "scenes"), options)
    row = listed(source)["b.tif@0,0"]
    (tmp_path / "scenes").rename(tmp_path / "away")
    with pytest.raises(UserError, match="is no longer there"):
        source.read(row)


def test_options_that_do_not_go_together(tmp_path: Path):
    write(tmp_path / "scenes" / "a.tif", noise(0, 2, 8, 8))
    scenes = str(tmp_path / "scenes")
    with pytest.raises(UserError, match="--stride 4 goes with --tile N"):
        open_source(scenes, SourceOptions(raster=RasterOptions(stride=4)))
    (tmp_path / "list.csv").write_text("path\n")
    with pytest.raises(UserError, match=r"--tile 4 goes with rasters, and '.*list\.csv' is none"):
        open_source(str(tmp_path / "list.csv"), SourceOptions(raster=RasterOptions(tile=4)))
    with pytest.raises(UserError, match="--label-column x goes with a list"):
        open_source(scenes, SourceOptions(raster=RasterOptions(tile=4), list=ListOptions(label_column="x")))
    with pytest.raises(UserError, match="lies inside SOURCE"):
        check_apart(
            open_source(scenes, SourceOptions(raster=RasterOptions(tile=4))),
            open_place(tmp_path / "scenes" / "out"),
        )


def test_moves_and_interruptions_do_not_change_a_byte(tmp_path: Path):
    for i in range(3):
        write(
            tmp_path / "scenes" / f"{i}.tif",
            noise(i, 3, 24, 24, "uint8"),
            tiled=True,
            blockxsize=16,
            blockysize=16,
        )
    (tmp_path / "scenes" / "bad.tif").write_text("text")
    options = RasterOptions(tile=8, stride=6)

    def shard(folder: Path, out: str) -> dict[str, str]:
        convert(RasterSource(str(folder), options), tmp_path / out, samples_per_shard=7, workers=0)
        return fingerprints(tmp_path / out)

    first = shard(tmp_path / "scenes", "out")
    (tmp_path / "moved").mkdir()
    moved = (tmp_path / "scenes").rename(tmp_path / "moved" / "scenes")
    assert shard(moved, "again") == first
    (tmp_path / "out" / layout.shard_name(2)).unlink()
    assert shard(moved, "out") == first


def test_rasters_in_a_remote_store(tmp_path: Path):
    needs.module("fsspec")
    pixels = noise(0, 3, 40, 40, "uint8")
    place = open_place("memory://rasters/scenes")
    place.write("deep/a.tif", write(tmp_path / "a.tif", pixels).read_bytes())
    source = RasterSource("memory://rasters/scenes", RasterOptions(tile=16, stride=24))
    rows = listed(source)
    assert len(rows) == 4
    assert np.array_equal(source.read(rows["deep/a.tif@24,0"]).data, np.moveaxis(pixels[:, :16, 24:40], 0, 2))
