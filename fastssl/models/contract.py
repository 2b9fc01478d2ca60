"""The contract of a trained backbone: what it takes, what it gives, and what it was trained on. Checkpoints store it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipelines.augment.channels import FULL, gain_and_offset, num_channels
from pipelines.augment.recipe import RECIPES, Recipe
from shards.dataset.mixed_set import MixedShardSet
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError
from shards.units import plural

RGB = ("red", "green", "blue")
# Of conversions whose plan says which bands were taken.
_RASTER_KINDS = ("rasters", "bands")
# Settings of the recipe that decide the evaluation view, all of them fields of the contract.
_VIEW = ("size", "eval_crop", "interpolation", "value_low", "value_high", "mean", "std")
_DTYPES = {torch.uint8: "uint8", torch.uint16: "uint16"}
# Floats so far outside of [0, 1] are no shares of a type's range; resizing alone may leave it by less.
_SLACK = 0.5


@dataclass(frozen=True)
class TrainingData:
    """The samples that a backbone was trained on."""

    num_samples: int
    """Samples in use: those of the split, where there is one."""
    options_sha256: str
    """`options_sha256` of the shards' manifest; for several folders a digest of theirs."""
    split: str = ""
    """The split's name; empty: all samples."""
    ids_sha256: str | None = None
    """SHA-256 of the split's sample ids; None without a split."""
    source: str | None = None
    """The name of what was converted to shards, such as that of a folder; None: unknown."""


