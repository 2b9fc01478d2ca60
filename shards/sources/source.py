"""What can be converted: the shape every kind of source has, and the plainest kind, a folder of images."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shards.errors import UserError
from shards.images.pixels import BadImage

if TYPE_CHECKING:
    from shards.images.mask_images import MaskFolder
    from shards.storage.place import Place

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".npy")
SPLITS = {"train", "val", "valid", "validation", "test"}
MAX_FILE_BYTES = 2 * 2**30
BATCH_ROWS = 1 << 16

ENTRIES = pa.schema(
    [
        (
            "source",
            pa.string(),
        ),  # unique, and what messages call the image: `cats/1.jpg`, `scene.tif@384,768`
        ("path", pa.string()),  # file to read where that is not `source`
        (
            "window",
            pa.list_(pa.int64()),
        ),  # the part of the file, or null for all of it; its meaning is the kind's
        ("bytes", pa.int64()),  # planned; 0 where unknown
        ("label", pa.string()),
        ("mask", pa.string()),
        ("mask_window", pa.list_(pa.int64())),
        ("group", pa.string()),  # what may not be torn apart by a split
    ]
)


@dataclass
class Picture:
    """What a source gives of one entry: encoded bytes, or pixels (H, W, C); `facts` are those known only now."""

    data: bytes | npt.NDArray
    mask: bytes | npt.NDArray | None = None
    facts: dict[str, Any] = field(default_factory=dict)


class Source:
    """Images to convert. Workers get it pickled, so it holds names and options, no open files.

    `name` is its own name wherever it lies; `extra_schema` holds the columns beyond ENTRIES, typed, which are kept in the table and
    in each sample's JSON; `classes` are those that count even where no entry has them.
    """

    kind: ClassVar[str]
    name: str
    extra_schema: pa.Schema = pa.schema([])
    classes: Sequence[str] = ()

    def settings(self) -> dict[str, Any]:
        """All that decides the shards' bytes beside the listing of the entries: JSON values."""
        return {}

    def entries(self) -> Iterator[pa.RecordBatch]:
        """The listing: batches of at most BATCH_ROWS rows of ENTRIES and `extra_schema`, in any order.

        Raises UserError where the source is missing, cannot be read or holds no images.
        """
        raise NotImplementedError

    def units(self, batch: pa.RecordBatch) -> npt.NDArray[np.uint64] | None:
        """What is best read together: entries with the same number, (N,) uint64, follow one another in the plan, shuffled among
        themselves. None: each stands alone."""
        return None

    def read(self, row: dict[str, Any]) -> Picture:
        """One entry. Raises BadImage for what is wrong with it alone, UserError where the whole source has gone away."""
        raise NotImplementedError

    def describe(self) -> list[str]:
        """After `entries`: what it was understood to be, a sentence each."""
        return []

    def warnings(self) -> list[str]:
        """After `entries`: what was left out and why, a sentence each."""
        return []

    def locate(self, source: str) -> str:
        """Where an entry stands in the source, such as its lines in a list; for messages."""
        return ""


def looks_like_splits(classes: list[str]) -> bool:
    """Whether the class folders are named as train/validation/test splits, so that labels would be these."""
    return bool(classes) and {name.lower() for name in classes} <= SPLITS


def entry_batch(columns: dict[str, Any], extra: pa.Schema | None = None) -> pa.RecordBatch:
    """A batch of ENTRIES (and `extra`) from columns by name, each a list or an array; those not given are null."""
    schema = pa.schema([*ENTRIES, *(extra or [])])
    num_rows = len(columns["source"])
    arrays = []
    for column in schema:
        values = columns.get(column.name)
        if values is None:
            arrays.append(pa.nulls(num_rows, column.type))
        elif isinstance(values, pa.Array):
            arrays.append(values.cast(column.type))
        else:
            arrays.append(pa.array(values, column.type))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def split_url(where: str) -> tuple[str, str]:
    """A file's path or URL as (folder, name); a query belongs to the name."""
    if "://" not in where:
        folder, name = os.path.split(where)
        return folder or ".", name
    head, mark, query = where.partition("?")
    folder, _, name = head.rpartition("/")
    return folder, name + mark + query


