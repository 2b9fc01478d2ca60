"""Masks over pictures: what is filled, outlined, striped and left free."""

import numpy as np

from shards.overview.mask_overlay import FILL, OUTLINE, class_colour, overlay, resized

PICTURE = np.full((12, 12, 3), 100, np.uint8)


def mixed(index: int, share: float) -> list[int]:
    return np.round((1 - share) * 100 + share * np.array(class_colour(index))).astype(int).tolist()


def test_a_class_is_filled_so_that_the_picture_shows_and_outlined():
    mask = np.zeros((12, 12), np.uint8)
    assert (overlay(PICTURE, mask) == PICTURE).all()
    mask[2:8, 3:9] = 2
    shown = overlay(PICTURE, mask)
    assert (shown[mask == 0] == 100).all()
    border = mask == 2
    border[3:7, 4:8] = False
    assert {tuple(pixel) for pixel in shown[border].tolist()} == {tuple(mixed(2, OUTLINE))}
    assert {tuple(pixel) for pixel in shown[3:7, 4:8].reshape(-1, 3).tolist()} == {tuple(mixed(2, FILL))}


def test_the_border_of_the_picture_is_no_outline_and_classes_have_one_between_them():
    mask = np.ones((12, 12), np.uint16)
    assert (overlay(PICTURE, mask) == mixed(1, FILL)).all()
    mask[:, 6:] = 300
    shown = overlay(PICTURE, mask)
    assert (shown[:, 5] == mixed(1, OUTLINE)).all()
    assert (shown[:, 6] == mixed(300, OUTLINE)).all()
    assert (shown[:, 4] == mixed(1, FILL)).all()


def test_what_is_ignored_is_striped_and_the_picture_shows_between():
    shown = overlay(PICTURE, np.full((12, 12), 255, np.uint8))
    striped = (shown != 100).any(axis=2)
    assert 0.2 < striped.mean() < 0.3
    assert {tuple(pixel) for pixel in shown[striped].tolist()} == {tuple(mixed(255, OUTLINE))}


def test_classes_have_colours_of_their_own():
    colours = [class_colour(index) for index in range(1, 41)]
    assert len(set(colours)) == 40
    assert class_colour(255) not in colours


def test_another_size_takes_the_class_at_the_middle_of_each_pixel():
    mask = np.arange(12).reshape(3, 4)
    assert (resized(mask, 3, 4) == mask).all()
    assert (resized(mask, 6, 8) == mask.repeat(2, 0).repeat(2, 1)).all()
    assert resized(mask, 1, 2).tolist() == [[5, 7]]
