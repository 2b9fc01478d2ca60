"""Rasters as rasterio reads them: headers, windows of pixels, and which of these hold data."""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.errors import UserError
from shards.images.pixels import BadImage
from shards.storage.place import Place

NO_INDEX = 255  # in the padding of a mask without nodata value: what losses ignore by convention
_OPEN = 32  # rasters held open by a process: tiles come in random order
# The folder is not listed at each opening; 128 MB of decoded blocks are held, not 5 % of the memory by each process.
_GDAL = {"GDAL_DISABLE_READDIR_ON_OPEN": True, "GDAL_CACHEMAX": 128}


@dataclass(frozen=True)
class Header:
    """What a raster's header says.

    `transform`: (a, b, c, d, e, f), where x = a column + b row + c and y = d column + e row + f; None where there is none.
    """

    width: int
    height: int
    dtypes: tuple[str, ...]  # of each band
    crs: str | None  # EPSG:n, or WKT
    transform: tuple[float, ...] | None

    @property
    def num_bands(self) -> int:
        return len(self.dtypes)


def check_rasterio() -> None:
    """Raises UserError where rasterio is missing."""
    try:
        import rasterio  # noqa: F401
    except ImportError:
        raise UserError("rasters need rasterio: pip install 'fastssl-pretrain[geo]'.") from None


def read_header(place: Place, name: str) -> Header:
    """The header of a raster; BadImage where it cannot be read, UserError where the folder has gone away."""
    with _reading(place, name):
        raster = _raster(place, name)
        crs, transform = raster.crs, raster.transform
        return Header(
            raster.width,
            raster.height,
            tuple(raster.dtypes),
            _crs_text(crs) if crs else None,
            None if transform.is_identity else tuple(transform)[:6],
        )


def _crs_text(crs: Any) -> str:
    number = crs.to_epsg(confidence_threshold=100)
    return f"EPSG:{number}" if number else crs.to_wkt()


def read_tile(
    place: Place, name: str, bands: list[int], window: list[int]
) -> tuple[npt.NDArray, npt.NDArray[np.bool_]]:
    """The pixels (H, W, C) of a window (first column, first row, width, height), and which hold data, (H, W).

    What sticks out to the right or below is filled with the raster's nodata value, or 0, and holds no data. Nor does a pixel all of
    whose bands are masked, by nodata value, alpha, mask band or NaN. `bands`: from 1, none for all.
    """
    with _reading(place, name):
        raster = _raster(place, name)
        bands = bands or list(raster.indexes)
        pixels, inside = _read(raster, bands, window)
        known = raster.read_masks(bands, window=inside).any(axis=0)
    if pixels.dtype.kind == "f":
        known &= ~np.isnan(pixels).all(axis=2)
    fill = 0 if raster.nodata is None else raster.nodata
    return _padded(pixels, window, fill), _padded(known[:, :, None], window, False)[:, :, 0]


def read_mask_tile(place: Place, name: str, window: list[int]) -> npt.NDArray:
    """The first band (H, W) of a window of a mask; what sticks out is its nodata value, or 255."""
    try:
        with _reading(place, name):
            raster = _raster(place, name)
            pixels, _ = _read(raster, [1], window)
    except BadImage as fault:
        raise BadImage(f"its mask '{name}': {fault.reason}") from fault
    fill = NO_INDEX if raster.nodata is None else raster.nodata
    return _padded(pixels, window, fill)[:, :, 0]


def _read(raster: Any, bands: list[int], window: list[int]) -> tuple[npt.NDArray, Any]:
    from rasterio.windows import Window

    column, row, width, height = window
    inside = Window(column, row, min(width, raster.width - column), min(height, raster.height - row))  # pyright: ignore[reportCallIssue] (attrs)
    dtype = np.result_type(*(raster.dtypes[band - 1] for band in bands))
    return np.moveaxis(raster.read(bands, window=inside, out_dtype=dtype), 0, 2), inside


def _padded(pixels: npt.NDArray, window: list[int], fill: float) -> npt.NDArray:
    _, _, width, height = window
    missing = (height - pixels.shape[0], width - pixels.shape[1])
    if missing == (0, 0):
        return pixels
    if pixels.dtype.kind in "iu":  # a nodata value that the type cannot hold marks no pixel
        limits = np.iinfo(pixels.dtype)
        fill = fill if limits.min <= fill <= limits.max else 0
    return np.pad(pixels, ((0, missing[0]), (0, missing[1]), (0, 0)), constant_values=fill)


@contextlib.contextmanager
def _reading(place: Place, name: str) -> Iterator[None]:
    """Faults in the project's words: BadImage, or UserError where the folder has gone away."""
    import rasterio

    log = logging.getLogger("rasterio._env")  # it prints what is then raised, and what GDAL gets along with
    disabled, log.disabled = log.disabled, True
    try:
        with warnings.catch_warnings(), rasterio.Env(**_GDAL):
            warnings.simplefilter("ignore")  # such as: it has no georeference
            yield
    except BadImage:
        raise
    except Exception as fault:  # rasterio raises several kinds
        if not place.is_there():
            raise UserError(
                f"the folder '{place.url}' has gone away; bring it back and run the same command again."
            ) from fault
        raise BadImage(f"cannot be read as a raster: {_words(fault, place, name)}") from fault
    finally:
        log.disabled = disabled


def _words(fault: BaseException, place: Place, name: str) -> str:
    """What GDAL said last, without the folder, which differs between machines."""
    while fault.__cause__ is not None:
        fault = fault.__cause__
    if isinstance(fault, OSError) and fault.strerror:
        return fault.strerror
    text = (
        str(fault)
        .replace(f"{place / name}", name)
        .replace(str(place.local / name) if place.local else name, name)
    )
    return re.sub(r"/vsi\w+/\S*/", "", text).strip() or type(fault).__name__


def _raster(place: Place, name: str) -> Any:
    if place.local is None:
        return _open_remote(place, name, place.size(name))
    status = os.stat(place.local / name)
    return _open_local(str(place.local / name), status.st_mtime_ns, status.st_size)


# The further arguments are part of the key only: a file that was written anew is opened anew.
@functools.lru_cache(_OPEN)
def _open_local(path: str, _changed_ns: int, _size: int) -> Any:
    import rasterio

    return rasterio.open(path)


@functools.lru_cache(_OPEN)
def _open_remote(place: Place, name: str, _size: int | None) -> Any:
    import rasterio

    def opener(path: str, mode: str = "rb", **_: Any) -> Any:
        return place.open(path.rpartition("://")[2].removeprefix(place.url.rpartition("://")[2]).lstrip("/"))

    return rasterio.open(place / name, opener=opener)


# At the end of the process they would be closed after what closes them is gone.
atexit.register(lambda: (_open_local.cache_clear(), _open_remote.cache_clear()))
