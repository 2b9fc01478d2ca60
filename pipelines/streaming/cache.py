"""Where pixels come from: shards, or memory that holds the whole data set, encoded or decoded."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from itertools import islice
from typing import Literal

import numpy as np

from pipelines.streaming.machine_memory import agree, free_memory, local_ranks, shared_bytes, wait_for_all
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError

GB = 1e9
# Of the free memory that a cache may fill by itself; the rest is for batches, the model and other programs.
SHARE = 0.5


# What reading and decoding raise: torch's and our decoders, files and networks, maps of empty files, remote storage.
READ_ERRORS = (RuntimeError, OSError, ValueError, EOFError, UserError)


Keeps = Literal["nothing", "encoded", "decoded"]


class Unreadable(Exception):
    """A sample of the data set cannot be read or decoded any more; the message says why."""


class Samples:
    """The decoded images of a data set, read and decoded each time; safe to use from threads."""

    note = ""
    """What is held in memory, for the user."""
    keeps: Keeps = "nothing"
    num_bytes = 0
    """Bytes that are kept when all is read."""
    held: Held | None = None

    def __init__(self, shards: ShardSet, decode: Callable[[memoryview], np.ndarray], channels: int):
        self.shards, self.channels, self._decode = shards, channels, decode
        self.beside: list[Callable[[int], object]] = []
        """What else to call for each sample when a cache is filled ahead: to keep its mask."""

    def fill(self, sample_id: int) -> None:
        """Keep what a cache keeps of one image; Unreadable as `pixels`."""

    def pixels(self, sample_id: int) -> np.ndarray:
        """Return the pixels (H, W, C) of one image; Unreadable where it is gone, damaged, or of another size than the table says."""
        return sound(self.shards, sample_id, lambda again: self._decode(self._read(sample_id, again)))

    def encoded(self, sample_id: int) -> memoryview:
        """Return the bytes of one image as they are stored; Unreadable where they are gone."""
        try:
            return self._read(sample_id)
        except READ_ERRORS as error:
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
        except READ_ERRORS as error:
            if not shards.mend(sample_id):
                raise Unreadable(str(error)) from error
            again = True
        else:
            break
    width, height = int(shards.widths[sample_id]), int(shards.heights[sample_id])
    if pixels.shape[:2] != (height, width):
        raise Unreadable(f"it is {pixels.shape[1]} x {pixels.shape[0]}, but {width} x {height} in the table")
    return pixels


class Held:
    """Memory for something of each sample, which the processes of a machine fill and read together; safe to use from threads."""

    def __init__(self, sizes: np.ndarray, shared: bool = True):
        """Take memory for at most `sizes` (N,) bytes of each sample; pages are taken when written. Every rank calls it, where
        `shared`."""
        ends = np.cumsum(sizes, dtype=np.int64)
        self._starts = ends - sizes
        total, count = int(ends[-1]), len(sizes)
        found = shared_bytes(total + count) if shared else (np.zeros(total + count, np.uint8), False)
        memory, self.shared = found
        self._bytes, self._kinds = memory[:total], memory[total:]

    def kind(self, sample_id: int) -> int:
        """Return what `keep` noted of a sample, 0 where nothing is held of it."""
        return int(self._kinds[sample_id])

    def place(self, sample_id: int, count: int) -> np.ndarray:
        """Return the first `count` bytes of a sample's memory."""
        first = int(self._starts[sample_id])
        return self._bytes[first : first + count]

    def keep(self, sample_id: int, data: np.ndarray, kind: int = 1) -> None:
        """Hold an array of a sample, and note a number above 0 of it."""
        flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        self.place(sample_id, len(flat))[:] = flat
        # Last: two may both write it, the same bytes.
        self._kinds[sample_id] = kind

    def num_held(self) -> int:
        """Return the number of samples that something is held of."""
        return int(np.count_nonzero(self._kinds))


class Cache(Samples):
    """Keeps something of each image in memory."""

    def __init__(
        self,
        shards: ShardSet,
        decode: Callable[[memoryview], np.ndarray],
        channels: int,
        ids: np.ndarray | None = None,
    ):
        """Keep all samples in use, in memory that the ranks share; or `ids`, for this process alone."""
        super().__init__(shards, decode, channels)
        self._kept = self.held = Held(in_use(shards, self._sizes(), ids), shared=ids is None)

    def _sizes(self) -> np.ndarray:
        """Return the most bytes that are kept of each sample, (num_samples,)."""
        raise NotImplementedError


