"""A folder of images to a folder of shards: plan, make each shard, merge.

A shard is a function of (plan, shard number). So the work may be killed at any moment and started again, and
may be done by any number of processes: the files are the same, byte for byte.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from shards import layout
from shards.errors import UserError
from shards.files import atomic_write, is_unfinished, remove_unfinished
from shards.image import BadImage, Stored, prove
from shards.layout import Manifest, ShardFile
from shards.plan import Plan, check_same, read_plan, settings_for, write_plan
from shards.sources import Sources, scan_folder
from shards.workers import Count, available_cpus, run_here, run_in_processes
from shards.write import Member, Sample, write_index, write_shard

Progress = Callable[[int, int, int], None]
SMALL = 256  # images below which starting processes takes longer than converting
MAX_FILE_BYTES = 2 * 2**30
# Without `sample_id`, which is known when all shards are.
_ROWS = pa.schema([field for field in layout.SCHEMA if field.name != "sample_id"])


def convert(
    source: str | os.PathLike,
    dest: str | os.PathLike,
    *,
    seed: int = 0,
    workers: int | None = None,
    samples_per_shard: int | None = None,
    progress: Progress | None = None,
    sources: Sources | None = None,
) -> Manifest:
    """Converts the images below `source` to shards in `dest`, and returns the manifest.

    The same call again finishes what was interrupted, mends missing or cut shards, and otherwise changes
    nothing. `workers`: processes, 0 for this one, None for one a CPU (this one below 256 images).
    `samples_per_shard`: None for 64 shards of 128 to 4096. `progress(done, total, quarantined)` is called
    about 10 times a second, in images. `sources`: what `scan_folder(source)` gave, if known. Raises UserError
    for whatever the user can mend.
    """
    source, dest = Path(source), Path(dest)
    if workers is not None and workers < 0:
        raise UserError(f"the number of workers must be 0 or more, got {workers}.")
    if samples_per_shard is not None and samples_per_shard < 1:
        raise UserError(f"the samples per shard must be 1 or more, got {samples_per_shard}.")
    check_apart(source, dest)
    if sources is None:
        sources = scan_folder(source)
    settings = settings_for(source, sources, seed, samples_per_shard)
    _make_folder(dest)
    with _lock(dest):
        remove_unfinished(dest)
        if (dest / layout.PLAN).exists():
            plan = read_plan(dest)
            check_same(plan, settings)
        else:
            plan = write_plan(dest, sources, settings)
        return _carry_out(source, dest, plan, workers, progress)


def check_apart(source: Path, dest: Path) -> None:
    """Raises UserError when the shards would lie among the images or over them."""
    inner, outer = dest.resolve(), source.resolve()
    if inner == outer or outer in inner.parents:
        raise UserError(
            f"DEST '{dest}' lies inside SOURCE '{source}'; choose a folder outside of it for the shards."
        )


def _carry_out(
    source: Path, dest: Path, plan: Plan, workers: int | None, progress: Progress | None
) -> Manifest:
    rows = dest / layout.ROWS
    if not (dest / layout.TABLE).exists() or not (dest / layout.QUARANTINE).exists():
        (dest / layout.MANIFEST).unlink(missing_ok=True)
    finished = Manifest.load(dest) if (dest / layout.MANIFEST).exists() else None
    rows.mkdir(exist_ok=True)
    remove_unfinished(rows)
    if finished:
        todo = [_number(file) for file in finished.shards if not _is_whole(dest, file)]
    else:
        todo = [shard for shard in range(plan.num_shards) if not _is_committed(dest, shard)]
    if todo:
        _make_all(source, dest, plan, todo, workers, progress)
    if finished:
        manifest = finished
        _check_mended(dest, finished, todo)
    else:
        manifest = _merge(dest, plan)
        manifest.save(dest)
    shutil.rmtree(rows)
    return manifest


def _make_all(
    source: Path, dest: Path, plan: Plan, todo: list[int], workers: int | None, progress: Progress | None
) -> None:
    total = plan.settings.num_images
    before = total - sum(map(plan.num_rows, todo))
    others = set(range(plan.num_shards)) - set(todo)
    bad_before = sum(len(_read_marks(dest, shard)[1]) for shard in others if _rows_path(dest, shard).exists())

    def show(done: int, quarantined: int) -> None:
        if progress:
            progress(before + done, total, bad_before + quarantined)

    if workers is None:
        workers = 0 if total - before < SMALL else available_cpus()
    make = functools.partial(make_shard, source, dest, plan)
    if workers:
        run_in_processes(make, todo, workers, show)
    else:
        run_here(make, todo, show)


def make_shard(source: Path, dest: Path, plan: Plan, shard: int, count: Count) -> None:
    """Writes tar, index and, last, the rows that mark the shard as finished: a function of plan, images."""
    rows: list[dict] = []
    quarantined: list[dict] = []
    samples = _samples(source, plan, shard, rows, quarantined, count)
    written = write_shard(dest / layout.shard_name(shard), samples)
    marks: dict = {"shard": None, "quarantined": quarantined}
    if written:
        file, members = written
        write_index(dest / layout.index_name(shard), members)
        _locate(rows, shard, members)
        marks["shard"] = vars(file)
    about = {"marks": json.dumps(marks, ensure_ascii=False, sort_keys=True)}
    table = pa.Table.from_pylist(rows, schema=_ROWS.with_metadata(about))
    atomic_write(_rows_path(dest, shard), lambda file: pq.write_table(table, file, compression="zstd"))


def _samples(
    source: Path, plan: Plan, shard: int, rows: list[dict], quarantined: list[dict], count: Count
) -> Iterator[Sample]:
    planned = plan.rows(shard).to_pylist()
    for row in planned:
        key, name, label = layout.sample_key(row["position"]), row["source"], row["label"]
        try:
            stored = prove(_read(source, name, row["bytes"]), name)
        except BadImage as fault:
            quarantined.append({"source": name, "reason": fault.reason, "position": row["position"]})
            count(1, 1)
            continue
        rows.append(_row(key, name, label, stored))
        yield Sample(key, stored, name, label, None if label is None else plan.classes[label])
        count(1, 0)


def _row(key: str, name: str, label: int | None, stored: Stored) -> dict:
    return {
        "key": key,
        "size": len(stored.data),
        "ext": stored.ext,
        "width": stored.width,
        "height": stored.height,
        "channels": stored.channels,
        "label": label,
        "source": name,
        "sha256": hashlib.sha256(stored.data).hexdigest(),
        "stored": stored.how,
    }


def _locate(rows: list[dict], shard: int, members: list[list[Member]]) -> None:
    for row, (image, *_) in zip(rows, members, strict=True):
        row["shard"] = shard
        row["offset"] = image.offset


def _read(source: Path, name: str, planned_bytes: int) -> bytes:
    if planned_bytes > MAX_FILE_BYTES:
        raise BadImage(f"{planned_bytes} bytes, more than the limit of {MAX_FILE_BYTES}")
    try:
        with open(os.path.join(source, name), "rb", buffering=0) as file:
            return file.readall()
    except OSError as fault:
        # One bad file is set aside; a disk that went away must not set aside all the rest.
        if not source.is_dir():
            raise UserError(
                f"the folder '{source}' has gone away; bring it back and run the same command again."
            ) from fault
        raise BadImage(f"cannot be read: {fault.strerror}") from fault


def _merge(dest: Path, plan: Plan) -> Manifest:
    shards: list[ShardFile] = []
    quarantined: list[dict] = []
    widths, heights = [0], [0]

    def write(file: BinaryIO) -> int:
        num_samples = 0
        with pq.ParquetWriter(file, layout.SCHEMA, compression="zstd") as writer:
            for shard in range(plan.num_shards):
                shard_file, bad = _read_marks(dest, shard)
                quarantined.extend(bad)
                if shard_file is None:
                    continue
                shards.append(shard_file)
                rows = pq.read_table(_rows_path(dest, shard)).replace_schema_metadata(None)
                ids = pa.array(range(num_samples, num_samples + rows.num_rows), pa.int64())
                writer.write_table(rows.add_column(0, "sample_id", ids))
                num_samples += rows.num_rows
                widths.append(int(rows["width"].to_numpy().max()))
                heights.append(int(rows["height"].to_numpy().max()))
        if not num_samples:
            first = "; ".join(f"{bad['source']}: {bad['reason']}" for bad in quarantined[:3])
            raise UserError(f"none of the {len(quarantined)} images can be used. The first: {first}.")
        return num_samples

    num_samples = atomic_write(dest / layout.TABLE, write)
    assert num_samples
    lines = "".join(json.dumps(bad, ensure_ascii=False, sort_keys=True) + "\n" for bad in quarantined)
    atomic_write(dest / layout.QUARANTINE, lines.encode())
    return Manifest(
        source=plan.settings.source,
        seed=plan.settings.seed,
        num_samples=num_samples,
        num_quarantined=len(quarantined),
        samples_per_shard=plan.settings.samples_per_shard,
        classes=plan.classes,
        max_width=max(widths),
        max_height=max(heights),
        bytes=sum(file.bytes for file in shards),
        shards=shards,
        options_sha256=plan.settings.sha256(),
    )


def _check_mended(dest: Path, manifest: Manifest, mended: list[int]) -> None:
    listed = {_number(file): file for file in manifest.shards}
    for shard in mended:
        made, _ = _read_marks(dest, shard)
        if made != listed[shard]:
            (dest / layout.shard_name(shard)).unlink(missing_ok=True)
            raise UserError(
                f"'{layout.shard_name(shard)}' was missing or cut short and cannot be made again: its "
                "images have changed since. Give a new DEST."
            )


def _rows_path(dest: Path, shard: int) -> Path:
    return dest / layout.ROWS / layout.rows_name(shard)


def _read_marks(dest: Path, shard: int) -> tuple[ShardFile | None, list[dict]]:
    """What a finished shard noted beside its rows: its file, None if no image was good, and the bad ones."""
    marks = json.loads(pq.read_schema(_rows_path(dest, shard)).metadata[b"marks"])
    return marks["shard"] and ShardFile(**marks["shard"]), marks["quarantined"]


def _is_committed(dest: Path, shard: int) -> bool:
    if not _rows_path(dest, shard).exists():
        return False
    file, _ = _read_marks(dest, shard)
    return file is None or _is_whole(dest, file)


def _is_whole(dest: Path, file: ShardFile) -> bool:
    tar = dest / file.name
    return tar.is_file() and tar.stat().st_size == file.bytes and tar.with_suffix(".idx").is_file()


def _number(file: ShardFile) -> int:
    return int(file.name.removeprefix("shard-").removesuffix(".tar"))


def _make_folder(dest: Path) -> None:
    try:
        dest.mkdir(parents=True, exist_ok=True)
        names = sorted(os.listdir(dest))
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"'{dest}' is a file; DEST is the folder for the shards.") from None
    except OSError as fault:
        raise UserError(f"'{dest}' cannot be written ({fault.strerror}); choose another DEST.") from fault
    # With a plan the folder is ours, and what a user laid beside the shards does no harm.
    foreign = [name for name in names if name != layout.LOCK and not is_unfinished(name)]
    if layout.PLAN not in names and foreign:
        raise UserError(
            f"'{dest}' already holds other files, such as '{foreign[0]}'; give a new or an empty folder."
        )


@contextlib.contextmanager
def _lock(dest: Path) -> Iterator[None]:
    """Holds `.lock`, so that two conversions never share a folder; the system frees it if we are killed."""
    try:
        file = open(dest / layout.LOCK, "w")  # noqa: SIM115 (closed below)
    except OSError as fault:
        raise UserError(f"'{dest}' cannot be written ({fault.strerror}); choose another DEST.") from fault
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another conversion is at work in '{dest}'; wait for it, or give another DEST."
            ) from None
        yield
