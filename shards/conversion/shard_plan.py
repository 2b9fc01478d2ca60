"""The plan of a conversion: every entry of the source in its shuffled place, and the settings that decided it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shards.conversion.listing import Listing, Survey
from shards.errors import UserError
from shards.format.layout import FORMAT_VERSION, plan_name
from shards.images.policy import Policy
from shards.sources.source import ENTRIES, Source
from shards.storage.place import Place

PLANNED = pa.schema(
    [("position", pa.int64()), *(field for field in ENTRIES if field.name != "label"), ("label", pa.int32())]
)


@dataclass(frozen=True)
class Settings:
    """All that the bytes of the shards depend on, beside the images themselves."""

    source: str
    kind: str
    num_images: int
    listing: str  # digest of all names, sizes and labels
    seed: int
    samples_per_shard: int
    dedupe: str
    store: dict[str, Any]
    source_settings: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    # Of images that are appended: `options_sha256` of the folder before, and `first_shard`, the number of the first new one.
    after: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """All settings as JSON; the same settings give the same text."""
        facts = dataclasses.asdict(self)
        if not self.after:
            del facts["after"]
        return json.dumps(facts, sort_keys=True)

    def sha256(self) -> str:
        """One hash of all settings, hexadecimal."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


@dataclass(frozen=True)
class Plan:
    """A written plan; its rows are read shard by shard, since there may be millions."""

    place: Place
    settings: Settings
    classes: list[str]
    num_bytes: int  # of the sources, as listed
    all_jpeg: bool  # by their names
    number: int = 0  # 0 of the folder's first images, 1 of the first that were appended, ...

    @property
    def num_shards(self) -> int:
        return -(-self.settings.num_images // self.settings.samples_per_shard)

    @property
    def first_shard(self) -> int:
        return self.settings.after.get("first_shard", 0)

    @property
    def shards(self) -> range:
        """The numbers of the shards. Position p of the plan lies in shard p // samples_per_shard, whatever the first one is."""
        return range(self.first_shard, self.first_shard + self.num_shards)

    def num_rows(self, shard: int) -> int:
        """The number of images planned for a shard: `samples_per_shard`, and in the last what is left."""
        size = self.settings.samples_per_shard
        return min(size, self.settings.num_images - (shard - self.first_shard) * size)

    def rows(self, shard: int) -> pa.Table:
        """The shard's rows: the columns of PLANNED and the source's extra columns."""
        with self.place.open(plan_name(self.number)) as file, pq.ParquetFile(file) as parquet:
            return parquet.read_row_group(shard - self.first_shard, use_threads=False)

    def extra_fields(self) -> list[pa.Field]:
        """The source's own columns."""
        with self.place.open(plan_name(self.number)) as file:
            schema = pq.read_schema(file)
        return extra_fields(schema)


def extra_fields(schema: pa.Schema) -> list[pa.Field]:
    """The columns of a plan that its source brought along."""
    return [column for column in schema if column.name not in PLANNED.names]


def default_samples_per_shard(num_images: int) -> int:
    """64 shards, of 128 to 4096 samples: a function of the number of images only, so never of the machine."""
    return min(max(-(-num_images // 64), 128), 4096)


def settings_for(
    source: Source,
    listing: Listing,
    seed: int,
    samples_per_shard: int | None,
    policy: Policy,
    dedupe: str,
    after: dict[str, Any] | None = None,
) -> Settings:
    """The settings of a conversion; the source counts by its own name, wherever it lies."""
    laid = source.mask_orientation
    return Settings(
        source=source.name,
        kind=source.kind,
        num_images=listing.num_images,
        listing=listing.digest,
        seed=seed,
        samples_per_shard=samples_per_shard or default_samples_per_shard(listing.num_images),
        dedupe=dedupe,
        store=dataclasses.asdict(policy),
        source_settings=source.settings() | ({} if laid == "auto" else {"mask_orientation": laid}),
        after=after or {},
    )


def write_plan(
    place: Place, survey: Survey, settings: Settings, number: int = 0, known_classes: Sequence[str] = ()
) -> Plan:
    """Write plan `number`, one row group a shard, from the survey's entries in their order.

    `known_classes` come first, with the numbers that they have.
    """
    new = [name for name in survey.listing.classes if name not in set(known_classes)]
    classes = [*known_classes, *new]
    about = {
        "settings": settings.to_json(),
        "classes": json.dumps(classes),
        "num_bytes": str(survey.listing.num_bytes),
        "all_jpeg": json.dumps(survey.listing.all_jpeg),
    }
    names = pa.array(classes, pa.string())
    first = settings.after.get("first_shard", 0) * settings.samples_per_shard

    def write(file: BinaryIO) -> None:
        writer = None
        for position, table in _in_shards(survey.ordered(), settings.samples_per_shard):
            labels = pc.index_in(table["label"], names)  # pyright: ignore[reportAttributeAccessIssue] (made at run time)
            positions = pa.array(first + np.arange(position, position + table.num_rows))
            extra = [column for column in table.schema if column.name not in ENTRIES.names]
            schema = pa.schema([*PLANNED, *extra], metadata=about)
            columns = {"position": positions, "label": labels}
            arrays = [columns[name] if name in columns else table[name] for name in schema.names]
            table = pa.table(arrays, schema=schema)
            if writer is None:
                writer = pq.ParquetWriter(file, schema, compression="zstd")
            writer.write_table(table, row_group_size=settings.samples_per_shard)
        assert writer is not None, "a listing is never empty"
        writer.close()

    place.write(plan_name(number), write)
    return Plan(place, settings, classes, survey.listing.num_bytes, survey.listing.all_jpeg, number)


def _in_shards(tables: Iterator[pa.Table], size: int) -> Iterator[tuple[int, pa.Table]]:
    """Cut the stream into tables of `size` rows (the last may be smaller), each with the position of its first row."""
    position = 0
    held: list[pa.Table] = []
    num_held = 0
    for table in tables:
        held.append(table)
        num_held += table.num_rows
        if num_held < size:
            continue
        whole = pa.concat_tables(held)
        start = 0
        while num_held - start >= size:
            yield position, whole.slice(start, size)
            position, start = position + size, start + size
        held, num_held = [whole.slice(start)], num_held - start
    if num_held:
        yield position, pa.concat_tables(held)


def read_plan(place: Place, number: int = 0) -> Plan:
    """Read the settings of plan `number`, not its rows; raise UserError when it is damaged."""
    try:
        with place.open(plan_name(number)) as file:
            about = pq.read_schema(file).metadata
        settings = Settings(**json.loads(about[b"settings"]))
        all_jpeg = json.loads(about.get(b"all_jpeg", b"false"))
        return Plan(
            place, settings, json.loads(about[b"classes"]), int(about[b"num_bytes"]), all_jpeg, number
        )
    except (pa.ArrowInvalid, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"'{place / plan_name(number)}' is damaged or of another version ({error}); convert to a new folder."
        ) from error


def check_same(plan: Plan, wanted: Settings) -> None:
    """Raise UserError, naming the first setting that differs, unless the plan was made with `wanted`."""
    way_out = "Give a new DEST, or delete this one."
    where = f"'{plan.place.url}' was begun with"
    if plan.number:
        way_out = f"Finish it as it was begun; or, where it is not finished, delete '{plan_name(plan.number)}' to give it up."
        where = f"'{plan.place.url}' was appended to with"
    for name, was, now in _differences(dataclasses.asdict(plan.settings), dataclasses.asdict(wanted)):
        if name == "listing":
            raise UserError(
                f"{where} {wanted.num_images} images of '{wanted.source}' whose names, sizes or labels have changed since (listing "
                f"{was[:12]} then, {now[:12]} now). {way_out}"
            )
        raise UserError(f"{where} {name.replace('_', ' ')} {was!r}, this command has {now!r}. {way_out}")


def _differences(was: dict[str, Any], now: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for name in {**was, **now}:
        one, other = was.get(name), now.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            yield from _differences(one, other)
        elif one != other:
            yield name, one, other
