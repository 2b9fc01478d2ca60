"""The table of the kinds of sources, and how a path or URL finds its row."""

from __future__ import annotations

import dataclasses
from typing import Any

from shards.errors import UserError
from shards.sources import (
    band_files,
    file_list,
    image_folder,
    parquet_images,
    raster_tiles,
    shard_folder,
    tar,
)
from shards.sources.source import Source, SourceKind
from shards.sources.source_options import SourceOptions
from shards.sources.table_reader import TABLE_SUFFIXES
from shards.storage.place import Place

# The first row that matches is taken; a new kind of source is its file and a line here.
SOURCES: dict[str, SourceKind] = {
    kind.name: kind
    for kind in (
        band_files.KIND,
        raster_tiles.KIND,
        shard_folder.KIND,
        parquet_images.KIND,
        file_list.KIND,
        tar.KIND,
        image_folder.KIND,
    )
}
# What the fields of SourceOptions go with, for messages.
_GOES_WITH = {
    "list": f"a list ({', '.join(TABLE_SUFFIXES)})",
    "tar": "tars",
    "raster": "rasters",
    "only": "a finished shard folder",
}


def open_source(where: str, options: SourceOptions | None = None) -> Source:
    """Return the source that `where`, a path or URL, means; see `SOURCES`.

    Raise UserError for options that do not go with it, and where it cannot be opened.
    """
    options = options or SourceOptions()
    if options.mask_suffix and not options.masks:
        raise UserError(f"--mask-suffix '{options.mask_suffix}' needs --masks FOLDER.")
    kind = next(kind for kind in SOURCES.values() if kind.matches(where, options))
    _check_options(kind, where, options)
    source = kind.open(where, options)
    source.mask_orientation = options.mask_orientation
    return source


def _check_options(kind: SourceKind, where: str, options: SourceOptions) -> None:
    for name, what in _GOES_WITH.items():
        value: Any = getattr(options, name)
        if name in kind.options:
            continue
        none = f", and '{where}' is none"
        if name == "raster" and not options.raster.tile:
            what, none = "--tile N, which cuts rasters into tiles", ""
        for option, given in (vars(value) if dataclasses.is_dataclass(value) else {name: value}).items():
            if given != (getattr(type(value)(), option) if dataclasses.is_dataclass(value) else ""):
                raise UserError(f"--{option.replace('_', '-')} {given} goes with {what}{none}.")
    if options.masks and kind.no_masks:
        raise UserError(f"--masks {kind.no_masks.format(where=where)}.")


def check_apart(source: Source, dest: Place) -> None:
    """Raise UserError when the shards would lie among the images or over them."""
    searched = source.searched
    if searched is None:
        return
    if searched.local is None or dest.local is None:
        outside = searched.url.rstrip("/")
        inside = dest.url.rstrip("/") == outside or dest.url.startswith(outside + "/")
    else:
        inner, outer = dest.local.resolve(), searched.local.resolve()
        inside = inner == outer or outer in inner.parents
    if inside:
        raise UserError(
            f"DEST '{dest.url}' lies inside SOURCE '{searched.url}'; choose a folder outside of it for the shards."
        )
