"""How much of remote shards is kept on this machine, and where."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shards.units import parse_bytes

SHARE = 0.5  # of the disk's free space that the cache may fill by itself


@dataclass(frozen=True)
class CacheSettings:
    """Where remote shards are kept on this machine and how many bytes of them; empty: as the environment says, else by itself."""

    folder: str = ""
    limit: str = ""

    def path(self) -> Path:
        """The folder: as set, `$FASTSSL_CACHE_DIR`, or `fastssl/shards` in the user's folder for caches."""
        if where := self.folder or os.environ.get("FASTSSL_CACHE_DIR", ""):
            return Path(where)
        caches = os.environ.get("XDG_CACHE_HOME", "")
        return (Path(caches) if caches else Path.home() / ".cache") / "fastssl" / "shards"

    def limit_bytes(self) -> int:
        """The limit: as set, `$FASTSSL_CACHE_BYTES`, or half of what is free where the cache lies; what it holds counts as free."""
        if text := self.limit or os.environ.get("FASTSSL_CACHE_BYTES", ""):
            return parse_bytes(text)
        folder = self.path()
        held = sum(size for _, _, size in held_files(folder))
        there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        return int(SHARE * (shutil.disk_usage(there).free + held))


def held_files(folder: Path) -> Iterator[tuple[int, Path, int]]:
    """(time of last use in ns, path, bytes) of each whole file of a cache."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.suffix in (".tar", ".parquet"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                yield status.st_atime_ns, path, status.st_size
