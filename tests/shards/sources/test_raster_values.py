"""What stands in rasters without being a value: nodata in statistics and masks, alpha, values turned over."""

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fastssl.cli import main
from shards.dataset.shard_set import ShardSet
from shards.format import layout
from shards.images.channel_statistics import PERCENTILES
from shards.images.decoding import decode
from shards.images.pixels import Pixels, resized, resized_known
from tests import needs

rasterio = needs.module("rasterio")
CRS = needs.module("rasterio.crs").CRS


def write(path: Path, pixels: np.ndarray, **options: Any) -> Path:
    """A GeoTIFF of (C, H, W), or (H, W), pixels with a place on Earth."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = pixels if pixels.ndim == 3 else pixels[None]
    count, height, width = pixels.shape
    options = {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 5e5, 0, -10, 5e6)} | options
    with rasterio.open(
        path, "w", driver="GTiff", width=width, height=height, count=count, dtype=pixels.dtype, **options
    ) as raster:
        raster.write(pixels)
    return path


def run(*words: str | Path) -> None:
    assert main(["shard", *map(str, words), "--workers", "0"]) == 0


def stored(folder: Path) -> dict[str, np.ndarray]:
    opened = ShardSet.open(folder)
    return {opened.name(i): decode(bytes(opened.read(i))) for i in range(opened.num_samples)}


def masks(folder: Path) -> dict[str, np.ndarray]:
    opened = ShardSet.open(folder)
    found = {opened.name(i): opened.read_mask(i) for i in range(opened.num_samples)}
    return {
        name: np.asarray(Image.open(io.BytesIO(mask))) for name, mask in found.items() if mask is not None
    }


def statistics(folder: Path) -> dict[str, Any]:
    [facts] = json.loads((folder / layout.MANIFEST).read_text())["statistics"].values()
    return facts


@pytest.mark.parametrize("tile", [True, False])
@pytest.mark.parametrize("nodata", [-9999, float("nan"), -3.4028234663852886e38])
def test_statistics_are_those_of_known_pixels(tmp_path: Path, tile: bool, nodata: float):
    rng = np.random.default_rng(1)
    pixels = (0.4 * rng.random((2, 64, 64))).astype(np.float32)
    known = rng.random((2, 64, 64)) > 0.03
    pixels[~known] = nodata
    write(tmp_path / "in" / "a.tif", pixels, nodata=nodata)
    run(tmp_path / "in", tmp_path / "out", *(["--tile", "32"] if tile else []))
    facts = statistics(tmp_path / "out")
    for channel in range(2):
        values = pixels[channel][known[channel]]
        if not tile:  # of 64 x 64 pixels every second row and column is counted
            values = pixels[channel, 1::2, 1::2][known[channel, 1::2, 1::2]]
        assert facts["mean"][channel] == pytest.approx(values.mean(), rel=0.005)
        assert facts["std"][channel] == pytest.approx(values.std(), rel=0.01)
        assert facts["p1"][channel] == pytest.approx(np.percentile(values, 1), abs=0.002)
        assert all(0 <= facts[f"p{p}"][channel] <= 0.402 for p in PERCENTILES)


@pytest.mark.parametrize(("dtype", "largest"), [("uint8", 255), ("uint16", 65535)])
@pytest.mark.parametrize("tile", [True, False])
def test_statistics_of_integers_leave_nodata_out(tmp_path: Path, dtype: str, largest: int, tile: bool):
    pixels = np.full((32, 32), largest // 5, dtype)
    pixels[:8] = 0
    write(tmp_path / "in" / "a.tif", pixels, nodata=0)
    run(tmp_path / "in", tmp_path / "out", *(["--tile", "32"] if tile else []))
    facts = statistics(tmp_path / "out")
    assert facts["mean"] == [pytest.approx(0.2, abs=1e-6)]
    assert (facts["std"], facts["pixels"]) == ([0.0], 24 * 32)
    [values] = stored(tmp_path / "out").values()
    assert np.array_equal(values[:, :, 0], pixels)


def test_scaling_leaves_nodata_out_of_its_neighbours(tmp_path: Path):
    pixels = np.full((64, 64), 0.25, np.float32)
    pixels[:, :20] = -9999
    write(tmp_path / "in" / "a.tif", pixels, nodata=-9999)
    for number, more in enumerate((["--tile", "64"], [])):
        run(tmp_path / "in", tmp_path / str(number), "--short-side", "24", *more)
        [values] = stored(tmp_path / str(number)).values()
        assert values.shape == (24, 24, 1)
        assert set(np.unique(values.round(6))) == {-9999.0, 0.25}
        assert 0.25 < (values == -9999).mean() < 0.38
        assert statistics(tmp_path / str(number))["mean"] == [pytest.approx(0.25, rel=0.004)]


def test_scaling_what_is_all_known_is_plain_scaling():
    values = np.random.default_rng(0).random((20, 30, 2)).astype(np.float32)
    known = np.ones(values.shape, np.bool_)
    scaled = resized_known(Pixels(values, known, (-1.0, -1.0)), 13, 9)
    assert np.allclose(scaled.values, resized(values, 13, 9), atol=1e-6)
    assert scaled.known is not None
    assert scaled.known.all()


RGBA = np.random.default_rng(3).integers(1, 255, (4, 32, 32)).astype(np.uint8)


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        ("white", np.moveaxis(RGBA, 0, 2)),
        ("keep", np.moveaxis(RGBA, 0, 2)),
        ("drop", np.moveaxis(RGBA[:3], 0, 2)),
        (
            "black",
            np.asarray(
                Image.alpha_composite(
                    Image.new("RGBA", (32, 32), "black"),
                    Image.fromarray(np.ascontiguousarray(np.moveaxis(RGBA, 0, 2))),
                ).convert("RGB")
            ),
        ),
    ],
)
def test_the_policy_of_alpha_is_applied_to_tiles(tmp_path: Path, alpha: str, expected: np.ndarray):
    write(tmp_path / "in" / "a.tif", RGBA, photometric="rgb", alpha="yes")
    run(tmp_path / "in", tmp_path / "out", "--tile", "32", "--alpha", alpha)
    [values] = stored(tmp_path / "out").values()
    assert np.array_equal(values, expected)
    table = pq.ParquetFile(tmp_path / "out" / layout.TABLE).read(use_threads=False)
    assert ("alpha" in table["stored"][0].as_py()) == (alpha in ("drop", "black"))


def test_tiles_with_alpha_are_refused_where_the_policy_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    write(tmp_path / "in" / "a.tif", RGBA, photometric="rgb", alpha="yes")
    write(tmp_path / "in" / "b.tif", RGBA[:3], photometric="rgb")
    flags = ["--tile", "32", "--alpha", "refuse"]
    run(tmp_path / "in", tmp_path / "out", *flags)
    assert list(stored(tmp_path / "out")) == ["b.tif@0,0"]
    assert "has an alpha channel" in capsys.readouterr().out
    # Bands that were chosen are bands, whatever is declared.
    run(tmp_path / "in", tmp_path / "chosen", *flags, "--bands", "1,2,3")
    assert len(stored(tmp_path / "chosen")) == 2


def test_deep_tiles_lose_an_alpha_that_is_dropped(tmp_path: Path):
    write(tmp_path / "in" / "a.tif", RGBA.astype(np.uint16) * 200, photometric="rgb", alpha="yes")
    for alpha, channels in (("drop", 3), ("black", 4)):
        run(tmp_path / "in", tmp_path / alpha, "--tile", "32", "--alpha", alpha)
        [values] = stored(tmp_path / alpha).values()
        assert np.array_equal(values, np.moveaxis(RGBA[:channels].astype(np.uint16) * 200, 0, 2))


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_masks_hold_the_samples_of_the_file_and_images_what_is_shown(tmp_path: Path, dtype: str):
    """Of a TIFF in which larger values are darker, from a folder and from tiles alike."""
    indices = np.arange(64, dtype=dtype).reshape(8, 8) % 3
    write(tmp_path / "in" / "a.tif", indices, photometric="MINISWHITE")
    write(tmp_path / "m" / "a.tif", indices, photometric="MINISWHITE")
    for number, flags in enumerate(([], ["--tile", "8"])):
        out = tmp_path / str(number)
        run(tmp_path / "in", out, "--masks", tmp_path / "m", *flags)
        [mask], [image] = masks(out).values(), stored(out).values()
        assert np.array_equal(mask, indices)
        assert np.array_equal(image[:, :, 0], np.iinfo(dtype).max - indices)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_masks_of_few_bits_hold_the_samples_of_the_file(tmp_path: Path, bits: int):
    indices = (np.arange(64, dtype=np.uint8).reshape(8, 8) * 5) % (1 << bits)
    write(tmp_path / "in" / "a.tif", np.zeros((8, 8), np.uint8))
    write(tmp_path / "m" / "a.tif", indices, photometric="MINISWHITE", nbits=bits)
    for number, flags in enumerate(([], ["--tile", "8"])):
        run(tmp_path / "in", tmp_path / str(number), "--masks", tmp_path / "m", *flags)
        [mask] = masks(tmp_path / str(number)).values()
        assert np.array_equal(mask, indices)


@pytest.mark.parametrize(
    ("dtype", "nodata"),
    [("int16", -9999), ("int16", -1), ("float32", float("nan")), ("float32", -9999), ("int32", 99999)],
)
def test_nodata_of_a_mask_is_the_index_that_is_ignored(tmp_path: Path, dtype: str, nodata: float):
    indices = (np.arange(144).reshape(12, 12) % 4).astype(dtype)
    indices[:2] = nodata
    write(tmp_path / "in" / "a.tif", np.zeros((12, 12), np.uint8))
    write(tmp_path / "m" / "a.tif", indices, nodata=nodata)
    wanted = np.where(np.arange(12)[:, None] < 2, 255, np.nan_to_num(indices)).astype(np.uint8)
    for number, flags in enumerate(([], ["--tile", "12"], ["--tile", "16", "--edge", "pad"])):
        run(tmp_path / "in", tmp_path / str(number), "--masks", tmp_path / "m", *flags)
        [mask] = masks(tmp_path / str(number)).values()
        assert np.array_equal(mask[:12, :12], wanted)
        assert (mask[12:] == 255).all()


def test_nodata_that_is_a_class_stays_one(tmp_path: Path):
    write(tmp_path / "in" / "a.tif", np.zeros((8, 8), np.uint8))
    write(tmp_path / "m" / "a.tif", np.eye(8, dtype=np.uint8), nodata=0)
    run(tmp_path / "in", tmp_path / "out", "--masks", tmp_path / "m", "--tile", "8")
    [mask] = masks(tmp_path / "out").values()
    assert np.array_equal(mask, np.eye(8))


def test_a_negative_class_is_refused_as_before(tmp_path: Path):
    write(tmp_path / "in" / "a.tif", np.zeros((8, 8), np.uint8))
    write(tmp_path / "in" / "b.tif", np.zeros((8, 8), np.uint8))
    write(tmp_path / "m" / "a.tif", np.full((8, 8), -1, np.int16))
    write(tmp_path / "m" / "b.tif", np.ones((8, 8), np.int16))
    manifest = convert_tiles(tmp_path)
    assert (manifest.num_samples, manifest.num_quarantined) == (1, 1)


def convert_tiles(folder: Path) -> layout.Manifest:
    run(folder / "in", folder / "out", "--masks", folder / "m", "--tile", "8")
    return layout.Manifest.load(folder / "out")


@pytest.mark.parametrize("written", ["unnamed", "proj4"])
def test_a_reference_of_coordinates_is_more_than_its_text(tmp_path: Path, written: str):
    wkt = re.sub(r',?AUTHORITY\["[^]]*\]', "", CRS.from_epsg(32633).to_wkt())
    other = {
        "unnamed": wkt.replace("WGS 84 / UTM zone 33N", "mine"),
        "proj4": "+proj=utm +zone=33 +datum=WGS84 +units=m",
    }[written]
    for name in "ab":
        write(tmp_path / "in" / f"{name}.tif", np.zeros((8, 8), np.uint8))
    write(tmp_path / "m" / "a.tif", np.ones((8, 8), np.uint8), crs=other)
    write(tmp_path / "m" / "b.tif", np.ones((8, 8), np.uint8), crs="EPSG:32634")
    manifest = convert_tiles(tmp_path)
    assert (manifest.num_samples, manifest.num_quarantined, manifest.num_masks) == (1, 1, 1)
    assert "is in another reference system" in (tmp_path / "out" / layout.QUARANTINE).read_text()


def test_pages_and_cmyk_are_what_the_policy_makes_of_them_in_tiles_too(tmp_path: Path):
    (tmp_path / "in").mkdir()
    pages = [Image.fromarray(np.full((16, 16, 3), value, np.uint8)) for value in (10, 20)]
    pages[0].save(tmp_path / "in" / "pages.tif", save_all=True, append_images=pages[1:])
    pages[0].save(tmp_path / "in" / "one.tif")
    Image.new("CMYK", (16, 16), (10, 60, 110, 0)).save(tmp_path / "in" / "ink.tif")
    run(tmp_path / "in", tmp_path / "a", "--tile", "16")
    found = stored(tmp_path / "a")
    assert set(found) == {"one.tif@0,0", "ink.tif@0,0"}
    assert "several pages (2 frames)" in (tmp_path / "a" / layout.QUARANTINE).read_text()
    assert found["ink.tif@0,0"].shape == (16, 16, 3)
    assert np.abs(found["ink.tif@0,0"].astype(int) - (245, 195, 145)).max() <= 1
    run(tmp_path / "in", tmp_path / "b", "--tile", "16", "--animated", "first", "--cmyk", "refuse")
    found = stored(tmp_path / "b")
    assert set(found) == {"one.tif@0,0", "pages.tif@0,0"}
    assert (found["pages.tif@0,0"] == 10).all()
    assert "CMYK, which the policy refuses" in (tmp_path / "b" / layout.QUARANTINE).read_text()
