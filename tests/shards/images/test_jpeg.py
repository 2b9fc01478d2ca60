"""The short way with clean JPEGs says what the long way through Pillow says, or nothing."""

import dataclasses
import random
from typing import get_args

import pytest
import simplejpeg

from shards.images import proof
from shards.images.jpeg import eighth, jpeg_header, simple_header, simple_jpeg
from shards.images.pixels import BadImage
from shards.images.policy import MAX_PIXELS, Policy
from shards.images.proof import Depth, Stored, prove
from tests.pictures import encoded, exif, photo, picture
from tests.shards.nasty import cases

CLEAN = {
    "RGB": encoded(photo(90, 70), "JPEG"),
    "grey": encoded(photo(90, 70).convert("L"), "JPEG"),
    "progressive": encoded(photo(90, 70), "JPEG", progressive=True),
    "4:4:4": encoded(photo(90, 70), "JPEG", subsampling=0),
    "comment": encoded(photo(90, 70), "JPEG", comment=b"hello"),
    "profile": encoded(photo(90, 70), "JPEG", icc_profile=bytes(600)),
    "a scan's marker in it": encoded(photo(90, 70), "JPEG", icc_profile=b"\xff\xda" * 300),
    "upright": encoded(photo(90, 70), "JPEG", exif=exif(1)),
}
_XMP = b"http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation='6'/>"
XMP = b"\xff\xe1" + (2 + len(_XMP)).to_bytes(2, "big") + _XMP


def told(data: bytes, policy: Policy, depth: Depth) -> dict | str:
    try:
        stored: Stored = prove(data, "x.jpg", policy, depth)
    except BadImage as fault:
        return fault.reason
    fields = {field.name: getattr(stored, field.name) for field in dataclasses.fields(stored)}
    if depth == "small":  # the rest hangs on how the image was decoded
        del fields["sample"], fields["pixels_hash"]
    else:
        fields["sample"] = fields["sample"].tolist()
    return fields


def both_ways(data: bytes, monkeypatch: pytest.MonkeyPatch, policy: Policy = Policy()) -> None:  # noqa: B008 (frozen)
    short = {depth: told(data, policy, depth) for depth in get_args(Depth)}
    with monkeypatch.context() as patch:
        patch.setattr(proof, "simple_header", lambda data, max_pixels: None)
        assert {depth: told(data, policy, depth) for depth in short} == short
    # Nor does it matter for what is stored how far it was decoded.
    if isinstance(short["both"], dict):
        both = dict(short["both"])
        del both["sample"], both["pixels_hash"]
        assert both == short["small"]
        assert short["pixels"]["small_hash"] is None
    else:
        assert set(short.values()) == {short["both"]}


def goes_short(data: bytes) -> bool:
    header = simple_header(data, MAX_PIXELS)
    return header is not None and eighth(data, header) is not None


@pytest.mark.parametrize("name", CLEAN)
def test_clean_files_go_the_short_way(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    header = simple_header(CLEAN[name], MAX_PIXELS)
    assert header is not None
    for decode, height, width in ((simple_jpeg, 70, 90), (eighth, 9, 12)):
        pixels = decode(CLEAN[name], header)
        assert pixels is not None
        assert pixels.shape == (height, width, 1 if name == "grey" else 3)
    both_ways(CLEAN[name], monkeypatch)


@pytest.mark.parametrize(
    "data",
    [
        encoded(photo(90, 70), "JPEG", exif=exif(6)),
        b"".join((CLEAN["RGB"][:2], XMP, CLEAN["RGB"][2:])),
        encoded(photo(90, 70), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"),
        encoded(picture(0, mode="CMYK"), "JPEG"),
        CLEAN["RGB"][:-40],
        CLEAN["RGB"][:20] + b"\0" + CLEAN["RGB"][20:],
        b"\xff\xd8",
    ],
    ids=["rotated", "XMP", "damaged EXIF", "CMYK", "cut", "stray byte", "no header"],
)
def test_all_others_take_the_long_way(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not goes_short(data)
    both_ways(data, monkeypatch)


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
            went += goes_short(bytes(broken))
            both_ways(bytes(broken), monkeypatch)
    assert went > 20  # some flips change no more than a colour


def test_a_bomb_is_not_decoded() -> None:
    header = simple_header(CLEAN["RGB"], 90 * 70)
    assert header is not None
    assert (header.width, header.height) == (90, 70)
    assert simple_header(CLEAN["RGB"], 90 * 70 - 1) is None


@pytest.mark.parametrize("name", CLEAN)
def test_an_eighth_shows_the_damage_that_all_pixels_show(name: str) -> None:
    rng = random.Random(1)
    data, colours = CLEAN[name], "GRAY" if name == "grey" else "RGB"
    header = jpeg_header(data)
    assert header is not None
    start, damaged = data.rindex(b"\xff\xda"), 0
    for _ in range(150):
        broken = bytearray(data)
        if rng.random() < 0.7:
            broken[rng.randrange(start, len(broken))] = rng.randrange(256)
        else:
            del broken[rng.randrange(start, len(broken)) :]
        try:
            simplejpeg.decode_jpeg(bytes(broken), colours, strict=True)
            whole = True
        except ValueError:
            whole, damaged = False, damaged + 1
        assert (eighth(bytes(broken), header) is not None) == whole
    assert damaged > 30
