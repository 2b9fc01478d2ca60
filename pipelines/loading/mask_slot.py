"""Masks beside the views of any engine: the threads that load an image decode and crop its mask too."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from pipelines.loading.loader_options import LoaderOptions
from pipelines.loading.masks import decode_mask, render_masks
from pipelines.streaming.batch import BatchRequest
from pipelines.streaming.batch_stream import Slot, SlotMaker, exact_device, work_stream
from pipelines.streaming.cache import (
    READ_ERRORS,
    Held,
    Keeps,
    Samples,
    Unreadable,
    free_share,
    in_use,
    mask_bytes,
    mask_sizes,
    sound,
)
from pipelines.streaming.host_slot import HostMemory, MemoryPool
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError


class Masks:
    """The masks of a data set, read each time or kept in memory, as its images are; safe to use from threads."""

    def __init__(self, shards: ShardSet, keep: Keeps = "nothing", shared: bool = False):
        """Keep what `keep` says of each mask from its first use on. UserError where no sample in use has a mask.

        Args:
            shared: keep it in memory that the ranks of a machine share; every rank calls this then.
        """
        if shards.mask_sizes is None or not (shards.mask_sizes[shards.ids] > 0).any():
            part = f"the split '{shards.split}' of " if shards.split else ""
            raise UserError(
                f"data.masks: {part}'{shards.folder}' holds no masks: convert with `fastssl shard SOURCE DEST --masks FOLDER`, or "
                "leave out --data.masks."
            )
        self._shards, self._keep = shards, keep
        # Decoded: 16 bits a pixel, of which masks of 8 bits write, and so take, the first half.
        sizes = mask_sizes(shards) if keep == "decoded" else in_use(shards, shards.mask_sizes)
        self._held = None if keep == "nothing" else Held(sizes, shared)

    def fill(self, sample_id: int) -> None:
        """Keep what is kept of one mask; Unreadable as `mask`."""
        assert self._shards.mask_sizes is not None
        if self._keep != "encoded":
            self.mask(sample_id)
        elif self._shards.mask_sizes[sample_id]:
            try:
                self._read(sample_id, False)
            except READ_ERRORS as error:
                raise Unreadable(f"its mask: {error}") from error

    def mask(self, sample_id: int) -> np.ndarray | None:
        """Return class indices, uint8 or uint16 (H, W); None where the sample has no mask.

        Raises:
            Unreadable: it is gone, damaged, or not of its image's size.
        """
        assert self._shards.mask_sizes is not None
        if not self._shards.mask_sizes[sample_id]:
            return None
        held = self._held if self._keep == "decoded" else None
        if held is not None and (item_bytes := held.kind(sample_id)):
            shape = int(self._shards.heights[sample_id]), int(self._shards.widths[sample_id])
            kept = held.place(sample_id, shape[0] * shape[1] * item_bytes)
            return kept.view(np.uint16 if item_bytes == 2 else np.uint8).reshape(shape)
        try:
            made = sound(self._shards, sample_id, lambda again: decode_mask(self._read(sample_id, again)))
        except Unreadable as error:
            raise Unreadable(f"its mask: {error}") from error
        if held is not None:
            held.keep(sample_id, made, made.dtype.itemsize)
        return made

    def _read(self, sample_id: int, again: bool) -> memoryview:
        held = self._held if self._keep == "encoded" else None
        assert self._shards.mask_sizes is not None
        if held is not None and held.kind(sample_id) and not again:
            return held.place(sample_id, int(self._shards.mask_sizes[sample_id])).data.toreadonly()
        data = self._shards.read_mask(sample_id)
        assert data is not None
        if held is not None:
            held.keep(sample_id, np.frombuffer(data, np.uint8))
        return data


class MaskedSlot(Slot):
    """Adds masks to another slot, whatever makes its views; the CPU crops them."""

    def __init__(self, slot: Slot, masks: Masks, memory: HostMemory, ignore: int):
        """Write masks to `memory`, int32 (S, S) for each view; `ignore` fills what has no class."""
        self._slot, self._masks, self._memory, self._ignore = slot, masks, memory, ignore

    def begin(self, request: BatchRequest) -> None:
        """As `Slot.begin`."""
        self._slot.begin(request)
        self._memory.begin(len(request.ids))

    def fill(self, i: int, sample_id: int, draws: np.ndarray) -> None:
        """As `Slot.fill`; a sample whose mask is bad is bad."""
        mask, out = self._masks.mask(sample_id), self._memory.at(i)
        self._slot.fill(i, sample_id, draws)
        if mask is not None:
            render_masks(mask, draws, self._ignore, out)
            return
        for view in out:
            view.fill(self._ignore)

    def complete(self) -> list[int]:
        """As `Slot.complete`."""
        return self._slot.complete()

    def launch(self) -> None:
        """As `Slot.launch`."""
        self._slot.launch()
        self._memory.launch()

    def views(self) -> Sequence[torch.Tensor]:
        """As `Slot.views`."""
        return self._slot.views()

    def masks(self) -> list[torch.Tensor]:
        """As `Slot.masks`."""
        return self._memory.take()

    def done(self) -> None:
        """As `Slot.done`."""
        self._slot.done()
        self._memory.done()


def with_masks(
    make_slots: SlotMaker, samples: Samples, sides: Sequence[int], batch: int, options: LoaderOptions
) -> SlotMaker:
    """Return what gives memory for a stream of views and their masks.

    Args:
        make_slots: gives that for the views.
        samples: the images; masks are kept in memory, and shared by ranks, as they are. Where a GPU keeps the images, masks stay in
            main memory, if half of what is free there holds them.
        sides: of each view, pixels.
        batch: samples in the largest batch.
        options: the loader's.

    Raises:
        UserError: no sample in use has a mask.
    """
    shards, keep, device = samples.shards, samples.keeps, exact_device(options.device)
    if options.cache == "gpu" and mask_bytes(shards) <= free_share():
        keep = "decoded"
    masks = Masks(shards, keep, samples.held is not None and samples.held.shared)
    samples.beside.append(masks.fill)

    def slots(*, in_chunks: bool = False) -> Sequence[Slot]:
        copies = None if in_chunks else work_stream(device, options.side_stream)
        shapes = [(side, side) for side in sides]
        pool = memory_pool(shapes, batch, options, torch.int32, in_chunks=in_chunks)
        return [
            MaskedSlot(
                slot, masks, HostMemory(shapes, batch, device, copies, torch.int32, pool), options.mask_ignore
            )
            for slot in make_slots(in_chunks=in_chunks)
        ]

    return slots


def memory_pool(
    shapes: Sequence[tuple[int, ...]],
    batch: int,
    options: LoaderOptions,
    dtype: torch.dtype = torch.float32,
    *,
    in_chunks: bool = False,
) -> MemoryPool | None:
    """Return what gives each batch memory of its own; None where batches overwrite each other, or are copied to a GPU anyway.

    `shapes`: those of one sample.
    """
    if options.reuse_memory or in_chunks or torch.device(options.device).type != "cpu":
        return None
    return MemoryPool([(batch, *shape) for shape in shapes], dtype)
