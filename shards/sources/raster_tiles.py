"""Rasters cut into tiles: every tile of every scene, with its place on Earth."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shards.errors import UserError
from shards.images.pixels import BadImage, checked
from shards.sources import source
from shards.sources.raster_reader import Header, check_rasterio, read_header, read_mask_tile, read_tile
from shards.sources.source import Picture, Source, entry_batch, split_url
from shards.sources.source_options import RasterOptions
from shards.storage.place import open_place
from shards.units import plural

if TYPE_CHECKING:
    from shards.images.mask_images import MaskFolder

SUFFIXES = (
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
_EDGES = {
    "drop": "tiles over the edge dropped",
    "pad": "tiles over the edge padded",
    "shift": "the last tiles shifted inside",
}
_SHOWN = 3


class RasterSource(Source):
    """All tiles of the rasters in a folder and below, or of one raster. A tile is called `scene.tif@COLUMN,ROW` of its first pixel.

    Each tile's group is its scene; `crs`, `transform` (6 numbers, as rasterio orders them) and `bounds` (left, bottom, right, top)
    are its own. `masks`: rasters of class indices on the same grids. A scene that cannot be used is quarantined as a whole.
    """

    kind = "rasters"
    extra_schema = pa.schema(
        [("crs", pa.string()), ("transform", pa.list_(pa.float64())), ("bounds", pa.list_(pa.float64()))]
    )

    def __init__(self, where: str, options: RasterOptions, masks: MaskFolder | None = None):
        check_rasterio()
        assert options.tile, "without --tile the source is another one"
        self._options = options
        self._bands = options.band_numbers()
        self._masks = masks
        folder, name = split_url(where)
        # The name of the only raster; empty for all in a folder.
        self.one = name if where.lower().endswith(SUFFIXES) and not os.path.isdir(where) else ""
        self.place = open_place(folder if self.one else where)
        self.name = self.one or self.place.name
        self._clear()

    def _clear(self) -> None:
        self._kinds: Counter[tuple[int, str]] = Counter()  # scenes by bands taken and their type
        self._num_tiles = 0
        self._small: list[str] = []
        self._refused: list[str] = []

    @property
    def _stride(self) -> int:
        return self._options.stride or self._options.tile

    def settings(self) -> dict[str, Any]:
        """How tiles are cut and masks found."""
        made = {
            "tile": self._options.tile,
            "stride": self._stride,
            "edge": self._options.edge,
            "nodata_max": self._options.nodata_max,
            "bands": self._bands,
        }
        return made | ({"masks": self._masks.settings()} if self._masks else {})

    def entries(self) -> Iterator[pa.RecordBatch]:
        """See `Source.entries`. Reads the header of every raster."""
        self._clear()
        held: list[pa.RecordBatch] = []
        others: Counter[str] = Counter()
        for name, size in self._files():
            suffix = os.path.splitext(name)[1].lower()
            if suffix not in SUFFIXES:
                others[suffix or "without extension"] += 1
                continue
            held += self._scene(name, size)
            if sum(batch.num_rows for batch in held) >= source.BATCH_ROWS // 4:
                yield from _joined(held)
                held = []
        yield from _joined(held)
        if not self._num_tiles:
            raise UserError(self._nothing(others))
        if self._masks:
            self._masks.check()

    def _nothing(self, others: Counter[str]) -> str:
        where, size = self.place.url, self._options.tile
        if self._small:
            return (
                f"every raster in '{where}' is smaller than a tile of {size} x {size}, such as {self._small[0]}; give a "
                "smaller --tile, or --edge pad."
            )
        if self._refused:
            return f"no raster in '{where}' can be used, such as {self._refused[0]}."
        return source.nothing_found(where, others, "rasters", SUFFIXES)

    def _files(self) -> Iterator[tuple[str, int]]:
        if not self.one:
            self.place.check_folder("SOURCE")
            yield from self.place.walk()
            return
        size = self.place.size(self.one)
        if size is None:
            raise UserError(f"there is no file '{self.place / self.one}'; check the path of SOURCE.")
        yield self.one, size

    def _scene(self, name: str, size: int) -> list[pa.RecordBatch]:
        """A scene's tiles; one row without window, which `read` refuses, where it cannot be used."""
        mask = self._masks.find(name) if self._masks else None
        try:
            header = self._checked(name, mask)
        except BadImage as fault:
            self._refused.append(f"'{name}' ({fault.reason})")
            return [entry_batch({"source": [name], "bytes": [size], "mask": [mask]}, self.extra_schema)]
        columns, rows = (
            starts(side, self._options.tile, self._stride, self._options.edge)
            for side in (header.width, header.height)
        )
        num_tiles = len(columns) * len(rows)
        if not num_tiles:
            self._small.append(f"'{name}' ({header.width} x {header.height})")
            return []
        self._num_tiles += num_tiles
        taken = self._bands or range(1, header.num_bands + 1)
        self._kinds[len(taken), str(np.result_type(*(header.dtypes[band - 1] for band in taken)))] += 1
        grid = np.stack(np.meshgrid(columns, rows), axis=2).reshape(-1, 2)
        step = source.BATCH_ROWS
        return [
            self._tiles(name, mask, header, grid[start : start + step], size // num_tiles)
            for start in range(0, num_tiles, step)
        ]

    def _checked(self, name: str, mask: str | None) -> Header:
        header = read_header(self.place, name)
        lacking = [band for band in self._bands if band > header.num_bands]
        if lacking:
            raise BadImage(f"has no band {lacking[0]}, only {header.num_bands}")
        if mask and self._masks:
            _check_grid(header, read_header(self._masks.place, mask), mask)
        return header

    def _tiles(
        self, name: str, mask: str | None, header: Header, grid: npt.NDArray, num_bytes: int
    ) -> pa.RecordBatch:
        count, tile = len(grid), self._options.tile
        windows = _lists(np.concatenate([grid, np.full_like(grid, tile)], axis=1))
        columns: dict[str, Any] = {
            "source": [f"{name}@{column},{row}" for column, row in grid.tolist()],
            "path": [name] * count,
            "window": windows,
            "bytes": np.full(count, num_bytes),
            "group": [name] * count,
        }
        if mask:
            columns |= {"mask": [mask] * count, "mask_window": windows}
        if header.crs:
            columns["crs"] = [header.crs] * count
        if header.transform:
            columns["transform"], columns["bounds"] = map(
                _lists, _georeferences(header.transform, grid, tile)
            )
        return entry_batch(columns, self.extra_schema)

    def describe(self) -> list[str]:
        """How many scenes of which kind, and how they are cut."""
        kinds = ", ".join(
            f"{count:,} of {bands} x {dtype}" for (bands, dtype), count in sorted(self._kinds.items())
        )
        size, share = self._options.tile, f"{self._options.nodata_max:.0%}"
        return [
            f"Rasters: {kinds}. {plural(self._num_tiles, 'tile')} of {size} x {size}, one every {self._stride} pixels, "
            f"{_EDGES[self._options.edge]}; more than {share} without data: quarantined."
        ]

    def warnings(self) -> list[str]:
        """Scenes that cannot be used, those too small, and differing bands."""
        found = []
        if len({bands for bands, _ in self._kinds}) > 1:
            found.append(
                "the rasters differ in their number of bands, and training wants one; choose with --bands."
            )
        if self._refused:
            found.append(
                f"{len(self._refused):,} rasters cannot be used and will be quarantined: {_some(self._refused)}"
            )
        if self._small:
            found.append(
                f"{len(self._small):,} rasters are smaller than a tile and left out: {_some(self._small)}"
            )
        return found + (self._masks.warnings() if self._masks else [])

    def read(self, row: dict[str, Any]) -> Picture:
        """A tile's pixels and mask; BadImage for too little data in it, and for a scene that cannot be used."""
        name = row["path"] or row["source"]
        if row["window"] is None:
            self._checked(name, row["mask"])
            raise BadImage("could not be read when it was listed, and can be now; give a new DEST to have it")
        pixels, known = read_tile(self.place, name, self._bands, row["window"])
        share = 1 - float(known.mean())
        if share > self._options.nodata_max:
            raise BadImage(
                f"more than {self._options.nodata_max:.0%} of the tile is without data ({share:.1%})"
            )
        mask = (
            read_mask_tile(self._masks.place, row["mask"], row["mask_window"])
            if self._masks and row["mask"]
            else None
        )
        return Picture(checked(pixels), mask, {"nodata_share": round(share, 6)})


def starts(size: int, tile: int, stride: int, edge: str) -> npt.NDArray[np.int64]:
    """Where tiles begin along a side of `size` pixels, ascending.

    drop: multiples of `stride` with the whole tile inside. pad: these and as many more as cover the rest (none that another covers
    whole). shift: those of pad, the last one moved back until it ends at the edge; none on a side shorter than a tile.
    """
    if edge == "drop" or (edge == "shift" and size < tile):
        return np.arange(0, max(size - tile + 1, 0), stride)
    last = max(-(-(size - tile) // stride), 0) * stride
    found = np.arange(0, min(last, size - 1) + 1, stride)
    return np.unique(np.minimum(found, size - tile)) if edge == "shift" else found


def _georeferences(
    transform: tuple[float, ...], grid: npt.NDArray, tile: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Each tile's own transform (N, 6), and its bounds (N, 4): left, bottom, right, top, of the box around it if it is turned."""
    a, b, c, d, e, f = transform
    corners = np.array([(0, 0), (tile, 0), (0, tile), (tile, tile)])
    columns, rows = (grid[:, None, axis] + corners[None, :, axis] for axis in (0, 1))
    x, y = a * columns + b * rows + c, d * columns + e * rows + f
    constant = np.ones(len(grid))
    own = np.stack([a * constant, b * constant, x[:, 0], d * constant, e * constant, y[:, 0]], axis=1)
    return own, np.stack([x.min(1), y.min(1), x.max(1), y.max(1)], axis=1)


def _check_grid(scene: Header, mask: Header, name: str) -> None:
    if (mask.width, mask.height) != (scene.width, scene.height):
        raise BadImage(
            f"its mask '{name}' has {mask.width} x {mask.height} pixels, the raster {scene.width} x {scene.height}"
        )
    if mask.num_bands != 1:
        raise BadImage(f"its mask '{name}' has {mask.num_bands} bands; one of class indices is wanted")
    if scene.crs and mask.crs and scene.crs != mask.crs:
        raise BadImage(f"its mask '{name}' is in another reference system")
    if scene.transform and mask.transform:
        # Far corners less than a tenth of a pixel apart.
        corner = np.array([scene.width, scene.height, 1.0])
        ours, theirs = (np.reshape(t, (2, 3)) for t in (scene.transform, mask.transform))
        pixel = float(np.hypot(ours[0, 0], ours[1, 0]))
        if max(np.abs((ours - theirs) @ corner).max(), np.abs((ours - theirs)[:, 2]).max()) > 0.1 * pixel:
            raise BadImage(f"its mask '{name}' lies elsewhere: the transforms differ")


def _lists(values: npt.NDArray) -> pa.ListArray:
    """Each row as a list."""
    count, width = values.shape
    return pa.ListArray.from_arrays(
        np.arange(0, count * width + 1, width, dtype=np.int32), np.ascontiguousarray(values).ravel()
    )


def _joined(batches: list[pa.RecordBatch]) -> list[pa.RecordBatch]:
    """As few batches as `BATCH_ROWS` allows."""
    return pa.Table.from_batches(batches).combine_chunks().to_batches(source.BATCH_ROWS) if batches else []


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
