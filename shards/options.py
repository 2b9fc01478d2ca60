"""The options that belong to one kind of source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

NO_COLUMN = "none"  # switches off the search for a column


@dataclass(frozen=True)
class ListOptions:
    """Of a list: CSV, TSV or Parquet with one image a row."""

    path_column: Annotated[str, tyro.conf.arg(metavar="NAME")] = ""
    """Column of the paths. Left out: the first of path, image, file, filename, url and the like."""
    label_column: Annotated[str, tyro.conf.arg(metavar="NAME")] = ""
    """Column of the class labels. Left out: label, class or the like, where there is one; none: no labels."""
    mask_column: Annotated[str, tyro.conf.arg(metavar="NAME")] = ""
    """Column of the masks' paths. Left out: mask or the like, where there is one; none: no masks."""
    group_column: Annotated[str, tyro.conf.arg(metavar="NAME")] = ""
    """Column of what a split must not tear apart. Left out: group, where there is one; none: no groups."""
    root: Annotated[str, tyro.conf.arg(metavar="FOLDER")] = ""
    """Folder or URL that relative paths start from. Left out: the folder of the list."""
