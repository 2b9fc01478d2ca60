"""Rasters as rasterio reads them: headers, windows of pixels, and which of these hold data."""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import re
import warnings
from collections import Counter
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shards.errors import UserError
from shards.images.mask_images import NO_INDEX, indices_of, is_index
from shards.images.pixels import BadImage, Pixels
from shards.images.raster_cells import CellCache
from shards.sources.file_set import names_file, nothing_found, split_url
from shards.storage.opening import open_place
from shards.storage.place import Place

RASTER_SUFFIXES = (
    ".tif",
    ".tiff",
    ".gtiff",
    ".jp2",
    ".vrt",
    ".img",
    ".bil",
    ".asc",
    ".png",
    ".jpg",
    ".jpeg",
    ".webp",
    ".bmp",
)
_OPEN = 32  # rasters held open by a process: tiles come in random order
# The folder is not listed at each opening; 128 MB of decoded blocks are held, not 5 % of the memory by each process.
_GDAL = {"GDAL_DISABLE_READDIR_ON_OPEN": True, "GDAL_CACHEMAX": 128}
CELLS = CellCache()


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


@dataclass(frozen=True)
class RasterScene:
    """One raster, or several that are its bands.

    files: names in the place of the source, "" for one that is missing; path: the name that its mask's is made of.
    """

    name: str
    path: str
    files: tuple[str, ...]
    num_bytes: int


class Scenes(Protocol):
    """Which files of a folder make a scene, and how its pixels are read. Picklable."""

    @property
    def kind(self) -> str: ...
    @property
    def extra_schema(self) -> pa.Schema: ...
    @property
    def place(self) -> Place: ...
    @property
    def name(self) -> str: ...
    @property
    def searched(self) -> Place | None: ...

    def settings(self) -> list[Any]:
        """The bands that are taken."""
        ...

    def scenes(self) -> Iterator[RasterScene]:
        """All scenes in any order. Raise UserError where the folder is missing."""
        ...

    @property
    def others(self) -> Counter[str]:
        """After `scenes`: files that belong to no scene, by their endings."""
        ...

    def nothing(self) -> str:
        """After `scenes`: why there is no scene."""
        ...

    def columns(self, scene: RasterScene, count: int) -> dict[str, Any]:
        """`count` rows of `extra_schema`."""
        ...

    def files(self, row: dict[str, Any]) -> tuple[str, ...]:
        """The files of an entry's scene."""
        ...

    def header(self, files: tuple[str, ...]) -> Header:
        """What the scene's header says, with the types of the bands taken. Raise BadImage where it cannot be used."""
        ...

    def read(self, files: tuple[str, ...], window: list[int]) -> tuple[Pixels, npt.NDArray[np.bool_]]:
        """As `raster_reader.read_tile`."""
        ...


class RasterFiles:
    """Scenes of one file each, with all their bands in it: those in a folder and below, or one. `bands`: from 1; empty for all."""

    kind = "rasters"
    extra_schema = pa.schema([])

    def __init__(self, where: str, bands: list[int]):
        self._bands = bands
        folder, name = split_url(where)
        self._one = name if names_file(where, RASTER_SUFFIXES) else ""
        self.place = open_place(folder if self._one else where)
        self.name = self._one or self.place.name
        self.searched = None if self._one else self.place
        self.others: Counter[str] = Counter()

    def settings(self) -> list[Any]:
        return self._bands

    def scenes(self) -> Iterator[RasterScene]:
        self.others.clear()
        for name, size in self._files():
            suffix = os.path.splitext(name)[1].lower()
            if suffix in RASTER_SUFFIXES:
                yield RasterScene(name, name, (name,), size)
            else:
                self.others[suffix or "without extension"] += 1

    def _files(self) -> Iterator[tuple[str, int]]:
        if not self._one:
            self.place.check_folder("SOURCE")
            yield from self.place.walk()
            return
        size = self.place.size(self._one)
        if size is None:
            raise UserError(f"There is no file '{self.place / self._one}'; check the path of SOURCE.")
        yield self._one, size

    def nothing(self) -> str:
        return nothing_found(self.place.url, self.others, "rasters", RASTER_SUFFIXES)

    def columns(self, scene: RasterScene, count: int) -> dict[str, Any]:
        return {}

    def files(self, row: dict[str, Any]) -> tuple[str, ...]:
        return (row["path"] or row["source"],)

    def header(self, files: tuple[str, ...]) -> Header:
        header = read_header(self.place, files[0])
        lacking = [band for band in self._bands if band > header.num_bands]
        if lacking:
            raise BadImage(f"has no band {lacking[0]}, only {header.num_bands}")
        taken = self._bands or range(1, header.num_bands + 1)
        return replace(header, dtypes=tuple(header.dtypes[band - 1] for band in taken))

    def read(self, files: tuple[str, ...], window: list[int]) -> tuple[Pixels, npt.NDArray[np.bool_]]:
        return read_tile(self.place, files[0], self._bands, window)


def check_rasterio() -> None:
    """Raise UserError where rasterio is missing."""
    try:
        import rasterio  # noqa: F401
    except ImportError:
        raise UserError("Rasters need rasterio: pip install rasterio.") from None


