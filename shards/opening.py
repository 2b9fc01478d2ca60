"""Which kind of source a path means, and its options."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shards.errors import UserError

if TYPE_CHECKING:
    from shards.places import Place
    from shards.sources import Source


def open_source(where: str, dest: Place, *, masks: str = "", mask_suffix: str = "") -> Source:
    """The source that `where` means: a folder of images, or a URL of one.

    `masks`: a folder of masks with the images' relative names, followed by `mask_suffix`. Raises UserError where the shards would lie
    inside the source, and where an option does not go with it.
    """
    from shards.masks import MaskFolder
    from shards.places import open_place
    from shards.sources import FolderSource

    if mask_suffix and not masks:
        raise UserError(f"--mask-suffix '{mask_suffix}' needs --masks FOLDER.")
    place = open_place(where)
    check_apart(place, dest)
    return FolderSource(place, MaskFolder(open_place(masks), mask_suffix) if masks else None)


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