class EncodedCache(Cache):
    """Keeps the bytes of each image from its first reading on."""

    keeps = "encoded"

    def _sizes(self) -> np.ndarray:
        return self.shards.sizes

    def fill(self, sample_id: int) -> None:
        """As `Samples.fill`."""
        self.encoded(sample_id)

    def _read(self, sample_id: int, again: bool = False) -> memoryview:
        if again or not self._kept.kind(sample_id):
            self._kept.keep(sample_id, np.frombuffer(self.shards.read(sample_id), dtype=np.uint8))
        return self._kept.place(sample_id, int(self.shards.sizes[sample_id])).data.toreadonly()


class DecodedCache(Cache):
    """Keeps the 8-bit pixels of each image from its first decoding on."""

    keeps = "decoded"

    def _sizes(self) -> np.ndarray:
        return decoded_sizes(self.shards, self.channels)

    def fill(self, sample_id: int) -> None:
        """As `Samples.fill`."""
        self.pixels(sample_id)

    def pixels(self, sample_id: int) -> np.ndarray:
        """As `Samples.pixels`."""
        shape = (int(self.shards.heights[sample_id]), int(self.shards.widths[sample_id]), self.channels)
        if not self._kept.kind(sample_id):
            self._kept.keep(sample_id, np.broadcast_to(super().pixels(sample_id), shape))
        return self._kept.place(sample_id, shape[0] * shape[1] * shape[2]).reshape(shape)


def decoded_sizes(shards: ShardSet, channels: int, ids: np.ndarray | slice = slice(None)) -> np.ndarray:
    """Return the bytes of each image's pixels, of `ids` (N,), or of all images, 0 for those not in use: int64 (N,).

    In a data set of several types each image counts as one of the largest type, so that images that lie end to end begin at multiples
    of their elements' size.
    """
    item_bytes = max(np.dtype(name).itemsize for name in shards.manifest.dtypes)
    sizes = shards.widths[ids].astype(np.int64) * shards.heights[ids] * (channels * item_bytes)
    return in_use(shards, sizes) if isinstance(ids, slice) else sizes


def in_use(shards: ShardSet, sizes: np.ndarray, ids: np.ndarray | None = None) -> np.ndarray:
    """Return the sizes of all images, 0 for those outside the split, or outside `ids`."""
    if ids is None and not shards.split:
        return sizes
    ids = shards.ids if ids is None else ids
    used = np.zeros_like(sizes)
    used[ids] = sizes[ids]
    return used


def sumin_use(shards: ShardSet, sizes: np.ndarray | None) -> int:
    """Return the bytes of the samples in use, given the sizes of all; 0 where there are none."""
    return 0 if sizes is None else int(in_use(shards, sizes).sum())


def mask_sizes(shards: ShardSet) -> np.ndarray:
    """Return the most bytes that each decoded mask of the samples in use can take, 16 bits a pixel: int64 (N,)."""
    masked = (
        shards.ids[shards.mask_sizes[shards.ids] > 0] if shards.mask_sizes is not None else shards.ids[:0]
    )
    return in_use(shards, 2 * shards.widths.astype(np.int64) * shards.heights, masked)


