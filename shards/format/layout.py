"""What a shard folder holds: file names, the sample table's columns, the manifest."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import re
import reprlib
import typing
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa

from shards.errors import UserError
from shards.storage.opening import open_place
from shards.storage.place import Place

T = TypeVar("T")

FORMAT_VERSION = 2
INDEX_VERSION = "v1.2"  # of DALI's webdataset index

MANIFEST = "manifest.json"
TABLE = "samples.parquet"
PLAN = "plan.parquet"
QUARANTINE = "quarantine.jsonl"
DROPPED = "dropped.parquet"
SPLITS = "splits.parquet"
LABELS = "labels.parquet"
SUMS = "SHA256SUMS"
ROWS = ".rows"
LOCK = ".lock"
MASK_EXT = "mask.png"
_SHARD_FILE = re.compile(r"shard-(\d{6,})\.(?:tar|idx)")

SCHEMA = pa.schema(
    [
        ("sample_id", pa.int64()),  # 0..N-1 without gaps, in shard order
        ("key", pa.string()),  # the members' name in the tar, before the dot
        ("shard", pa.int32()),  # number of the shard, as in its file name
        ("offset", pa.int64()),  # of the first byte of the image in the tar
        ("size", pa.int64()),  # bytes of the stored image
        ("ext", pa.string()),  # jpg, png, webp or npy
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("channels", pa.int16()),
        ("dtype", pa.string()),  # uint8, uint16 or float32
        ("label", pa.int32()),  # index into the manifest's classes, or null
        ("mask_offset", pa.int64()),  # of the mask's first byte in the tar, or null
        ("mask_size", pa.int64()),
        ("group", pa.string()),  # what a split may not tear apart, or null
        ("source", pa.string()),  # what the source calls it, such as the path below the source folder
        ("sha256", pa.string()),  # of the stored image, hexadecimal
        ("pixels_hash", pa.string()),  # XXH3, 128 bit, equal where the pixels are: see `duplicates`
        ("duplicate_of", pa.int64()),  # the first sample with the same pixels, or null
        ("stored", pa.string()),  # "kept", or "re-encoded: " and why
        # of all the sample's bytes in the tar, from its first header to its last padding
        ("tar_crc32", pa.uint32()),
    ]
)


def shard_name(shard: int) -> str:
    """The tar's file name: `shard-000012.tar`."""
    return f"shard-{shard:06d}.tar"


def index_name(shard: int) -> str:
    """The DALI index's file name: `shard-000012.idx`."""
    return f"shard-{shard:06d}.idx"


def shard_number(name: str) -> int:
    """The shard's number, from the name of one of its files."""
    return int(name.removeprefix("shard-").partition(".")[0])


def shard_of(name: str) -> int | None:
    """The number of the shard whose tar or index has this name; None for what is neither."""
    found = _SHARD_FILE.fullmatch(name)
    return int(found[1]) if found else None


def rows_name(shard: int) -> str:
    """The file name, below `.rows`, that marks a shard as finished: `shard-000012.parquet`."""
    return f"shard-{shard:06d}.parquet"


def plan_name(number: int) -> str:
    """The file name of a plan: `plan.parquet`, and `plan-001.parquet` of the first images that were appended."""
    return f"plan-{number:03d}.parquet" if number else PLAN


def dropped_name(number: int) -> str:
    """The file name of what plan `number` left out: `dropped.parquet`, `dropped-001.parquet`, ..."""
    return f"dropped-{number:03d}.parquet" if number else DROPPED


def sample_key(position: int) -> str:
    """The key of the sample at this position of the plan: digits only, so no reader splits it wrongly."""
    return f"{position:09d}"


def tool_version() -> str:
    """The version of the installed distribution."""
    try:
        return importlib.metadata.version("fastssl-pretrain")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


@dataclass(frozen=True)
class ShardFile:
    """One tar as it must lie in the folder."""

    name: str
    num_samples: int
    bytes: int
    sha256: str
    index_sha256: str = ""  # of its DALI index


@dataclass(frozen=True)
class Appended:
    """Images that were appended: where they came from, how they were planned, and what the folder was before."""

    source: str
    kind: str
    seed: int
    samples_per_shard: int
    first_shard: int
    before: str  # options_sha256 of the folder then
    num_samples_before: int
    dedupe: str


