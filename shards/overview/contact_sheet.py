"""One picture of a shard folder: samples drawn at random with name and label, masks laid over them, and histograms."""

from __future__ import annotations

import io
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image

from shards.checking.damage import Row
from shards.checking.shard_checker import read_rows
from shards.dataset.order import epoch_order
from shards.format import layout
from shards.images.pixels import read_npy
from shards.overview.summary import Overview
from shards.storage.place import Place

COLUMNS = 8
THUMB = 320  # pixels, the longer side at most
STRETCH = (2, 98)  # percentiles that become black and white
_PAPER = 243  # gray around images that are not square
_BLUE, _PALE, _INK, _FAINT = "#3b6ea5", "#a9c4e0", "#1c2430", "#6b7480"
_MAX_NAMED = 10  # classes that a chart names; more are drawn without names
# Of mask values from 1 on, again from the first after the last; 0 is left as it is.
_MASK_COLOURS = np.array(
    [
        (230, 57, 70),
        (42, 157, 143),
        (244, 162, 97),
        (69, 123, 245),
        (155, 93, 229),
        (255, 209, 102),
        (6, 214, 240),
    ],
    np.float64,
)


def thumbnail(data: bytes, ext: str) -> npt.NDArray[np.uint8]:
    """A stored image as people can see it, (H, W, 3) with the longer side at most THUMB.

    8 bit with 1 or 3 channels as it is; of all else the first three bands (or the first, where there are fewer), each stretched
    between its STRETCH percentiles; what is not finite is black.
    """
    if ext != "npy":
        with Image.open(io.BytesIO(data)) as image:
            image = image.convert("RGB")
            image.thumbnail((THUMB, THUMB))
            return np.asarray(image)
    pixels = read_npy(data)
    step = -(-max(pixels.shape[:2]) // THUMB)
    pixels = pixels[step // 2 :: step, step // 2 :: step]
    bands = pixels[:, :, :3] if pixels.shape[2] >= 3 else pixels[:, :, :1]
    if bands.dtype != np.uint8 or pixels.shape[2] > 4:
        bands = np.stack([_stretched(bands[:, :, i]) for i in range(bands.shape[2])], axis=2)
    return np.broadcast_to(bands, (*bands.shape[:2], 3)).astype(np.uint8)


def _stretched(band: npt.NDArray) -> npt.NDArray[np.uint8]:
    values = band.astype(np.float64)
    finite = np.isfinite(values)
    if not finite.any():
        return np.zeros(band.shape, np.uint8)
    low, high = np.percentile(values[finite], STRETCH)
    scaled = (np.where(finite, values, low) - low) / max(high - low, 1e-12)
    return (np.clip(scaled, 0, 1) * 255).astype(np.uint8)


def with_mask(picture: npt.NDArray[np.uint8], mask: bytes) -> npt.NDArray[np.uint8]:
    """The picture (H, W, 3) with a mask (PNG of class indices) laid over it, a colour a class, 0 left free."""
    with Image.open(io.BytesIO(mask)) as image:
        small = image.resize(picture.shape[1::-1], Image.Resampling.NEAREST)
        indices = np.asarray(small).astype(np.int64)
    colours = _MASK_COLOURS[(indices - 1) % len(_MASK_COLOURS)]
    mixed = np.where(indices[:, :, None] > 0, 0.5 * picture + 0.5 * colours, picture)
    return mixed.astype(np.uint8)


def draw_overview(place: Place, overview: Overview, num_samples: int, seed: int, out: BinaryIO) -> None:
    """Write the PNG: up to `num_samples` samples drawn with `seed`, above histograms."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ids = sorted(epoch_order(overview.manifest.num_samples, seed, 0)[:num_samples].tolist())
    columns = min(COLUMNS, max(4, len(ids)))
    rows = -(-len(ids) // columns)
    height = 1.0 + 1.95 * rows + 2.9
    figure = pyplot.figure(figsize=(13.2, height), facecolor="white")
    manifest = overview.manifest
    figure.text(0.02, 1 - 0.34 / height, place.name, fontsize=16, weight="bold", color=_INK, va="center")
    about = [f"{manifest.num_samples:,} samples"]
    about += [f"{len(manifest.classes):,} classes"] if manifest.classes else []
    about += [f"{manifest.num_masks:,} masks"] if manifest.num_masks else []
    about += [f"{len(manifest.shards):,} shard{'' if len(manifest.shards) == 1 else 's'}"]
    about += [f"{len(ids)} samples drawn with seed {seed}"]
    figure.text(0.02, 1 - 0.66 / height, " · ".join(about), fontsize=10, color=_FAINT, va="center")
    top, bottom = 1 - 0.92 / height, 3.0 / height
    grid = figure.add_gridspec(
        rows, columns, left=0.02, right=0.98, top=top, bottom=bottom, wspace=0.08, hspace=0.3
    )
    for number, sample_id in enumerate(ids):
        (row,) = read_rows(place, sample_id, sample_id + 1)
        axis = figure.add_subplot(grid[number // columns, number % columns])
        axis.imshow(_squared(_picture(place, row)), interpolation="nearest", aspect="equal")
        axis.set_axis_off()
        index = int(overview.labels[sample_id])
        label = manifest.classes[index] if index >= 0 else f"sample {sample_id}"
        below = {"transform": axis.transAxes, "ha": "center", "va": "top"}
        axis.text(0.5, -0.03, _short(label, 22), fontsize=8, color=_INK, weight="bold", **below)
        axis.text(0.5, -0.15, _short(row["source"], 28), fontsize=6.5, color=_FAINT, **below)
    _histograms(figure, overview, height)
    figure.savefig(out, format="png", dpi=120)
    pyplot.close(figure)


def _picture(place: Place, row: Row) -> npt.NDArray[np.uint8]:
    tar = layout.shard_name(row["shard"])
    picture = thumbnail(place.read_range(tar, row["offset"], row["size"]), row["ext"])
    if row["mask_size"]:
        picture = with_mask(picture, place.read_range(tar, row["mask_offset"], row["mask_size"]))
    return picture


def _squared(picture: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The picture in the middle of a square, so that all stand in line."""
    height, width = picture.shape[:2]
    side = max(height, width)
    square = np.full((side, side, 3), _PAPER, np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = picture
    return square


def _short(text: str, length: int) -> str:
    """The text, or its end where it is longer: names differ there. `$` would begin a formula."""
    text = text if len(text) <= length else "…" + text[1 - length :]
    return text.replace("$", r"\$")


def _histograms(figure: Any, overview: Overview, height: float) -> None:
    grid = figure.add_gridspec(
        1, 4, left=0.05, right=0.98, top=2.25 / height, bottom=0.5 / height, wspace=0.2
    )
    axes = [figure.add_subplot(grid[0, i]) for i in range(4)]
    _bars(axes[0], overview.short_sides, "Shorter side", "pixels", log=True)
    _bars(axes[1], overview.aspects, "Width / height", "", log=True)
    _bars(axes[2], overview.sizes / 1000, "Stored image", "kB", log=True)
    counts = np.sort(overview.class_counts())[::-1]
    if not len(counts):
        _named(
            axes[3], {f"{e}, {c} x {dtype}": n for (e, c, dtype), n in overview.formats.items()}, "Formats"
        )
    elif len(counts) <= _MAX_NAMED:
        named = dict(zip(overview.manifest.classes, overview.class_counts().tolist(), strict=True))
        _named(axes[3], named, "Samples of each class")
    else:
        axes[3].bar(np.arange(len(counts)), counts, width=1.0 if len(counts) > 40 else 0.8, color=_BLUE)
        axes[3].set_xlim(-0.6, len(counts) - 0.4)
        axes[3].set_ylim(0)
        axes[3].set_xlabel("class, from the largest", fontsize=8, color=_FAINT)
        axes[3].set_title(f"Samples of each class ({counts[0]:,} to {counts[-1]:,})", **_title())
        axes[3].xaxis.get_major_locator().set_params(integer=True)
    for axis in axes:
        axis.tick_params(labelsize=7.5, colors=_FAINT, length=3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color("#c4cad1")


def _named(axis: Any, counts: dict[str, int], title: str) -> None:
    """Bars with their names on them, from the largest."""
    ordered = sorted(counts.items(), key=lambda pair: pair[1])[-_MAX_NAMED:]
    axis.barh(range(len(ordered)), [count for _, count in ordered], color=_PALE)
    for number, (name, count) in enumerate(ordered):
        at = (0, number), (4, 0)
        text = f"{_short(name, 24)}  {count:,}"
        axis.annotate(text, at[0], at[1], textcoords="offset points", fontsize=8, color=_INK, va="center")
    axis.set_yticks([])
    axis.set_title(title, **_title())


def _bars(axis: Any, values: npt.NDArray, title: str, unit: str, *, log: bool) -> None:
    low, high = float(values.min()), float(values.max())
    if high / max(low, 1e-12) < 1.05:  # all alike: one bar in the middle
        low, high = low * 0.8, high * 1.25
    spread = log and high / low > 8
    bins = np.geomspace(low, high, 41) if spread else np.linspace(low, high, 41)
    axis.hist(values, bins=bins, color=_BLUE)
    if spread:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
    middle = float(np.median(values))
    axis.axvline(middle, color="#d1495b", linewidth=1.2)
    axis.set_title(f"{title}: median {middle:,.4g} {unit}".rstrip(), **_title())
    axis.set_xlabel(unit, fontsize=8, color=_FAINT)


def _title() -> dict[str, Any]:
    return {"fontsize": 9.5, "color": _INK, "loc": "left"}
