"""What `fastssl inspect` counts and draws."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from fastssl.cli import main
from shards.conversion.convert import convert
from shards.images.pixels import write_npy
from shards.overview.contact_sheet import (
    DPI,
    THUMB,
    draw_histogram,
    histogram_range,
    overview_figure,
    thumbnail,
)
from shards.overview.mask_overlay import class_colour
from shards.overview.summary import inspect
from shards.sources.source_kinds import open_source
from shards.storage.opening import open_place
from tests.pictures import encoded, picture


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """11 images of a list: classes ant (8) and bee (2), one without, a duplicate, a refused one, sizes 24 x 16 but for one."""
    root = tmp_path_factory.mktemp("inspect")
    rows = ["path,label,group,weight,town"]
    for i in range(11):
        name = f"{i:02d}.{'png' if i % 4 == 0 else 'jpg'}"
        image = picture(2 if i == 10 else i, (90, 30) if i == 7 else (24, 16))
        (root / name).write_bytes(encoded(image, "PNG" if i % 4 == 0 else "JPEG"))
        label = "" if i == 9 else "bee" if i in (3, 4) else "ant"
        rows.append(f"{name},{label},{i // 4},{i / 4},{'Ulm' if i < 6 else ''}")
    (root / "bad.jpg").write_bytes(b"text")
    (root / "list.csv").write_text("\n".join([*rows, "bad.jpg,ant,0,1,Ulm"]) + "\n")
    dest = open_place(root / "out")
    convert(open_source(str(root / "list.csv")), dest)
    return root / "out"


def test_the_numbers_are_those_of_the_samples(folder: Path):
    overview = inspect(open_place(folder))
    assert overview.class_counts().tolist() == [8, 2]
    assert int((overview.labels < 0).sum()) == 1
    assert overview.formats == {("jpg", 3, "uint8"): 8, ("png", 3, "uint8"): 3}
    assert overview.stored == {"kept": 11}
    assert (overview.num_groups, overview.num_duplicates) == (3, 1)
    percentiles = overview.percentiles()
    assert (
        percentiles["width"].tolist() == np.percentile([24] * 10 + [90], (0, 1, 25, 50, 75, 99, 100)).tolist()
    )
    assert percentiles["short side"][[0, -1]].tolist() == [16, 30]
    assert percentiles["width / height"][[0, -1]].tolist() == [1.5, 3.0]
    assert sorted(overview.sizes) == sorted(len(path.read_bytes()) for path in folder.parent.glob("[01]*.*"))
    extra = {name: (kind, nulls, values) for name, kind, nulls, values in overview.extra}
    assert extra["weight"] == ("double", 0, "0.0 to 2.5")
    assert extra["town"][1:] == (5, "1 different: Ulm (6)")


def test_the_tables_tell_them(folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "150")
    assert main(["inspect", str(folder)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for wanted in (
        "samples 11",
        "classes 2, 1 sample without",
        "groups 3",
        "duplicates 1 with the pixels of an earlier image, marked in the table",
        "quarantined 1",
        "ant 8 72.7 %",
        "bee 2 18.2 %",
        "jpg 3 uint8 8 72.7 %",
        "not readable as JPEG, PNG, WebP, BMP, TIFF, GIF or NumPy array 1",
    ):
        assert wanted in lines
    mean = json.loads((folder / "manifest.json").read_text())["statistics"]["uint8/3"]["mean"][0]
    # In the values that are stored, 0 to 255.
    assert any(line.startswith(f"uint8/3 1 {255 * mean:.3g} ") for line in lines)


def test_the_picture_is_drawn_the_same_again(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    names = [str(tmp_path / name) for name in ("a.png", "b.png", "c.png")]
    for name, seed in zip(names, ("0", "0", "1"), strict=True):
        assert main(["inspect", str(folder), "--out", name, "--samples", "5", "--seed", seed]) == 0
    drawn = [np.asarray(Image.open(name).convert("RGB")) for name in names]
    assert drawn[0].shape[1] > 1000
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])
    # Samples above, blue bars below.
    blue = (np.abs(drawn[0].astype(int) - (0x3B, 0x6E, 0xA5)).sum(axis=2) < 6).any(axis=1)
    assert blue.any()
    assert np.flatnonzero(blue)[0] > len(blue) // 3


def test_deep_images_are_stretched_between_their_percentiles():
    ramp = np.linspace(1000, 5000, 101, dtype=np.float64)
    pixels = np.broadcast_to(ramp[:, None, None], (101, 4, 6)).astype(np.uint16)
    shown = thumbnail(write_npy(pixels), "npy")
    assert shown.shape == (101, 4, 3)
    assert (shown[:3] == 0).all()
    assert (shown[98:] == 255).all()
    assert abs(int(shown[50, 0, 0]) - 127) <= 1
    floats = np.where(np.arange(101)[:, None, None] == 7, np.nan, pixels).astype(np.float32)
    assert (thumbnail(write_npy(floats), "npy")[7] == 0).all()
    one = thumbnail(write_npy(pixels[:, :, :2]), "npy")
    assert np.array_equal(one[:, :, 0], one[:, :, 2])
    assert max(thumbnail(write_npy(np.zeros((900, 400, 5), np.uint16)), "npy").shape) <= THUMB


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 arrays of 2 channels of 16 bits with values 1000 to 1255 and twice as much; masks of classes 1, 3 and 255."""
    root = tmp_path_factory.mktemp("deep")
    (root / "images").mkdir()
    (root / "masks").mkdir()
    ramp = np.arange(1000, 1256, dtype=np.uint16).reshape(16, 16)
    for i in range(4):
        np.save(root / "images" / f"{i}.npy", np.stack([np.roll(ramp, i), 2 * ramp], axis=2))
        mask = np.zeros((16, 16), np.uint8)
        mask[:4], mask[4:8], mask[8:10] = 1, 3, 255
        Image.fromarray(mask).save(root / "masks" / f"{i}.png")
    assert (
        main(
            [
                "shard",
                str(root / "images"),
                str(root / "out"),
                "--masks",
                str(root / "masks"),
                "--workers",
                "0",
            ]
        )
        == 0
    )
    return root / "out"