def mask_bytes(shards: ShardSet) -> int:
    """Return the most bytes that the decoded masks of the samples in use can take."""
    return int(mask_sizes(shards).sum())


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

    Every rank calls it: the ranks of a machine share the cache.

    Args:
        only_encoded: keep encoded bytes even where pixels would fit: another part decodes them.
        masks: leave room for the masks, kept as the images are (`mask_slot.Masks`).
        cache_gb: memory that the cache may fill, in 10^9 bytes; 0 means half of what is free now.

    Raises:
        UserError: not even the encoded images fit.
    """
    if cache != "ram":
        return Samples(shards, decode, channels)
    encoded, decoded = sumin_use(shards, shards.sizes), int(decoded_sizes(shards, channels).sum())
    if masks:
        encoded, decoded = encoded + sumin_use(shards, shards.mask_sizes), decoded + mask_bytes(shards)
    what = f"{len(shards):,} images{' and masks' if masks else ''}"
    decoded = decoded if eight_bit(shards) and not only_encoded else None
    return make_cache(shards, decode, channels, agree(lambda: choose_kept(what, encoded, decoded, cache_gb)))


def make_cache(
    shards: ShardSet,
    decode: Callable[[memoryview], np.ndarray],
    channels: int,
    kept: tuple[bool, str, int],
    ids: np.ndarray | None = None,
) -> Cache:
    """Return a cache of what `choose_kept` has chosen. `ids`: as for `Cache`."""
    pixels, note, num_bytes = kept
    samples = (DecodedCache if pixels else EncodedCache)(shards, decode, channels, ids)
    samples.note, samples.num_bytes = f"cache in RAM: {note}", num_bytes
    return samples


def choose_kept(
    what: str, encoded: int, decoded: int | None, cache_gb: float, taken: int = 0
) -> tuple[bool, str, int]:
    """Return whether pixels fit in memory, what that is in words, and how many bytes are kept.

    Args:
        what: the samples, in words.
        encoded: bytes as they are stored.
        decoded: bytes of the pixels; None where these are not kept.
        cache_gb: as for `open_samples`.
        taken: bytes that other caches will fill.

    Raises:
        UserError: not even the encoded images fit.
    """
    free = free_memory()
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) // local_ranks()[1]
    allowed = (min(cache_gb * GB, free) or SHARE * free / ranks) - taken
    pixels = decoded is not None and decoded <= allowed
    sizes = f"{_gb(decoded)} decoded and " if decoded is not None else ""
    text = f"{what} are {sizes}{_gb(encoded)} encoded"
    besides = f" beside {_gb(taken)} of other caches" if taken else ""
    if encoded > allowed:
        raise UserError(
            f"data.cache ram: the {text}, more than the {_gb(max(allowed, 0))} allowed{besides} ({_gb(free)} are free on this "
            "machine, within the limit of its control group): set --data.cache none (the system keeps what it can of the shards in "
            "memory)" + (", or raise --data.cache-gb." if cache_gb * GB < free else ".")
        )
    kept = decoded if pixels and decoded is not None else encoded
    how = "pixels" if pixels else "encoded bytes"
    return (
        pixels,
        f"the {text}; {_gb(allowed)} are allowed{besides} ({_gb(free)} are free), so {how} are kept",
        kept,
    )


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / GB:.2f} GB"


def free_share() -> float:
    """Return the bytes that a cache of this process may fill by itself."""
    return SHARE * free_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def fill_ahead(
    samples: Samples,
    threads: int,
    progress: Callable[[int, int], None] | None = None,
    ids: np.ndarray | None = None,
) -> None:
    """Read, and decode, all that a cache keeps, before it is used; the ranks of a machine do a part each. Every rank calls it.

    A sample that is bad is left for the stream of batches, which replaces it by another.

    Args:
        samples: a cache; others have nothing to fill.
        threads: of this process.
        progress: takes the samples that are held, on this machine, and their number.
        ids: those to keep, by this process alone; None for all in use.
    """
    held = samples.held
    if held is None:
        return
    number, ranks = local_ranks() if held.shared else (0, 1)
    ids = samples.shards.ids if ids is None else ids
    part = np.array_split(ids, ranks)[number]

    def fill(chunk: np.ndarray) -> None:
        for sample_id in chunk:
            for one in (samples.fill, *samples.beside):
                with contextlib.suppress(Unreadable):
                    one(int(sample_id))

    # Small enough that a Ctrl-C, and the display, need not wait.
    chunks = iter(np.array_split(part, -(-len(part) // 32) or 1))
    with ThreadPoolExecutor(threads, thread_name_prefix="cache") as pool:
        running = {pool.submit(fill, chunk) for chunk in islice(chunks, 2 * threads)}
        while running:
            done, running = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
            running |= {pool.submit(fill, chunk) for chunk in islice(chunks, len(done))}
            if progress:
                progress(held.num_held(), len(ids))
    if held.shared:
        wait_for_all()
    if progress:
        progress(len(ids), len(ids))
