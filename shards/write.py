"""One shard: a USTAR archive, the same bytes whenever the same samples are written, and its DALI index."""

import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, BinaryIO

from shards.image import Stored
from shards.layout import INDEX_VERSION, MASK_EXT, ShardFile
from shards.places import Place

BLOCK = 512
RECORD = 20 * BLOCK  # tar pads its archives to this
_JSON = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
_SMALL = 4 * BLOCK
_MODE_AND_OWNER, _TIME = b"0000644\0" + b"0000000\0" * 2, b"00000000000\0"
_TAIL = b"0" + bytes(100) + b"ustar\x0000" + bytes(64 + 16 + 155 + 12)
# Of the sum, with spaces in its own eight places.
_FIXED_SUM = sum(_MODE_AND_OWNER + _TIME + _TAIL) + 8 * ord(" ")
MAX_MEMBER_BYTES = 8 * 2**30 - 1  # eleven octal digits


@dataclass(frozen=True, slots=True)
class Sample:
    """An image to write, with what the tar says about it. `label` and `mask` (a PNG) are None where there is none."""

    key: str
    stored: Stored
    source: str
    label: int | None
    class_name: str | None
    mask: bytes | None = None
    facts: dict[str, Any] = field(default_factory=dict)  # for the JSON


@dataclass(frozen=True, slots=True)
class Member:
    """A file in the tar: `offset` is of its first data byte."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Entry:
    """A sample as it lies in the tar: its members, the image first, and the CRC-32 of all their bytes, headers and paddings too."""

    members: list[Member]
    crc32: int


def write_shard(dest: Place, name: str, samples: Iterable[Sample]) -> tuple[ShardFile, list[Entry]] | None:
    """Writes the tar `name`, whole or not at all, and returns its facts and where each sample lies.

    Takes the samples one by one, so only one image is held. Without samples nothing is written and None
    returned: readers refuse an empty shard.
    """
    samples = iter(samples)
    first = next(samples, None)
    if first is None:
        return None
    return dest.write(name, lambda file: _write_tar(file, name, chain([first], samples)))


def index_lines(samples: Iterable[list[Member]]) -> list[str]:
    """The lines of the index of DALI's webdataset reader (v1.2): for each member `<ext> <offset> <size> <name>`."""
    lines = [
        " ".join(f"{m.name.partition('.')[2]} {m.offset} {m.size} {m.name}" for m in members)
        for members in samples
    ]
    return [f"{INDEX_VERSION} {len(lines)}", *lines]


def write_index(dest: Place, name: str, samples: Iterable[list[Member]]) -> str:
    """Writes the index `name`; returns its SHA-256."""
    data = ("\n".join(index_lines(samples)) + "\n").encode("ascii")
    dest.write(name, data)
    return hashlib.sha256(data).hexdigest()


def _write_tar(file: BinaryIO, name: str, samples: Iterator[Sample]) -> tuple[ShardFile, list[Entry]]:
    digest = hashlib.sha256()
    at = crc32 = 0  # `at`: of the next byte
    listing = []
    small = bytearray()  # not yet written: many small pieces would cost more than the images between them

    def put(data: bytes) -> None:
        nonlocal at, crc32
        at += len(data)
        crc32 = zlib.crc32(data, crc32)
        if len(data) <= _SMALL:
            small.extend(data)
            return
        flush()
        file.write(data)
        digest.update(data)

    def flush() -> None:
        file.write(small)
        digest.update(small)
        small.clear()

    for sample in samples:
        members, crc32 = [], 0
        for suffix, data in _files(sample):
            member = f"{sample.key}.{suffix}"
            put(header(member, len(data)))
            members.append(Member(member, at, len(data)))
            put(data)
            put(bytes(-len(data) % BLOCK))
        listing.append(Entry(members, crc32))
    put(bytes(2 * BLOCK + -(at + 2 * BLOCK) % RECORD))
    flush()
    return ShardFile(name, len(listing), at, digest.hexdigest()), listing


def _files(sample: Sample) -> Iterator[tuple[str, bytes]]:
    stored = sample.stored
    yield stored.ext, stored.data
    if sample.label is not None:
        yield "cls", str(sample.label).encode("ascii")
    facts = sample.facts | {
        "height": stored.height,
        "label": sample.class_name,
        "source": sample.source,
        "width": stored.width,
    }
    yield "json", _JSON.encode(facts).encode()
    if sample.mask is not None:
        yield MASK_EXT, sample.mask


def header(name: str, size: int) -> bytes:
    """A USTAR header (POSIX.1-1988) of a regular file, mode 0644, without owner and time: the same bytes as `tarfile` makes."""
    assert len(name) <= 100, name
    assert size <= MAX_MEMBER_BYTES, size
    own, digits = name.encode("ascii"), b"%011o" % size
    return b"%b%b\0%b%06o\0 %b" % (
        own.ljust(100, b"\0") + _MODE_AND_OWNER,
        digits,
        _TIME,
        _FIXED_SUM + sum(own) + sum(digits),
        _TAIL,
    )
