"""Locate damage inside a shard: which sample, which of its files, and from which byte on."""

from __future__ import annotations

import hashlib
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from PIL import Image

from shards.format import layout
from shards.format.tar_writer import BLOCK, Member, header
from shards.images.pillow import strict_pillow
from shards.images.pixels import BadImage, damage, read_npy
from shards.images.png import check_png
from shards.images.policy import Policy
from shards.images.proof import prove

Row = dict[str, Any]  # of the sample table; where that cannot be read: key, offset and size only


@dataclass(frozen=True)
class Damage:
    """One thing that is wrong in a shard folder.

    file: its name in the folder; kind: missing, length, bytes, index, table, json (manifest, quarantine), sums, decode or stale; what:
    one clause; offset: of the first wrong byte, or of the damaged part, in the file. What is not known is None.
    """

    file: str
    kind: str
    what: str
    sample_id: int | None = None
    key: str | None = None
    source: str | None = None
    member: str | None = None
    offset: int | None = None

    @property
    def harmless(self) -> bool:
        """Whether it is litter only, and every sample is as it should be."""
        return self.kind == "stale"


def of_sample(
    file: str, kind: str, what: str, row: Row, member: str | None = None, offset: int | None = None
) -> Damage:
    """A finding that belongs to one sample."""
    return Damage(file, kind, what, row.get("sample_id"), row["key"], row.get("source"), member, offset)


def read_header(block: bytes) -> tuple[str, int] | None:
    """Name and size of a member; None unless the block is, byte for byte, a header as we write it."""
    try:
        name, size = block[:100].rstrip(b"\0").decode("ascii"), int(block[124:135], 8)
        return (name, size) if name and header(name, size) == block else None
    except (ValueError, AssertionError):
        return None


