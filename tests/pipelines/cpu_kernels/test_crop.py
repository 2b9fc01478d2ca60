"""Crop and resize on the CPU: Pillow's bits, for any box, and transposes of any size."""

import numpy as np
import pytest
from PIL import Image

from pipelines.cpu_kernels.crop import resize, scratch_bytes, strip_rows
from pipelines.cpu_kernels.transpose import transpose
from tests.pictures import photo

FILTERS = {False: Image.Resampling.BILINEAR, True: Image.Resampling.BICUBIC}


def cropped(pixels: np.ndarray, box: tuple[int, int, int, int], cubic: bool, size: int) -> np.ndarray:
    out = np.empty((3, size, size), dtype=np.uint8)
    # Old bytes show what is read before it is written, and bytes past the end what is written there.
    wanted = scratch_bytes(*pixels.shape[:2], size)
    scratch = np.full(wanted + 64, 171, dtype=np.uint8)
    resize(pixels, *box, cubic, scratch[:wanted], out)
    assert (scratch[wanted:] == 171).all()
    return out


def by_pillow(pixels: np.ndarray, box: tuple[int, int, int, int], cubic: bool, size: int) -> np.ndarray:
    """One axis at a time: Pillow chooses which comes first."""
    top, left, height, width = box
    image = Image.fromarray(pixels[top : top + height, left : left + width])
    across = image.resize((size, height), FILTERS[cubic])
    return np.asarray(across.resize((size, size), FILTERS[cubic])).transpose(2, 0, 1)


@pytest.mark.parametrize("cubic", [False, True])
@pytest.mark.parametrize("size", [1, 7, 16, 33, 96])
@pytest.mark.parametrize(
    "box",
    [
        (0, 0, 150, 200),
        (3, 5, 96, 96),
        (20, 31, 1, 1),
        (149, 0, 1, 200),
        (0, 199, 150, 1),
        (7, 9, 15, 17),
        (40, 60, 90, 31),
    ],
    ids=str,
)
def test_a_crop_has_pillow_s_bits(box, size, cubic):
    pixels = np.array(photo(200, 150))
    np.testing.assert_array_equal(cropped(pixels, box, cubic, size), by_pillow(pixels, box, cubic, size))


@pytest.mark.parametrize("cubic", [False, True])
def test_extremes_are_clipped_as_pillow_clips_them(cubic):
    pixels = (np.random.default_rng(0).integers(0, 2, (40, 50, 3)) * 255).astype(np.uint8)
    box = (1, 2, 37, 46)
    np.testing.assert_array_equal(cropped(pixels, box, cubic, 64), by_pillow(pixels, box, cubic, 64))


def test_a_crop_taller_than_a_strip_has_no_seams():
    pixels = np.random.default_rng(1).integers(0, 256, (200, 3000, 3), dtype=np.uint8)
    assert strip_rows(3000) < 150
    box = (11, 100, 150, 2800)
    np.testing.assert_array_equal(cropped(pixels, box, False, 48), by_pillow(pixels, box, False, 48))


def test_random_boxes():
    rng = np.random.default_rng(2)
    pixels = np.array(photo(120, 90))
    for _ in range(60):
        height, width = int(rng.integers(1, 91)), int(rng.integers(1, 121))
        box = (int(rng.integers(0, 91 - height)), int(rng.integers(0, 121 - width)), height, width)
        cubic, size = bool(rng.integers(2)), int(rng.integers(1, 130))
        np.testing.assert_array_equal(cropped(pixels, box, cubic, size), by_pillow(pixels, box, cubic, size))


@pytest.mark.parametrize("height", [1, 15, 16, 17, 40, 64])
@pytest.mark.parametrize("width", [1, 15, 16, 17, 50, 64])
def test_a_transpose_of_any_size_in_larger_planes(height, width):
    rng = np.random.default_rng(height * 100 + width)
    source = rng.integers(0, 256, (height + 3, width + 5), dtype=np.uint8)
    out = np.full((width + 2, height + 7), 171, dtype=np.uint8)
    transpose(
        source.reshape(-1),
        2 * source.shape[1] + 1,
        source.shape[1],
        height,
        width,
        out.reshape(-1),
        out.shape[1] + 4,
        out.shape[1],
    )
    expected = np.full_like(out, 171)
    expected[1 : 1 + width, 4 : 4 + height] = source[2 : 2 + height, 1 : 1 + width].T
    np.testing.assert_array_equal(out, expected)
