"""The fused engine on a GPU: CPU threads decode, and batched kernels make the views on their own stream, one step ahead.

Decoded images of any sizes and types lie end to end in one buffer of bytes; a GPU cache is such a buffer of the whole data set. With a
`BatchDecoder` the device decodes too, and the CPU only what it cannot. The same code runs on CPU tensors, for the tests.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from pipelines.augment.draws import DRAW
from pipelines.augment.recipe import Recipe
from pipelines.kernels.batched_views import BatchedKernels, BatchedViews
from pipelines.kernels.decode import is_array
from pipelines.kernels.view_params import PLAIN, TYPES, Form
from pipelines.loading.gpu_decode import DeviceDecoding
from pipelines.streaming.batch import BatchRequest
from pipelines.streaming.batch_stream import Slot, hand_over
from pipelines.streaming.cache import GB, SHARE, Samples, Unreadable, decoded_sizes
from pipelines.streaming.pinned import pinned_empty
from shards.errors import UserError


class GpuStore:
    """The decoded data set in the memory of a device: each image from its first use on."""

    def __init__(self, samples: Samples, device: torch.device, cache_gb: float = 0):
        """Allocate up to `cache_gb`, in 10^9 bytes; 0 is half of what is free. UserError where the pixels do not fit."""
        sizes = decoded_sizes(samples.shards, samples.channels)
        total = int(sizes.sum())
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else total
        allowed = cache_gb * GB or SHARE * free
        what = f"{len(samples.shards):,} images are {total / GB:.2f} GB decoded"
        if (device.type == "cuda" or cache_gb) and total > allowed:
            raise UserError(
                f"data.cache gpu: the {what}, more than the {allowed / GB:.2f} GB allowed on the device: set --data.cache ram, or "
                "raise --data.cache-gb."
            )
        self.note = f"cache on the GPU: the {what}; kept from their first use on"
        self.first_bytes = np.cumsum(sizes) - sizes
        self.pixels = torch.empty(total, dtype=torch.uint8, device=device)
        self.held = np.zeros(samples.shards.num_samples, dtype=np.bool_)
        # Of what is held: places in TYPES.
        self.types = np.zeros(samples.shards.num_samples, dtype=np.uint8)


class GpuSlot(Slot):
    """Memory for one batch of decoded images, and the launches that turn them into views."""

    def __init__(
        self,
        samples: Samples,
        recipe: Recipe,
        device: torch.device,
        side: torch.cuda.Stream | None = None,
        store: GpuStore | None = None,
        form: Form = PLAIN,
        kernels: BatchedKernels | None = None,
        decoding: DeviceDecoding | None = None,
    ):
        """Start with no memory. `side`: stream of copies and kernels, None on a CPU. `kernels`: None takes the best for the device.

        `decoding`: None lets the CPU decode everything.
        """
        self._samples, self._device, self._side, self._store = samples, device, side, store
        self._make = BatchedViews(recipe, device, kernels, form, samples.shards.manifest.dtypes)
        self._decoder = decoding.decoder if decoding is not None else None
        self._decoding = decoding.stream if decoding is not None else None
        self._ready = torch.cuda.Event() if self._decoding is not None else None
        # To be decoded by the device, and decoded by it.
        self._encoded: dict[int, np.ndarray] = {}
        self._decoded: dict[int, torch.Tensor] = {}
        self._take_memory(0)
        self._pixels = torch.empty(0, dtype=torch.uint8, device=device)
        self._copied = torch.cuda.Event() if side is not None else None
        self._ids: np.ndarray = np.empty(0, dtype=np.int64)
        self._draws: np.ndarray = np.empty(0, dtype=DRAW)
        # Of each image's place: its first byte and its size.
        self._first_bytes, self._places = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        self._end = 0
        # Places in TYPES.
        self._types = np.empty(0, dtype=np.uint8)
        self._strays: dict[int, np.ndarray] = {}
        self._fresh: list[int] = []
        self._views: list[torch.Tensor] = []

    def begin(self, request: BatchRequest) -> None:
        """As `Slot.begin`: each image gets the place that its size in the table asks for."""
        if self._copied is not None:
            self._copied.synchronize()
        self._ids, self._draws = np.array(request.ids), request.draws.copy()
        sizes = self._sizes(self._ids)
        self._first_bytes, self._places = np.cumsum(sizes) - sizes, sizes
        self._types = np.zeros(len(sizes), dtype=np.uint8)
        self._strays, self._fresh = {}, []
        self._encoded, self._decoded = {}, {}
        # Bytes in use.
        self._end = int(sizes.sum())
        # Grows by quarters, so that batches of mixed sizes soon find it large enough.
        if len(self._host) < self._end:
            self._take_memory(self._end * 5 // 4)

    def fill(self, i: int, sample_id: int, draws: np.ndarray) -> None:
        """As `Slot.fill`: decode, or gather what the device will decode."""
        if self._store is not None and self._store.held[sample_id]:
            self._types[i] = self._store.types[sample_id]
        else:
            encoded = self._for_device(i, sample_id)
            if encoded is not None:
                self._encoded[i], self._types[i] = encoded, TYPES.index("uint8")
            else:
                self._fill_pixels(i, sample_id)
        self._ids[i] = sample_id
        self._draws[:, i] = draws

    def _for_device(self, i: int, sample_id: int) -> np.ndarray | None:
        """Return the bytes of an image that the device will decode; None for what the CPU decodes.

        The CPU decodes arrays, stand-ins for bad samples, and what the device has refused.
        """
        if self._decoder is None or sample_id != self._ids[i] or i in self._encoded:
            return None
        encoded = self._samples.encoded(sample_id)
        return None if is_array(encoded) else np.frombuffer(encoded, np.uint8)

    def _fill_pixels(self, i: int, sample_id: int) -> None:
        image = self._samples.pixels(sample_id)
        own = sample_id == self._ids[i]
        size = self._places[i] if own else self._sizes(np.array([sample_id]))[0]
        if image.nbytes > size or image.shape[2] != self._samples.channels:
            raise Unreadable(
                f"it is {image.shape[2]} x {image.dtype}, but the table has {self._samples.channels} channels of "
                f"{' or '.join(self._samples.shards.manifest.dtypes)}"
            )
        pixels = np.ascontiguousarray(image).reshape(-1).view(np.uint8)
        if own:
            first = int(self._first_bytes[i])
            self._host_bytes[first : first + len(pixels)] = pixels
        else:
            # Stands in for a bad sample and may be larger.
            self._strays[i] = pixels
        self._types[i] = TYPES.index(image.dtype.name)
        self._fresh.append(i)

    def complete(self) -> list[int]:
        """As `Slot.complete`: let the device decode; what it refuses, and what is not of the size in the table, is filled again."""
        if self._decoder is None or not self._encoded:
            return []
        places = list(self._encoded)
        stream = self._decoding.cuda_stream if self._decoding is not None else 0
        with torch.cuda.stream(self._decoding):
            made = self._decoder([self._encoded[i] for i in places], stream)
            if self._ready is not None:
                self._ready.record()
        shards = self._samples.shards
        for i, pixels in zip(places, made, strict=True):
            size = int(shards.heights[self._ids[i]]), int(shards.widths[self._ids[i]]), 3
            if pixels is not None and tuple(pixels.shape) == size:
                self._decoded[i] = pixels
        return [i for i in places if i not in self._decoded]

    def launch(self) -> None:
        """As `Slot.launch`."""
        self._place_strays()
        with torch.cuda.stream(self._side):
            pixels, first_bytes = self._upload()
            widths = self._samples.shards.widths[self._ids]
            self._views = self._make(pixels, first_bytes, widths, self._draws, self._types)
            if self._copied is not None:
                self._copied.record()

    def views(self) -> Sequence[torch.Tensor]:
        """As `Slot.views`: the current stream waits for the kernels, the host does not."""
        views, self._views = self._views, []
        if self._copied is not None:
            hand_over(views, self._copied, self._device)
        return views

    def done(self) -> None:
        """As `Slot.done`: nothing is lent."""

    def _upload(self) -> tuple[torch.Tensor, np.ndarray]:
        """Return the bytes on the device and where each image of the batch begins in them."""
        if self._store is not None:
            self._place(self._store.pixels, self._store.first_bytes[self._ids])
            # Later launches follow on the same stream, so what is marked as held here is there when they read it.
            fresh = [*self._fresh, *self._decoded]
            self._store.types[self._ids[fresh]] = self._types[fresh]
            self._store.held[self._ids[fresh]] = True
            return self._store.pixels, self._store.first_bytes[self._ids]
        if len(self._pixels) < len(self._host):
            self._pixels = torch.empty_like(self._host, device=self._device)
        if self._decoded:
            self._place(self._pixels, self._first_bytes)
        else:
            self._pixels[: self._end].copy_(self._host[: self._end], non_blocking=True)
        return self._pixels, self._first_bytes

    def _place(self, pixels: torch.Tensor, first_bytes: np.ndarray) -> None:
        """Copy each image that was decoded for this batch to its place on the device."""
        sizes = self._sizes(self._ids)
        for i in self._fresh:
            size, first, at = int(sizes[i]), int(self._first_bytes[i]), int(first_bytes[i])
            pixels[at : at + size].copy_(self._host[first : first + size], non_blocking=True)
        if self._decoded:
            # In a few launches for all of them.
            if self._ready is not None:
                torch.cuda.current_stream(self._device).wait_event(self._ready)
            places = [
                pixels[int(first_bytes[i]) :][: decoded.numel()].view(decoded.shape)
                for i, decoded in self._decoded.items()
            ]
            decoded = list(self._decoded.values())
            torch._foreach_copy_(places, decoded, non_blocking=True)  # pyright: ignore[reportPrivateImportUsage]

    def _place_strays(self) -> None:
        """Put the stand-ins behind all others."""
        places = sorted(self._strays)
        # As large as the table has them, so that the next one is aligned too.
        sizes = self._sizes(self._ids[places])
        old, total = self._host, self._end + int(sizes.sum())
        if total > len(old):
            self._take_memory(total)
            self._host[: self._end] = old[: self._end]
        for i, size in zip(places, sizes, strict=True):
            pixels = self._strays[i]
            self._first_bytes[i] = self._end
            self._host_bytes[self._end : self._end + len(pixels)] = pixels
            self._end += int(size)

    def _sizes(self, ids: np.ndarray) -> np.ndarray:
        return decoded_sizes(self._samples.shards, self._samples.channels, ids)

    def _take_memory(self, count: int) -> None:
        self._host = self._memory(count)
        # The same memory for the threads that fill it: each operation of torch would ask for Python's lock once more.
        self._host_bytes = self._host.numpy()

    def _memory(self, count: int) -> torch.Tensor:
        make = pinned_empty if self._side is not None else torch.empty
        return make((count,), dtype=torch.uint8)
