"""Images of any number of channels and any depth: which number, what [0, 1] means, and which operations are defined for them.

Crops, flips, turns, blur, solarise, noise, erasing and brightness act on each channel by itself. Contrast moves towards the mean of
the gray version, which is luma for three channels and the mean of the channels otherwise. Saturation, hue and grayscale need red,
green and blue: with other channels a recipe that has them is refused before the run starts.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np

from pipelines.augment.operations import OPERATIONS
from pipelines.augment.recipe import IMAGENET_MEAN, IMAGENET_STD, Recipe
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError

# What the largest number of a type is in [0, 1], before recipe.value_low and value_high.
FULL = {"uint8": 255.0, "uint16": 65535.0, "float32": 1.0}
LOW, HIGH = "p1", "p99"  # of the manifest, for data.value_range percentiles
# Share of a type's range that is few.
FEW = 0.05


def num_channels(shards: ShardSet) -> int:
    """Return the channels of the views: 3 for images of 1 and 3 (gray is repeated), else the number that all images have."""
    found = shards.manifest.channels
    if set(found) <= {1, 3}:
        return 3
    if len(found) == 1:
        return found[0]
    raise UserError(
        f"'{shards.folder}' holds images of {', '.join(map(str, sorted(found)))} channels, and a batch must have one number of them "
        "(1 goes with 3): convert them to a folder each."
    )


def fit_recipe(recipe: Recipe, shards: ShardSet, value_range: str = "auto") -> Recipe:
    """Return the recipe with mean, std and value range for the channels of a data set.

    Mean and std stay as they are where there are as many as channels; otherwise, or with percentiles, those that nobody changed from
    ImageNet's come from the manifest. A recipe that has its value range keeps it: evaluation uses that of the training.

    Args:
        value_range: what becomes 0 and 1, where the recipe does not say. auto: as recipe.value_range; type: the range of
            the type (255, 65535, for floats 1); percentiles: the 1st and 99th of each channel in the manifest.

    Raises:
        UserError: different numbers of channels; mean or std of another number; floats beyond 0 to 1 with the range of the type;
            percentiles of images of different types.
    """
    channels = num_channels(shards)
    ours = (recipe.mean, recipe.std) == (IMAGENET_MEAN, IMAGENET_STD)
    value_range = recipe.value_range if value_range == "auto" else value_range
    # From here on value_low and value_high say it.
    recipe = replace(recipe, value_range="type")
    if value_range == "percentiles" and not recipe.value_low:
        facts = _only(shards)
        low, high = (tuple(_spread(facts[name], channels)) for name in (LOW, HIGH))
        # A channel that is the same everywhere has no range.
        high = tuple(max(b, a + 1e-6) for a, b in zip(low, high, strict=True))
        recipe = replace(recipe, value_low=low, value_high=high)
        if ours:
            return _normalised(recipe, facts, channels)
    elif not recipe.value_low:
        _check_floats(shards)
        _warn_of_small_values(shards)
    if ours and len(recipe.mean) != channels:
        return _normalised(recipe, _joined(shards, channels), channels)
    for name in ("mean", "std", "value_low"):
        values = getattr(recipe, name)
        if values and len(values) != channels:
            raise UserError(
                f"recipe.{name} has {len(values)} values and the views of '{shards.folder}' have {channels} channels: "
                f"give {channels}, or leave it out."
            )
    return recipe


def is_deep(pixels: np.ndarray, recipe: Recipe) -> bool:
    """Return whether an image (H, W, C) is worked on in floats: all but 8 bits in three channels and over their full range."""
    return not eight_bit_rgb(pixels.dtype, pixels.shape[2], recipe)


def eight_bit_rgb(dtype: np.dtype, channels: int, recipe: Recipe) -> bool:
    """Return whether images of this kind are worked on in 8 bits."""
    return dtype == np.uint8 and channels == 3 and not recipe.value_low


def check_operations(recipe: Recipe) -> None:
    """Raise UserError where a recipe draws operations that are not defined for its number of channels."""
    channels = len(recipe.mean)
    drawn = [
        name
        for operation in OPERATIONS.values()
        for name, reach in operation.rgb.items()
        if any(reach(recipe, view) > 0 for view in range(recipe.total_views))
    ]
    if channels == 3 or not drawn:
        return
    flags = " ".join(f"--recipe.{name.replace('_', '-')} 0" for name in drawn)
    raise UserError(
        f"The images have {channels} channels, and {' and '.join(f'recipe.{name}' for name in drawn)} need red, green and blue: set "
        f"{flags}, or take --recipe.preset multispectral."
    )


def gain_and_offset(recipe: Recipe, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Return gain and offset, float32 (C,) each: pixels of `dtype` are in [0, 1] as pixel * gain + offset, clamped."""
    low = np.array(recipe.value_low or (0.0,) * len(recipe.mean))
    span = np.array(recipe.value_high or (1.0,) * len(recipe.mean)) - low
    return (1 / (FULL[dtype.name] * span)).astype(np.float32), (-low / span).astype(np.float32)


