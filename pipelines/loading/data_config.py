"""The settings of a configuration's section `data`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from pipelines.loading.loader_options import LoaderOptions, ViewSettings
from shards.dataset.shard_set import ShardSet
from shards.splits.split_table import open_split
from shards.storage.cache_settings import CacheSettings
from shards.units import parse_bytes


@dataclass(frozen=True)
class ShardsConfig:
    """Where the samples come from."""

    shards: str = ""
    """Folder of shards that `fastssl shard` made, or its URL, such as s3://bucket/shards."""
    split: str = ""
    """Part of the shards that `fastssl split` made, such as train or labelled-0.1; empty: all of them."""
    cache_dir: str = ""
    """Where remote shards are kept on this machine; empty is $FASTSSL_CACHE_DIR, or else ~/.cache/fastssl/shards."""
    cache_bytes: str = ""
    """How much of them, such as 200GB; empty is $FASTSSL_CACHE_BYTES, or else half of what is free there."""

    def __post_init__(self) -> None:
        if self.cache_bytes:
            parse_bytes(self.cache_bytes)

    def open(self) -> ShardSet:
        """Return the samples to train on; UserError as `open_split`."""
        return open_split(self.shards, self.split, CacheSettings(self.cache_dir, self.cache_bytes))


@dataclass(frozen=True)
class DataConfig(ViewSettings, ShardsConfig):
    """Where the samples come from and how they become views."""

    def __post_init__(self) -> None:
        ViewSettings.__post_init__(self)
        ShardsConfig.__post_init__(self)

    def options(self, **more: Any) -> LoaderOptions:
        """Return the options of a loader that this section sets, and `more`: those of the process, such as its device."""
        ours = {field.name: getattr(self, field.name) for field in fields(ViewSettings)}
        return LoaderOptions(**{**ours, **more})
