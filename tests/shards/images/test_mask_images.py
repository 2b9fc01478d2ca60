"""Masks in files: what is read as class indices, and how they turn."""

import io

import numpy as np
import pytest
from PIL import Image

from shards.images.mask_images import prove_mask
from shards.images.pixels import BadImage, read_npy
from shards.images.policy import Policy
from shards.images.proof import prove, prove_pixels
from tests import needs
from tests.pictures import encoded, exif, picture, png
from tests.shards.images.test_proof import pixels

STORED = prove_pixels(np.zeros((1, 4, 3), np.uint8))
FLAT = np.array([[0, 1, 2, 3]], np.uint8)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (png(4, 1, 2, 0, b"\0\x1b"), [0, 1, 2, 3]),  # Pillow would give 0, 85, 170, 255
        (png(4, 1, 4, 0, b"\0\x01\x2f"), [0, 1, 2, 15]),
        (png(4, 1, 1, 0, b"\0\x50"), [0, 1, 0, 1]),
        (png(4, 1, 8, 0, b"\0\x00\x01\x02\xff"), [0, 1, 2, 255]),
        (encoded(Image.fromarray(FLAT.astype(np.uint16) * 1000), "PNG"), [0, 1000, 2000, 3000]),
        (encoded(Image.fromarray(FLAT.astype(np.uint16) * 1000), "TIFF"), [0, 1000, 2000, 3000]),
        (encoded(Image.fromarray(FLAT.astype(np.float32)), "TIFF"), [0, 1, 2, 3]),
        (encoded(Image.fromarray(FLAT), "BMP"), [0, 1, 2, 3]),
    ],
)
def test_indices_are_those_in_the_file(data: bytes, expected: list[int]):
    assert pixels(prove_mask(data, "m", STORED, Policy())).tolist() == [expected]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (encoded(Image.fromarray(FLAT.astype(np.float32) + 0.5), "TIFF"), "does not hold class indices"),
        (encoded(picture(0, (4, 1)), "PNG"), r"has colours \(RGB\)"),
        (encoded(Image.fromarray(FLAT), "PNG")[:-12], "the end is missing"),
        (encoded(Image.fromarray(FLAT), "JPEG"), "is damaged: cannot identify"),
        (encoded(Image.fromarray(FLAT.T), "PNG"), "has 1 x 4 pixels, the image 4 x 1"),
    ],
)
def test_what_is_no_mask_is_refused(data: bytes, words: str):
    with pytest.raises(BadImage, match=rf"its mask 'm'.*{words}"):
        prove_mask(data, "m", STORED, Policy())


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_a_mask_with_an_orientation_of_its_own_turns_once(turn: int, kind: str):
    image = picture(1, (8, 8))
    mask = image.getchannel(0)
    stored = prove(encoded(image.copy(), "PNG", exif=exif(turn)), "a.png", Policy(store="png"))
    own = {"tiffinfo": {0x112: turn}} if kind == "TIFF" else {"exif": exif(turn)}
    for options in (own, {}):
        found = prove_mask(encoded(mask.copy(), kind, **options), "m", stored, Policy(), "file")
        assert np.array_equal(pixels(found), pixels(stored.data)[:, :, 0])


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "F", "I;16"])
def test_a_tiff_and_its_mask_turn_alike(turn: int, mode: str):
    if mode != "RGB":
        needs.module("rasterio")
    grey = picture(1, (8, 6), "L")
    image = {
        "RGB": lambda: grey.convert("RGB"),
        "F": lambda: grey.convert("F"),
        "I;16": lambda: grey.convert("I;16"),
    }[mode]()
    stored = prove(encoded(image, "TIFF", tiffinfo={0x112: turn}), "a.tif")
    assert stored.file_size == (8, 6)
    found = read_npy(stored.data) if stored.ext == "npy" else pixels(stored.data)
    mask = pixels(prove_mask(encoded(grey.copy(), "PNG"), "m", stored, Policy(), "file"))
    assert np.array_equal(found[:, :, 0], mask)
    upright = Image.open(io.BytesIO(encoded(grey.copy(), "TIFF", tiffinfo={0x112: turn})))
    assert np.array_equal(np.asarray(upright), mask)


@pytest.mark.parametrize("turn", range(2, 9))
def test_how_a_mask_of_a_turned_photo_lies_is_known_or_refused(turn: int):
    """A mask drawn over the photo as it is shown, and one drawn over the file's pixels; orientations from 5 on swap the sides."""
    image = picture(2, (12, 8))
    stored = prove(encoded(image, "PNG", exif=exif(turn)), "a.png", Policy(store="png"))
    shown = pixels(stored.data)[:, :, 0]
    drawn = {
        "shown": encoded(Image.fromarray(shown), "PNG"),
        "file": encoded(image.getchannel(0), "PNG"),
    }
    for laid, mask in drawn.items():
        assert np.array_equal(pixels(prove_mask(mask, "m", stored, Policy(), laid)), shown)
        if turn < 5:
            with pytest.raises(BadImage, match=rf"orientation {turn}\).*--mask-orientation file or shown"):
                prove_mask(mask, "m", stored, Policy())
        else:
            assert np.array_equal(pixels(prove_mask(mask, "m", stored, Policy())), shown)
