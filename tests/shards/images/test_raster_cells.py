"""Compressed rasters: decoded once for all tiles of a scene, within a limit of memory, with the bytes of one read for each tile."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards.conversion import shard_maker
from shards.conversion.convert import convert
from shards.format import layout
from shards.images import raster_cells
from shards.images.raster_cells import CellCache, decode_unit
from shards.sources import raster_reader, raster_tiles
from shards.sources.raster_tiles import RasterSource
from shards.sources.source import Source
from shards.sources.source_options import RasterOptions
from tests import needs
from tests.pictures import fingerprints

TRANSFORM = (10.0, 0.0, 500_000.0, 0.0, -10.0, 5_200_000.0)
rasterio = needs.module("rasterio")
# Small, and with the layout of its name: one strip (GDAL shows blocks of one row above 2,000 rows, else one block), or one codestream.
ONE_STRIP = {"driver": "GTiff", "compress": "deflate"}
PER_SHARD = 4
KINDS = {
    "long strip.tif": (2010, 96, ONE_STRIP | {"blockysize": 2010}),
    "long strip, by band.tif": (2010, 96, ONE_STRIP | {"blockysize": 2010, "interleave": "band"}),
    "short strip.tif": (420, 130, ONE_STRIP | {"blockysize": 420}),
    "one tile.jp2": (420, 130, {"driver": "JP2OpenJPEG", "QUALITY": "100", "REVERSIBLE": "YES"}),
    "lossy.jp2": (420, 130, {"driver": "JP2OpenJPEG", "QUALITY": "20"}),
}


def write(path: Path, height: int, width: int, options: dict[str, Any], seed: int = 0) -> Path:
    """Write three bands, smooth with noise, 1 to 255."""
    path.parent.mkdir(parents=True, exist_ok=True)
    wave = 90 * np.sin(np.add.outer(np.arange(height) / 17, np.arange(width) / 11)) + 128
    noise = np.random.default_rng(seed).integers(-9, 10, (3, height, width))
    pixels = (wave + noise).clip(1, 255).astype("uint8")
    shape = {"height": height, "width": width, "count": 3, "dtype": "uint8"}
    where = {"crs": "EPSG:32632", "transform": rasterio.Affine(*TRANSFORM)}
    with rasterio.open(path, "w", **shape, **where, **options) as file:
        file.write(pixels)
    return path


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int]]]:
    """What the driver is asked for from now on: (file, pixels of the window) for each read."""
    asked: list[tuple[str, int]] = []
    opened = raster_reader._open

    class Counted:
        def __init__(self, raster: Any):
            self._raster = raster

        def __getattr__(self, name: str) -> Any:
            return getattr(self._raster, name)

        def read(self, bands: list[int], window: Any, **options: Any) -> np.ndarray:
            asked.append((Path(self._raster.name).name, window.width * window.height))
            return self._raster.read(bands, window=window, **options)

    monkeypatch.setattr(raster_reader, "_open", lambda path, **options: Counted(opened(path, **options)))
    raster_reader.close_rasters()
    yield asked
    raster_reader.close_rasters()


def as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read each tile by itself, in the plan's order, and keep nothing."""
    monkeypatch.setattr(raster_cells, "decode_unit", lambda raster: None)
    monkeypatch.setattr(RasterSource, "read_all", Source.read_all)
    raster_reader.close_rasters()


def source(folder: Path, **options: Any) -> RasterSource:
    return RasterSource(str(folder), RasterOptions(**{"tile": 64, "stride": 96, "edge": "pad"} | options))


@pytest.mark.parametrize("kind", KINDS)
def test_a_scene_is_decoded_once_and_its_shards_have_the_same_bytes(
    tmp_path: Path, kind: str, decoded: list, monkeypatch: pytest.MonkeyPatch
):
    height, width, options = KINDS[kind]
    write(tmp_path / "scenes" / kind, height, width, options)
    manifest = convert(source(tmp_path / "scenes"), tmp_path / "out", workers=0, samples_per_shard=PER_SHARD)
    assert manifest is not None
    assert manifest.num_samples > 2 * PER_SHARD
    # Three shards or more, and the estimate of their size: the whole scene once for all of them.
    assert decoded == [(kind, height * width)]
    as_before(monkeypatch)
    convert(source(tmp_path / "scenes"), tmp_path / "before", workers=0, samples_per_shard=PER_SHARD)
    assert len(decoded) > manifest.num_samples
    assert fingerprints(tmp_path / "out") == fingerprints(tmp_path / "before")


def test_tiles_of_jpeg_2000_are_decoded_once_each(tmp_path: Path, decoded: list):
    options = {"driver": "JP2OpenJPEG", "tiled": True, "blockxsize": 128, "blockysize": 256}
    write(tmp_path / "scenes" / "a.jp2", 400, 300, options)
    convert(source(tmp_path / "scenes"), tmp_path / "out", workers=0)
    sizes = [w * h for w in (128, 128, 300 - 256) for h in (256, 400 - 256)]
    assert sorted(size for _, size in decoded) == sorted(sizes)


def test_what_gdal_keeps_is_left_to_it(tmp_path: Path):
    """Tiled GeoTIFFs, strips of some rows, and rasters that are not compressed: only the tile's own pixels are read."""
    for options in (
        {"driver": "GTiff", "compress": "deflate", "tiled": True, "blockxsize": 64, "blockysize": 64},
        {"driver": "GTiff", "compress": "deflate", "blockysize": 16},
        {"driver": "GTiff", "compress": "deflate", "blockysize": 1},
        {"driver": "GTiff", "blockysize": 2010},
        {"driver": "PNG"},
    ):
        with rasterio.open(write(tmp_path / "a", 2010, 96, options)) as raster:
            assert decode_unit(raster) is None, options


