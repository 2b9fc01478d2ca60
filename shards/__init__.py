"""Images in, WebDataset shards out: convert a folder once, then read any sample by number. No torch here.

    from shards import ShardSet, SplitRule, split
    from shards.conversion import convert

    convert("photos/", "photo-shards/")
    split("photo-shards/", SplitRule(val=0.1))
    shards = ShardSet.open("photo-shards/")
    print(shards, shards[0].label, shards[0].pixels().shape)

Names are imported when they are first used, so that `import shards` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shards.checking.damage import Damage
    from shards.checking.repair import Repair, repair
    from shards.checking.verify import VerifyResult, verify
    from shards.conversion.convert import Part, ProgressReport, convert
    from shards.conversion.labelling import Labelling, label
    from shards.dataset.mixed_set import MixedShardSet
    from shards.dataset.order import block_order, epoch_order
    from shards.dataset.shard_set import ShardSample, ShardSet
    from shards.errors import UserError
    from shards.format.layout import Manifest
    from shards.images.policy import Policy
    from shards.overview.summary import Overview, inspect
    from shards.sources.source import Source
    from shards.sources.source_kinds import SOURCES, open_source
    from shards.sources.source_options import ListOptions, RasterOptions, SourceOptions, TarOptions
    from shards.splits.split_rules import Division, SplitRule
    from shards.splits.split_table import open_split, split
    from shards.storage.cache_settings import CacheSettings

__all__ = [
    "SOURCES",
    "CacheSettings",
    "Damage",
    "Division",
    "Labelling",
    "ListOptions",
    "Manifest",
    "MixedShardSet",
    "Overview",
    "Part",
    "Policy",
    "ProgressReport",
    "RasterOptions",
    "Repair",
    "ShardSample",
    "ShardSet",
    "Source",
    "SourceOptions",
    "SplitRule",
    "TarOptions",
    "UserError",
    "VerifyResult",
    "block_order",
    "convert",
    "epoch_order",
    "inspect",
    "label",
    "open_source",
    "open_split",
    "repair",
    "split",
    "verify",
]
_HOMES = {
    "shards.checking.damage": ("Damage",),
    "shards.checking.repair": ("Repair", "repair"),
    "shards.checking.verify": ("VerifyResult", "verify"),
    "shards.conversion.convert": ("Part", "ProgressReport", "convert"),
    "shards.conversion.labelling": ("Labelling", "label"),
    "shards.dataset.mixed_set": ("MixedShardSet",),
    "shards.dataset.order": ("block_order", "epoch_order"),
    "shards.dataset.shard_set": ("ShardSample", "ShardSet"),
    "shards.errors": ("UserError",),
    "shards.format.layout": ("Manifest",),
    "shards.images.policy": ("Policy",),
    "shards.overview.summary": ("Overview", "inspect"),
    "shards.sources.source": ("Source",),
    "shards.sources.source_kinds": ("SOURCES", "open_source"),
    "shards.sources.source_options": ("ListOptions", "RasterOptions", "SourceOptions", "TarOptions"),
    "shards.splits.split_rules": ("Division", "SplitRule"),
    "shards.splits.split_table": ("open_split", "split"),
    "shards.storage.cache_settings": ("CacheSettings",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'shards' has no attribute '{name}'")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
