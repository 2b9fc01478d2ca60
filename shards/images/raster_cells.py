"""Decoded parts of compressed rasters, kept for the next tiles: a JPEG 2000 tile or a strip is decoded once for all tiles in it.

GDAL keeps blocks itself where a block is what its format decodes at once, as in a tiled GeoTIFF. It keeps none of what it reads from
JPEG 2000, and goes through a TIFF of a single strip from the first row, band by band, again and again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import numpy as np
import numpy.typing as npt

# Of a process; a cell takes half of it at most, so that neighbours stay while a tile that lies across two of them is cut.
KEPT_BYTES = 256 * 2**20

# Pixels (H, W, C), and which hold data, bool (H, W): None where the caller does not ask.
Part = tuple[npt.NDArray, npt.NDArray[np.bool_] | None]


def decode_unit(raster: Any) -> tuple[int, int] | None:
    """Return (height, width) of what is decoded together and that GDAL does not keep; None where it does, or where nothing is decoded.

    A JPEG 2000 raster must be open with USE_TILE_AS_BLOCK, or its blocks are not its tiles.
    """
    height, width = raster.block_shapes[0]
    if raster.driver.startswith("JP2"):
        return height, width
    whole = raster.height, raster.width
    if raster.driver != "GTiff" or raster.compression is None:
        return None
    return whole if (height, width) == whole or (height == 1 and _one_strip(raster)) else None


def _one_strip(raster: Any) -> bool:
    """Return whether a TIFF is a single long strip, which GDAL presents as blocks of one row: the last is not in the file."""
    from rasterio.errors import RasterBlockError

    try:
        raster.block_size(1, raster.height - 1, 0)
    except RasterBlockError:
        return True
    return False


class CellCache:
    """The latest cells of rasters, at most `limit` bytes of them."""

    def __init__(self, limit: int = KEPT_BYTES):
        self._limit, self._held = limit, 0
        self._cells: OrderedDict[Hashable, Part] = OrderedDict()
        self._damaged: set[Hashable] = set()

    @property
    def num_bytes(self) -> int:
        """Return the bytes of the cells that are held."""
        return self._held

    def clear(self) -> None:
        """Forget all cells."""
        self._cells.clear()
        self._damaged.clear()
        self._held = 0

    def read(self, raster: Any, key: Hashable, bands: list[int], window: list[int], known: bool) -> Part:
        """Return a window (first column, first row, width, height) that lies inside a raster.

        Args:
            raster: open for reading.
            key: of the file and its state.
            bands: from 1.
            window: in pixels.
            known: whether to tell which pixels hold data.
        """
        unit = decode_unit(raster)
        if unit is None:
            return _decode(raster, bands, window, known)
        dtype = np.result_type(*(raster.dtypes[band - 1] for band in bands))
        rows, columns = unit
        row_bytes = min(columns, raster.width) * (len(bands) * dtype.itemsize + known)
        # A longer one is cut into strips.
        rows = min(rows, raster.height, max(1, self._limit // 2 // row_bytes))
        left, top, width, height = window
        pixels = np.empty((height, width, len(bands)), dtype)
        data = np.empty((height, width), np.bool_) if known else None
        for y in range(top // rows * rows, top + height, rows):
            for x in range(left // columns * columns, left + width, columns):
                cell = [x, y, min(columns, raster.width - x), min(rows, raster.height - y)]
                found = self._cell(raster, (key, tuple(bands), known, x, y), bands, cell)
                if found is None:
                    return _decode(raster, bands, window, known)
                part, held = found
                ours, theirs = _overlap(window, cell), _overlap(cell, window)
                pixels[ours] = part[theirs]
                if data is not None and held is not None:
                    data[ours] = held[theirs]
        return pixels, data

    def _cell(self, raster: Any, key: tuple, bands: list[int], window: list[int]) -> Part | None:
        """Return a cell; None where it cannot be decoded as a whole: some of its tiles may be sound."""
        if key in self._damaged:
            return None
        if key in self._cells:
            self._cells.move_to_end(key)
            return self._cells[key]
        _, _, width, height = window
        size = height * width * (len(bands) * np.result_type(*raster.dtypes).itemsize + 1)
        # Room first, so that the limit holds at every moment.
        while self._cells and self._held + size > self._limit:
            _, old = self._cells.popitem(last=False)
            self._held -= _num_bytes(old)
        try:
            made = self._cells[key] = _decode(raster, bands, window, key[2])
        # rasterio raises several kinds.
        except Exception:
            self._damaged.add(key)
            return None
        self._held += _num_bytes(made)
        return made


def _num_bytes(part: Part) -> int:
    return part[0].nbytes + (0 if part[1] is None else part[1].nbytes)


def _overlap(one: list[int], other: list[int]) -> tuple[slice, slice]:
    """Return the rows and columns of one window that lie in another, counted in the first."""
    first_column, first_row, width, height = one
    column, row, other_width, other_height = other
    return (
        slice(max(row - first_row, 0), min(row + other_height - first_row, height)),
        slice(max(column - first_column, 0), min(column + other_width - first_column, width)),
    )


def _decode(raster: Any, bands: list[int], window: list[int], known: bool) -> Part:
    from rasterio.windows import Window

    inside = Window(*window)  # pyright: ignore[reportCallIssue] (attrs)
    dtype = np.result_type(*(raster.dtypes[band - 1] for band in bands))
    pixels = np.moveaxis(raster.read(bands, window=inside, out_dtype=dtype), 0, 2)
    if not known:
        return pixels, None
    nodata = _nodata_values(raster, bands)
    if nodata is not None:
        # As GDAL tells them, without decoding once more.
        return pixels, (pixels != nodata).any(axis=2)
    return pixels, raster.read_masks(bands, window=inside).any(axis=0)


def _nodata_values(raster: Any, bands: list[int]) -> npt.NDArray | None:
    """Return the value without data of each band, where that alone decides and integers hold it; None otherwise."""
    from rasterio.enums import MaskFlags

    found = []
    for band in bands:
        value, dtype = raster.nodatavals[band - 1], np.dtype(raster.dtypes[band - 1])
        if raster.mask_flag_enums[band - 1] != [MaskFlags.nodata] or dtype.kind not in "iu":
            return None
        limits = np.iinfo(dtype)
        if not (float(value).is_integer() and limits.min <= value <= limits.max):
            return None
        found.append(int(value))
    return np.array(found, np.result_type(*(raster.dtypes[band - 1] for band in bands)))
