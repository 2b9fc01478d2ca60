"""`SHA256SUMS`: the checksums of all files of a shard folder, in the form that `sha256sum --check` reads."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from shards.format import layout
from shards.format.layout import Manifest
from shards.storage.place import Place

_LINE = re.compile(r"([0-9a-f]{64})  (.+)")
_OWN = re.compile(r"# sha256 of the lines above: ([0-9a-f]{64})")
CHUNK_BYTES = 8 << 20  # a store answers few large questions sooner than many small ones


@dataclass(frozen=True)
class Sums:
    """What `SHA256SUMS` says: SHA-256 by file name, and whether the file itself is as it was written."""

    by_name: dict[str, str]
    is_whole: bool


def write_sums(dest: Place, manifest: Manifest) -> None:
    """Write the checksums of a folder whose manifest is about to be written; all other files must be there."""
    digests = {file.name: file.sha256 for file in manifest.shards}
    for file in manifest.shards:
        digests[index_of(file.name)] = file.index_sha256
    plans = range(len(manifest.identities))
    of_plans = (name(k) for k in plans for name in (layout.plan_name, layout.dropped_name))
    for name in (layout.TABLE, layout.QUARANTINE, *of_plans):
        if dest.exists(name):
            digests[name] = sha256_of(dest, name)
    digests[layout.MANIFEST] = hashlib.sha256(manifest.to_bytes()).hexdigest()
    text = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()) if digest)
    own = hashlib.sha256(text.encode()).hexdigest()
    # Readers of such files skip lines that begin with '#'.
    dest.write(layout.SUMS, f"{text}# sha256 of the lines above: {own}\n".encode())


def read_sums(place: Place) -> Sums | None:
    """The checksums of a folder; None where it has no such file."""
    try:
        data = place.read(layout.SUMS)
    except FileNotFoundError:
        return None
    body, _, last = data.removesuffix(b"\n").rpartition(b"\n")
    own = _OWN.fullmatch(last.decode("utf-8", "replace"))
    digest = hashlib.sha256(body + b"\n").hexdigest()
    whole = data.endswith(b"\n") and own is not None and own.group(1) == digest
    lines = map(_LINE.fullmatch, body.decode("utf-8", "replace").splitlines())
    named = {found.group(2): found.group(1) for found in lines if found}
    # Files of the folder itself: a path would have others' files read.
    plain = {name: digest for name, digest in named.items() if "/" not in name and name not in (".", "..")}
    return Sums(plain, whole and len(plain) == len(named))


def sha256_of(place: Place, name: str) -> str:
    """The SHA-256 of a file, hexadecimal; FileNotFoundError where it is missing."""
    digest = hashlib.sha256()
    with place.open(name) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def index_of(tar: str) -> str:
    """The file name of a tar's DALI index."""
    return tar.removesuffix(".tar") + ".idx"
