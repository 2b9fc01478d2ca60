"""Verify that a shard folder is still what its conversion wrote, and name the samples that are damaged."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from shards.checking.damage import Damage
from shards.checking.shard_checker import Checker
from shards.conversion.listing import SCRATCH
from shards.conversion.shard_plan import read_plan
from shards.conversion.workers import run_here, run_in_processes
from shards.cpus import available_cpus
from shards.errors import UserError, nearest
from shards.format import layout
from shards.format.checksums import Sums, index_of, read_sums, sha256_of
from shards.format.columns import read_columns
from shards.format.label_table import WAY_OUT as LABEL_AGAIN
from shards.format.label_table import labels_fault
from shards.format.layout import Manifest, ShardFile
from shards.format.sample_table import is_given_up
from shards.images.policy import MAX_PIXELS, Policy
from shards.splits.split_table import WAY_OUT, splits_fault
from shards.storage.atomic_files import is_unfinished
from shards.storage.opening import Where, open_place
from shards.storage.place import Place
from shards.units import plural

LEVELS = ("fast", "hash", "decode")
SMALL_BYTES = 64 << 20  # below, starting processes takes longer than reading


@dataclass(frozen=True)
class VerifyResult:
    """What a check found; `level` says how deep it looked."""

    level: str
    num_shards: int
    num_samples: int
    num_bytes: int
    duration_s: float
    findings: list[Damage] = field(default_factory=list)

    @property
    def damaged(self) -> bool:
        """Whether anything is wrong that a reader could meet."""
        return not all(finding.harmless for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """JSON values: the fields, and `damaged`."""
        return asdict(self) | {"damaged": self.damaged}


@dataclass(frozen=True)
class Promise:
    """What must lie in a folder, by its manifest and its checksums; by the one that is whole where the other is not."""

    place: Place
    manifest: Manifest | None
    sums: Sums | None
    files: list[ShardFile]
    classes: list[str] | None
    findings: list[Damage]  # about these two themselves
    appending: bool = False  # whether images are being appended, or were until that was interrupted
    given_up: bool = False  # whether that has left something, and its plan was deleted

    @classmethod
    def read(cls, place: Place) -> Promise:
        """Raise UserError where there is no finished conversion."""
        sums = read_sums(place)
        findings: list[Damage] = []
        manifest = None
        if sums is None or not sums.by_name:
            manifest = Manifest.load(place)
        else:
            try:
                manifest = Manifest.load(place)
            except UserError as error:
                if not sums.is_whole:
                    raise
                kind, what = ("json", "is damaged: it cannot be read")
                if not place.exists(layout.MANIFEST):
                    kind, what = "missing", "the manifest is missing"
                elif "format version" in str(error) and _agrees(place, sums, layout.MANIFEST):
                    raise
                findings.append(Damage(layout.MANIFEST, kind, what))
        given_up = manifest is not None and is_given_up(place, manifest)
        appending = manifest is not None and (given_up or layout.is_appending(place, manifest))
        if manifest and appending:
            begun = layout.plan_name(len(manifest.identities))
            what = "of an append that is unfinished: the same `fastssl shard ... --append` finishes it"
            if given_up:
                what = "was deleted: its append is given up, and the next one removes what it has left"
            findings.append(Damage(begun, "stale", what))
            if sums and begun in sums.by_name:
                # They are those of the folder to come, and the manifest of that is written last.
                return cls(
                    place, manifest, None, manifest.shards, manifest.classes, findings, appending, given_up
                )
        if sums is None:
            what = "there are no checksums of the files that are no shards"
            findings.append(Damage(layout.SUMS, "missing", what))
        elif not sums.is_whole:
            findings.append(Damage(layout.SUMS, "sums", "its own checksum does not match"))
        elif manifest and not _agrees(place, sums, layout.MANIFEST):
            findings.append(Damage(layout.MANIFEST, "json", _manifest_fault(place, manifest, sums)))
        files = _files(place, manifest, sums)
        sound = all(finding.harmless for finding in findings)
        classes = manifest.classes if manifest and sound else None
        return cls(place, manifest, sums, files, classes, findings, appending, given_up)

    def sum_of(self, name: str) -> str | None:
        """The SHA-256 that a file must have; None where that is not known."""
        return self.sums.by_name.get(name) if self.sums and self.sums.is_whole else None

    @property
    def plans(self) -> list[str]:
        """The file names of the plans, by the manifest or, where that cannot be read, by the checksums."""
        known = self.sums.by_name if self.sums else {}
        count = (
            len(self.manifest.identities) if self.manifest else sum(name.startswith("plan") for name in known)
        )
        return [layout.plan_name(number) for number in range(max(1, count))]

    @property
    def dropped(self) -> set[str]:
        """The file names of what each plan left out; not each is there."""
        return {layout.dropped_name(number) for number in range(len(self.plans))}

    def starts(self) -> list[int]:
        """The first sample id of each shard."""
        starts = [0]
        for file in self.files:
            starts.append(starts[-1] + file.num_samples)
        return starts[:-1]


def verify(
    folder: Where,
    *,
    level: str = "hash",
    workers: int | None = None,
    progress: Callable[[int, int, int], None] = lambda *_: None,
) -> VerifyResult:
    """Check a finished shard folder; change nothing in it.

    Args:
        level: "fast" looks at names and lengths only; "hash" reads every byte; "decode" decodes every sample, too.
        workers: processes, 0 for this one, None for one a CPU.
        progress: called with (bytes read, bytes in all, findings).

    Raises:
        UserError: there is no finished conversion, or no such level.
    """
    if level not in LEVELS:
        raise UserError(f"There is no level '{level}'.{nearest(level, LEVELS)}")
    begin_s = time.monotonic()
    promise = Promise.read(open_place(folder))
    findings = [*promise.findings, *_stale(promise)]
    table = "whole"
    for finding in _other_files(promise, read=level != "fast"):
        findings.append(finding)
        if finding.file == layout.TABLE:
            table = "none" if finding.kind == "missing" else "suspect"
    if level == "fast":
        findings += _lengths(promise)
    else:
        findings += _shards(promise, table, level == "decode", workers, progress)
    num_bytes = sum(max(0, file.bytes) for file in promise.files)
    num_samples = sum(file.num_samples for file in promise.files)
    duration_s = time.monotonic() - begin_s
    return VerifyResult(level, len(promise.files), num_samples, num_bytes, duration_s, findings)


def _shards(
    promise: Promise,
    table: str,
    decode: bool,
    workers: int | None,
    progress: Callable[[int, int, int], None],
) -> list[Damage]:
    files = promise.files
    num_bytes = sum(max(0, file.bytes) for file in files)
    max_pixels = promise.manifest.store.get("max_pixels", MAX_PIXELS) if promise.manifest else MAX_PIXELS
    with tempfile.TemporaryDirectory(prefix="fastssl-verify-") as out:
        checker = Checker(
            promise.place,
            tuple(files),
            tuple(promise.starts()),
            table,
            promise.classes,
            Policy(max_pixels=max_pixels),
            decode,
            Path(out),
        )

        def show(done: int, found: int) -> None:
            progress(done, num_bytes, found)

        if workers is None:
            workers = 0 if num_bytes < SMALL_BYTES else available_cpus()
        if workers and files:
            run_in_processes(checker, range(len(files)), workers, show)
        else:
            run_here(checker, range(len(files)), show)
        texts = [path.read_text() for path in sorted(Path(out).iterdir())]
    return [Damage(**fields) for text in texts for fields in json.loads(text)]


def _lengths(promise: Promise) -> Iterator[Damage]:
    sizes = promise.place.sizes()  # a store takes its time for each question
    for file in promise.files:
        length = promise.place.size(file.name) if sizes is None else sizes.get(file.name)
        if length is None:
            what = f"the shard is missing, {plural(file.num_samples, 'sample')} with it"
            yield Damage(file.name, "missing", what)
        elif length != file.bytes >= 0:
            yield Damage(file.name, "length", f"has {length:,} bytes and should have {file.bytes:,}")
        index = index_of(file.name)
        if not (promise.place.exists(index) if sizes is None else index in sizes):
            yield Damage(index, "missing", "the DALI index is missing")


def _other_files(promise: Promise, *, read: bool) -> Iterator[Damage]:
    """Table, plan, quarantine and splits; `read`: by their checksums, not just their presence."""
    place = promise.place
    expected = {layout.TABLE, layout.QUARANTINE, *promise.plans}
    expected |= {name for name in promise.dropped if promise.sum_of(name)}
    for name in sorted(expected):
        if not place.exists(name):
            yield Damage(name, "missing", "the file is missing")
            continue
        wanted = promise.sum_of(name)
        # Both may hold what is to be appended, behind what the manifest counts.
        grows = promise.appending and name in (layout.TABLE, layout.QUARANTINE)
        agrees = grows or not read or wanted is None or sha256_of(place, name) == wanted
        fault = _fault_of(promise, name, grows) if read or name == layout.TABLE else ""
        kind = "json" if name == layout.QUARANTINE else "table"
        if fault:
            yield Damage(name, kind, fault)
        elif not agrees:
            yield Damage(name, kind, "differs from its SHA-256")
    fault = splits_fault(place, promise.manifest) if read else ""
    if fault:
        yield Damage(layout.SPLITS, "table", f"{fault}. {WAY_OUT.rstrip('.')}")
    fault = labels_fault(place, promise.manifest) if read and promise.manifest else ""
    if fault:
        yield Damage(layout.LABELS, "table", f"{fault}. {LABEL_AGAIN.rstrip('.')}")


def _fault_of(promise: Promise, name: str, grows: bool) -> str:
    """What is wrong inside of a file, as far as the other files tell."""
    place, manifest = promise.place, promise.manifest
    try:
        if name in promise.plans:
            number = promise.plans.index(name)
            settings = read_plan(place, number).settings
            if manifest and settings.sha256() != manifest.identities[number]:
                return "is of another conversion than the manifest: their settings differ"
            wanted, what = settings.num_images, "images"
        elif name == layout.QUARANTINE:
            with place.open(name) as file:
                return _quarantine_fault(file, manifest, grows)
        else:
            wanted, what = sum(file.num_samples for file in promise.files), "samples"
            if name.startswith("dropped"):
                wanted = -1
        with place.open(name) as file, pq.ParquetFile(file) as parquet:
            if wanted >= 0 and not _is_count(parquet.metadata.num_rows, wanted, grows):
                return f"has {parquet.metadata.num_rows:,} rows, but there are {wanted:,} {what}"
            for group in range(parquet.num_row_groups) if promise.sum_of(name) is None else ():
                parquet.read_row_group(group, use_threads=False)
    except Exception as error:  # a damaged table raises many kinds
        return f"is damaged: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return ""


def _quarantine_fault(lines: Iterable[bytes], manifest: Manifest | None, grows: bool) -> str:
    number = 0
    for number, line in enumerate(lines, 1):
        try:
            if set(json.loads(line)) >= {"source", "reason", "position"}:
                continue
        except (ValueError, TypeError):
            pass
        return f"line {number} is damaged"
    if manifest and not _is_count(number, manifest.num_quarantined, grows):
        return f"has {number:,} lines, but the manifest counts {manifest.num_quarantined:,} refused images"
    return ""


def _is_count(found: int, wanted: int, grows: bool) -> bool:
    """Whether a file has as many rows as are wanted, or more where it may hold those of an append, too."""
    return found == wanted or (grows and found > wanted)


def _stale(promise: Promise) -> Iterator[Damage]:
    """Litter of killed runs, and shards that are not this conversion's."""
    known = {file.name for file in promise.files}
    known |= {index_of(name) for name in known}
    # While images are appended, further shards are theirs.
    may_be_foreign = promise.given_up or not promise.appending
    for name in promise.place.names():
        if is_unfinished(name) or name.startswith(SCRATCH):
            yield Damage(name, "stale", "left by a run that was killed")
        elif name not in known and layout.shard_of(name) is not None and may_be_foreign:
            what = "is none of this conversion's shards, but readers of *.tar would take it"
            yield Damage(name, "table", what)
    if promise.place.names(layout.ROWS) and not promise.appending:
        yield Damage(layout.ROWS, "stale", "left by a run that was killed")


