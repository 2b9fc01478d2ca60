"""The options that belong to one kind of source."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args, get_type_hints

import tyro

from shards.errors import UserError, nearest

MASK_ORIENTATIONS = ("auto", "file", "shown")
MAX_TILE = 16_384  # pixels a side
MAX_BANDS = 65_535
LABELS_FROM = ("auto", "sample", "folder", "folder:1", "tar", "none")
_BAND_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
NO_COLUMN = "none"  # switches off the search for a column


@dataclass(frozen=True)
class ListOptions:
    """Of a list: CSV, TSV or Parquet with one image a row, by its path or, in Parquet, as its bytes."""

    path_column: Annotated[str, tyro.conf.arg(metavar="NAME")] = ""
    """Column of the paths, or of the images. Left out: the first of path, image, file, filename, url and the like."""
    label_column: Annotated[str, tyro.conf.arg(metavar="NAME")] = ""
    """Column of the class labels. Left out: label, class or the like, where there is one; none: no labels."""
    mask_column: Annotated[str, tyro.conf.arg(metavar="NAME")] = ""
    """Column of the masks' paths. Left out: mask or the like, where there is one; none: no masks."""
    group_column: Annotated[str, tyro.conf.arg(metavar="NAME")] = ""
    """Column of groups that a split must keep together. Left out: group, where there is one; none: no groups."""
    root: Annotated[str, tyro.conf.arg(metavar="FOLDER")] = ""
    """Folder or URL that relative paths start from. Left out: the folder of the list."""


@dataclass(frozen=True)
class TarOptions:
    """Of tars."""

    label_from: Annotated[str, tyro.conf.arg(metavar="auto|sample|folder[:N]|tar|none")] = "auto"
    """Class of an image: what its .json or .cls says; the folder that holds it (folder:1: the first of its path); its tar's name.
    auto: what the sample says; in archives of images alone the folder, or the name of the tar within the tar."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"auto|sample|folder(:[1-9]\d?)?|tar|none", self.label_from):
            hint = nearest(self.label_from, LABELS_FROM)
            raise UserError(f"There is no --label-from '{self.label_from}'.{hint}")


@dataclass(frozen=True)
class RasterOptions:
    """Of rasters (GeoTIFF and what else rasterio opens), which are cut into tiles."""

    tile: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """Cuts each raster into tiles of N x N pixels; 0: SOURCE holds images, not rasters."""
    stride: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """Pixels from one tile's begin to the next one's; 0: as --tile, so that they do not overlap."""
    edge: Literal["drop", "pad", "shift"] = "drop"
    """At the right and lower edge: tiles that reach beyond it are dropped, padded with nodata, or shifted back inside."""
    nodata_max: Annotated[float, tyro.conf.arg(metavar="SHARE")] = 0.5
    """Tiles with a larger share of pixels without data are quarantined: 0 to 1."""
    bands: Annotated[str, tyro.conf.arg(metavar="N,N,..|NAME,..")] = ""
    """Bands to take, in this order: numbers from 1 on, as 4,3,2 (left out: all), or the names that end the files of a folder with one
    file for each band, as B04,B03,B02; these need no --tile."""

    def __post_init__(self) -> None:
        for name in ("tile", "stride"):
            value = getattr(self, name)
            if not 0 <= value <= MAX_TILE:
                raise UserError(f"--{name} is {value}, but it must be between 1 and {MAX_TILE}.")
        if self.edge not in get_args(get_type_hints(type(self))["edge"]):
            raise UserError(f"There is no --edge '{self.edge}'. Known: drop, pad, shift.")
        if not 0 <= self.nodata_max <= 1:
            raise UserError(f"--nodata-max is {self.nodata_max}, but it must be between 0 and 1.")
        self.band_names()

    def band_numbers(self) -> list[int]:
        """The bands to take, from 1; empty for all, and where they are names."""
        return [] if self.band_names() else [int(part) for part in self._bands()]

    def band_names(self) -> list[str]:
        """The names of the bands to take; empty where they are numbers. Raise UserError for anything else."""
        parts = self._bands()
        if all(part.isdecimal() and 1 <= int(part) <= MAX_BANDS for part in parts):
            return []
        if not all(_BAND_NAME.fullmatch(part) and not part.isdecimal() for part in parts):
            raise UserError(
                f"--bands is '{self.bands}', but it must be numbers from 1 on with commas, such as 4,3,2, or the names of bands, such "
                "as B04,B03,B02."
            )
        if len({part.lower() for part in parts}) < len(parts):
            raise UserError(f"--bands is '{self.bands}', but a name can stand in it once only.")
        return parts

    def _bands(self) -> list[str]:
        return [part.strip() for part in self.bands.split(",")] if self.bands else []


@dataclass(frozen=True)
class SourceOptions:
    """How a source is read: the options of `fastssl shard` that say what SOURCE means. A kind of source refuses those of another."""

    list: ListOptions = field(default_factory=ListOptions)
    tar: TarOptions = field(default_factory=TarOptions)
    raster: RasterOptions = field(default_factory=RasterOptions)
    masks: Annotated[str, tyro.conf.arg(metavar="FOLDER")] = ""
    """Folder of masks (class indices) with the images' relative names; for segmentation."""
    mask_suffix: Annotated[str, tyro.conf.arg(metavar="TEXT")] = ""
    """What follows an image's name in its mask's name, such as _mask."""
    mask_orientation: Annotated[str, tyro.conf.arg(metavar="auto|file|shown")] = "auto"
    """How masks lie whose photos EXIF turns: as the file does, or as the photo is shown. auto: by the size; where that is the
    same both ways, the photo is quarantined."""
    only: Annotated[str, tyro.conf.arg(metavar="IDS|SPLIT")] = ""
    """Of a finished shard folder as SOURCE: the samples to take, as a file (one sample_id a line, or Parquet) or a split's name."""

    def __post_init__(self) -> None:
        if self.mask_orientation not in MASK_ORIENTATIONS:
            hint = nearest(self.mask_orientation, MASK_ORIENTATIONS)
            raise UserError(f"There is no --mask-orientation '{self.mask_orientation}'.{hint}")
