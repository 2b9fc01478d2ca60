"""What a shard folder holds: file names, the sample table's columns, the manifest."""

import dataclasses
import importlib.metadata
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from shards.errors import UserError
from shards.files import atomic_write

FORMAT_VERSION = 1
INDEX_VERSION = "v1.2"  # of DALI's webdataset index

MANIFEST = "manifest.json"
TABLE = "samples.parquet"
PLAN = "plan.parquet"
QUARANTINE = "quarantine.jsonl"
ROWS = ".rows"
LOCK = ".lock"

SCHEMA = pa.schema(
    [
        ("sample_id", pa.int64()),  # 0..N-1 without gaps, in shard order
        ("key", pa.string()),  # the members' name in the tar, before the dot
        ("shard", pa.int32()),  # number of the shard, as in its file name
        ("offset", pa.int64()),  # of the first byte of the image in the tar
        ("size", pa.int64()),  # bytes of the stored image
        ("ext", pa.string()),  # jpg, png or webp
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("channels", pa.int8()),  # 1 or 3
        ("label", pa.int32()),  # index into the manifest's classes, or null
        ("source", pa.string()),  # path below the source folder
        ("sha256", pa.string()),  # of the stored image, hexadecimal
        ("stored", pa.string()),  # "kept", or "re-encoded: " and why
    ]
)


def shard_name(shard: int) -> str:
    """The tar's file name: `shard-000012.tar`."""
    return f"shard-{shard:06d}.tar"


def index_name(shard: int) -> str:
    """The DALI index's file name: `shard-000012.idx`."""
    return f"shard-{shard:06d}.idx"


def rows_name(shard: int) -> str:
    """The file name, below `.rows`, that marks a shard as finished: `shard-000012.parquet`."""
    return f"shard-{shard:06d}.parquet"


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


@dataclass(frozen=True)
class Manifest:
    """The facts of a finished shard folder; written last, so its presence means that the folder is whole."""

    source: str  # the source folder's own name
    seed: int
    num_samples: int
    num_quarantined: int
    samples_per_shard: int  # planned, before bad images are left out
    classes: list[str]
    max_width: int
    max_height: int
    bytes: int  # of all tars
    shards: list[ShardFile]
    options_sha256: str
    tool_version: str = dataclasses.field(default_factory=tool_version)
    format_version: int = FORMAT_VERSION

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "Manifest":
        """Reads `manifest.json`; raises UserError when it is missing, damaged or of another version."""
        path = Path(folder) / MANIFEST
        try:
            fields: Any = json.loads(path.read_text(encoding="utf-8"))
            version = fields["format_version"]
            if version == FORMAT_VERSION:
                shards = [ShardFile(**shard) for shard in fields.pop("shards")]
                return cls(shards=shards, **fields)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(_no_manifest(path.parent)) from None
        except (ValueError, KeyError, TypeError) as fault:
            raise UserError(f"'{path}' is damaged ({fault}); convert to a new folder.") from fault
        raise UserError(
            f"'{path}' has format version {version}, this fastssl reads "
            f"{FORMAT_VERSION}; update fastssl or convert again."
        )

    def save(self, folder: str | os.PathLike) -> None:
        """Writes `manifest.json`, atomically; the same facts give the same bytes."""
        text = json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True, ensure_ascii=False)
        atomic_write(Path(folder) / MANIFEST, (text + "\n").encode())


def _no_manifest(folder: Path) -> str:
    if not folder.is_dir():
        return f"there is no folder '{folder}'; give the folder that `fastssl shard SOURCE DEST` made."
    if (folder / PLAN).exists():
        return f"the conversion into '{folder}' is unfinished; run the same `fastssl shard` command again."
    return f"'{folder}' holds no {MANIFEST}, so it is no shard folder; `fastssl shard SOURCE DEST` makes one."
