"""Which column of a Parquet file holds the images themselves."""

from __future__ import annotations

import json

import pyarrow as pa

from shards.errors import UserError, did_you_mean
from shards.sources.file_list import USUAL, is_binary
from shards.sources.source_options import ListOptions
from shards.sources.table_reader import ParquetFile
from shards.storage.place import Place

NAMES = (
    "image",
    "img",
    "picture",
    "photo",
    "pixel_values",
    "jpg",
    "jpeg",
    "png",
    "webp",
    "bytes",
    "image_bytes",
    "content",
    "data",
)


def is_image(kind: pa.DataType) -> bool:
    """Whether a column may hold encoded images: binary data, or a struct with such a field `bytes`."""
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and is_image(kind.field("bytes").type)
    return is_binary(kind) and not pa.types.is_fixed_size_binary(kind)


def has_path(kind: pa.DataType) -> bool:
    """Whether a column of images also holds the path of each."""
    return pa.types.is_struct(kind) and kind.get_field_index("path") >= 0


def choose_image(table: ParquetFile, images: list[str], options: ListOptions) -> str:
    """The column of images: the one wanted, else the first usual one, else the only one; UserError where that is none."""
    wanted = options.path_column
    if wanted and wanted not in images:
        if wanted in table.columns:
            raise UserError(
                f"'{table.where}': --path-column '{wanted}' holds {table.columns[wanted]}, no images."
            )
        raise UserError(
            f"'{table.where}' has no column '{wanted}' (--path-column). It has: {', '.join(table.columns)}."
            + did_you_mean(wanted, table.columns)
        )
    if wanted:
        return wanted
    lowered = {name.lower(): name for name in images if name.lower() not in USUAL["mask"]}
    found = [lowered[name] for name in NAMES if name in lowered] or list(lowered.values())
    if not found:
        raise UserError(
            f"'{table.where}' has no column of images: binary data, or a struct with `bytes`. It has: "
            f"{', '.join(table.columns)}. A list of paths is read from one file, not from several."
        )
    if len(found) > 1 and found[0].lower() not in NAMES:
        raise UserError(
            f"'{table.where}' has several columns of images: {', '.join(found)}; choose one, --path-column NAME."
        )
    return found[0]


def class_names(schema: pa.Schema, label: str) -> list[str]:
    """The names of a Hugging Face `ClassLabel`; none where a file's schema tells none."""
    about = schema.metadata or {}
    try:
        names = json.loads(about[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, ValueError, TypeError):
        return []
    return [str(one) for one in names] if isinstance(names, list) else []


def holds_images(place: Place, name: str, options: ListOptions) -> bool:
    """Whether a Parquet file is a table of images, rather than a list of their paths."""
    if not place.exists(name):
        return False
    table = ParquetFile(place, name, place / name)
    kinds = table.columns
    images = [column for column, kind in kinds.items() if kind is not None and is_image(kind)]
    if options.path_column:
        return options.path_column in images
    if any(pa.types.is_struct(kinds[column]) for column in images):
        return True
    lowered = {column.lower(): column for column in kinds}
    path = next((lowered[usual] for usual in USUAL["path"] if usual in lowered), None)
    return bool(images) and (path is None or path in images)