@dataclass(frozen=True)
class Manifest:
    """The facts of a finished shard folder; written last, so its presence means that the folder is whole."""

    source: str  # the source's own name
    kind: str  # folder, list, tars, ...
    seed: int
    num_samples: int
    num_quarantined: int
    num_duplicates: int  # marked or dropped
    dedupe: str
    samples_per_shard: int  # planned, before bad images are left out
    classes: list[str]
    channels: list[int]  # the numbers of channels that occur
    dtypes: list[str]
    num_masks: int
    max_width: int
    max_height: int
    bytes: int  # of all tars
    store: dict[str, Any]  # the policy
    statistics: dict[str, Any]  # per channel mean, std, percentiles: shards.images.channel_statistics
    shards: list[ShardFile]
    options_sha256: str
    appended: list[Appended] = dataclasses.field(default_factory=list)
    tool_version: str = dataclasses.field(default_factory=tool_version)
    format_version: int = FORMAT_VERSION

    @classmethod
    def load(cls, folder: str | os.PathLike | Place) -> Manifest:
        """Read `manifest.json`; raise UserError when it is missing, damaged or of another version."""
        place = open_place(folder)
        try:
            fields: Any = json.loads(place.read(MANIFEST))
            version = fields["format_version"]
            if version == FORMAT_VERSION:
                shards = [checked_fields(ShardFile, shard, "shards") for shard in fields.pop("shards")]
                appended = [checked_fields(Appended, part, "appended") for part in fields.pop("appended", [])]
                for shard in shards:
                    # A name out of a file that strangers may have written: with a path in it others' files would be read and mended.
                    if not shard.name.endswith(".tar") or shard_of(shard.name) is None:
                        raise ValueError(f"a shard is called {shard.name!r}, not as {shard_name(0)}")
                return checked_fields(cls, fields | {"shards": shards, "appended": appended}, "the manifest")
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(_no_manifest(place)) from None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"'{place / MANIFEST}' is damaged ({error}); convert to a new folder.") from error
        raise UserError(
            f"'{place / MANIFEST}' has format version {version}, this fastssl reads {FORMAT_VERSION}; convert again, "
            "or update fastssl where that is older."
        )

    def to_bytes(self) -> bytes:
        """The content of `manifest.json`; the same facts give the same bytes."""
        facts = dataclasses.asdict(self)
        if not self.appended:
            del facts["appended"]
        text = json.dumps(facts, indent=1, sort_keys=True, ensure_ascii=False)
        return (text + "\n").encode()

    @property
    def identities(self) -> list[str]:
        """`options_sha256` of the folder after each of its plans; the last is its own."""
        return [*(part.before for part in self.appended), self.options_sha256]

    def num_samples_at(self, identity: str) -> int | None:
        """The samples that the folder had when its `options_sha256` was this; None where it never was."""
        known = {part.before: part.num_samples_before for part in self.appended}
        return ({self.options_sha256: self.num_samples} | known).get(identity)

    def save(self, folder: str | os.PathLike | Place) -> None:
        """Write `manifest.json`, atomically."""
        open_place(folder).write(MANIFEST, self.to_bytes())


def checked_fields(kind: type[T], fields: Any, where: str) -> T:
    """Make a dataclass of what a JSON file holds; ValueError names the field that is missing, unknown or of another type."""
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: {type(fields).__name__} in the place of an object")
    types = typing.get_type_hints(kind)
    for name, value in fields.items():
        if name not in types:
            raise ValueError(f"{where}: unknown field {name!r}")
        _check_type(types[name], value, f"{where}: {name}")
    try:
        return kind(**fields)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from error


def _check_type(kind: Any, value: Any, where: str) -> None:
    outer, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    if outer is Any:
        return
    if not isinstance(value, outer) or (outer is int and isinstance(value, bool)):
        raise ValueError(f"{where} is {reprlib.repr(value)}, not {outer.__name__}")
    if outer is int and not -(2**63) <= value < 2**63:
        raise ValueError(f"{where} is {value}")
    for one in value if outer is list else ():
        _check_type(inner[0], one, where)


def is_appending(place: Place, manifest: Manifest) -> bool:
    """Whether images are being appended to a folder, or were until that was interrupted."""
    return place.exists(plan_name(len(manifest.identities)))


def check_size(where: str, found_bytes: int | None, expected_bytes: int) -> None:
    """Raise UserError unless the file `where` has the bytes that the manifest says; None where it is missing."""
    if found_bytes is None:
        raise UserError(f"'{where}' is missing; run the same `fastssl shard` command again to make it.")
    if found_bytes != expected_bytes:
        raise UserError(
            f"'{where}' has {found_bytes:,} bytes and should have {expected_bytes:,}; run the same `fastssl shard` command again to "
            "mend it."
        )


def _no_manifest(place: Place) -> str:
    if not place.is_there():
        return f"There is no folder '{place.url}'; give the folder that `fastssl shard SOURCE DEST` made."
    if place.exists(PLAN):
        return f"The conversion into '{place.url}' is unfinished; run the same `fastssl shard` command again."
    return (
        f"'{place.url}' holds no {MANIFEST}, so it is no shard folder; `fastssl shard SOURCE DEST` makes one."
    )