def read_header(place: Place, name: str) -> Header:
    """The header of a raster; BadImage where it cannot be read, UserError where the folder has gone away."""
    with _reading(place, name):
        raster, _ = _raster(place, name)
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
) -> tuple[Pixels, npt.NDArray[np.bool_]]:
    """The pixels of a window (first column, first row, width, height) as the file has them, and which hold data in any band, (H, W).

    What sticks out to the right or below is filled with the raster's nodata value, or 0, and holds no data. Nor does a pixel all of
    whose bands are masked, by nodata value, alpha, mask band or NaN. `bands`: from 1, none for all. Where larger values are darker
    (MinIsWhite), unsigned ones are turned over, as whoever shows the file does.
    """
    with _reading(place, name):
        from rasterio.enums import PhotometricInterp

        raster, key = _raster(place, name)
        taken = bands or list(raster.indexes)
        pixels, known = CELLS.read(raster, key, taken, _inside(raster, window), True)
        nodata = [raster.nodatavals[band - 1] for band in taken]
        alpha = not bands and has_alpha(raster)
        cmyk = not bands and raster.count == 4 and raster.photometric == PhotometricInterp.cmyk
        # A TIFF of several pages lists them so.
        frames = max(1, len(raster.subdatasets)) if raster.driver == "GTiff" else 1
        turned_over = (
            pixels.dtype.kind == "u" and raster.tags(ns="IMAGE_STRUCTURE").get("MINISWHITE") == "YES"
        )
    assert known is not None, "it was asked for"
    if pixels.dtype.kind == "f":
        known &= ~np.isnan(pixels).all(axis=2)
    known = _padded(known[:, :, None], window, False)[:, :, 0]
    pixels = _padded(pixels, window, 0 if nodata[0] is None else nodata[0])
    in_bands = np.repeat(known[:, :, None], pixels.shape[2], axis=2)
    for band, value in enumerate(nodata):
        if value is not None and not np.isnan(value):
            in_bands[:, :, band] &= pixels[:, :, band] != value
    if turned_over:
        largest = np.iinfo(pixels.dtype).max
        pixels, nodata = largest - pixels, [None if value is None else largest - value for value in nodata]
    return Pixels(pixels, in_bands, tuple(nodata), alpha, cmyk, frames), known


def has_alpha(raster: Any) -> bool:
    """Whether the last band of a raster is declared to be its transparency."""
    from rasterio.enums import ColorInterp

    return raster.count > 1 and raster.colorinterp[-1] == ColorInterp.alpha


def read_mask_tile(place: Place, name: str, window: list[int]) -> npt.NDArray:
    """The first band (H, W) of a window of a mask; what sticks out is its nodata value, or 255.

    A nodata value that is no class index, such as -9999 or NaN, is 255, too.
    """
    try:
        with _reading(place, name):
            raster, key = _raster(place, name)
            pixels, _ = CELLS.read(raster, key, [1], _inside(raster, window), False)
            nodata = raster.nodatavals[0]
    except BadImage as error:
        raise BadImage(f"its mask '{name}': {error.reason}") from error
    pixels = indices_of(pixels[:, :, 0], nodata)
    fill = NO_INDEX if nodata is None or not is_index(nodata) else nodata
    return _padded(pixels[:, :, None], window, fill)[:, :, 0]


def _inside(raster: Any, window: list[int]) -> list[int]:
    column, row, width, height = window
    return [column, row, min(width, raster.width - column), min(height, raster.height - row)]


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
    except Exception as error:  # rasterio raises several kinds
        if not place.is_there():
            raise UserError(
                f"The folder '{place.url}' is no longer there; bring it back and run the same command again."
            ) from error
        raise BadImage(f"cannot be read as a raster: {_words(error, place, name)}") from error
    finally:
        log.disabled = disabled


def _words(error: BaseException, place: Place, name: str) -> str:
    """What GDAL said last, without the folder, which differs between machines."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = (
        str(error)
        .replace(f"{place / name}", name)
        .replace(str(place.local / name) if place.local else name, name)
    )
    return re.sub(r"/vsi\w+/\S*/", "", text).strip() or type(error).__name__


def _raster(place: Place, name: str) -> tuple[Any, Hashable]:
    """An open raster, and a key of the file as it is now."""
    if place.local is None:
        size = place.size(name)
        return _open_remote(place, name, size), (place.url, name, size)
    path, status = str(place.local / name), os.stat(place.local / name)
    key = path, status.st_mtime_ns, status.st_size
    return _open_local(*key), key


# The further arguments are part of the key only: a file that was written anew is opened anew.
@functools.lru_cache(_OPEN)
def _open_local(path: str, _changed_ns: int, _size: int) -> Any:
    return _open(path)


@functools.lru_cache(_OPEN)
def _open_remote(place: Place, name: str, _size: int | None) -> Any:
    def opener(path: str, mode: str = "rb", **_: Any) -> Any:
        return place.open(path.rpartition("://")[2].removeprefix(place.url.rpartition("://")[2]).lstrip("/"))

    return _open(place / name, opener=opener)


def _open(path: str, **options: Any) -> Any:
    import rasterio
    from rasterio.errors import RasterioIOError

    raster = rasterio.open(path, **options)
    if not raster.driver.startswith("JP2"):
        return raster
    # Or the blocks are 1024 pixels at most, which are parts of its tiles.
    try:
        whole = rasterio.open(path, **options, USE_TILE_AS_BLOCK="YES")
    # GDAL refuses tiles of 2 GB.
    except RasterioIOError:
        return raster
    raster.close()
    return whole


def close_rasters() -> None:
    """Close what is held open, and forget what was decoded."""
    _open_local.cache_clear()
    _open_remote.cache_clear()
    CELLS.clear()


# At the end of the process they would be closed after what closes them is gone.
atexit.register(close_rasters)