def test_shuffled_scenes_are_decoded_once_for_the_tiles_read_ahead(
    tmp_path: Path, decoded: list, monkeypatch: pytest.MonkeyPatch
):
    """Of five scenes the cache holds one: read in the plan's order, nearly each tile would decode its scene anew."""
    options = ONE_STRIP | {"blockysize": 420}
    for i in range(5):
        write(tmp_path / "scenes" / f"{i}.tif", 420, 130, options, seed=i)
    cell = 420 * 130 * 4
    monkeypatch.setattr(raster_reader, "CELLS", CellCache(2 * cell + 1))
    convert(source(tmp_path / "scenes"), tmp_path / "out", workers=0)
    # Once for the estimate's 16 tiles, once for those of the shard.
    assert len(decoded) <= 10
    decoded.clear()
    # Memory for eight tiles ahead of their turn.
    monkeypatch.setattr(raster_tiles, "AHEAD_BYTES", 8 * 64 * 64 * 3)
    manifest = convert(source(tmp_path / "scenes"), tmp_path / "few", workers=0)
    assert manifest is not None
    num_tiles = 16 + manifest.num_samples + manifest.num_quarantined
    assert len(decoded) <= num_tiles / 2
    as_before(monkeypatch)
    convert(source(tmp_path / "scenes"), tmp_path / "before", workers=0)
    assert (
        fingerprints(tmp_path / "out") == fingerprints(tmp_path / "few") == fingerprints(tmp_path / "before")
    )


def test_a_scene_larger_than_the_limit_is_decoded_in_strips_within_it(tmp_path: Path):
    path = write(tmp_path / "a.tif", 2010, 96, ONE_STRIP | {"blockysize": 2010})
    limit = 96 * 4 * 200
    cells, held = CellCache(limit), []
    with rasterio.open(path) as raster:
        whole = np.moveaxis(raster.read(), 0, 2)
        for top in (0, 90, 1990, 40, 700):
            window = [10, top, 60, min(64, 2010 - top)]
            pixels, known = cells.read(raster, "a", [1, 2, 3], window, True)
            assert np.array_equal(pixels, whole[top : top + 64, 10:70])
            assert known is not None
            assert known.all()
            held.append(cells.num_bytes)
        # Band by band and in another order too.
        pixels, none = cells.read(raster, "a", [3, 1], [0, 150, 96, 300], False)
        assert none is None
        assert np.array_equal(pixels, whole[150:450][:, :, [2, 0]])
    assert 0 < max(held) <= limit


@pytest.mark.parametrize("kind", ["short strip.tif", "one tile.jp2"])
def test_pixels_without_data_are_those_that_gdal_tells(tmp_path: Path, kind: str):
    height, width, options = KINDS[kind]
    path = write(tmp_path / kind, height, width, options)
    with rasterio.open(path, "r+") as file:
        file.nodata = 128
    with rasterio.open(path) as raster:
        expected = raster.read_masks([1, 2, 3]).any(axis=0)
        _, known = CellCache().read(raster, "a", [1, 2, 3], [0, 0, width, height], True)
        one_band, _ = raster.read_masks([1]), None
        _, known_of_one = CellCache().read(raster, "a", [1], [0, 0, width, height], True)
    assert known is not None
    assert np.array_equal(known, expected)
    assert np.array_equal(known_of_one, one_band[0] > 0)
    assert not known_of_one.all()


def test_sound_tiles_of_a_damaged_scene_are_still_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    options = {"driver": "JP2OpenJPEG", "tiled": True, "blockxsize": 128, "blockysize": 128}
    path = write(tmp_path / "scenes" / "a.jp2", 400, 300, options)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    manifest = convert(source(tmp_path / "scenes"), tmp_path / "out", workers=0)
    assert manifest is not None
    assert manifest.num_samples > 0
    bad = [
        json.loads(line)["source"] for line in (tmp_path / "out" / layout.QUARANTINE).read_text().splitlines()
    ]
    assert bad
    as_before(monkeypatch)
    convert(source(tmp_path / "scenes"), tmp_path / "before", workers=0)
    assert fingerprints(tmp_path / "out") == fingerprints(tmp_path / "before")


def test_a_conversion_that_was_stopped_between_shards_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    height, width, options = KINDS["one tile.jp2"]
    write(tmp_path / "scenes" / "a.jp2", height, width, options)
    convert(source(tmp_path / "scenes"), tmp_path / "whole", workers=0, samples_per_shard=PER_SHARD)

    finished, write_rows = [], shard_maker.write_rows

    def write_two(*args: Any) -> None:
        if len(finished) == 2:
            raise KeyboardInterrupt
        finished.append(write_rows(*args))

    with monkeypatch.context() as patch:
        patch.setattr(shard_maker, "write_rows", write_two)
        with pytest.raises(KeyboardInterrupt):
            convert(source(tmp_path / "scenes"), tmp_path / "part", workers=0, samples_per_shard=PER_SHARD)
    convert(source(tmp_path / "scenes"), tmp_path / "part", workers=0, samples_per_shard=PER_SHARD)
    assert fingerprints(tmp_path / "part") == fingerprints(tmp_path / "whole")
