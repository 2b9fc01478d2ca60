"""Rasters cut into tiles: every tile of every scene, with its place on Earth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shards.errors import UserError
from shards.images.mask_images import MaskFolder
from shards.images.pixels import BadImage, checked
from shards.sources import source
from shards.sources.file_set import names_file, told_kinds
from shards.sources.image_folder import folder_label, mask_folder
from shards.sources.raster_reader import (
    Header,
    RasterFiles,
    RasterScene,
    Scenes,
    check_rasterio,
    read_header,
    read_mask_tile,
)
from shards.sources.source import Picture, Source, SourceKind, entry_batch
from shards.sources.source_options import RasterOptions, SourceOptions
from shards.sources.table_reader import TABLE_SUFFIXES
from shards.units import plural

_EDGES = {
    "drop": "tiles over the edge dropped",
    "pad": "tiles over the edge padded",
    "shift": "the last tiles shifted inside",
}
_GEOREFERENCE = pa.schema(
    [("crs", pa.string()), ("transform", pa.list_(pa.float64())), ("bounds", pa.list_(pa.float64()))]
)
_SHOWN = 3
# Pixels of tiles that a process reads ahead of their turn.
AHEAD_BYTES = 128 * 2**20


class RasterSource(Source):
    """All tiles of the rasters in a folder and below, or of one raster. A tile is called `scene.tif@COLUMN,ROW` of its first pixel.

    Each tile's group is its scene; `crs`, `transform` (6 numbers, as rasterio orders them) and `bounds` (left, bottom, right, top)
    are its own. `masks`: rasters of class indices on the same grids. A scene that cannot be used is quarantined as a whole. `scenes`:
    what makes a scene; None for one raster file each. Without `options.tile` a scene is one image, called as itself.
    """

    def __init__(
        self,
        where: str,
        options: RasterOptions,
        masks: MaskFolder | None = None,
        scenes: Scenes | None = None,
    ):
        check_rasterio()
        assert options.tile or scenes, "without --tile the source is another one"
        self._options = options
        self._masks = masks
        self._scenes = scenes or RasterFiles(where, options.band_numbers())
        self.kind, self.place, self.name = self._scenes.kind, self._scenes.place, self._scenes.name
        self.searched = self._scenes.searched
        self.noun = "tile" if options.tile else "image"
        self.extra_schema = pa.schema([*_GEOREFERENCE, *self._scenes.extra_schema])
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
            "bands": self._scenes.settings(),
        }
        return made | ({"masks": self._masks.settings()} if self._masks else {})

    def entries(self) -> Iterator[pa.RecordBatch]:
        """See `Source.entries`. Reads the header of every scene."""
        self._clear()
        held: list[pa.RecordBatch] = []
        for scene in self._images():
            held += self._scene(scene)
            if sum(batch.num_rows for batch in held) >= source.BATCH_ROWS // 4:
                yield from _joined(held)
                held = []
        yield from _joined(held)
        if not self._num_tiles:
            raise UserError(self._nothing())
        if self._masks:
            self._masks.check()

    def _images(self) -> Iterator[RasterScene]:
        """All scenes but the masks, where these lie among them."""
        if not (self._masks and self._masks.lies_in(self.place)):
            yield from self._scenes.scenes()
            return
        found = list(self._scenes.scenes())
        masks = self._masks.among([scene.path for scene in found])
        yield from (scene for scene in found if scene.path not in masks)

    def _nothing(self) -> str:
        where, size = self.place.url, self._options.tile
        if self._small:
            return (
                f"Every raster in '{where}' is smaller than a tile of {size} x {size}, such as {self._small[0]}; give a "
                "smaller --tile, or --edge pad."
            )
        if self._refused:
            return f"No raster in '{where}' can be used, such as {self._refused[0]}."
        return self._scenes.nothing()

    def _scene(self, scene: RasterScene) -> list[pa.RecordBatch]:
        """A scene's tiles; one row without window, which `read` refuses, where it cannot be used."""
        mask = self._masks.find(scene.path) if self._masks else None
        try:
            header = self._checked(scene.files, mask)
        except BadImage as error:
            self._refused.append(f"'{scene.name}' ({error.reason})")
            about = {"source": [scene.name], "bytes": [scene.num_bytes], "mask": [mask]}
            return [entry_batch(about | self._scenes.columns(scene, 1), self.extra_schema)]
        tile = self._options.tile
        columns, rows = (
            starts(side, tile, self._stride, self._options.edge) if tile else np.zeros(1, np.int64)
            for side in (header.width, header.height)
        )
        num_tiles = len(columns) * len(rows)
        if not num_tiles:
            self._small.append(f"'{scene.name}' ({header.width} x {header.height})")
            return []
        self._num_tiles += num_tiles
        self._kinds[header.num_bands, str(np.result_type(*header.dtypes))] += 1
        grid = np.stack(np.meshgrid(columns, rows), axis=2).reshape(-1, 2)
        step = source.BATCH_ROWS
        return [
            self._tiles(scene, mask, header, grid[start : start + step], scene.num_bytes // num_tiles)
            for start in range(0, num_tiles, step)
        ]

    def _checked(self, files: tuple[str, ...], mask: str | None) -> Header:
        header = self._scenes.header(files)
        if mask and self._masks:
            _check_mask(header, read_header(self._masks.place, mask), mask)
        return header

    def _tiles(
        self, scene: RasterScene, mask: str | None, header: Header, grid: npt.NDArray, num_bytes: int
    ) -> pa.RecordBatch:
        count, tile = len(grid), self._options.tile
        size = (tile, tile) if tile else (header.width, header.height)
        windows = _lists(np.concatenate([grid, np.broadcast_to(np.array(size), grid.shape)], axis=1))
        names = [f"{scene.name}@{column},{row}" for column, row in grid.tolist()] if tile else [scene.name]
        columns: dict[str, Any] = {
            "source": names,
            "path": [scene.name] * count,
            "window": windows,
            "bytes": np.full(count, num_bytes),
            "group": [scene.name] * count,
            **self._scenes.columns(scene, count),
        }
        if not tile:
            columns["label"] = [folder_label(scene.name)]
        if mask:
            columns |= {"mask": [mask] * count, "mask_window": windows}
        if header.crs:
            columns["crs"] = [header.crs] * count
        if header.transform:
            columns["transform"], columns["bounds"] = map(
                _lists, _georeferences(header.transform, grid, size)
            )
        return entry_batch(columns, self.extra_schema)

    def describe(self) -> list[str]:
        """How many scenes of which kind, and how they are cut."""
        kinds = ", ".join(
            f"{count:,} of {bands} x {dtype}" for (bands, dtype), count in sorted(self._kinds.items())
        )
        size, share = self._options.tile, f"{self._options.nodata_max:.0%}"
        others = (
            [f"Other files are left out: {told_kinds(self._scenes.others)}."] if self._scenes.others else []
        )
        if not size:
            return [f"Scenes, whole: {kinds}; more than {share} without data: quarantined.", *others]
        return [
            f"Rasters: {kinds}. {plural(self._num_tiles, 'tile')} of {size} x {size}, one every {self._stride} pixels, "
            f"{_EDGES[self._options.edge]}; more than {share} without data: quarantined.",
            *others,
        ]

    def left_out(self) -> str:
        """See `Source.left_out`."""
        return told_kinds(self._scenes.others)

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
        files = self._scenes.files(row)
        if row["window"] is None:
            self._checked(files, row["mask"])
            raise BadImage("could not be read when it was listed, and can be now; give a new DEST to have it")
        pixels, known = self._scenes.read(files, row["window"])
        share = 1 - float(known.mean())
        if share > self._options.nodata_max:
            whole = "tile" if self._options.tile else "scene"
            raise BadImage(
                f"more than {self._options.nodata_max:.0%} of the {whole} is without data ({share:.1%})"
            )
        mask = (
            read_mask_tile(self._masks.place, row["mask"], row["mask_window"])
            if self._masks and row["mask"]
            else None
        )
        facts = {"nodata_share": round(share, 6)}
        return Picture(
            checked(pixels.values),
            mask,
            facts,
            *(pixels.known, pixels.fill, pixels.alpha, pixels.cmyk, pixels.frames),
        )

    def read_all(self, rows: Sequence[dict[str, Any]]) -> Iterator[Picture | BadImage]:
        """As `Source.read_all`. Tiles lie shuffled: those that come next are read scene by scene and row by row, at most `AHEAD_BYTES`
        of them, so that what is decoded of a scene serves all of them."""
        at, count = 0, max(1, AHEAD_BYTES // max(1, 4 * self._options.tile**2)) if self._options.tile else 1
        while at < len(rows):
            part = rows[at : at + count]
            held: dict[int, Picture | BadImage] = {}
            num_bytes, largest = 0, 1
            for i in sorted(range(len(part)), key=lambda i: _place_in_scene(part[i])):
                if num_bytes + largest > AHEAD_BYTES:
                    break
                [held[i]] = super().read_all([part[i]])
                size = _num_bytes(held[i])
                num_bytes, largest = num_bytes + size, max(largest, size)
            for i, row in enumerate(part):
                yield from [held.pop(i)] if i in held else super().read_all([row])
            at += len(part)
            if self._options.tile and largest > 1:
                count = max(1, AHEAD_BYTES // largest)


def _num_bytes(found: Picture | BadImage) -> int:
    parts = () if isinstance(found, BadImage) else (found.data, found.mask, found.known)
    return sum(part.nbytes for part in parts if isinstance(part, np.ndarray))


def _place_in_scene(row: dict[str, Any]) -> tuple:
    column, line, *_ = row["window"] or (0, 0)
    return row["path"] or row["source"], line, column


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
    transform: tuple[float, ...], grid: npt.NDArray, size: tuple[int, int]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Each tile's own transform (N, 6), and its bounds (N, 4): left, bottom, right, top, of the box around it if it is turned."""
    a, b, c, d, e, f = transform
    width, height = size
    corners = np.array([(0, 0), (width, 0), (0, height), (width, height)])
    columns, rows = (grid[:, None, axis] + corners[None, :, axis] for axis in (0, 1))
    x, y = a * columns + b * rows + c, d * columns + e * rows + f
    constant = np.ones(len(grid))
    own = np.stack([a * constant, b * constant, x[:, 0], d * constant, e * constant, y[:, 0]], axis=1)
    return own, np.stack([x.min(1), y.min(1), x.max(1), y.max(1)], axis=1)


def _check_mask(scene: Header, mask: Header, name: str) -> None:
    if (mask.width, mask.height) != (scene.width, scene.height):
        raise BadImage(
            f"its mask '{name}' has {mask.width} x {mask.height} pixels, the raster {scene.width} x {scene.height}"
        )
    if mask.num_bands != 1:
        raise BadImage(f"its mask '{name}' has {mask.num_bands} bands; one of class indices is wanted")
    check_grid(scene, mask, f"its mask '{name}'")


def check_grid(scene: Header, other: Header, what: str) -> None:
    """Raise BadImage where a raster of a scene's size lies elsewhere on Earth; `what` names it."""
    if scene.crs and other.crs and not _same_reference(scene.crs, other.crs):
        raise BadImage(f"{what} is in another reference system")
    if scene.transform and other.transform:
        # Far corners less than a tenth of a pixel apart.
        corner = np.array([scene.width, scene.height, 1.0])
        ours, theirs = (np.reshape(t, (2, 3)) for t in (scene.transform, other.transform))
        pixel = float(np.hypot(ours[0, 0], ours[1, 0]))
        if max(np.abs((ours - theirs) @ corner).max(), np.abs((ours - theirs)[:, 2]).max()) > 0.1 * pixel:
            raise BadImage(f"{what} lies elsewhere: the transforms differ")


def _same_reference(one: str, other: str) -> bool:
    """Whether two texts mean one reference system: `EPSG:32633` and its WKT, under whatever name."""
    if one == other:
        return True
    from rasterio.crs import CRS
    from rasterio.errors import CRSError

    try:
        return bool(CRS.from_user_input(one) == CRS.from_user_input(other))
    except CRSError:
        return False


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


def _matches(where: str, options: SourceOptions) -> bool:
    return bool(options.raster.tile) and not names_file(where, TABLE_SUFFIXES)


KIND = SourceKind(
    "rasters",
    "with --tile a folder of rasters, or one",
    _matches,
    lambda where, options: RasterSource(where, options.raster, mask_folder(options)),
    ("raster",),
)
