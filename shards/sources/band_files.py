"""Scenes with one file for each band, as Sentinel-2 and Landsat come: `scene_B02.tif`, `scene_B03.tif`, or `scene/B02.tif`."""

from __future__ import annotations

import os
import posixpath
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shards.errors import UserError
from shards.images.pixels import BadImage, Pixels
from shards.sources.file_set import is_folder
from shards.sources.image_folder import mask_folder
from shards.sources.raster_reader import RASTER_SUFFIXES, Header, RasterScene, read_header, read_tile
from shards.sources.raster_tiles import RasterSource, check_grid
from shards.sources.source import SourceKind
from shards.sources.source_options import SourceOptions
from shards.storage.opening import open_place

_SEPARATORS = "_-."
_SHOWN = 5


class BandFiles:
    """The scenes in a folder and below, whose bands are the files of a folder with one beginning and the names `bands` as endings.

    A scene is called by its path up to the band: `a/scene` for `a/scene_B02.tif` and for `a/scene/B02.tif`, and also for
    `a/scene/scene_B02.tif`. Names of bands are compared without regard to case. Pixels are stacked in the order of `bands`; the files'
    names are kept in the column `files`. `whole`: scenes are not cut into tiles.
    """

    kind = "bands"
    extra_schema = pa.schema([("files", pa.list_(pa.string()))])

    def __init__(self, where: str, bands: list[str], *, whole: bool):
        self.place = self.searched = open_place(where)
        self.name = self.place.name
        self._bands = bands
        self._whole = whole
        self.others: Counter[str] = Counter()
        self._seen: list[str] = []

    def settings(self) -> list[Any]:
        return self._bands

    def scenes(self) -> Iterator[RasterScene]:
        self.place.check_folder("SOURCE")
        self.others.clear()
        self._seen.clear()
        # By folder, then by scene. A folder's files may come before and after those of the folders in it, but not later.
        held: dict[str, dict[str, dict[int, tuple[str, int]]]] = {}
        for name, size in self.place.walk():
            folder = posixpath.dirname(name)
            for other in [
                other for other in held if not f"{folder}/".startswith(f"{other}/" if other else "")
            ]:
                yield from self._finished(held.pop(other))
            found = self._split(name)
            if found is None:
                suffix = os.path.splitext(name)[1].lower()
                if suffix in RASTER_SUFFIXES:
                    suffix = "rasters of other bands"
                self.others[suffix or "without extension"] += 1
                if len(self._seen) < _SHOWN:
                    self._seen.append(posixpath.basename(name))
                continue
            scene, band = found
            files = held.setdefault(folder, {}).setdefault(scene, {})
            if band in files:
                raise UserError(
                    f"'{self.place / files[band][0]}' and '{self.place / name}' are both the band {self._bands[band]} of '{scene}': "
                    "move one out of the folder."
                )
            files[band] = name, size
        for scenes in held.values():
            yield from self._finished(scenes)

    def _finished(self, scenes: dict[str, dict[int, tuple[str, int]]]) -> Iterator[RasterScene]:
        for scene, files in scenes.items():
            names = tuple(files[band][0] if band in files else "" for band in range(len(self._bands)))
            yield RasterScene(scene, f"{scene}.tif", names, sum(size for _, size in files.values()))

    def _split(self, name: str) -> tuple[str, int] | None:
        """The scene and the band's number that a file belongs to; None for any other file."""
        path, suffix = os.path.splitext(name)
        if suffix.lower() not in RASTER_SUFFIXES:
            return None
        folder, stem = posixpath.split(path)
        # The longest first: `x_SR_B4` is the band SR_B4, where B4 is one, too.
        for band in sorted(range(len(self._bands)), key=lambda band: -len(self._bands[band])):
            wanted = self._bands[band].lower()
            if stem.lower() == wanted:
                return folder or self.name, band
            begin = stem[: len(stem) - len(wanted)]
            if stem.lower().endswith(wanted) and begin[-1] in _SEPARATORS and begin[:-1]:
                begin = begin[:-1]
                return (
                    folder if begin == posixpath.basename(folder) else posixpath.join(folder, begin)
                ), band
        return None

    def nothing(self) -> str:
        seen = ", ".join(f"'{name}'" for name in self._seen)
        return (
            f"'{self.place.url}' holds no raster whose name ends with a band of --bands ({', '.join(self._bands)})"
            f"{f', only files such as {seen}' if seen else ''}. Rasters with all bands in one file need numbers, such as --bands "
            "4,3,2, and --tile."
        )

    def columns(self, scene: RasterScene, count: int) -> dict[str, Any]:
        return {"files": [list(scene.files)] * count}

    def files(self, row: dict[str, Any]) -> tuple[str, ...]:
        return tuple(row["files"])

    def header(self, files: tuple[str, ...]) -> Header:
        missing = [band for band, name in zip(self._bands, files, strict=True) if not name]
        if missing:
            raise BadImage(f"has no file of the band {', '.join(missing)}")
        if not self._whole:
            return self._compared(files)
        # A folder may hold a million small scenes: what the other bands say is found when they are read, by many processes.
        first = read_header(self.place, files[0])
        return replace(first, dtypes=first.dtypes[:1] * len(files))

    def _compared(self, files: tuple[str, ...]) -> Header:
        headers = [read_header(self.place, name) for name in files]
        first = headers[0]
        for name, header in zip(files, headers, strict=True):
            if header.num_bands != 1:
                raise BadImage(f"'{name}' has {header.num_bands} bands; one file for each band is wanted")
            if (header.width, header.height) != (first.width, first.height):
                raise BadImage(
                    f"'{name}' has {header.width} x {header.height} pixels and '{files[0]}' {first.width} x {first.height}; "
                    "choose bands of one size with --bands, or bring them to one size"
                )
            check_grid(first, header, f"'{name}'")
        return replace(first, dtypes=tuple(header.dtypes[0] for header in headers))

    def read(self, files: tuple[str, ...], window: list[int]) -> tuple[Pixels, npt.NDArray[np.bool_]]:
        self._compared(files)
        bands, known = zip(*(read_tile(self.place, name, [1], window) for name in files), strict=True)
        values = np.concatenate([band.values for band in bands], axis=2)
        in_bands = np.concatenate([band.known for band in bands], axis=2)
        fill, frames = tuple(band.fill[0] for band in bands), max(band.frames for band in bands)
        return Pixels(values, in_bands, fill, frames=frames), np.any(known, axis=0)


def _open(where: str, options: SourceOptions) -> RasterSource:
    rasters, names = options.raster, options.raster.band_names()
    if "://" not in where and os.path.exists(where) and not is_folder(where):
        raise UserError(
            f"--bands {rasters.bands} names the files of a folder with one file for each band, and '{where}' is no folder."
        )
    if not rasters.tile and (rasters.stride or rasters.edge != "drop"):
        flag = f"--stride {rasters.stride}" if rasters.stride else f"--edge {rasters.edge}"
        raise UserError(f"{flag} goes with --tile N, which cuts the scenes into tiles.")
    return RasterSource(where, rasters, mask_folder(options), BandFiles(where, names, whole=not rasters.tile))


KIND = SourceKind(
    "bands",
    "with --bands and names a folder with one file for each band",
    lambda where, options: bool(options.raster.band_names()),
    _open,
    ("raster",),
)
