"""Mean, spread and percentiles of each channel, added up shard by shard in any order."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
_FLOAT_BINS = 1 << 16
# of 8-bit samples, which are counted many at a time: a call costs more than counting one sample
_HELD_BYTES = 1 << 18


class Statistics:
    """Histograms of the pixels that `shards.images.pixels.sampled` takes of each image, by (dtype, number of channels).

    Integers are counted exactly, so the order of adding changes nothing. float32 values are counted by their upper 16 bits (sign,
    exponent, 7 bits of fraction): mean, std and percentiles are then right to about 0.4 % of the value. NaN, infinities and what is
    declared to be no data are left out. A percentile is the smallest value that so many of the pixels do not exceed. An image counts
    with the pixels of its grid: 256 to 1,024 unless it is small or thin, whatever its size.
    """

    def __init__(self):
        self._counts: dict[tuple[str, int], npt.NDArray[np.int64]] = {}
        self._held: dict[int, list[npt.NDArray[np.uint8]]] = {}  # by number of channels
        self._held_bytes = 0

    def add(self, sample: npt.NDArray, known: npt.NDArray[np.bool_] | None = None) -> None:
        """Count pixels (k, C), uint8, uint16 or float32; the array must not change afterwards.

        `known`: which of the values are data, (k, C); None for all.
        """
        if sample.dtype == np.uint8 and known is None:
            self._held.setdefault(sample.shape[1], []).append(sample)
            self._held_bytes += sample.size
            if self._held_bytes >= _HELD_BYTES:
                self._count_held()
            return
        num_bins = 256 if sample.dtype == np.uint8 else _FLOAT_BINS
        counts = self._of((sample.dtype.name, sample.shape[1]), num_bins)
        if sample.dtype == np.float32:
            sample = np.ascontiguousarray(sample)
            values = (sample.view(np.uint32) >> 16).astype(np.int64)
            values[~np.isfinite(sample)] = -1  # counted nowhere
        else:
            values = sample.astype(np.int64)
        if known is not None:
            values[~known] = -1
        for channel in range(sample.shape[1]):
            column = values[:, channel]
            counts[channel] += np.bincount(column[column >= 0], minlength=num_bins)

    def _count_held(self) -> None:
        for channels, samples in self._held.items():
            counts = self._of(("uint8", channels), 256)
            for row, column in zip(counts, np.concatenate(samples).T, strict=True):
                # Pillow counts bytes as they are, several times as fast as numpy, which widens them to 64 bits first.
                row += np.array(Image.fromarray(np.ascontiguousarray(column)[None]).histogram())
        self._held, self._held_bytes = {}, 0

    def _all(self) -> dict[tuple[str, int], npt.NDArray[np.int64]]:
        self._count_held()
        return self._counts

    def merge(self, other: Statistics) -> None:
        """Add what another one has counted."""
        for key, counts in other._all().items():
            self._of(key, counts.shape[1])[:] += counts

    def _of(self, key: tuple[str, int], num_bins: int) -> npt.NDArray[np.int64]:
        if key not in self._counts:
            self._counts[key] = np.zeros((key[1], num_bins), np.int64)
        return self._counts[key]

    def to_json(self) -> dict[str, Any]:
        """JSON values from which `from_json` makes the same again."""
        packed = {}
        for (dtype, channels), counts in self._all().items():
            data = zlib.compress(counts.astype("<i8").tobytes(), 6)
            packed[f"{dtype}/{channels}"] = base64.b64encode(data).decode("ascii")
        return packed

    @classmethod
    def from_json(cls, packed: dict[str, Any]) -> Statistics:
        """The inverse of `to_json`."""
        statistics = cls()
        for name, data in packed.items():
            dtype, _, channels = name.partition("/")
            counts = np.frombuffer(zlib.decompress(base64.b64decode(data)), "<i8")
            statistics._counts[dtype, int(channels)] = counts.reshape(int(channels), -1).astype(np.int64)
        return statistics

    def summary(self) -> dict[str, Any]:
        """For the manifest, by "dtype/channels": mean, std and percentiles of each channel, and the pixels counted.

        Integers are given as shares of their range (0 to 1), floats as they are.
        """
        return {
            f"{dtype}/{channels}": _summary(dtype, counts)
            for (dtype, channels), counts in sorted(self._all().items())
        }


def join_summaries(parts: Sequence[tuple[dict[str, Any], int]]) -> dict[str, Any]:
    """The summary of several sets of images together, from the summary and the number of images of each.

    A set counts by its images, whose kinds it divides by the pixels counted. Mean and std are those of all; percentiles are
    interpolated between those known, and so lie between the sets' own.
    """
    joined: dict[str, Any] = {}
    for kind in sorted({kind for summary, _ in parts for kind in summary}):
        found, shares = [], []
        for summary, num_images in parts:
            if kind in summary:
                found.append(summary[kind])
                shares.append(
                    num_images * summary[kind]["pixels"] / sum(f["pixels"] for f in summary.values())
                )
        weights = np.array(shares)[:, None] / sum(shares)
        means, stds = (np.array([facts[name] for facts in found]) for name in ("mean", "std"))
        mean = (weights * means).sum(axis=0)
        std = np.sqrt((weights * (stds**2 + (means - mean) ** 2)).sum(axis=0))
        joined[kind] = {"mean": mean.round(6).tolist(), "std": std.round(6).tolist()}
        joined[kind]["pixels"] = sum(facts["pixels"] for facts in found)
        # (sets, percentiles, channels)
        values = np.array([[facts[f"p{p}"] for p in PERCENTILES] for facts in found])
        columns = [_joined_percentiles(values[:, :, c], weights[:, 0]) for c in range(values.shape[2])]
        joined[kind] |= {
            f"p{p}": row for p, row in zip(PERCENTILES, np.transpose(columns).tolist(), strict=True)
        }
    return joined


def _joined_percentiles(values: npt.NDArray[np.float64], weights: npt.NDArray[np.float64]) -> list[float]:
    """The PERCENTILES of a mixture of distributions, given by theirs (sets, percentiles)."""
    if len(values) == 1:
        return values[0].tolist()
    at = np.unique(values)
    shares = [np.interp(at, own, PERCENTILES, left=0, right=100) for own in values]
    return np.interp(PERCENTILES, weights @ np.array(shares), at).round(6).tolist()


def _summary(dtype: str, counts: npt.NDArray[np.int64]) -> dict[str, Any]:
    values = _values(dtype, counts.shape[1])
    means, stds = [], []
    percentiles: dict[str, list[float]] = {f"p{p}": [] for p in PERCENTILES}
    order = np.argsort(values, kind="stable")
    for channel in counts:
        seen = channel > 0
        total = max(int(channel.sum()), 1)
        mean = float((values[seen] * channel[seen]).sum() / total)
        means.append(round(mean, 6))
        stds.append(round(float(np.sqrt(((values[seen] - mean) ** 2 * channel[seen]).sum() / total)), 6))
        below = np.cumsum(channel[order])
        for percent in PERCENTILES:
            at = int(np.searchsorted(below, total * percent / 100))
            percentiles[f"p{percent}"].append(round(float(values[order[min(at, len(order) - 1)]]), 6))
    return {"mean": means, "std": stds, "pixels": int(counts.sum(axis=1).max())} | percentiles


def _values(dtype: str, num_bins: int) -> npt.NDArray[np.float64]:
    if dtype != "float32":
        return np.arange(num_bins) / (num_bins - 1)
    # The middle of the values whose upper 16 bits are the bin's number; infinities and NaN get 0, and are never counted.
    middle = (np.arange(num_bins, dtype=np.uint32) << 16) + np.uint32(1 << 15)
    with np.errstate(invalid="ignore"):  # the signalling NaNs among them
        values = middle.view(np.float32).astype(np.float64)
    values[0] = 0.0
    return np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
