"""Masks follow their images: the same place, no class that was not there."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from pipelines.augment.draws import draw
from pipelines.augment.operations import OPERATIONS
from pipelines.augment.recipe import Recipe
from pipelines.kernels.reference import make_view
from pipelines.loading.masks import decode_mask, mask_view
from tests.pictures import encoded

ALL_WAYS = Recipe(
    size=24, vflip_p=0.5, quarter_turns=True, jitter_p=0, gray_p=0, blur_p=(0.0,), solarize_p=(0.0,)
)
TURNS = {1: Image.Transpose.ROTATE_90, 2: Image.Transpose.ROTATE_180, 3: Image.Transpose.ROTATE_270}


def drawn(width: int, height: int, count: int = 40) -> np.ndarray:
    return draw(ALL_WAYS, 0, 0, np.arange(count), np.full(count, width), np.full(count, height))[0]


def test_a_mask_is_cut_and_turned_as_pillow_does_with_the_nearest_filter():
    # No centre of a pixel of 32 lies on the border of two of less than 64, where rounding would decide.
    mask = np.random.default_rng(0).integers(0, 256, (31, 47), dtype=np.uint8)
    for one in drawn(47, 31):
        left, top = int(one["left"]), int(one["top"])
        box = (left, top, left + int(one["width"]), top + int(one["height"]))
        image = Image.fromarray(mask).crop(box).resize((32, 32), Image.Resampling.NEAREST)
        for name, flip in (
            ("hflip", Image.Transpose.FLIP_LEFT_RIGHT),
            ("vflip", Image.Transpose.FLIP_TOP_BOTTOM),
        ):
            image = image.transpose(flip) if one[name] else image
        image = image.transpose(TURNS[int(one["turns"])]) if one["turns"] else image
        np.testing.assert_array_equal(mask_view(mask, one, 32), np.asarray(image))


def test_the_mask_lies_where_the_image_lies():
    """An image that is its own mask stays that, but for the pixels at borders, which the image's filter mixes."""
    mask = np.zeros((60, 80), dtype=np.uint8)
    mask[8:30, 10:50] = 1
    image = Image.fromarray(mask * 255).convert("RGB")
    levels = dataclasses.replace(ALL_WAYS, mean=(0.0,) * 3, std=(1 / 255,) * 3)
    for one in drawn(80, 60):
        view = np.rint(make_view(image, one, levels, 24)[0]).astype(np.uint8)
        sure = (view == 0) | (view == 255)
        assert sure.mean() > 0.6
        np.testing.assert_array_equal(mask_view(mask, one, 24)[sure], view[sure] // 255)


def test_operations_on_colours_leave_masks_alone_and_erased_pixels_have_no_class():
    mask = np.arange(576, dtype=np.uint16).reshape(24, 24)
    one = drawn(24, 24)[0].copy()
    plain = mask_view(mask, one, 24)
    for operation in OPERATIONS.values():
        if operation.switch and not operation.geometric:
            one[operation.switch] = 1
    np.testing.assert_array_equal(mask_view(mask, one, 24), plain)
    one["erase_top"], one["erase_left"], one["erase_height"], one["erase_width"] = 2, 3, 4, 5
    plain[2:6, 3:8] = 700
    np.testing.assert_array_equal(mask_view(mask, one, 24, ignore=700), plain)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_stored_masks_decode(dtype):
    mask = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (5, 7), dtype=dtype)
    data = encoded(Image.fromarray(mask), "PNG")
    found = decode_mask(memoryview(data))
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, mask)
    for broken in (data[:40], b"", encoded(Image.fromarray(mask.astype(np.uint8)), "BMP")):
        with pytest.raises(RuntimeError):
            decode_mask(memoryview(broken))
