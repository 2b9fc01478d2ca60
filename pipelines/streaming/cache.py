"""Where pixels come from: shards, or memory that holds the whole data set, encoded or decoded."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np

from shards.dataset.shard_set import ShardSet
from shards.errors import UserError

GB = 1e9
# Of the free memory that a cache may fill by itself; the rest is for batches, the model and other programs.
SHARE = 0.5


# What reading and decoding raise: torch's and our decoders, files and networks, maps of empty files, remote storage.
_ERRORS = (RuntimeError, OSError, ValueError, EOFError, UserError)


Keeps = Literal["nothing", "encoded", "decoded"]


class Unreadable(Exception):
    """A sample of the data set cannot be read or decoded any more; the message says why."""


class Samples:
    """The decoded images of a data set, read and decoded each time; safe to use from threads."""

    note = ""
    """What is held in memory, for the user."""
    keeps: Keeps = "nothing"

    def __init__(self, shards: ShardSet, decode: Callable[[memoryview], np.ndarray], channels: int):
        self.shards, self.channels, self._decode = shards, channels, decode

    def pixels(self, sample_id: int) -> np.ndarray:
        """Return the pixels (H, W, C) of one image; Unreadable where it is gone, damaged, or of another size than the table says."""
        return sound(self.shards, sample_id, lambda again: self._decode(self._read(sample_id, again)))

    def encoded(self, sample_id: int) -> memoryview:
        """Return the bytes of one image as they are stored; Unreadable where they are gone."""
        try:
            return self._read(sample_id)
        except _ERRORS as error:
            raise Unreadable(str(error)) from error

    def _read(self, sample_id: int, again: bool = False) -> memoryview:
        """Return the stored bytes. `again`: what was kept of them is damaged."""
        return self.shards.read(sample_id)


def sound(shards: ShardSet, sample_id: int, make: Callable[[bool], np.ndarray]) -> np.ndarray:
    """Return the pixels (H, W, ...) that `make` reads and decodes; call it again, with True, where a damaged copy of remote shards was
    removed.

    Raises:
        Unreadable: they are gone, damaged, or of another size than the table says.
    """
    again = False
    while True:
        try:
            pixels = make(again)
        except _ERRORS as error:
            if not shards.mend(sample_id):
                raise Unreadable(str(error)) from error
            again = True
        else:
            break
    width, height = int(shards.widths[sample_id]), int(shards.heights[sample_id])
    if pixels.shape[:2] != (height, width):
        raise Unreadable(f"it is {pixels.shape[1]} x {pixels.shape[0]}, but {width} x {height} in the table")
    return pixels


class EncodedCache(Samples):
    """Keeps the bytes of each image from its first reading on."""

    keeps = "encoded"

    def __init__(self, shards: ShardSet, decode: Callable[[memoryview], np.ndarray], channels: int):
        super().__init__(shards, decode, channels)
        self._ends = np.cumsum(_in_use(shards, shards.sizes), dtype=np.int64)
        # The system gives pages when they are written.
        self._bytes = np.empty(int(self._ends[-1]), dtype=np.uint8)
        self._held = np.zeros(shards.num_samples, dtype=np.bool_)

    def _read(self, sample_id: int, again: bool = False) -> memoryview:
        end = int(self._ends[sample_id])
        place = self._bytes[end - int(self.shards.sizes[sample_id]) : end]
        if again or not self._held[sample_id]:
            place[:] = np.frombuffer(self.shards.read(sample_id), dtype=np.uint8)
            # Last: two threads may both write it, the same bytes.
            self._held[sample_id] = True
        return place.data.toreadonly()


class DecodedCache(Samples):
    """Keeps the 8-bit pixels of each image from its first decoding on."""

    keeps = "decoded"

    def __init__(self, shards: ShardSet, decode: Callable[[memoryview], np.ndarray], channels: int):
        super().__init__(shards, decode, channels)
        self._ends = np.cumsum(decoded_sizes(shards, channels))
        self._bytes = np.empty(int(self._ends[-1]), dtype=np.uint8)
        self._held = np.zeros(shards.num_samples, dtype=np.bool_)

    def pixels(self, sample_id: int) -> np.ndarray:
        """As `Samples.pixels`."""
        shape = (int(self.shards.heights[sample_id]), int(self.shards.widths[sample_id]), self.channels)
        end = int(self._ends[sample_id])
        place = self._bytes[end - shape[0] * shape[1] * shape[2] : end].reshape(shape)
        if not self._held[sample_id]:
            place[:] = super().pixels(sample_id)
            self._held[sample_id] = True
        return place


def decoded_sizes(shards: ShardSet, channels: int, ids: np.ndarray | slice = slice(None)) -> np.ndarray:
    """Return the bytes of each image's pixels, of `ids` (N,), or of all images, 0 for those not in use: int64 (N,).

    In a data set of several types each image counts as one of the largest type, so that images that lie end to end begin at multiples
    of their elements' size.
    """
    item_bytes = max(np.dtype(name).itemsize for name in shards.manifest.dtypes)
    sizes = shards.widths[ids].astype(np.int64) * shards.heights[ids] * (channels * item_bytes)
    return _in_use(shards, sizes) if isinstance(ids, slice) else sizes


def _in_use(shards: ShardSet, sizes: np.ndarray) -> np.ndarray:
    """Return the sizes of all images, 0 for those outside the split."""
    if not shards.split:
        return sizes
    used = np.zeros_like(sizes)
    used[shards.ids] = sizes[shards.ids]
    return used


def sum_in_use(shards: ShardSet, sizes: np.ndarray | None) -> int:
    """Return the bytes of the samples in use, given the sizes of all; 0 where there are none."""
    return 0 if sizes is None else int(_in_use(shards, sizes).sum())


def mask_bytes(shards: ShardSet) -> int:
    """Return the most bytes that the decoded masks of the samples in use can take: 16 bits a pixel."""
    masked = shards.ids[shards.mask_sizes[shards.ids] > 0] if shards.mask_sizes is not None else slice(0)
    return 2 * int((shards.widths[masked].astype(np.int64) * shards.heights[masked]).sum())


def eight_bit(shards: ShardSet) -> bool:
    """Return whether all images are decoded to 8 bits a channel."""
    return shards.manifest.dtypes == ["uint8"]


def open_samples(
    shards: ShardSet,
    decode: Callable[[memoryview], np.ndarray],
    channels: int,
    cache: str = "none",
    cache_gb: float = 0,
    *,
    only_encoded: bool = False,
    masks: bool = False,
) -> Samples:
    """Return the data set's images, with the cache that is asked for: 'ram' holds pixels where they fit and encoded bytes where not.

    Args:
        only_encoded: keep encoded bytes even where pixels would fit: another part decodes them.
        masks: leave room for the masks, kept as the images are (`mask_slot.Masks`).
        cache_gb: memory that the cache may fill, in 10^9 bytes; 0 means half of what is free now, shared among the ranks here.

    Raises:
        UserError: not even the encoded images fit.
    """
    if cache != "ram":
        return Samples(shards, decode, channels)
    allowed = cache_gb * GB or free_share()
    encoded, decoded = sum_in_use(shards, shards.sizes), int(decoded_sizes(shards, channels).sum())
    if masks:
        encoded, decoded = encoded + sum_in_use(shards, shards.mask_sizes), decoded + mask_bytes(shards)
    what = f"{len(shards):,} images {'and masks ' if masks else ''}are {decoded / GB:.2f} GB decoded and {encoded / GB:.2f} GB encoded"
    if encoded > allowed:
        raise UserError(
            f"data.cache ram: the {what}, more than the {allowed / GB:.2f} GB allowed: set --data.cache none (the system keeps what "
            "it can of the shards in memory) or raise --data.cache-gb."
        )
    whole = decoded <= allowed and eight_bit(shards) and not only_encoded
    samples = (DecodedCache if whole else EncodedCache)(shards, decode, channels)
    samples.note = (
        f"cache in RAM: the {what}; {allowed / GB:.2f} GB are allowed, so {'pixels' if whole else 'encoded bytes'} are kept from "
        "their first use on"
    )
    return samples


def free_share() -> float:
    """Return the bytes that a cache of this process may fill by itself."""
    return SHARE * free_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def free_memory() -> int:
    """Return the bytes that this process may still take: what the system has available, within the limit of its control group."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        [available] = [line for line in lines if line.startswith("MemAvailable:")]
        free = int(available.split()[1]) * 1024
    except (OSError, ValueError):
        if not hasattr(os, "sysconf"):
            # An unknown system: little enough for any.
            return int(4 * GB)
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
    # No such file, or 'max'.
    except (OSError, ValueError):
        return free
    return max(0, min(free, limit - used))