def read_file(place: Place, name: str, planned_bytes: int, offset: int | None = None) -> bytes:
    """A whole file of a source, or `planned_bytes` from `offset` on.

    Raises BadImage where it cannot be read, UserError where the source has gone away.
    """
    if planned_bytes > MAX_FILE_BYTES:
        raise BadImage(f"{planned_bytes} bytes, more than the limit of {MAX_FILE_BYTES}")
    try:
        if offset is not None:
            return place.read_range(name, offset, planned_bytes)
        return place.read(name, planned_bytes)
    except OSError as fault:
        # One bad file is set aside; a disk that went away must not set aside all the rest.
        if not place.is_there():
            raise UserError(
                f"the folder '{place.url}' has gone away; bring it back and run the same command again."
            ) from fault
        raise BadImage(f"cannot be read: {fault.strerror or fault}") from fault


class FolderSource(Source):
    """All images below a folder, found by their names; an image's label is the first folder of its path.

    Follows links to folders; skips hidden names and `__MACOSX`. `masks`: a second folder with masks of the same relative names.
    """

    kind = "folder"

    def __init__(self, place: Place, masks: MaskFolder | None = None):
        self.place = place
        self.masks = masks
        self.name = place.name
        self._others: Counter[str] = Counter()
        self._example = ""

    def settings(self) -> dict[str, Any]:
        """The rule by which masks are found, where there are any."""
        return {"masks": self.masks.settings()} if self.masks else {}

    def entries(self) -> Iterator[pa.RecordBatch]:
        """See `Source.entries`; also raises UserError for a name that is not valid UTF-8."""
        self.place.check_folder("SOURCE")
        self._others.clear()
        names: list[str] = []
        sizes: list[int] = []
        found = False
        for name, size in self.place.walk():
            suffix = os.path.splitext(name)[1].lower()
            if suffix not in SUFFIXES:
                self._others[suffix or "without extension"] += 1
                if suffix in (".tar", ".parquet"):
                    self._example = "*/" * name.count("/") + f"*{suffix}"
                continue
            found = True
            names.append(name)
            sizes.append(size)
            if len(names) == BATCH_ROWS:
                yield self._batch(names, sizes)
                names, sizes = [], []
        if names:
            yield self._batch(names, sizes)
        if found and self.masks:
            self.masks.check()
        if not found:
            raise UserError(nothing_found(self.place.url, self._others, example=self._example))

    def _batch(self, names: list[str], sizes: list[int]) -> pa.RecordBatch:
        labels = [name.partition("/")[0] if "/" in name else None for name in names]
        masks = [self.masks.find(name) for name in names] if self.masks else None
        return entry_batch(
            {"source": names, "bytes": np.array(sizes, np.int64), "label": labels, "mask": masks}
        )

    def read(self, row: dict[str, Any]) -> Picture:
        """The file's bytes, and its mask's."""
        data = read_file(self.place, row["source"], row["bytes"])
        mask = self.masks.read(row["mask"]) if self.masks and row["mask"] else None
        return Picture(data, mask)

    def describe(self) -> list[str]:
        """What lies in the folder beside the images."""
        kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in self._others.most_common(5))
        return [f"Other files are left out, by their names: {kinds}."] if kinds else []

    def warnings(self) -> list[str]:
        """Masks without image and images without mask."""
        return self.masks.warnings() if self.masks else []


_WAYS_OUT = {
    ".arrow": "save a Hugging Face data set with its `to_parquet`",
    **dict.fromkeys((".tar", ".parquet"), "tars and Parquet files in folders below are named by a pattern"),
    **dict.fromkeys(
        (".zip", ".gz", ".tgz", ".xz", ".zst", ".7z"), "unpack archives, or give them as plain .tar"
    ),
    **dict.fromkeys((".heic", ".heif", ".avif", ".jxl", ".gif"), "turn these into JPEG or PNG first"),
}


def nothing_found(
    where: str,
    others: Counter[str],
    what: str = "images",
    suffixes: tuple[str, ...] = SUFFIXES,
    example: str = "",
) -> str:
    """What to say of a folder without images; `others` counts what it holds, by suffix; `example`: a file below, for a pattern."""
    if not others:
        return f"'{where}' is empty: it holds no {what} and no other files (hidden ones do not count)."
    seen = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5))
    noun = "file" if others.total() == 1 else "files"
    text = f"'{where}' holds no {what}, only {others.total()} other {noun} ({seen}); {what} are files named {', '.join(suffixes)}."
    for way_out in dict.fromkeys(
        _WAYS_OUT[suffix] for suffix, _ in others.most_common() if suffix in _WAYS_OUT
    ):
        pattern = f": '{where.rstrip('/')}/{example}'" if "pattern" in way_out and example else ""
        text += f" {way_out[0].upper()}{way_out[1:]}{pattern}."
    return text
