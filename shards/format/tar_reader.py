"""Tar archives as they come (USTAR, PAX, GNU): where each file's bytes lie, and where an archive stops being whole."""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import IO

from shards.storage.atomic_files import RangeFile

BLOCK = 512
_END = tarfile.EOFHeaderError  # pyright: ignore[reportAttributeAccessIssue] (its stub lacks them)
_NOTHING = tarfile.EmptyHeaderError  # pyright: ignore[reportAttributeAccessIssue]
_SPECIAL = {
    tarfile.SYMTYPE: "symbolic links",
    tarfile.FIFOTYPE: "pipes",
    tarfile.CHRTYPE: "devices",
    tarfile.BLKTYPE: "devices",
}
_GZIP, _XZ, _BZ2, _ZSTD = b"\x1f\x8b", b"\xfd7zXZ", b"BZh", b"\x28\xb5\x2f\xfd"
# The WebDataset convention: the key ends before the first dot of the last part, the extension is all after it, in lower case.
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class TarMember:
    """A file in a tar: `offset` is of its first byte. Its name is a name only, and never a path on a disk.

    special: what it is where it is no file whose bytes lie in the archive, such as "symbolic links"; "" for all others.
    """

    name: str
    offset: int
    size: int
    special: str = ""


class Cut(Exception):
    """From `offset` on the archive is not whole; `name` is the file it ends in, where that is known; `reason` says more."""

    def __init__(self, offset: int, name: str, reason: str):
        super().__init__(reason)
        self.offset = offset
        self.name = name
        self.reason = reason


def members(file: IO[bytes], size: int) -> Iterator[TarMember]:
    """All that a tar of `size` bytes holds but folders, in its order. A hard link has the bytes of the file before it that it names.

    Raises Cut where the archive is damaged or cut short, after all files that are whole.
    """
    # Made for the first hard link: most archives have none, and some a million files.
    files: dict[str, TarMember] | None = None
    for info, name in _headers(file, size):
        if info.isdir():
            continue
        if info.isreg() and not info.issparse():
            member = TarMember(name, info.offset_data, info.size)
            if files is not None:
                files[_place(name)] = member
            yield member
        elif info.islnk():
            if files is None:
                files = {
                    _place(before): TarMember(before, known.offset_data, known.size)
                    for known, before in _headers(file, size, info.offset)
                    if known.isreg() and not known.issparse()
                }
            target = files.get(_place(_text(info.linkname)))
            if target:
                files[_place(name)] = replace(target, name=name)
                yield files[_place(name)]
            else:
                yield TarMember(name, info.offset_data, 0, "hard links to files that are not in the tar")
        else:
            special = "sparse files" if info.issparse() else _SPECIAL.get(info.type, "members of other types")
            yield TarMember(name, info.offset_data, 0, special)


def _headers(file: IO[bytes], size: int, end: int | None = None) -> Iterator[tuple[tarfile.TarInfo, str]]:
    """The header of each member, with its name, up to the byte `end` or to the end of the tar. Raises Cut as `members`."""
    offset = 0
    file.seek(0)
    try:
        tar = tarfile.TarFile(fileobj=file, encoding="utf-8", errors="surrogateescape")
    except Exception as error:  # on damaged input tarfile raises many kinds
        if size and _only_zeros(file, size):
            return
        raise Cut(0, "", _beginning(file, error)) from error
    tar.offset = 0
    tar.pax_headers = {}
    while end is None or offset < end:
        file.seek(offset)
        try:
            info = tarfile.TarInfo.fromtarfile(tar)
        except _END:
            return
        except _NOTHING:
            # Writers flush whole blocks, so one that was killed leaves just this.
            raise Cut(offset, "", "without an end mark, so perhaps cut short") from None
        except Exception as error:
            raise Cut(offset, "", f"damaged ({error})") from error
        name = _text(info.name)
        if tar.offset <= offset:  # a negative size would go in circles
            raise Cut(offset, name, "damaged (a negative size)")
        if info.isreg() and not info.issparse() and info.offset_data + info.size > size:
            raise Cut(offset, name, "cut short")
        info.offset = offset
        yield info, name
        if tar.offset > size:
            raise Cut(offset, name, "cut short")
        offset = tar.offset


@dataclass
class Archive:
    """A tar: a file, or `size` bytes of one from `start` on, where it lies in another tar.

    plain: an archive of images rather than of WebDataset samples; None until that is known.
    """

    names: list[str]  # of the file, and of each tar within it
    file: IO[bytes]
    start: int
    size: int
    plain: bool | None = None
    seen: set[int] = field(default_factory=set)  # hashes of the images' names

    @property
    def name(self) -> str:
        return "/".join(self.names)

    def members(self) -> Iterator[TarMember]:
        """As the function `members`; offsets are those in the file."""
        inside = io.BufferedReader(RangeFile(self.size, self._read), BLOCK) if self.start else self.file
        for member in members(inside, self.size):
            yield replace(member, offset=member.offset + self.start)

    def _read(self, offset: int, size: int) -> bytes:
        self.file.seek(self.start + offset)
        return self.file.read(size)


def _only_zeros(file: IO[bytes], size: int) -> bool:
    file.seek(0)
    return not file.read(min(size, BLOCK)).strip(b"\0")


def _beginning(file: IO[bytes], error: Exception) -> str:
    file.seek(0)
    head = file.read(6)
    if not head:
        return "empty (0 bytes)"
    if head.startswith((_GZIP, _XZ, _BZ2, _ZSTD)):
        return "compressed: unpack it to a plain .tar first"
    return f"no tar archive ({error})"


def _place(name: str) -> str:
    """A name without what leads nowhere, for comparison: `./a//b` is `a/b`."""
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def _text(name: str) -> str:
    """The name in UTF-8; what is none is written as \\xe4."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def split_name(name: str) -> tuple[str, str] | None:
    """The sample's key and the extension; None for what is hidden or in a hidden folder, without a dot, or metadata (`__x__`)."""
    found = _NAME.fullmatch(name)
    if not found or is_hidden(name):
        return None
    return found[1], found[2].lower()


def is_hidden(name: str) -> bool:
    """Whether a member counts as little as a hidden file on a disk, or one in a hidden folder; so does metadata (`__x__`)."""
    if not name.startswith(".") and "/." not in name and "__" not in name:
        return False
    parts = name.split("/")
    return (
        any(part.startswith(".") and part not in (".", "..") for part in parts)
        or "__MACOSX" in parts[:-1]
        or bool(re.fullmatch(r"__[^/]*__", name))
    )
