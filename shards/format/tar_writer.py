"""One shard: a USTAR archive, the same bytes whenever the same samples are written, and its DALI index."""

import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, BinaryIO, NamedTuple

from shards.format.layout import INDEX_VERSION, MASK_EXT, ShardFile
from shards.images.proof import Stored
from shards.storage.place import Place

BLOCK = 512
RECORD = 20 * BLOCK  # tar pads its archives to this
_JSON = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
_HELD_BYTES = 1 << 18  # written and hashed at a time: more than a file buffers, less than leaves the cache
_PADDING = [bytes(-size % BLOCK) for size in range(BLOCK)]
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


class Member(NamedTuple):
    """A file in the tar: `offset` is of its first data byte."""

    name: str
    offset: int
    size: int


class Entry(NamedTuple):
    """A sample as it lies in the tar: its members, the image first, and the CRC-32 of all their bytes, headers and paddings too."""

    members: list[Member]
    crc32: int


def write_shard(dest: Place, name: str, samples: Iterable[Sample]) -> tuple[ShardFile, list[Entry]] | None:
    """Write the tar `name`, whole or not at all, and return its facts and where each sample lies.

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
    """Write the index `name`; return its SHA-256."""
    data = ("\n".join(index_lines(samples)) + "\n").encode("ascii")
    dest.write(name, data)
    return hashlib.sha256(data).hexdigest()


def _write_tar(file: BinaryIO, name: str, samples: Iterator[Sample]) -> tuple[ShardFile, list[Entry]]:
    digest = hashlib.sha256()
    at = held_bytes = 0  # `at`: of the next byte
    listing = []
    held: list[
        bytes
    ] = []  # not yet written: a call for each small piece would cost more than the images between them

    def flush() -> None:
        # copying small pieces is cheap, a large image would be held twice
        large = at - held_bytes > 4 * _HELD_BYTES
        for data in held if large else [b"".join(held)]:
            file.write(data)
            digest.update(data)
        held.clear()

    for sample in samples:
        if at - held_bytes >= _HELD_BYTES:
            flush()
            held_bytes = at
        files = _files(sample)
        members = []
        start = len(held)
        for suffix, data in files:
            member, size = f"{sample.key}.{suffix}", len(data)
            held += (header(member, size), data, _PADDING[size % BLOCK])
            members.append(Member(member, at + BLOCK, size))
            at += BLOCK + size + -size % BLOCK
        crc32 = zlib.crc32(held[start + 1], zlib.crc32(held[start]))
        listing.append(Entry(members, zlib.crc32(b"".join(held[start + 2 :]), crc32)))
    end = 2 * BLOCK + -(at + 2 * BLOCK) % RECORD
    held.append(bytes(end))
    flush()
    return ShardFile(name, len(listing), at + end, digest.hexdigest()), listing


def _files(sample: Sample) -> list[tuple[str, bytes]]:
    stored = sample.stored
    files = [(stored.ext, stored.data)]
    if sample.label is not None:
        files.append(("cls", b"%d" % sample.label))
    facts = sample.facts | {
        "height": stored.height,
        "label": sample.class_name,
        "source": sample.source,
        "width": stored.width,
    }
    files.append(("json", _JSON.encode(facts).encode()))
    if sample.mask is not None:
        files.append((MASK_EXT, sample.mask))
    return files


def header(name: str, size: int) -> bytes:
    """A USTAR header (POSIX.1-1988) of a regular file, mode 0644, without owner and time: the same bytes as `tarfile` makes."""
    assert len(name) <= 100, name
    assert size <= MAX_MEMBER_BYTES, size
    own, digits = name.encode("ascii"), b"%011o" % size
    return b"".join(
        (
            own.ljust(100, b"\0"),
            _MODE_AND_OWNER,
            digits,
            b"\0",
            _TIME,
            b"%06o\0 " % (_FIXED_SUM + sum(own) + sum(digits)),
            _TAIL,
        )
    )
