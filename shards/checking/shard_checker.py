"""Checks one shard against what was promised of it: its tar, its DALI index and its rows of the table."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import pyarrow.parquet as pq

from shards.checking.damage import (
    Damage,
    Examiner,
    Row,
    as_rows,
    decode_fault,
    grouped,
    mask_fault,
    of_sample,
    read_index,
    walk,
)
from shards.conversion.workers import Count
from shards.format import layout
from shards.format.checksums import CHUNK_BYTES, index_of
from shards.format.layout import ShardFile
from shards.format.tar_writer import Member, index_lines
from shards.images.policy import Policy
from shards.storage.place import Place
from shards.units import plural

_TOLD_BY_JSON = ("source", "width", "height")


@dataclass(frozen=True)
class Checker:
    """Checks shards of one folder, each by its place in `files`; picklable. What it finds it writes to the folder `out`.

    starts: the first sample id of each shard; table: "whole", "suspect" (then its rows are compared with the tars) or "none"; decode:
    whether every sample is decoded too.
    """

    place: Place
    files: tuple[ShardFile, ...]
    starts: tuple[int, ...]
    table: str
    classes: list[str] | None
    policy: Policy
    decode: bool
    out: Path

    def __call__(self, number: int, count: Count) -> None:
        """Check shard `files[number]`; count bytes and findings."""
        found = list(self._check(number, count))
        if found:
            text = json.dumps([asdict(finding) for finding in found])
            (self.out / f"{number:09d}.json").write_text(text)
        count(0, len(found))

    def _check(self, number: int, count: Count) -> Iterator[Damage]:
        file = self.files[number]
        length = self.place.size(file.name)
        if length is None:
            yield Damage(
                file.name, "missing", f"the shard is missing, {plural(file.num_samples, 'sample')} with it"
            )
        else:
            with self.place.open(file.name) as tar:
                yield from self._check_tar(number, tar, length, count)
        name = index_of(file.name)
        if not self.place.exists(name):
            yield Damage(name, "missing", "the DALI index is missing")

    def _check_tar(self, number: int, tar: IO[bytes], length: int, count: Count) -> Iterator[Damage]:
        file = self.files[number]
        wanted = file.bytes if file.bytes >= 0 else length
        whole = length >= wanted and _sha256(tar, wanted, count) == file.sha256
        index = self._index(file.name)
        rows = self._rows(number)
        if rows is None and not whole:
            rows = as_rows([members for members in read_index(index or b"") if members])
        rows = rows or []
        hurt: list[Damage] = []
        if not whole or length != wanted:
            examiner = Examiner(file.name, tar, rows, read_index(index or b""), self.classes)
            if length != wanted:
                yield _wrong_length(file, length, wanted, rows, examiner.ends())
        if not whole:
            hurt = list(examiner.findings(min(length, wanted)))
            if not hurt and length == wanted:
                what = "differs from its SHA-256, though every sample's own checks pass"
                hurt = [Damage(file.name, "bytes", what)]
            yield from hurt
        if index is not None:
            yield from self._check_index(file, index, tar if whole else None, rows)
        if whole and self.table == "suspect" and rows:
            yield from self._compare(number, tar, rows)
        if self.decode and self.table != "none":
            known = {finding.key for finding in hurt}
            inside = (row for row in rows if row["offset"] + row["size"] <= length)
            yield from self._decode(file.name, tar, (row for row in inside if row["key"] not in known))

    def _index(self, tar: str) -> bytes | None:
        try:
            return self.place.read(index_of(tar))
        except FileNotFoundError:
            return None

    def _rows(self, number: int) -> list[Row] | None:
        """The shard's rows; None where the table cannot be read, or not even its ids are right."""
        if self.table == "none":
            return None
        start = self.starts[number]
        try:
            rows = read_rows(self.place, start, start + self.files[number].num_samples)
            offsets = [row["offset"] for row in rows]
            if len(rows) == self.files[number].num_samples and offsets == sorted(offsets):
                return rows
        except Exception:  # a damaged table raises many kinds
            if self.table == "whole":
                raise
        return None

    def _check_index(
        self, file: ShardFile, data: bytes, tar: IO[bytes] | None, rows: list[Row]
    ) -> Iterator[Damage]:
        if file.index_sha256 and hashlib.sha256(data).hexdigest() == file.index_sha256:
            return
        name = index_of(file.name)
        if tar is None:
            if file.index_sha256:
                yield Damage(name, "index", "differs from its SHA-256, and the tar is damaged too")
            return
        wanted = index_lines(grouped(walk(tar)))
        if data == ("\n".join(wanted) + "\n").encode():
            return
        found = data.decode("utf-8", "replace").split("\n")
        if found[0] != wanted[0]:
            yield Damage(
                name, "index", f"its first line is {found[0]!r}, but must be {wanted[0]!r}", offset=0
            )
        at, num_wrong = len(found[0]) + 1, 0
        rows = rows or as_rows([members for members in read_index("\n".join(wanted).encode()) if members])
        for line, (row, right) in enumerate(zip(rows, wanted[1:], strict=False), 2):
            was = found[line - 1] if line <= len(found) else ""
            if was != right:
                num_wrong += 1
                what = f"line {line} is wrong" if was else f"line {line} is missing"
                yield of_sample(name, "index", what, row, None, at)
            at += len(was) + 1
        if not num_wrong and found[0] == wanted[0]:
            yield Damage(name, "index", "its end differs from what the tar says", offset=at)

    def _compare(self, number: int, tar: IO[bytes], rows: list[Row]) -> Iterator[Damage]:
        """What a table that is not as it was written says wrongly of a whole tar."""
        for row, truth in zip(rows, self._truth(number, tar), strict=False):
            wrong = [name for name, value in truth.items() if row[name] != value]
            if wrong:
                pairs = ", ".join(f"{name} {row[name]!r} instead of {truth[name]!r}" for name in wrong)
                yield of_sample(layout.TABLE, "table", f"its row is wrong: {pairs}", row | truth)

    def _truth(self, number: int, tar: IO[bytes]) -> Iterator[Row]:
        start = self.starts[number]
        shard = int(self.files[number].name[6:-4])
        for sample_id, members in enumerate(grouped(walk(tar)), start):
            image = members[0]
            data = {member.name.partition(".")[2]: _read(tar, member) for member in members}
            key, _, ext = image.name.partition(".")
            facts = json.loads(data["json"])
            mask = next((m for m in members if m.name.endswith(f".{layout.MASK_EXT}")), None)
            yield {
                "sample_id": sample_id,
                "key": key,
                "shard": shard,
                "offset": image.offset,
                "size": image.size,
                "ext": ext,
                "sha256": hashlib.sha256(data[ext]).hexdigest(),
                "mask_offset": mask and mask.offset,
                "mask_size": mask and mask.size,
                "label": int(data["cls"]) if "cls" in data else None,
            } | {name: facts[name] for name in _TOLD_BY_JSON}

    def _decode(self, name: str, tar: IO[bytes], rows: Iterable[Row]) -> Iterator[Damage]:
        for row in rows:
            tar.seek(row["offset"])
            fault = decode_fault(tar.read(row["size"]), row, self.policy)
            if fault:
                yield of_sample(name, "decode", f"does not decode: {fault}", row, None, row["offset"])
            if row.get("mask_size"):
                tar.seek(row["mask_offset"])
                fault = mask_fault(tar.read(row["mask_size"]), (row["width"], row["height"]))
                if fault:
                    yield of_sample(
                        name, "decode", f"its mask does not decode: {fault}", row, None, row["mask_offset"]
                    )


