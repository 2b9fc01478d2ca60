"""The settings of a configuration's section `data`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from pipelines.loading.loader_options import LoaderOptions, ViewSettings
from shards.dataset.shard_set import ShardSet
from shards.splits.split_table import open_mix
from shards.storage.cache_settings import CacheSettings
from shards.units import parse_bytes


@dataclass(frozen=True)
class ShardsConfig:
    """Where the samples come from."""

    shards: str | tuple[str, ...] = ""
    """Folder of shards that `fastssl shard` made, or its URL, such as s3://bucket/shards; or several folders, one after the other."""
    weights: tuple[float, ...] = ()
    """How much of an epoch each of several folders gives, such as 1 3; empty: each sample of all of them once."""
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
        """Return the samples to train on; UserError as `open_mix`."""
        folders = (self.shards,) if isinstance(self.shards, str) else self.shards
        return open_mix(folders, self.split, self.weights, CacheSettings(self.cache_dir, self.cache_bytes))


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
