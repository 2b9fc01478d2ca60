"""What `fastssl inspect` counts and draws."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastssl.cli import main
from shards.conversion.convert import convert
from shards.images.pixels import write_npy
from shards.overview.contact_sheet import THUMB, thumbnail, with_mask
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
    assert any(line.startswith(f"uint8/3 1 {mean:.3g} ") for line in lines)


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


def test_a_mask_colours_what_is_not_zero():
    mask = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8))
    grey = np.full((2, 2, 3), 100, np.uint8)
    shown = with_mask(grey, encoded(mask, "PNG"))
    assert shown[0, 0].tolist() == [100, 100, 100]
    assert shown[0, 1].tolist() == [165, 78, 85]  # half of (230, 57, 70)
    assert np.array_equal(shown[0, 1], shown[1, 1])
    assert not np.array_equal(shown[0, 1], shown[1, 0])


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