def padded(size: int) -> int:
    """Bytes that a member's data takes in the tar."""
    return -(-size // BLOCK) * BLOCK


def walk(file: IO[bytes], at: int = 0) -> Iterator[Member]:
    """The members of a tar from byte `at` on, as far as the headers are whole."""
    while True:
        file.seek(at)
        found = read_header(file.read(BLOCK))
        if found is None:
            return
        name, size = found
        yield Member(name, at + BLOCK, size)
        at += BLOCK + padded(size)


def grouped(members: Iterator[Member]) -> list[list[Member]]:
    """Members by sample: neighbours with the same key."""
    samples: list[list[Member]] = []
    for member in members:
        if not samples or member.name.partition(".")[0] != samples[-1][0].name.partition(".")[0]:
            samples.append([])
        samples[-1].append(member)
    return samples


def read_index(data: bytes) -> list[list[Member] | None]:
    """What each line of a DALI index says, the first left out; None for a line that is no index line."""
    return [_index_line(line) for line in data.decode("utf-8", "replace").splitlines()[1:]]


def _index_line(line: str) -> list[Member] | None:
    words = line.split(" ")
    try:
        members = [
            Member(name, int(offset), int(size))
            for _, offset, size, name in zip(*[iter(words)] * 4, strict=True)
        ]
    except ValueError:
        return None
    return members or None


def as_rows(samples: list[list[Member]]) -> list[Row]:
    """Rows of what the members alone tell."""
    return [
        {"key": files[0].name.partition(".")[0], "offset": files[0].offset, "size": files[0].size}
        for files in samples
    ]


class Examiner:
    """Finds what differs in a tar that differs: by each sample's own CRC-32, SHA-256, headers and paddings.

    `rows`: the shard's rows of the table, in order; `index`: what its DALI index says, as `read_index` gives it; `classes`: the
    manifest's.
    """

    def __init__(
        self,
        name: str,
        file: IO[bytes],
        rows: list[Row],
        index: list[list[Member] | None],
        classes: list[str] | None,
    ):
        self._name = name
        self._file = file
        self._rows = rows
        self._index = index if len(index) == len(rows) else [None] * len(rows)
        self._classes = classes

    def findings(self, num_bytes: int) -> Iterator[Damage]:
        """All that is wrong in the first `num_bytes` of the tar; samples beyond them are passed over."""
        end = 0
        for number, (row, end) in enumerate(zip(self._rows, self.ends(), strict=True)):
            start = row["offset"] - BLOCK
            members = self._members(number)
            if end > num_bytes:
                return
            self._file.seek(start)
            data = self._file.read(end - start)
            if row.get("tar_crc32") is not None and zlib.crc32(data) == row["tar_crc32"]:
                continue
            found = list(self._faults(data, start, members, row))
            if not found and row.get("tar_crc32") is not None:
                what = "bytes of the sample differ: its JSON" + (", mask" if row.get("mask_size") else "")
                found = [of_sample(self._name, "bytes", f"{what} or class", row, None, start)]
            yield from found
        self._file.seek(end)
        rest = np.frombuffer(self._file.read(num_bytes - end), np.uint8)
        if rest.any():
            wrong = end + int(np.flatnonzero(rest)[0])
            yield Damage(self._name, "bytes", "the zeros at the tar's end are damaged", offset=wrong)

    def ends(self) -> list[int]:
        """For each sample, the first byte behind its own."""
        if not self._rows:
            return []
        last = self._members(len(self._rows) - 1)[-1]
        return [row["offset"] - BLOCK for row in self._rows[1:]] + [last.offset + padded(last.size)]

    def _members(self, number: int) -> list[Member]:
        """Where a sample's files lie: by the index where it is whole, else by the tar's headers, else the image's place alone."""
        row, told = self._rows[number], self._index[number]
        if told and (told[0].offset, told[0].size) == (row["offset"], row["size"]):
            return told
        image = Member(f"{row['key']}.{row.get('ext', '?')}", row["offset"], row["size"])
        follows = walk(self._file, row["offset"] + padded(row["size"]))
        others = []
        for member in follows:
            if member.name.partition(".")[0] != row["key"]:
                break
            others.append(member)
        return [image, *others]

    def _faults(self, data: bytes, start: int, members: list[Member], row: Row) -> Iterator[Damage]:
        def fault(what: str, member: Member, at: int) -> Damage:
            return of_sample(self._name, "bytes", what, row, member.name, at)

        for member in members:
            at = member.offset - start
            wanted = header(member.name, member.size) if "?" not in member.name else None
            if wanted and data[at - BLOCK : at] != wanted:
                wrong = _first_difference(data[at - BLOCK : at], wanted)
                yield fault("its tar header is damaged", member, start + at - BLOCK + wrong)
            padding = data[at + member.size : at + padded(member.size)]
            if padding.strip(b"\0"):
                wrong = len(padding) - len(padding.lstrip(b"\0"))
                yield fault("the padding after it is damaged", member, member.offset + member.size + wrong)
            content = data[at : at + member.size]
            what = self._content_fault(content, member, row, is_image=member is members[0])
            if what:
                yield fault(what, member, member.offset)

    def _content_fault(self, content: bytes, member: Member, row: Row, *, is_image: bool) -> str:
        ext = member.name.partition(".")[2]
        if is_image:
            wanted = row.get("sha256")
            return "the image's bytes are damaged" if wanted and _sha256(content) != wanted else ""
        if ext == "cls":
            wanted = row.get("label")
            return "its class is damaged" if wanted is not None and content != b"%d" % wanted else ""
        if ext == layout.MASK_EXT:
            return f"its mask is {fault}" if (fault := mask_fault(content, None)) else ""
        if ext == "json":
            return "" if self._json_agrees(content, row) else "its JSON is damaged"
        return ""

    def _json_agrees(self, content: bytes, row: Row) -> bool:
        try:
            facts = json.loads(content)
        except ValueError:
            return False
        if not isinstance(facts, dict):
            return False
        wanted = {name: row[name] for name in ("source", "width", "height") if name in row}
        if self._classes is not None and "label" in row:
            wanted["label"] = None if row["label"] is None else self._classes[row["label"]]
        return all(facts.get(name) == value for name, value in wanted.items())


def decode_fault(data: bytes, row: Row, policy: Policy) -> str:
    """Why a stored image does not decode to what the table says of it; empty where it does."""
    try:
        if row["ext"] == "npy":
            pixels = read_npy(data)
            found = (*pixels.shape[1::-1], pixels.shape[2], pixels.dtype.name)
        else:
            stored = prove(data, f"{row['key']}.{row['ext']}", policy, "small")
            found = (stored.width, stored.height, stored.channels, stored.dtype)
    except BadImage as error:
        return error.reason
    wanted = (row["width"], row["height"], row["channels"], row["dtype"])
    if found != wanted:
        return "decodes to {} x {} pixels, {} x {}, the table says {} x {}, {} x {}".format(*found, *wanted)
    return ""


def mask_fault(data: bytes, size: tuple[int, int] | None) -> str:
    """Why a stored mask does not decode, or has not this (width, height); empty where all is well."""
    try:
        with strict_pillow(), Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            check_png(data)
            image.load()
            found = image.size
    except BadImage as error:
        return error.reason
    except Exception as error:  # on damaged input Pillow raises almost anything
        return damage(error).reason
    return f"of {found[0]} x {found[1]} pixels, not {size[0]} x {size[1]}" if size and found != size else ""


def _first_difference(one: bytes, other: bytes) -> int:
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
