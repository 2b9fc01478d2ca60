"""The plan of a conversion: every source image in its shuffled place, and the settings that decided it."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shards.errors import UserError
from shards.files import atomic_write
from shards.layout import FORMAT_VERSION, PLAN
from shards.order import PLAN_TAG, epoch_order
from shards.sources import Sources

_FIELDS = [("position", pa.int64()), ("source", pa.string()), ("label", pa.int32()), ("bytes", pa.int64())]


@dataclass(frozen=True)
class Settings:
    """All that the bytes of the shards depend on, beside the images themselves."""

    source: str
    num_images: int
    listing_sha256: str  # of all paths and sizes
    seed: int
    samples_per_shard: int
    format_version: int = FORMAT_VERSION

    def sha256(self) -> str:
        """One hash of all settings, hexadecimal."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Plan:
    """A written plan; its rows are read shard by shard, since there may be millions."""

    path: Path
    settings: Settings
    classes: list[str]

    @property
    def num_shards(self) -> int:
        return -(-self.settings.num_images // self.settings.samples_per_shard)

    def num_rows(self, shard: int) -> int:
        """The number of images planned for a shard: `samples_per_shard`, and in the last what is left."""
        size = self.settings.samples_per_shard
        return min(size, self.settings.num_images - shard * size)

    def rows(self, shard: int) -> pa.Table:
        """The shard's rows: position int64, source string, label int32 or null, bytes int64."""
        with pq.ParquetFile(self.path) as file:
            return file.read_row_group(shard, use_threads=False)


def default_samples_per_shard(num_images: int) -> int:
    """64 shards, of 128 to 4096 samples: a function of the number of images only, so never of the machine."""
    return min(max(-(-num_images // 64), 128), 4096)


def settings_for(source: Path, sources: Sources, seed: int, samples_per_shard: int | None) -> Settings:
    """The settings of a conversion of `sources`; the folder counts by its own name, wherever it lies."""
    return Settings(
        source=source.resolve().name,
        num_images=len(sources),
        listing_sha256=_listing_sha256(sources),
        seed=seed,
        samples_per_shard=samples_per_shard or default_samples_per_shard(len(sources)),
    )


def write_plan(dest: Path, sources: Sources, settings: Settings) -> Plan:
    """Permutes the sources once and writes `plan.parquet`, one row group a shard."""
    num_images = len(sources)
    rows = epoch_order(num_images, settings.seed, 0, PLAN_TAG)
    labels = sources.labels[rows]
    about = {"settings": json.dumps(dataclasses.asdict(settings)), "classes": json.dumps(sources.classes)}
    schema = pa.schema(_FIELDS, metadata=about)

    def write(file: BinaryIO) -> None:
        with pq.ParquetWriter(file, schema, compression="zstd") as writer:
            for start in range(0, num_images, settings.samples_per_shard):
                part = slice(start, start + settings.samples_per_shard)
                columns = [
                    pa.array(np.arange(num_images)[part]),
                    sources.paths.take(pa.array(rows[part])).cast(pa.string()),
                    pa.array(labels[part], mask=labels[part] < 0),
                    pa.array(sources.sizes[rows[part]]),
                ]
                writer.write_table(pa.Table.from_arrays(columns, schema=schema))

    atomic_write(dest / PLAN, write)
    return Plan(dest / PLAN, settings, sources.classes)


def read_plan(dest: Path) -> Plan:
    """Reads the settings of `plan.parquet`, not its rows; raises UserError when it is damaged."""
    path = dest / PLAN
    try:
        about = pq.read_schema(path).metadata
        settings = Settings(**json.loads(about[b"settings"]))
        return Plan(path, settings, json.loads(about[b"classes"]))
    except (pa.ArrowInvalid, KeyError, TypeError, ValueError) as fault:
        raise UserError(f"'{path}' is damaged ({fault}); convert to a new folder.") from fault


def check_same(plan: Plan, wanted: Settings) -> None:
    """Raises UserError, naming the first setting that differs, unless the plan was made with `wanted`."""
    way_out = "Give a new DEST, or delete this one."
    for field in dataclasses.fields(Settings):
        was, now = getattr(plan.settings, field.name), getattr(wanted, field.name)
        if was == now:
            continue
        where = f"'{plan.path.parent}' was begun with"
        if field.name == "listing_sha256":
            raise UserError(
                f"{where} {wanted.num_images} images of '{wanted.source}' whose names or sizes have changed "
                f"since (listing {was[:12]} then, {now[:12]} now). {way_out}"
            )
        raise UserError(
            f"{where} {field.name.replace('_', ' ')} {was!r}, this command has {now!r}. {way_out}"
        )


def _listing_sha256(sources: Sources) -> str:
    _, offsets, text = sources.paths.buffers()
    digest = hashlib.sha256()
    ends = np.frombuffer(offsets, np.int64)[: len(sources) + 1]
    digest.update(ends.tobytes())
    digest.update(memoryview(text)[: int(ends[-1])])
    digest.update(sources.sizes.tobytes())
    return digest.hexdigest()