def read_rows(place: Place, start: int, stop: int) -> list[Row]:
    """Rows start..stop of the sample table."""
    rows: list[Row] = []
    with place.open(layout.TABLE) as file, pq.ParquetFile(file) as parquet:
        at = 0
        for group in range(parquet.num_row_groups):
            size = parquet.metadata.row_group(group).num_rows
            if at < stop and at + size > start:
                table = parquet.read_row_group(group, use_threads=False)
                first = max(start - at, 0)
                rows += table.slice(first, min(stop - at, size) - first).to_pylist()
            at += size
    return rows


def _wrong_length(file: ShardFile, length: int, wanted: int, rows: list[Row], ends: list[int]) -> Damage:
    what = f"has {length:,} bytes and should have {wanted:,}"
    if length > wanted:
        return Damage(file.name, "length", what, offset=wanted)
    cut = next((number for number, end in enumerate(ends) if end > length), None)
    if cut is None:
        return Damage(file.name, "length", f"{what}: cut off behind its last sample", offset=length)
    more = len(rows) - cut - 1
    what += ": cut off in this sample" + (f", {more:,} more after it are lost" if more else "")
    return of_sample(file.name, "length", what, rows[cut], None, length)


def _sha256(file: IO[bytes], num_bytes: int, count: Count) -> str:
    digest = hashlib.sha256()
    file.seek(0)
    left = num_bytes
    while left and (chunk := file.read(min(left, CHUNK_BYTES))):
        digest.update(chunk)
        left -= len(chunk)
        count(len(chunk), 0)
    return digest.hexdigest()


def _read(tar: IO[bytes], member: Member) -> bytes:
    tar.seek(member.offset)
    return tar.read(member.size)
