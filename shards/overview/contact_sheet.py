"""One picture of a shard folder: samples drawn at random with name and label, their masks, and histograms."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image

from shards import terminal
from shards.checking.damage import Row
from shards.checking.shard_checker import read_rows
from shards.dataset.order import epoch_order
from shards.format import layout
from shards.images.pixels import read_npy
from shards.overview.mask_overlay import class_colour, class_name, overlay, resized
from shards.overview.summary import Overview
from shards.storage.place import Place

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 8
THUMB = 320  # pixels, the longer side at most
STRETCH = (2, 98)  # percentiles that become black and white
_PAPER = 243  # gray around images that are not square
DPI = 120
_WIDTH = 13.2  # inches
_BLUE, _PALE, _RED, _INK, _FAINT = "#3b6ea5", "#a9c4e0", "#d1495b", "#1c2430", "#6b7480"
_MAX_NAMED = 10  # classes that a chart names; more are drawn without names
_MAX_IN_LEGEND = 10
_EDGES = (0.5, 99.5)  # percentiles that a histogram ends at where what is beyond would squeeze it


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


def draw_overview(
    place: Place, overview: Overview, num_samples: int, seed: int, out: BinaryIO, masks: bool = True
) -> None:
    """Write the PNG of `overview_figure`."""
    overview_figure(place, overview, num_samples, seed, masks).savefig(out, format="png", dpi=DPI)


def overview_figure(
    place: Place, overview: Overview, num_samples: int, seed: int, masks: bool = True
) -> Figure:
    """Draw up to `num_samples` samples chosen by `seed`, with their masks if asked for, above histograms of all samples."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    ids = sorted(epoch_order(overview.manifest.num_samples, seed, 0)[:num_samples].tolist())
    columns = min(COLUMNS, max(4, len(ids)))
    rows = -(-len(ids) // columns)
    height = 1.3 + 1.95 * rows + 2.9
    figure = Figure(figsize=(_WIDTH, height), facecolor="white")
    manifest = overview.manifest
    figure.text(
        0.02, 1 - 0.34 / height, _short(place.name, 60), fontsize=16, weight="bold", color=_INK, va="center"
    )
    about = [f"{manifest.num_samples:,} samples"]
    about += [f"{len(manifest.classes):,} classes"] if manifest.classes else []
    about += [f"{manifest.num_masks:,} masks"] if manifest.num_masks else []
    about += [f"{len(manifest.shards):,} shard{'' if len(manifest.shards) == 1 else 's'}"]
    about += [f"{len(ids)} samples drawn with seed {seed}"]
    figure.text(0.02, 1 - 0.66 / height, " · ".join(about), fontsize=10, color=_FAINT, va="center")
    alike = [
        f"{title.lower()} {tell(values[0])}"
        for title, values, tell in _distributions(overview)
        if _alike(values)
    ]
    notes = [f"alike in all samples: {', '.join(alike)}"] if alike else []
    if any(ext == "npy" and dtype != "uint8" for ext, _, dtype in overview.formats):
        notes.append(
            f"values of more than 8 bits are shown from black at their {STRETCH[0]} % to white at their {STRETCH[1]} % percentile"
        )
    figure.text(0.02, 1 - 0.92 / height, " · ".join(notes), fontsize=9, color=_FAINT, va="center")
    grid = figure.add_gridspec(
        rows,
        columns,
        left=0.02,
        right=0.98,
        top=1 - 1.2 / height,
        bottom=3.0 / height,
        wspace=0.08,
        hspace=0.3,
    )
    shown: set[int] = set()
    for number, sample_id in enumerate(ids):
        (row,) = read_rows(place, sample_id, sample_id + 1)
        axis = figure.add_subplot(grid[number // columns, number % columns])
        picture, mask = _picture(place, row, masks)
        if mask is not None:
            shown.update(np.unique(mask).tolist())
            picture = overlay(picture, mask)
        axis.imshow(_squared(picture), interpolation="auto", aspect="equal")
        axis.set_axis_off()
        index = int(overview.labels[sample_id])
        label = manifest.classes[index] if index >= 0 else f"sample {sample_id}"
        below = {"transform": axis.transAxes, "ha": "center", "va": "top"}
        room = axis.get_position(original=True).width * _WIDTH * DPI
        for y, text, looks in (
            (-0.03, label, {"fontsize": 8, "weight": "bold", "color": _INK}),
            (-0.15, row["source"], {"fontsize": 6.5, "color": _FAINT}),
        ):
            fits = _fitting(terminal.shown(text), room, looks["fontsize"], looks.get("weight", "normal"))
            axis.text(0.5, y, fits, **looks, **below)
    classes = sorted(shown - {0})
    if classes:
        more = f", {len(classes) - _MAX_IN_LEGEND:,} more" if len(classes) > _MAX_IN_LEGEND else ""
        figure.legend(
            [Patch(color="#" + bytes(class_colour(index)).hex()) for index in classes[:_MAX_IN_LEGEND]],
            [class_name(index) for index in classes[:_MAX_IN_LEGEND]],
            title=f"masks (class 0 is left free{more})",
            loc="upper right",
            bbox_to_anchor=(0.985, 1 - 0.08 / height),
            ncols=5,
            fontsize=8.5,
            title_fontsize=8.5,
            frameon=False,
        )
    _histograms(figure, overview, height)
    return figure


def _picture(
    place: Place, row: Row, masks: bool
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64] | None]:
    """Return a sample's picture (H, W, 3) and its mask in that size, if it has one that is wanted."""
    tar = layout.shard_name(row["shard"])
    picture = thumbnail(place.read_range(tar, row["offset"], row["size"]), row["ext"])
    if not masks or not row["mask_size"]:
        return picture, None
    with Image.open(io.BytesIO(place.read_range(tar, row["mask_offset"], row["mask_size"]))) as image:
        return picture, resized(np.asarray(image).astype(np.int64), *picture.shape[:2])


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


def _fitting(text: str, room: float, size: float, weight: str) -> str:
    """The text, or as much of its end as fits in `room` pixels; neighbours would run into each other otherwise."""
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.font_manager import FontProperties

    font, drawn = FontProperties(size=size, weight=weight), RendererAgg(1, 1, DPI)
    # Letters have some four pixels and more.
    for length in range(min(len(text), int(room / 4)), 0, -1):
        shown = _short(text, length)
        if drawn.get_text_width_height_descent(shown.replace(r"\$", "$"), font, False)[0] <= room:
            return shown
    return ""


def _distributions(overview: Overview) -> list[tuple[str, npt.NDArray, Callable[[float], str]]]:
    """Return what histograms show: title, values of the samples, a value in words."""
    return [
        ("Shorter side", overview.short_sides, lambda value: f"{value:,.4g} pixels"),
        ("Width / height", overview.aspects, lambda value: f"{value:,.4g}"),
        ("Stored image", overview.sizes / 1000, lambda value: f"{value:,.4g} kB"),
    ]


def _alike(values: npt.NDArray) -> bool:
    return bool(values.min() == values.max())


def _histograms(figure: Figure, overview: Overview, height: float) -> None:
    """Draw the distributions that are more than one value, the classes or formats, and the pixel values."""
    shown = [one for one in _distributions(overview) if not _alike(one[1])]
    grid = figure.add_gridspec(
        1, len(shown) + 2, left=0.04, right=0.98, top=2.25 / height, bottom=0.62 / height, wspace=0.22
    )
    axes = [figure.add_subplot(grid[0, i]) for i in range(len(shown) + 2)]
    for axis, (title, values, tell) in zip(axes, shown, strict=False):
        draw_histogram(axis, values, title, tell)
    _classes(axes[-2], overview)
    _pixel_values(axes[-1], overview)
    for axis in axes:
        axis.tick_params(labelsize=7.5, colors=_FAINT, length=3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color("#c4cad1")


def _classes(axis: Axes, overview: Overview) -> None:
    from matplotlib.ticker import MaxNLocator

    counts = np.sort(overview.class_counts())[::-1]
    if not len(counts):
        _named(axis, {f"{e}, {c} x {dtype}": n for (e, c, dtype), n in overview.formats.items()}, "Formats")
    elif len(counts) <= _MAX_NAMED:
        named = dict(zip(overview.manifest.classes, overview.class_counts().tolist(), strict=True))
        _named(axis, named, "Samples of each class")
    else:
        axis.bar(np.arange(len(counts)), counts, width=1.0 if len(counts) > 40 else 0.8, color=_BLUE)
        axis.set_xlim(-0.6, len(counts) - 0.4)
        axis.set_ylim(0)
        axis.set_xlabel("class, from the largest", fontsize=8, color=_FAINT)
        axis.set_title(f"Samples of each class ({counts[0]:,} to {counts[-1]:,})", **_title())
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _pixel_values(axis: Axes, overview: Overview) -> None:
    """Draw the percentiles of each channel of the most frequent kind of pixels, in the values that are stored."""
    kinds: Counter[str] = Counter()
    for (_, channels, dtype), count in overview.formats.items():
        kinds[f"{dtype}/{channels}"] += count
    values = overview.pixel_values()
    kind = max(values, key=lambda name: kinds[name])
    facts = values[kind]
    channels = np.arange(1, len(facts["mean"]) + 1)
    axis.hlines(channels, facts["p1"], facts["p99"], color=_PALE, linewidth=1.5)
    thick = max(1.0, 60 / len(channels))
    axis.hlines(channels, facts["p25"], facts["p75"], color=_BLUE, linewidth=min(8.0, thick))
    axis.plot(facts["p50"], channels, "|", color=_RED, markersize=9)
    axis.set_ylim(len(channels) + 0.6, 0.4)
    axis.set_yticks(channels[:: -(-len(channels) // 12)])
    axis.ticklabel_format(axis="x", style="plain")
    dtype = kind.partition("/")[0]
    if dtype != "float32":
        axis.set_xlim(0)
    of = "" if len(values) == 1 else f" of {kinds[kind]:,} samples"
    axis.set_title(f"Pixel values{of} as stored, {dtype}", **_title())
    axis.set_ylabel("channel", fontsize=8, color=_FAINT)
    axis.set_xlabel("1 to 99 % (line), 25 to 75 % (bar), median", fontsize=8, color=_FAINT)


def _named(axis: Any, counts: dict[str, int], title: str) -> None:
    """Bars with their names on them, from the largest."""
    from matplotlib.ticker import MaxNLocator

    ordered = sorted(counts.items(), key=lambda pair: pair[1])[-_MAX_NAMED:]
    axis.barh(range(len(ordered)), [count for _, count in ordered], color=_PALE)
    for number, (name, count) in enumerate(ordered):
        at = (0, number), (4, 0)
        text = f"{_short(terminal.shown(name), 24)}  {count:,}"
        axis.annotate(text, at[0], at[1], textcoords="offset points", fontsize=8, color=_INK, va="center")
    axis.set_yticks([])
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_title(title, **_title())


def histogram_range(values: npt.NDArray) -> tuple[float, float, bool]:
    """Return from where to where a histogram goes, and whether its axis is logarithmic.

    It ends at the _EDGES percentiles where the few values beyond would take more than two thirds of the axis.
    """
    low, high = float(values.min()), float(values.max())
    inner_low = float(np.percentile(values, _EDGES[0], method="lower"))
    inner_high = float(np.percentile(values, _EDGES[1], method="higher"))
    log = inner_low > 0 and inner_high / inner_low > 8
    scale = np.log if log else float
    inner = scale(inner_high) - scale(inner_low)
    if inner > 0 and (scale(max(high, 1e-12)) - scale(max(low, 1e-12))) > 3 * inner:
        low, high = inner_low, inner_high
    return low, high, low > 0 and high / low > 8


def draw_histogram(axis: Axes, values: npt.NDArray, title: str, tell: Callable[[float], str]) -> None:
    """Draw a histogram with its median; say what is cut off; count logarithmically where one bar is most of the samples."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    low, high, log = histogram_range(values)
    if not log and values.dtype.kind in "iu":
        # Bars of whole values, as wide as each other.
        step = -(-int(high - low + 1) // 41)
        bins = np.arange(low - 0.5, high + step, step)
    else:
        bins = np.geomspace(low, high, 41) if log else np.linspace(low, high, 41)
        # Rounding must not lose the ends.
        bins[0], bins[-1] = low, high
    counts, *_ = axis.hist(values, bins=bins.tolist(), color=_BLUE)
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    if log:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
    notes = []
    if np.max(counts) > len(values) / 2:
        axis.set_yscale("log")
        axis.set_ylim(0.5)
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
        notes.append("counts on a logarithmic axis")
    below, above = int((values < low).sum()), int((values > high).sum())
    notes += [f"{below:,} below {tell(low)} not shown"] if below else []
    notes += [f"{above:,} above {tell(high)} not shown"] if above else []
    middle = float(np.median(values))
    if low <= middle <= high:
        axis.axvline(middle, color=_RED, linewidth=1.2)
    axis.set_title(f"{title}: median {tell(middle)}", **_title())
    axis.set_xlabel("\n".join(notes), fontsize=7.5, color=_FAINT)


def _title() -> dict[str, Any]:
    return {"fontsize": 9.5, "color": _INK, "loc": "left"}
