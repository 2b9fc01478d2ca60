"""Which file of a folder of masks is an image's mask."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastssl.cli import main
from shards.conversion.convert import convert
from shards.format.layout import Manifest
from shards.images.mask_images import MaskFolder
from shards.overview.mask_shares import mask_shares
from shards.sources.image_folder import FolderSource
from shards.sources.raster_tiles import RasterSource
from shards.sources.source_options import RasterOptions
from shards.storage.opening import open_place
from tests import needs
from tests.pictures import encoded, picture


def write_mask(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((16, 24), value, np.uint8)).save(
        path, "TIFF" if path.suffix.lower()[1:3] == "ti" else "PNG"
    )


def test_endings_in_capitals_are_found(tmp_path: Path):
    for name in ("S.TIF", "a/T.tif", "a/U.Png", "a/b/V.png"):
        path = tmp_path / "i" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(1), "PNG"))
    for value, name in enumerate(("S.TIF", "a/T.TIFF", "a/U.PNG", "a/b/V.Tif")):
        write_mask(tmp_path / "m" / name, value)
    masks = MaskFolder(open_place(tmp_path / "m"))
    found = {
        row["source"]: row["mask"]
        for batch in FolderSource(open_place(tmp_path / "i"), masks).entries()
        for row in batch.to_pylist()
    }
    assert found == {"S.TIF": "S.TIF", "a/T.tif": "a/T.TIFF", "a/U.Png": "a/U.PNG", "a/b/V.png": "a/b/V.Tif"}
    assert masks.warnings() == []
    manifest = convert(
        FolderSource(open_place(tmp_path / "i"), MaskFolder(open_place(tmp_path / "m"))), tmp_path / "out"
    )
    assert manifest is not None
    assert manifest.num_masks == 4


def write_image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed).save(path)


def pairs(folder: Path, masks: Path, suffix: str = "") -> dict[str, str | None]:
    source = FolderSource(open_place(folder), MaskFolder(open_place(masks), suffix))
    return {row["source"]: row["mask"] for batch in source.entries() for row in batch.to_pylist()}


def test_masks_beside_their_images_are_no_images(tmp_path: Path):
    for i in range(3):
        write_image(tmp_path / "d" / f"img_{i}.png", i)
        write_mask(tmp_path / "d" / f"img_{i}_masks.png", i)
    write_image(tmp_path / "d" / "lonely_masks.png", 9)
    assert pairs(tmp_path / "d", tmp_path / "d", "_masks") == {
        **{f"img_{i}.png": f"img_{i}_masks.png" for i in range(3)},
        "lonely_masks.png": None,
    }
    source = FolderSource(open_place(tmp_path / "d"), MaskFolder(open_place(tmp_path / "d"), "_masks"))
    manifest = convert(source, tmp_path / "out", workers=0)
    assert manifest is not None
    assert (manifest.num_samples, manifest.num_masks) == (4, 3)
    assert source.describe() == ["3 files among the images are their masks."]


def test_an_image_is_not_its_own_mask(tmp_path: Path):
    write_image(tmp_path / "a" / "0.jpg", 0)
    write_mask(tmp_path / "a" / "0.png", 1)
    write_image(tmp_path / "a" / "1.png", 1)
    assert pairs(tmp_path, tmp_path) == {"a/0.jpg": "a/0.png", "a/1.png": None}


def test_a_folder_of_masks_within_that_of_the_images_holds_no_images(tmp_path: Path):
    write_image(tmp_path / "ant" / "0.jpg", 0)
    write_mask(tmp_path / "masks" / "ant" / "0.png", 1)
    assert pairs(tmp_path, tmp_path / "masks") == {"ant/0.jpg": "ant/0.png"}


def test_rasters_and_masks_in_one_folder(tmp_path: Path):
    rasterio = needs.module("rasterio")
    for name in ("s", "s_m", "t"):
        made = {"driver": "GTiff", "width": 8, "height": 8, "count": 1, "dtype": "uint8"}
        with rasterio.open(
            tmp_path / f"{name}.tif", "w", **made, transform=rasterio.Affine(2, 0, 0, 0, -2, 9)
        ) as raster:
            raster.write(np.ones((1, 8, 8), np.uint8))
    source = RasterSource(str(tmp_path), RasterOptions(tile=8), MaskFolder(open_place(tmp_path), "_m"))
    rows = {row["source"]: row["mask"] for batch in source.entries() for row in batch.to_pylist()}
    assert rows == {"s.tif@0,0": "s_m.tif", "t.tif@0,0": None}


@pytest.mark.parametrize(("images", "masks"), [("images", "masks"), ("train/img", "train/Labels")])
def test_folders_of_images_and_masks_taken_as_classes_are_told(
    tmp_path: Path, images: str, masks: str, capsys: pytest.CaptureFixture[str]
):
    write_image(tmp_path / "d" / images / "0.jpg", 0)
    write_mask(tmp_path / "d" / masks / "0.png", 1)
    assert main(["shard", str(tmp_path / "d"), str(tmp_path / "out"), "--workers", "0"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert (
        f"the folders '{images}' and '{masks}' look like images and their masks, and both are taken as images"
        in told
    )
    assert f"fastssl shard {tmp_path}/d/{images} ... --masks {tmp_path}/d/{masks}." in told
    write_image(tmp_path / "e" / "images" / "0.jpg", 0)
    source = FolderSource(open_place(tmp_path / "e"))
    list(source.entries())
    assert source.warnings() == []


def test_masks_of_0_and_255_are_told_of_and_shares_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for values, name in (((0, 255), "binary"), ((0, 1), "good"), ((0, 3, 255), "three")):
        for i in range(4):
            write_image(tmp_path / name / "i" / f"{i}.png", i)
            mask = np.resize(np.array(values, np.uint8), (16, 24))
            (tmp_path / name / "m").mkdir(exist_ok=True)
            Image.fromarray(mask).save(tmp_path / name / "m" / f"{i}.png")
        words = [
            "shard",
            str(tmp_path / name / "i"),
            str(tmp_path / name / "out"),
            "--masks",
            str(tmp_path / name / "m"),
        ]
        assert main([*words, "--workers", "0"]) == 0
        told = " ".join(capsys.readouterr().out.split())
        assert ("the masks hold 0 and 255 only" in told) == (name == "binary")
        assert main(["inspect", str(tmp_path / name / "out")]) == 0
        told = " ".join(capsys.readouterr().out.split())
        assert ("the masks hold 0 and 255 only" in told) == (name == "binary")
        share = f"{100 / len(values):.2f} %"
        assert f"Pixels of the masks, by class class share class 0 {share}" in told
        assert ("255 (ignored)" in told) == (255 in values)
    place = open_place(tmp_path / "three" / "out")
    found = mask_shares(place, Manifest.load(place), 2)
    assert (found.num_read, found.num_masks) == (2, 4)
    assert found.shares == {0: 1 / 3, 3: 1 / 3, 255: 1 / 3}
