"""The settings of a configuration's section `data`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from pipelines.engines.engine_table import EngineName
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError
from shards.splits.split_table import open_split
from shards.storage.cache_settings import CacheSettings
from shards.units import parse_bytes


@dataclass(frozen=True)
class DataConfig:
    """Where the samples come from and how they become views."""

    shards: str = ""
    """Folder of shards that `fastssl shard` made, or its URL, such as s3://bucket/shards."""
    split: str = ""
    """Part of the shards that `fastssl split` made, such as train or labelled-0.1; empty: all of them."""
    cache_dir: str = ""
    """Where remote shards are kept on this machine; empty is $FASTSSL_CACHE_DIR, or else ~/.cache/fastssl/shards."""
    cache_bytes: str = ""
    """How much of them, such as 200GB; empty is $FASTSSL_CACHE_BYTES, or else half of what is free there."""
    engine: EngineName = "fused"
    """What makes the views: 'fused' (ours), 'dali' or 'kornia' (NVIDIA's and Kornia's operations, the same draws), or 'reference'
    (PIL and torchvision, one image at a time)."""
    threads: int = 0
    """Threads that decode and augment; 0 means one per core that this process may use, divided among the ranks here."""
    augment_on: Literal["cpu", "gpu"] = "cpu"
    """Where views are made ('reference': only 'cpu'): 'gpu' frees CPU cores and takes time of the GPU. With train.micro_batch only
    'fused' makes them there: a chunk's views when the step asks for the chunk, for each pass anew."""
    decode: Literal["cpu", "gpu"] = "cpu"
    """Where images are decoded with data.augment_on gpu: 'gpu' (nvImageCodec) helps where few CPU cores serve a GPU, whose memory then
    holds the decoded images of up to 3 batches; arrays, such as 16 bits, are left to the CPU."""
    order: Literal["auto", "global", "blocks"] = "auto"
    """'global' shuffles all samples; 'blocks' shuffles shards, and samples within a few shards, so that few are in use at a time.
    'auto' is 'blocks' for remote shards."""
    block_shards: int = 16
    """Shards whose samples are shuffled together with data.order blocks."""
    cache: Literal["none", "ram", "gpu"] = "none"
    """Keep the data set in memory: 'ram' as pixels where they fit and as encoded bytes where not, 'gpu' as pixels on the GPU."""
    cache_gb: float = 0.0
    """Memory that the cache may fill, in 10^9 bytes; 0 is half of what is free at the start (the ranks of a machine share it)."""
    value_range: Literal["type", "percentiles"] = "type"
    """What becomes 0 and 1: the ends of the type's range (65535 for 16 bits), or the 1st and 99th percentile of each channel."""
    side_stream: bool = True
    """Let a GPU copy, and make views where data.augment_on is gpu, on a stream beside the step's; False does it between the steps."""
    max_bad_share: float = 0.001
    """Stop when more than ten samples, and more than this share of those read, are bad; others stand in till then. 0: at the first."""
    masks: bool = False
    """Batches carry the masks of their views too, for segmentation: the same crops, flips and turns, made on the CPU."""
    mask_ignore: int = 255
    """Class index in masks for pixels whose class is not known: of samples without a mask, and of erased rectangles."""

    def __post_init__(self) -> None:
        if self.threads < 0:
            raise UserError(f"data.threads is {self.threads}, but it must be 0 (one per core) or more.")
        if self.block_shards < 1:
            raise UserError(f"data.block_shards is {self.block_shards}, but it must be at least 1.")
        if self.cache_bytes:
            parse_bytes(self.cache_bytes)
        if self.cache_gb < 0:
            raise UserError(f"data.cache_gb is {self.cache_gb}, but it must be 0 (automatic) or more.")
        if not -(2**31) <= self.mask_ignore < 2**31:
            raise UserError(f"data.mask_ignore is {self.mask_ignore}, but masks are integers of 32 bits.")
        if not 0 <= self.max_bad_share <= 1:
            raise UserError(
                f"data.max_bad_share is {self.max_bad_share}, but it must be a share between 0 and 1."
            )

    def open(self) -> ShardSet:
        """The samples to train on; UserError as `open_split`."""
        return open_split(self.shards, self.split, CacheSettings(self.cache_dir, self.cache_bytes))

    def options(self) -> dict[str, Any]:
        """The keyword arguments of `open_loader` that this section sets: all but those of `open`."""
        opening = ("shards", "split", "cache_dir", "cache_bytes")
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in opening}