@dataclass(frozen=True)
class Contract:
    """What a backbone takes and gives, and where it comes from. None stands for what an older checkpoint does not tell.

    The backbone maps float views (N, channels, size, size) to features (N, num_features). A view is a channel's pixels with
    `value_low` as 0 and `value_high` as 1, clamped to [0, 1], from which `mean` is subtracted, and which is divided by `std`:
    `eval_recipe` lets `pipelines.eval_batches` make them from shards, `normalize` makes them from a tensor of pixels.
    """

    backbone: str
    """Its name, as in model.backbone."""
    num_features: int
    channels: int
    size: int
    """Side, in pixels, of the views it was trained on. A ViT takes no other; a convolutional network takes any."""
    mean: tuple[float, ...]
    """Of each channel, in [0, 1]."""
    std: tuple[float, ...]
    """Of each channel, where the range is [0, 1]."""
    value_low: tuple[float, ...]
    """Of each channel: what becomes 0, as a share of its type's range (255, 65535, for floats 1). Empty: the type's 0."""
    value_high: tuple[float, ...]
    """Of each channel: what becomes 1, likewise. Empty: the type's largest."""
    eval_crop: float
    """Share of the shorter side that the centred square of an evaluation view covers."""
    interpolation: str
    """How that square is resized: bilinear or bicubic, with antialias."""
    patch_size: int | None
    """Side of a ViT's patch, in pixels; None for a convolutional network."""
    num_heads: int | tuple[int, ...] | None
    """Attention heads, one number or, where they differ, that of each block; None without attention."""
    method: str
    """The method that trained it, as in method.name."""
    evaluated: str
    """Path, in the method, of the branch that this is."""
    step: int
    """Optimizer steps that it was trained for."""
    data: TrainingData
    channel_names: tuple[str, ...] | None = None
    """Of each channel, in order: red, green, blue; or the bands of --bands; None: unknown."""
    dtypes: tuple[str, ...] | None = None
    """Types of the pixels it was trained on: uint8, uint16, float32."""

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Contract:
        """Return the contract that `to_json` gave; what a newer version added to it is left out."""
        made = {
            kind: {f.name: _frozen(found[f.name]) for f in dataclasses.fields(kind) if f.name in found}
            for kind, found in ((TrainingData, values["data"]), (cls, values))
        }
        return cls(**{**made[cls], "data": TrainingData(**made[TrainingData])})

    def to_json(self) -> dict[str, Any]:
        """Return the contract as plain values: numbers, strings, None, lists and dictionaries."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def eval_recipe(self) -> Recipe:
        """Return the recipe of the evaluation views, for `pipelines.eval_batches`."""
        return dataclasses.replace(RECIPES["eval"], **{name: getattr(self, name) for name in _VIEW})

    def normalize(self, images: Tensor) -> Tensor:
        """Return pixels as the backbone takes them: float32 (..., channels, H, W), on their device.

        Args:
            images: pixels (..., channels, H, W), uint8 or uint16; or floats, which are shares of a type's range, in [0, 1]. Floats of
                any range are taken where the training's were such.

        Raises:
            UserError: another number of channels, another type, or floats that do not lie in [0, 1].
        """
        name = "float32" if images.is_floating_point() else _DTYPES.get(images.dtype)
        if name is None:
            raise UserError(f"The images are {images.dtype}, but they must be uint8, uint16 or floats.")
        found = images.shape[-3] if images.ndim >= 3 else 0
        if found != self.channels:
            raise UserError(
                f"The images {tuple(images.shape)} have {plural(found, 'channel')}, but {self.backbone} takes {self._channels()}: "
                f"give (N, {self.channels}, H, W)."
            )
        own_floats = self.dtypes == ("float32",) and self.value_low
        if name == "float32" and images.numel() and not own_floats:
            low, high = (float(value) for value in images.aminmax())
            if not -_SLACK <= low <= high <= 1 + _SLACK:
                raise UserError(
                    f"The images are floats from {low:g} to {high:g}, but floats are shares of a type's range, from 0 to 1: give "
                    "uint8 or uint16, or divide by 255 or 65535; do not normalise them before."
                )
        gain, offset, mean, std = (
            torch.tensor(values, dtype=torch.float32, device=images.device)[:, None, None]
            for values in (*gain_and_offset(self.eval_recipe(), np.dtype(name)), self.mean, self.std)
        )
        return ((images.float() * gain + offset).clamp(0, 1) - mean) / std

    def check_shards(self, shards: ShardSet) -> None:
        """Raise UserError for shards whose views have another number of channels, or the same channels in another order."""
        found = num_channels(shards)
        if found != self.channels:
            raise UserError(
                f"{self.backbone} was trained on {self._channels()}, and the images of '{shards.folder}' make views of {found}: give "
                "shards of the same channels."
            )
        ours, theirs = self.channel_names or (), channel_names(shards) or ()
        # Bands are found without regard to case.
        one, other = ([name.lower() for name in names] for names in (ours, theirs))
        if one != other and sorted(one) == sorted(other):
            raise UserError(
                f"{self.backbone} was trained on {', '.join(ours)}, and '{shards.folder}' has them in another order: "
                f"{', '.join(theirs)}. Convert again with the --bands of the training."
            )

    def describe(self) -> str:
        """Return the contract as lines to print."""
        data = self.data
        of, split = (
            f" of '{data.source}'" if data.source else "",
            f", split {data.split}" if data.split else "",
        )
        lines = {
            "input": f"(N, {self.channels}, {self.size}, {self.size})",
            "features": f"(N, {self.num_features})",
            "channels": ", ".join(self.channel_names) if self.channel_names else f"{self.channels}, unnamed",
            "values": self._values(),
            "mean, std": f"{_row(self.mean)}; {_row(self.std)}",
            "view": f"centred square of {self.eval_crop:g} of the shorter side, {self.interpolation}",
            "patch": f"{self.patch_size} px" if self.patch_size else "",
            "heads": "" if self.num_heads is None else str(self.num_heads).strip("()"),
            "weights": f"{self.evaluated} of {self.method} after {plural(self.step, 'step')}",
            "data": f"{plural(data.num_samples, 'sample')}{of}{split} (conversion {data.options_sha256[:12]})",
        }
        return "\n".join([self.backbone, *(f"  {name:<11}{text}" for name, text in lines.items() if text)])

    def __str__(self) -> str:
        return self.describe()

    def __repr__(self) -> str:
        shape = f"(N, {self.channels}, {self.size}, {self.size}) -> (N, {self.num_features})"
        return f"<Contract {self.backbone}: {shape}, {self.method}, {plural(self.step, 'step')}>"

    def _channels(self) -> str:
        names = f" ({', '.join(self.channel_names)})" if self.channel_names else ""
        return plural(self.channels, "channel") + names

    def _values(self) -> str:
        """Return what becomes 0 and 1, in units of the pixels where they are all of one type."""
        types = " or ".join(self.dtypes or ())
        scale = FULL.get(types)
        if not self.value_low:
            top = f"0 to {scale:g}" if scale else "its type's range"
            return f"{types or 'pixels'}, {top} as 0 to 1"
        unit = f"{types}, " if scale else "shares of the type's range, "
        low, high = (
            _row([value * (scale or 1) for value in values]) for values in (self.value_low, self.value_high)
        )
        return f"{unit}{low} as 0 and {high} as 1"


class DataFacts(NamedTuple):
    """What open shards tell of a contract beyond a checkpoint's other entries; None: unknown."""

    source: str | None = None
    dtypes: tuple[str, ...] | None = None
    channel_names: tuple[str, ...] | None = None

    @classmethod
    def of(cls, shards: ShardSet) -> DataFacts:
        """Return the facts of open shards."""
        manifest = shards.manifest
        return cls(manifest.source, tuple(sorted(manifest.dtypes)), channel_names(shards))


