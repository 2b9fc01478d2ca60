"""Which kind of source a path means, and its options."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shards.errors import UserError
from shards.options import ListOptions, RasterOptions

if TYPE_CHECKING:
    from shards.places import Place
    from shards.sources import Source


def open_source(
    where: str,
    dest: Place,
    *,
    masks: str = "",
    mask_suffix: str = "",
    lists: ListOptions | None = None,
    rasters: RasterOptions | None = None,
) -> Source:
    """The source that `where`, a path or URL, means.

    A folder of images; a list (CSV, TSV, Parquet); with `rasters.tile` a folder of rasters, or one. `masks`: a folder of masks with
    the images' relative names, followed by `mask_suffix`. Raises UserError where the shards would lie inside the source, and where an
    option does not go with it.
    """
    from shards.list_files import SUFFIXES as LISTS
    from shards.lists import ListSource
    from shards.masks import MaskFolder
    from shards.places import open_place
    from shards.rasters import RasterSource
    from shards.sources import FolderSource

    if mask_suffix and not masks:
        raise UserError(f"--mask-suffix '{mask_suffix}' needs --masks FOLDER.")
    lists, rasters = lists or ListOptions(), rasters or RasterOptions()
    if where.partition("?")[0].lower().endswith(LISTS) and not _is_folder(where):
        if masks:
            raise UserError(
                "--masks goes with a folder; in a list, --mask-column names the column of the masks."
            )
        _refuse(rasters, "rasters", where)
        return ListSource(where, lists)
    _refuse(lists, f"a list ({', '.join(LISTS)})", where)
    folder = MaskFolder(open_place(masks), mask_suffix) if masks else None
    if rasters.tile:
        source = RasterSource(where, rasters, folder)
        if not source.one:
            check_apart(source.place, dest)
        return source
    _refuse(rasters, "--tile N, which cuts rasters into tiles", "")
    place = open_place(where)
    check_apart(place, dest)
    return FolderSource(place, folder)


def _is_folder(where: str) -> bool:
    import os

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
