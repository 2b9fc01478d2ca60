"""The short way with clean JPEGs says what the long way through Pillow says, or nothing."""

import dataclasses
import random

import numpy as np
import pytest
import simplejpeg

from shards import image
from shards.image import Stored, prove
from shards.jpeg import jpeg_header, simple_jpeg
from shards.pixels import BadImage
from shards.policy import MAX_PIXELS, Policy
from tests.pictures import encoded, exif, photo, picture
from tests.shards.nasty import cases

CLEAN = {
    "RGB": encoded(photo(90, 70), "JPEG"),
    "grey": encoded(photo(90, 70).convert("L"), "JPEG"),
    "progressive": encoded(photo(90, 70), "JPEG", progressive=True),
    "4:4:4": encoded(photo(90, 70), "JPEG", subsampling=0),
    "comment": encoded(photo(90, 70), "JPEG", comment=b"hello"),
    "profile": encoded(photo(90, 70), "JPEG", icc_profile=bytes(600)),
}


def told(data: bytes, policy: Policy) -> tuple | str:
    try:
        stored: Stored = prove(data, "x.jpg", policy)
    except BadImage as fault:
        return fault.reason
    fields = {field.name: getattr(stored, field.name) for field in dataclasses.fields(stored)}
    return *fields.pop("sample").ravel().tolist(), *fields.items()


def both_ways(data: bytes, monkeypatch: pytest.MonkeyPatch, policy: Policy = Policy()) -> None:  # noqa: B008 (frozen)
    short = told(data, policy)
    with monkeypatch.context() as patch:
        patch.setattr(image, "simple_jpeg", lambda data, max_pixels, plain: None)
        assert told(data, policy) == short


@pytest.mark.parametrize("name", CLEAN)
def test_clean_files_go_the_short_way(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = simple_jpeg(CLEAN[name], MAX_PIXELS)
    assert pixels is not None
    assert pixels.shape == (70, 90, 1 if name == "grey" else 3)
    both_ways(CLEAN[name], monkeypatch)


@pytest.mark.parametrize(
    "data",
    [
        encoded(photo(90, 70), "JPEG", exif=exif(6)),
        encoded(photo(90, 70), "JPEG", exif=exif(1)),
        encoded(picture(0, mode="CMYK"), "JPEG"),
        CLEAN["RGB"][:-40],
        CLEAN["RGB"][:20] + b"\0" + CLEAN["RGB"][20:],
        b"\xff\xd8",
    ],
    ids=["rotated", "EXIF", "CMYK", "cut", "stray byte", "no header"],
)
def test_all_others_take_the_long_way(data: bytes) -> None:
    assert simple_jpeg(data, MAX_PIXELS) is None


def test_nasty_images_are_told_the_same_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    jpegs = [case.data for case in cases().values() if case.data.startswith(b"\xff\xd8")]
    assert len(jpegs) > 15
    for data in jpegs:
        for policy in (Policy(), Policy(store="jpeg", damaged="mend"), Policy(max_pixels=400, min_side=17)):
            both_ways(data, monkeypatch, policy)


def test_flipped_bytes_are_told_the_same_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    went = 0
    for data in CLEAN.values():
        header = data.index(b"\xff\xda")
        for _ in range(40):
            broken = bytearray(data)
            broken[rng.randrange(2, header + 12 if rng.random() < 0.8 else len(data))] = rng.randrange(256)
            went += simple_jpeg(bytes(broken), MAX_PIXELS) is not None
            both_ways(bytes(broken), monkeypatch)
    assert went > 20  # some flips change no more than a colour


def test_a_bomb_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    header = jpeg_header(CLEAN["RGB"])
    assert header is not None
    assert header.simple
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *args, **options: np.zeros((70, 90, 3), np.uint8))
    assert simple_jpeg(CLEAN["RGB"], 90 * 70) is not None
    assert simple_jpeg(CLEAN["RGB"], 90 * 70 - 1) is None
