"""What can be converted: the contract of every kind of source."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shards.errors import UserError
from shards.images.pixels import BadImage, Pixels

if TYPE_CHECKING:
    from shards.sources.source_options import SourceOptions
    from shards.storage.place import Place

MAX_FILE_BYTES = 2 * 2**30
BATCH_ROWS = 1 << 16

ENTRIES = pa.schema(
    [
        # unique, and what messages call the image: `cats/1.jpg`, `scene.tif@384,768`
        ("source", pa.string()),
        ("path", pa.string()),  # file to read where that is not `source`
        # the part of the file, or null for all of it; its meaning is the kind's
        ("window", pa.list_(pa.int64())),
        ("bytes", pa.int64()),  # planned; 0 where unknown
        ("label", pa.string()),
        ("mask", pa.string()),
        ("mask_window", pa.list_(pa.int64())),
        ("group", pa.string()),  # what may not be torn apart by a split
    ]
)


@dataclass
class Picture:
    """What a source gives of one entry: encoded bytes, or pixels (H, W, C); `facts` are those known only now.

    known, fill, alpha, cmyk, frames: of pixels, as in `Pixels`.
    """

    data: bytes | npt.NDArray
    mask: bytes | npt.NDArray | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    known: npt.NDArray[np.bool_] | None = None
    fill: tuple[float | None, ...] = ()
    alpha: bool = False
    cmyk: bool = False
    frames: int = 1

    @property
    def image(self) -> bytes | Pixels:
        """What `prove` takes."""
        if isinstance(self.data, bytes):
            return self.data
        return Pixels(self.data, self.known, self.fill, self.alpha, self.cmyk, self.frames)


class Source:
    """Images to convert. Workers get it pickled, so it holds names and options, no open files.

    kind: its key in `source_kinds.SOURCES`; name: its own name wherever it lies; extra_schema: the columns beyond ENTRIES, typed,
    which are kept in the table and in each sample's JSON; classes: those that count even where no entry has them, known after
    `entries`; searched: the folder all of whose files may be entries, so that the shards must not lie in it, or None.
    """

    kind: str
    name: str
    searched: Place | None = None
    extra_schema: pa.Schema = pa.schema([])
    classes: Sequence[str] = ()
    mask_orientation: str = "auto"
    """As `prove_mask` takes it."""
    noun = "image"
    """What an entry is called on the screen."""

    def settings(self) -> dict[str, Any]:
        """All that decides the shards' bytes beside the listing of the entries: JSON values."""
        return {}

    def entries(self) -> Iterator[pa.RecordBatch]:
        """The listing: batches of at most BATCH_ROWS rows of ENTRIES and `extra_schema`, in any order.

        Raise UserError where the source is missing, cannot be read or holds no images.
        """
        raise NotImplementedError

    def units(self, batch: pa.RecordBatch) -> npt.NDArray[np.uint64] | None:
        """What is best read together: entries with the same number, (N,) uint64, follow one another in the plan, shuffled among
        themselves. None: each stands alone."""
        return None

    def read(self, row: dict[str, Any]) -> Picture:
        """One entry. Raise BadImage for what is wrong with it alone, UserError where the whole source has gone away."""
        raise NotImplementedError

    def read_all(self, rows: Sequence[dict[str, Any]]) -> Iterator[Picture | BadImage]:
        """The entries in their order, and a BadImage for each that is bad. A source may read some ahead, in an order that suits it."""
        for row in rows:
            try:
                yield self.read(row)
            except BadImage as error:
                yield error

    def describe(self) -> list[str]:
        """After `entries`: what it was understood to be, a sentence each."""
        return []

    def warnings(self) -> list[str]:
        """After `entries`: what was left out and why, a sentence each."""
        return []

    def left_out(self) -> str:
        """After `entries`: how many files of which kinds are no entries, as in `9 .txt, 2 .heic`; "" for none."""
        return ""

    def locate(self, source: str) -> str:
        """Where an entry stands in the source, such as its lines in a list; for messages."""
        return ""


@dataclass(frozen=True)
class SourceKind:
    """A row of `source_kinds.SOURCES`: how a kind of source is recognised and opened.

    name: as `Source.kind`; what: what a path must be to mean it, for messages and documentation; matches: whether a path or URL means
    it, with these options; the first row that matches is taken; options: the fields of SourceOptions that it reads; no_masks: why
    --masks does not go with it, "" where it does.
    """

    name: str
    what: str
    matches: Callable[[str, SourceOptions], bool]
    open: Callable[[str, SourceOptions], Source]
    options: tuple[str, ...] = ()
    no_masks: str = ""


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


def read_file(place: Place, name: str, planned_bytes: int, offset: int | None = None) -> bytes:
    """A whole file of a source, or `planned_bytes` from `offset` on.

    Raise BadImage where it cannot be read, UserError where the source has gone away.
    """
    if planned_bytes > MAX_FILE_BYTES:
        raise BadImage(f"{planned_bytes} bytes, more than the limit of {MAX_FILE_BYTES}")
    try:
        if offset is not None:
            return place.read_range(name, offset, planned_bytes)
        return place.read(name, planned_bytes)
    except OSError as error:
        # One bad file is set aside; a disk that went away must not set aside all the rest.
        if not place.is_there():
            raise UserError(
                f"The folder '{place.url}' is no longer there; bring it back and run the same command again."
            ) from error
        raise BadImage(f"cannot be read: {error.strerror or error}") from error