def contract_of(state: dict[str, Any]) -> Contract:
    """Return the contract of a checkpoint: the stored one or, in an older checkpoint, what its other entries tell."""
    return Contract.from_json(state["contract"]) if "contract" in state else make_contract(state)


def make_contract(
    state: dict[str, Any], evaluated: str = "backbone", facts: DataFacts | None = None
) -> Contract:
    """Return the contract that a checkpoint's entries step, config, architecture and shards make, with facts of open shards."""
    shape, config, shards = state["architecture"], state["config"], state["shards"]
    facts = facts or DataFacts()
    # Settings that the checkpoint's version did not have acted as today's defaults do.
    view = {name: _frozen(config["recipe"].get(name, getattr(Recipe, name))) for name in _VIEW}
    return Contract(
        backbone=shape["name"],
        num_features=shape["num_features"],
        channels=shape["channels"],
        patch_size=shape["patch_size"],
        num_heads=_frozen(shape["num_heads"]),
        method=config["method"]["name"],
        evaluated=evaluated,
        step=state["step"],
        data=TrainingData(
            num_samples=shards["num_samples"],
            options_sha256=shards["options_sha256"],
            split=config["data"].get("split", ""),
            ids_sha256=shards.get("ids_sha256"),
            source=facts.source,
        ),
        channel_names=facts.channel_names,
        dtypes=facts.dtypes,
        **view,
    )


def channel_names(shards: ShardSet) -> tuple[str, ...] | None:
    """Return the names of the channels of the views, in order; None where the shards do not know them.

    Bands that were chosen by `--bands` have the names or numbers given there. Images of 8 bits in 1 or 3 channels give red, green and
    blue, unless they are rasters or were converted from other shards, which may hold any bands.
    """
    if isinstance(shards, MixedShardSet):
        found = {channel_names(part) for part in shards.parts}
        return found.pop() if len(found) == 1 else None
    manifest = shards.manifest
    kinds = {manifest.kind, *(part.kind for part in manifest.appended)}
    if kinds <= set(_RASTER_KINDS):
        return _chosen_bands(shards)
    if (
        kinds & {*_RASTER_KINDS, "shards"}
        or manifest.dtypes != ["uint8"]
        or not set(manifest.channels) <= {1, 3}
    ):
        return None
    return RGB


def _chosen_bands(shards: ShardSet) -> tuple[str, ...] | None:
    from shards.conversion.shard_plan import read_plan
    from shards.storage.opening import open_place

    found = set()
    # A plan that cannot be read is no reason not to train.
    with contextlib.suppress(UserError, OSError):
        place = open_place(shards.folder)
        for number in range(len(shards.manifest.identities)):
            bands = read_plan(place, number).settings.source_settings["bands"]
            found.add(tuple(f"band {band}" if isinstance(band, int) else band for band in bands))
        if len(found) == 1 and len(names := found.pop()) == num_channels(shards):
            return names
    return None


def _row(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
