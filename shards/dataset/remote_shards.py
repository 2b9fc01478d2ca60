"""The remote shards of one `ShardSet`: downloaded when they are read, evicted when others need their space."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable
from typing import IO, TYPE_CHECKING

from shards.errors import UserError
from shards.format.layout import MANIFEST, TABLE, Manifest, check_size, shard_name
from shards.storage.cache_settings import CacheSettings
from shards.storage.remote import RemotePlace
from shards.storage.shard_cache import CachedFile, ShardCache

if TYPE_CHECKING:
    from shards.storage.place import Place

TOUCH_S = 5.0  # between two notes that a shard is in use
FORGET_S = 30.0  # for so long the map of a shard that made room for others may still be wanted


class Near:
    """The shards of one remote place, and its sample table, through a cache on this machine.

    Raises UserError where the largest shard is more than the cache may hold.
    """

    def __init__(self, place: RemotePlace, manifest: Manifest, table: CachedFile, settings: CacheSettings):
        self.settings = settings
        self.cache = ShardCache(place, settings.path(), settings.limit_bytes())
        self._table = table
        self._files = {f.name: CachedFile(f.name, f.bytes, f.sha256, f.sha256) for f in manifest.shards}
        self._used_s: dict[int, float] = {}
        self._right: set[int] = set()
        largest = max(manifest.shards, key=lambda file: file.bytes)
        if largest.bytes > self.cache.limit_bytes:
            raise UserError(
                f"'{place / largest.name}' has {largest.bytes:,} bytes and the cache '{self.cache.folder}' may hold "
                f"{self.cache.limit_bytes:,}: raise --data.cache-bytes."
            )

    @property
    def num_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(file.bytes for file in self._files.values())

    def largest_bytes(self, count: int) -> int:
        """Bytes of the `count` largest shards together."""
        return sum(sorted((file.bytes for file in self._files.values()), reverse=True)[:count])

    def open(self, shard: int) -> IO[bytes]:
        """A shard's tar; download it, or waits for the process that does. See `ShardCache.open`."""
        self._used_s[shard] = time.monotonic()
        return self.cache.open(self._file(shard))

    def open_table(self) -> IO[bytes]:
        """The sample table."""
        return self.cache.open(self._table)

    def used(self, shard: int) -> None:
        """Note, now and then, that a shard is in use: it should be among the last to make room."""
        now_s = time.monotonic()
        if now_s - self._used_s.get(shard, 0.0) > TOUCH_S:
            self._used_s[shard] = now_s
            self.cache.touch(self._file(shard))

    def forget(self, maps: dict[int, memoryview]) -> None:
        """Take out of `maps` what has made room for others and is not in use: until then it still fills the disk."""
        old_s = time.monotonic() - FORGET_S
        for shard in list(maps):
            if self._used_s.get(shard, 0.0) < old_s and not self.cache.holds(self._file(shard)):
                maps.pop(shard, None)

    def prefetch(self, shards: Iterable[int]) -> None:
        """Begin to download shards that will be wanted, in this order. See `ShardCache.prefetch`."""
        self.cache.prefetch([self._file(shard) for shard in shards])

    def is_damaged(self, shard: int) -> bool:
        """Whether a shard that lies here is not what its manifest says, all bytes compared, once; it is removed then."""
        if shard in self._right:
            return False
        right = self.cache.check(self._file(shard))
        if right:
            self._right.add(shard)
        return right is False

    def _file(self, shard: int) -> CachedFile:
        return self._files[shard_name(shard)]


def open_near(place: Place, settings: CacheSettings) -> tuple[Manifest, Near]:
    """The manifest of remote shards, and the shards; UserError where they are unfinished, or a shard is missing or cut short."""
    assert isinstance(place, RemotePlace)
    manifest = Manifest.load(place)
    sizes = place.sizes()
    if sizes is not None:  # a web server is asked when a shard is wanted
        for shard in manifest.shards:
            check_size(place / shard.name, sizes.get(shard.name), shard.bytes)
    num_bytes = place.size(TABLE) if sizes is None else sizes.get(TABLE)
    if not num_bytes:
        raise UserError(
            f"'{place / TABLE}' is missing, or of unknown size; run the same `fastssl shard` command again to mend it."
        )
    # It has no checksum of its own: the manifest's, written after it, tells it from those of other conversions.
    key = hashlib.sha256(place.read(MANIFEST)).hexdigest()
    return manifest, Near(place, manifest, CachedFile(TABLE, num_bytes, key), settings)