def _agrees(place: Place, sums: Sums, name: str) -> bool:
    return sha256_of(place, name) == sums.by_name.get(name)


def _manifest_fault(place: Place, manifest: Manifest, sums: Sums) -> str:
    """Which part of a manifest that is not as it was written contradicts the other files."""
    wrong = [
        file.name
        for file in manifest.shards
        if (file.sha256, file.index_sha256)
        != (sums.by_name.get(file.name), sums.by_name.get(index_of(file.name)))
    ]
    if wrong:
        return f"differs from its SHA-256: what it says of {', '.join(wrong[:3])} is wrong"
    return "differs from its SHA-256"


def _files(place: Place, manifest: Manifest | None, sums: Sums | None) -> list[ShardFile]:
    if manifest and (sums is None or not sums.is_whole or _agrees(place, sums, layout.MANIFEST)):
        return manifest.shards
    assert sums is not None
    # The manifest is damaged: names and checksums are told twice, the counts by the table's row groups.
    told = {file.name: file for file in manifest.shards} if manifest else {}
    counts = _counts(place)
    files = []
    for name in sorted(name for name in sums.by_name if name.endswith(".tar")):
        num_samples = counts.get(int(name[6:-4]), told[name].num_samples if name in told else 0)
        files.append(
            ShardFile(name, num_samples, -1, sums.by_name[name], sums.by_name.get(index_of(name), ""))
        )
    return files


def _counts(place: Place) -> dict[int, int]:
    """Samples by shard, as the table tells; nothing where it cannot be read."""
    try:
        with place.open(layout.TABLE) as file:
            pairs = read_columns(file, ["shard"])["shard"].value_counts().to_pylist()
    except Exception:  # a damaged table raises many kinds
        return {}
    return {pair["values"]: pair["counts"] for pair in pairs}
