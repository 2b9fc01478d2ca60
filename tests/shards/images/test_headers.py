import io

import pytest
from PIL import Image

from shards.images.headers import tiff_header
from shards.images.jpeg import decode_jpeg, jpeg_header
from tests.pictures import encoded, picture

JPEG = encoded(picture(0), "JPEG")


def test_a_jpeg_header_tells_of_its_frame():
    header = jpeg_header(JPEG)
    assert header is not None
    assert (header.coding, header.bits, header.width, header.height) == ("baseline", 8, 24, 16)
    assert header.common_chroma
    assert header.mended is JPEG
    progressive = jpeg_header(encoded(picture(0), "JPEG", progressive=True))
    assert progressive is not None
    assert progressive.coding == "progressive"


@pytest.mark.parametrize("stray", [b"\0", b"abc", b"\xff\xd0", b"\xff\x01", b"\xff\x00\x07"])
@pytest.mark.parametrize("segment", [0, 1, 2])
def test_mending_a_jpeg_header_gives_the_clean_file(stray: bytes, segment: int):
    at = 2
    for _ in range(segment):
        at += 2 + int.from_bytes(JPEG[at + 2 : at + 4], "big")
    header = jpeg_header(JPEG[:at] + stray + JPEG[at:])
    assert header is not None
    assert header.mended == JPEG


def test_padding_before_a_marker_is_no_fault():
    padded = JPEG[:2] + b"\xff\xff" + JPEG[2:]
    header = jpeg_header(padded)
    assert header is not None
    assert header.mended == padded


@pytest.mark.parametrize("length", [2, 3, 20, 100, 300])
def test_a_cut_jpeg_header_is_none(length: int):
    assert jpeg_header(JPEG[:length]) is None


def test_the_strict_decoder_gives_pillows_pixels():
    image = Image.open(io.BytesIO(JPEG))
    pixels, faults = decode_jpeg(image, JPEG, mend=False)
    assert faults == []
    assert pixels is not None
    assert pixels.tobytes() == image.convert("RGB").tobytes()


def test_a_tiff_header_tells_of_pages_bits_and_turns():
    image = picture(0)
    plain = tiff_header(encoded(image, "TIFF"))
    assert (plain.size, plain.bits, plain.plain, plain.alpha, plain.pages) == ((24, 16), 8, True, False, 1)
    assert tiff_header(encoded(image.convert("RGBA"), "TIFF")).alpha
    assert tiff_header(encoded(image.convert("CMYK"), "TIFF")).plain
    assert tiff_header(encoded(image, "TIFF", big_tiff=True)).size == (24, 16)
    turned = tiff_header(encoded(image, "TIFF", tiffinfo={0x112: 6}))
    assert (turned.size, turned.orientation) == ((24, 16), 6)
    assert not tiff_header(encoded(image.convert("F"), "TIFF")).plain
    three = encoded(image.copy(), "TIFF", save_all=True, append_images=[picture(1), picture(2)])
    assert tiff_header(three).pages == 3
