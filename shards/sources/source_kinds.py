"""Which kind of source a path means, and its options."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from shards.errors import UserError
from shards.sources.source_options import ListOptions, RasterOptions, TarOptions
from shards.sources.table_reader import SUFFIXES as LISTS

if TYPE_CHECKING:
    from shards.sources.source import Source
    from shards.storage.place import Place


def open_source(
    where: str,
    dest: Place,
    *,
    masks: str = "",
    mask_suffix: str = "",
    only: str = "",
    lists: ListOptions | None = None,
    rasters: RasterOptions | None = None,
    tars: TarOptions | None = None,
) -> Source:
    """The source that `where`, a path or URL, means.

    A list (CSV, TSV, Parquet); with `rasters.tile` a folder of rasters, or one; a tar, a pattern of tars or a folder of nothing but
    tars; a finished shard folder; else a folder of images. `masks`: a folder of masks with the images' relative names, followed by
    `mask_suffix`. `only`: which samples of a shard folder, see `reshard.read_only`. Raises UserError where the shards would lie inside
    the source, and where an option does not go with it.
    """
    from shards.images.mask_images import MaskFolder
    from shards.sources.source import FolderSource
    from shards.storage.place import open_place

    if mask_suffix and not masks:
        raise UserError(f"--mask-suffix '{mask_suffix}' needs --masks FOLDER.")
    lists, rasters, tars = lists or ListOptions(), rasters or RasterOptions(), tars or TarOptions()
    kind = _kind(where, rasters, lists)
    if kind not in ("list", "parquet"):
        _refuse(lists, f"a list ({', '.join(LISTS)})", where)
    if kind != "tars":
        _refuse(tars, "tars", where)
    if kind != "rasters":
        what = ("rasters", where) if rasters.tile else ("--tile N, which cuts rasters into tiles", "")
        _refuse(rasters, *what)
    if only and kind != "shards":
        raise UserError(f"--only {only} goes with a finished shard folder, and '{where}' is none.")
    if masks and kind in ("list", "parquet"):
        raise UserError("--masks goes with a folder; in a list, --mask-column names the column of the masks.")
    if masks and kind in ("tars", "shards"):
        raise UserError(f"--masks goes with a folder of images or rasters; '{where}' has its masks inside.")
    if kind == "list":
        from shards.sources.file_list import ListSource

        return ListSource(where, lists)
    folder = MaskFolder(open_place(masks), mask_suffix) if masks else None
    if kind == "rasters":
        from shards.sources.raster_tiles import RasterSource

        source = RasterSource(where, rasters, folder)
        whole = not source.one
    elif kind == "tars":
        from shards.sources.tar import TarSource

        source = TarSource(where, tars)
        whole = source.files.searches
    elif kind == "parquet":
        from shards.sources.parquet_images import ImageTableSource

        source = ImageTableSource(where, lists)
        whole = source.files.searches
    elif kind == "shards":
        from shards.sources.shard_folder import ShardFolderSource, read_only

        check_apart(open_place(where), dest)
        return ShardFolderSource(where, read_only(where, only) if only else None)
    else:
        source, whole = FolderSource(open_place(where), folder), True
    if whole:
        check_apart(source.place, dest)
    return source


def _kind(where: str, rasters: RasterOptions, lists: ListOptions) -> str:
    from shards.sources.file_set import holds_only, is_pattern
    from shards.sources.shard_folder import is_shard_folder
    from shards.sources.source import SUFFIXES as IMAGES
    from shards.storage.place import open_place

    if not _is_folder(where):
        name = where.partition("?")[0].lower()
        if name.endswith(LISTS) and not (name.endswith(".parquet") and _holds_images(where, lists)):
            return "list"
        if rasters.tile:
            return "rasters"
        if name.endswith(".parquet"):
            return "parquet"
        if is_pattern(where) and name.endswith(IMAGES):
            raise UserError(
                f"'{where}': a pattern names tars or Parquet files; of images give the folder, and all in it and below count."
            )
        if name.endswith(".tar") or is_pattern(where):
            return "tars"
    if rasters.tile:
        return "rasters"
    if os.path.isfile(where):
        raise UserError(
            f"'{where}' is one file: SOURCE is a folder, a list ({', '.join(LISTS)}) or a .tar; one raster needs --tile N."
        )
    place = open_place(where)
    if is_shard_folder(place):
        return "shards"
    if holds_only(place, ".parquet"):
        return "parquet"
    return "tars" if holds_only(place, ".tar") else "folder"


def _holds_images(where: str, lists: ListOptions) -> bool:
    from shards.sources.file_set import is_pattern
    from shards.sources.parquet_columns import holds_images
    from shards.sources.source import split_url
    from shards.storage.place import open_place

    if is_pattern(where):
        return True
    folder, name = split_url(where)
    return holds_images(open_place(folder), name, lists)


def _is_folder(where: str) -> bool:
    return "://" not in where and os.path.isdir(where)


def _refuse(options: Any, what: str, where: str) -> None:
    """Raises UserError where any of the options of another kind of source is set."""
    plain = type(options)()
    for name, value in vars(options).items():
        if value != getattr(plain, name):
            none = f", and '{where}' is none" if where else ""
            raise UserError(f"--{name.replace('_', '-')} {value} goes with {what}{none}.")


def check_apart(source: Place, dest: Place) -> None:
    """Raises UserError when the shards would lie among the images or over them."""
    if source.local is None or dest.local is None:
        inside = dest.url.rstrip("/") == source.url.rstrip("/") or dest.url.startswith(
            source.url.rstrip("/") + "/"
        )
    else:
        inner, outer = dest.local.resolve(), source.local.resolve()
        inside = inner == outer or outer in inner.parents
    if inside:
        raise UserError(
            f"DEST '{dest.url}' lies inside SOURCE '{source.url}'; choose a folder outside of it for the shards."
        )