def _normalised(recipe: Recipe, facts: dict[str, Any], channels: int) -> Recipe:
    """Return mean and std of the data set's channels, in the recipe's value range, to which views are clamped."""
    low = np.array(recipe.value_low or (0.0,) * channels)
    span = np.array(recipe.value_high or (1.0,) * channels) - low
    mean = np.clip((np.array(_spread(facts["mean"], channels)) - low) / span, 0, 1)
    std = np.clip(np.array(_spread(facts["std"], channels)) / span, 1e-6, 1)
    return replace(recipe, mean=tuple(map(float, mean)), std=tuple(map(float, std)))


def _only(shards: ShardSet) -> dict[str, Any]:
    facts = list(shards.manifest.statistics.values())
    if len(facts) != 1:
        raise UserError(
            f"data.value_range percentiles needs images of one type, and '{shards.folder}' holds "
            f"{', '.join(sorted(shards.manifest.statistics))}: set --data.value-range type."
        )
    return facts[0]


def _joined(shards: ShardSet, channels: int) -> dict[str, Any]:
    """Return mean and std of all images with this number of channels, whatever their types."""
    found = [f for key, f in shards.manifest.statistics.items() if key.endswith(f"/{channels}")]
    share = np.array([f["pixels"] for f in found], dtype=np.float64)[:, None]
    share /= share.sum()
    means, stds = (np.array([f[name] for f in found]) for name in ("mean", "std"))
    mean = (share * means).sum(axis=0)
    return {"mean": mean, "std": np.sqrt((share * (stds**2 + (means - mean) ** 2)).sum(axis=0))}


def _spread(values: Any, channels: int) -> list[float]:
    """Return one value a channel; gray ones are repeated."""
    return [float(v) for v in values] if len(values) == channels else [float(values[0])] * channels


def _warn_of_small_values(shards: ShardSet) -> None:
    """Warn where 98 % of the values fill no more than `FEW` of their type's range: noise and solarising would act on all of it."""
    for key, facts in shards.manifest.statistics.items():
        low, high, full = min(facts[LOW]), max(facts[HIGH]), FULL[key.partition("/")[0]]
        # Images of one value have no range to be stretched.
        if 0 < high - low <= FEW:
            warnings.warn(
                f"98 % of the values of '{shards.folder}' lie between {low * full:g} and {high * full:g}, {high - low:.1%} of the "
                f"range from 0 to {full:g} that becomes [0, 1], and noise has that scale: --data.value-range percentiles stretches "
                "them.",
                stacklevel=3,
            )


def _check_floats(shards: ShardSet) -> None:
    for key, facts in shards.manifest.statistics.items():
        low, high = min(facts[LOW]), max(facts[HIGH])
        if key.startswith("float32/") and (low < 0 or high > 1):
            raise UserError(
                f"'{shards.folder}' holds floats, and 98 % of them lie between {low:g} and {high:g}, not 0 and 1: set "
                "--data.value-range percentiles."
            )