def panels(figure: Figure) -> dict[str, Axes]:
    """The axes below the samples, by the first words of their titles."""
    return {axis.get_title("left").split(":")[0]: axis for axis in figure.axes if axis.get_title("left")}


def test_pixel_values_stand_in_stored_values(deep: Path, capsys: pytest.CaptureFixture):
    assert main(["inspect", str(deep)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    [first] = [line.split() for line in lines if line.startswith("uint16/2 1 ")]
    assert first[2] in ("1,127", "1,128")  # the mean of 1000 to 1255 is 1127.5
    assert (first[4], first[-1]) == ("1,002", "1,253")
    place = open_place(deep)
    axis = panels(overview_figure(place, inspect(place), 2, 0))["Pixel values as stored, uint16"]
    lines, bars = (one.get_segments() for one in axis.collections)
    assert [np.round(segment[:, 0]).tolist() for segment in lines] == [[1002, 1253], [2004, 2506]]
    assert [np.round(segment[:, 0]).tolist() for segment in bars] == [[1063, 1191], [2126, 2382]]
    assert axis.get_xlim()[0] == 0


def test_names_of_samples_do_not_run_into_each_other(tmp_path: Path):
    for i, letter in enumerate("Wi"):
        (tmp_path / "src" / (letter * 80)).mkdir(parents=True)
        for k in range(4):
            picture(10 * i + k, (24, 16)).save(tmp_path / "src" / (letter * 80) / f"{letter * 30}{k}.jpg")
    convert(tmp_path / "src", tmp_path / "out", workers=0)
    place = open_place(tmp_path / "out")
    figure = overview_figure(place, inspect(place), 8, 0)
    figure.set_dpi(DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    ends = [
        [text.get_window_extent(canvas.get_renderer()) for text in axis.texts]
        for axis in figure.axes
        if axis.images
    ]
    assert len(ends) == 8
    for left, right in itertools.pairwise(ends):
        for one, other in zip(left, right, strict=True):
            assert one.width > 0
            assert one.x1 < other.x0
    shown = [text.get_text() for axis in figure.axes if axis.images for text in axis.texts]
    assert all(text.startswith("…") and len(text) > 5 for text in shown)
    # Narrow letters fill their room, too.
    assert max(map(len, shown)) > 2 * min(map(len, shown))


def test_masks_have_a_legend_and_can_be_left_out(deep: Path, tmp_path: Path):
    place = open_place(deep)
    figure = overview_figure(place, inspect(place), 2, 0)
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["class 1", "class 3", "255 (ignored)"]
    colours = [
        tuple(round(255 * part) for part in patch.get_facecolor()[:3]) for patch in legend.get_patches()
    ]
    assert colours == [class_colour(index) for index in (1, 3, 255)]
    plain = overview_figure(place, inspect(place), 2, 0, masks=False)
    assert not plain.legends
    shown, free = (np.asarray(one.axes[0].images[0].get_array()).astype(int) for one in (figure, plain))
    changed = (shown != free).any(axis=2)
    assert changed[:8].all()
    assert not changed[10:].any()
    for options in ([], ["--no-masks"]):
        assert main(["inspect", str(deep), "--out", str(tmp_path / f"{len(options)}.png"), *options]) == 0
    assert (tmp_path / "0.png").read_bytes() != (tmp_path / "1.png").read_bytes()


def test_what_is_alike_in_all_samples_has_no_histogram(deep: Path):
    place = open_place(deep)
    figure = overview_figure(place, inspect(place), 2, 0)
    assert list(panels(figure)) == ["Formats", "Pixel values as stored, uint16"]
    told = " ".join(text.get_text() for text in figure.texts)
    assert "alike in all samples: shorter side 16 pixels, width / height 1, stored image" in told


def test_few_far_values_are_cut_from_a_histogram_and_told():
    values = np.concatenate([np.arange(60, 80).repeat(50), [3, 2000, 3000]])
    axis = Figure().subplots()
    draw_histogram(axis, values, "Side", lambda value: f"{value:g} px")
    assert histogram_range(values) == (60, 79, False)
    assert sum(bar.get_height() for bar in axis.patches) == 1000
    assert {bar.get_height() for bar in axis.patches} == {50}
    assert axis.get_xlabel() == "1 below 60 px not shown\n2 above 79 px not shown"
    assert axis.get_title("left") == f"Side: median {np.median(values):g} px"
    assert axis.get_yscale() == "linear"


def test_one_value_that_dominates_is_counted_logarithmically():
    values = np.array([512] * 98 + [400, 700])
    axis = Figure().subplots()
    draw_histogram(axis, values, "Side", str)
    assert axis.get_yscale() == "log"
    assert axis.get_xlabel() == "counts on a logarithmic axis"
    assert sum(bar.get_height() for bar in axis.patches) == 100


def test_values_over_orders_of_magnitude_have_a_logarithmic_axis():
    values = np.geomspace(1, 1e4, 500)
    assert histogram_range(values) == (1, pytest.approx(1e4), True)
    assert histogram_range(np.linspace(100, 200, 500)) == (100, 200, False)


@pytest.mark.parametrize("options", [["--samples", "0"], ["--out", "a.jpg"], ["--out", "nowhere/a.png"]])
def test_impossible_options_are_refused(folder: Path, options: list[str]):
    assert main(["inspect", str(folder), *options]) == 2


def test_no_number_is_broken_in_a_narrow_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "in").mkdir()
    for i in range(3):
        deep = np.random.default_rng(i).integers(0, 9000, (900, 700, 4), np.uint16)
        np.save(tmp_path / "in" / f"{i}.npy", deep)
    convert(tmp_path / "in", tmp_path / "out", workers=0)
    assert main(["inspect", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    [size] = [line for line in lines if line.startswith("bytes ")]
    assert size.split() == ["bytes", *["5.0", "MB"] * 7]
    first = next(at for at, line in enumerate(lines) if line.startswith("uint16/4"))
    assert [len(line.split()) for line in lines[first : first + 5]] == [11, 10, 10, 10, 0]
