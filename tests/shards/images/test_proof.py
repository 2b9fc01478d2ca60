import io
import struct
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps

from shards.images.pixels import BadImage, pixels_hash
from shards.images.policy import Policy
from shards.images.proof import prove
from tests.pictures import encoded, exif, picture, png


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


CLEAN = {
    "rgb.jpg": encoded(picture(0), "JPEG"),
    "grey.jpeg": encoded(picture(0, mode="L"), "JPEG"),
    "progressive.JPG": encoded(picture(0), "JPEG", progressive=True),
    "upright.jpg": encoded(picture(0), "JPEG", exif=exif(1)),
    "profile.jpg": encoded(picture(0), "JPEG", icc_profile=b"profile", comment=b"hello"),
    "trailing.jpg": encoded(picture(0), "JPEG") + b"more",
    "phone.jpg": encoded(picture(0), "MPO", save_all=True, append_images=[picture(1)]),
    "rgb.png": encoded(picture(0), "PNG"),
    "grey.png": encoded(picture(0, mode="L"), "PNG"),
    "lossy.webp": encoded(picture(0), "WEBP"),
    "lossless.webp": encoded(picture(0), "WEBP", lossless=True),
}


@pytest.mark.parametrize("name", CLEAN)
def test_clean_images_are_kept_byte_for_byte(name: str):
    data = CLEAN[name]
    channels = 1 if "grey" in name else 3
    ext = {"jpeg": "jpg"}.get(name.lower().partition(".")[2], name.lower().partition(".")[2])
    stored = prove(data, name)
    assert (stored.data, stored.ext, stored.how) == (data, ext, "kept")
    assert (stored.width, stored.height, stored.channels, stored.dtype) == (24, 16, channels, "uint8")
    decoded = pixels(data).reshape(16, 24, channels)
    assert stored.pixels_hash == pixels_hash(decoded)
    assert np.array_equal(stored.sample, decoded.reshape(-1, channels))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_rotation_is_baked_in(kind: str, orientation: int):
    data = encoded(picture(1, (96, 64)), kind, exif=exif(orientation))
    stored = prove(data, f"a.{kind.lower()}")
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert (stored.height, stored.width) == upright.shape[:2]
    if orientation == 1:
        assert stored.data == data
        return
    assert stored.how.startswith("re-encoded: EXIF rotation")
    assert stored.ext == ("jpg" if kind == "JPEG" else "png")
    assert not Image.open(io.BytesIO(stored.data)).getexif()
    # JPEG quality 95 costs a few grey levels; PNG costs nothing.
    difference = np.abs(pixels(stored.data).astype(int) - upright.astype(int)).mean()
    assert difference < (3 if kind == "JPEG" else 1e-9)


def test_tiff_rotation_is_baked_in_once():
    data = encoded(picture(1), "TIFF", tiffinfo={0x0112: 6})
    stored = prove(data, "a.tif")
    assert (stored.width, stored.height, stored.ext) == (16, 24, "png")
    assert np.array_equal(pixels(stored.data), np.asarray(picture(1).transpose(Image.Transpose.ROTATE_270)))


def test_an_impossible_orientation_counts_as_none():
    data = encoded(picture(1), "JPEG", exif=exif(9))
    assert prove(data, "a.jpg").data == data


def test_cmyk_becomes_rgb_jpeg():
    data = encoded(picture(2, (96, 64), "CMYK"), "JPEG")
    stored = prove(data, "a.jpg")
    assert (stored.ext, stored.channels, stored.how) == ("jpg", 3, "re-encoded: CMYK to RGB")
    wanted = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(pixels(stored.data) - wanted).mean() < 3


def test_palette_becomes_rgb():
    image = picture(3).quantize(16)
    stored = prove(encoded(image, "PNG"), "a.png")
    assert (stored.ext, stored.channels, stored.how) == ("png", 3, "re-encoded: palette to RGB")
    assert np.array_equal(pixels(stored.data), np.asarray(image.convert("RGB")))


def test_alpha_is_composited_on_white():
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 0] = 200
    rgba[0, :, 3] = (0, 128, 255)
    stored = prove(encoded(Image.fromarray(rgba), "PNG"), "a.png")
    assert (stored.channels, stored.how) == (3, "re-encoded: alpha on white")
    # (1 - a) * 255 + a * colour, a = 128 / 255.
    assert pixels(stored.data).tolist() == [[[255, 255, 255], [227, 127, 127], [200, 0, 0]]]


def test_grey_with_alpha_stays_grey():
    la = np.array([[[100, 0], [100, 255]]], np.uint8)
    stored = prove(encoded(Image.fromarray(la, "LA"), "PNG"), "a.png")
    assert stored.channels == 1
    assert pixels(stored.data).tolist() == [[255, 100]]


@pytest.mark.parametrize(
    ("mode", "transparency", "expected"),
    [("L", 0, [[255, 50]]), ("RGB", (0, 0, 0), [[[255] * 3, [50] * 3]]), ("P", 0, [[[255] * 3, [50] * 3]])],
)
def test_a_transparent_colour_becomes_white(mode: str, transparency, expected: list):
    image = Image.fromarray(np.array([[0, 50]], np.uint8)).convert(mode)
    stored = prove(encoded(image, "PNG", transparency=transparency), "a.png")
    assert stored.how == "re-encoded: alpha on white"
    assert pixels(stored.data).tolist() == expected


def test_webp_with_alpha():
    stored = prove(encoded(picture(4, mode="RGBA"), "WEBP", exact=True), "a.webp")
    image = picture(4, mode="RGBA")
    image.putalpha(0)
    hidden = prove(encoded(image, "WEBP", lossless=True), "a.webp")
    assert hidden.ext == "png"
    assert pixels(hidden.data).min() == 255
    assert stored.channels == 3


def test_one_bit_and_four_bit_become_8_bit_grey():
    bits = Image.fromarray(np.array([[0, 255, 255]], np.uint8)).convert("1")
    stored = prove(encoded(bits, "PNG"), "a.png")
    assert (stored.channels, stored.how) == (1, "re-encoded: 1-bit to grey")
    assert pixels(stored.data).tolist() == [[0, 255, 255]]
    stored = prove(png(2, 1, 4, 0, b"\0\x0f"), "a.png")
    assert stored.how == "re-encoded: 4-bit to 8-bit"
    assert pixels(stored.data).tolist() == [[0, 255]]


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "GIF"])
def test_other_formats_become_png(kind: str):
    image = picture(5).quantize(8).convert("RGB") if kind == "GIF" else picture(5)
    stored = prove(encoded(image, kind), f"a.{kind.lower()}")
    assert stored.ext == "png"
    assert stored.how.startswith(f"re-encoded: {kind} to PNG")
    assert np.array_equal(pixels(stored.data), np.asarray(image))


def test_the_content_decides_not_the_name():
    data = CLEAN["rgb.png"]
    stored = prove(data, "deep/er/a.JPG")
    assert (stored.data, stored.ext, stored.how) == (data, "png", "kept: PNG named .jpg")
    assert (
        prove(CLEAN["rgb.jpg"], "x.tar/a.jpg@512").how
        == prove(CLEAN["rgb.jpg"], "x.parquet@17").how
        == "kept"
    )
    assert prove(CLEAN["rgb.jpg"], "x.tar/a.png@512").how == "kept: JPEG named .png"
    assert prove(CLEAN["rgb.jpg"], "a").how == "kept: JPEG named without extension"


def test_re_encoding_drops_comments_and_profiles():
    data = encoded(picture(2, mode="CMYK"), "JPEG", comment=b"hello", icc_profile=b"profile")
    again = Image.open(io.BytesIO(prove(data, "a.jpg").data))
    assert "comment" not in again.info
    assert "icc_profile" not in again.info


def test_stray_bytes_in_a_jpeg_header_are_mended():
    # libjpeg skips these, DALI's parser ends the pipeline.
    data = CLEAN["rgb.jpg"]
    stray = data[:2] + data[2:20] + b"\0\0\0" + data[20:]
    stored = prove(stray, "a.jpg")
    assert stored.how == "re-encoded: mended JPEG header"
    assert prove(stored.data, "a.jpg").how == "kept"


def test_unreadable_exif_is_dropped():
    data = CLEAN["rgb.jpg"]
    block = b"Exif\0\0" + b"II*\0\xff\xff\xff\x7f" + b"rubbish"
    broken = data[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + data[2:]
    stored = prove(broken, "a.jpg")
    assert stored.how in ("kept", "re-encoded: unreadable EXIF")
    assert stored.width == 24


DAMAGED = {
    "zero bytes": (b"", r"empty file \(0 bytes\)"),
    "text": (b"hello, I am no image", r"not readable as JPEG, PNG"),
    "jpeg half": (encoded(picture(0, (96, 64)), "JPEG")[:-200], r"damaged: Premature end of JPEG file"),
    "jpeg without end": (CLEAN["rgb.jpg"][:-2], r"damaged: Premature end of JPEG file"),
    "jpeg head only": (CLEAN["rgb.jpg"][:10], r"not readable|damaged"),
    "png half": (CLEAN["rgb.png"][: len(CLEAN["rgb.png"]) // 2], r"damaged"),
    "png without end": (CLEAN["rgb.png"][:-12], r"damaged PNG: the end is missing"),
    "webp half": (CLEAN["lossy.webp"][: len(CLEAN["lossy.webp"]) // 2], r"not readable|damaged"),
    "animated gif": (encoded(picture(0), "GIF", save_all=True, append_images=[picture(1)]), r"2 frames"),
    "animated webp": (encoded(picture(0), "WEBP", save_all=True, append_images=[picture(1)]), r"2 frames"),
    "animated png": (encoded(picture(0), "PNG", save_all=True, append_images=[picture(1)]), r"2 frames"),
    "tiff pages": (encoded(picture(0), "TIFF", save_all=True, append_images=[picture(1)]), r"2 frames"),
    "another format": (encoded(picture(0), "TGA"), r"not readable"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_what_cannot_be_used_is_refused_with_a_reason(case: str):
    data, reason = DAMAGED[case]
    with pytest.raises(BadImage, match=reason) as refused:
        prove(data, "a.png")
    # The same words in every run: no addresses.
    assert "0x" not in refused.value.reason


def test_a_damaged_checksum_in_a_png_is_found():
    # Pillow decodes it; libpng, so DALI, does not.
    data = bytearray(CLEAN["rgb.png"])
    at = data.index(b"IDAT")
    (length,) = struct.unpack_from(">I", data, at - 4)
    data[at + 4 + length] ^= 1
    np.asarray(Image.open(io.BytesIO(data)))
    with pytest.raises(BadImage, match=r"damaged PNG: a checksum"):
        prove(bytes(data), "a.png")


def test_decompression_bombs_are_refused_before_decoding():
    with pytest.raises(BadImage, match=r"24 x 16 pixels, more than the limit of 383"):
        prove(CLEAN["rgb.png"], "a.png", Policy(max_pixels=24 * 16 - 1))
    assert prove(CLEAN["rgb.png"], "a.png", Policy(max_pixels=24 * 16)).how == "kept"
    with pytest.raises(BadImage, match=r"60000 x 60000 pixels"):
        prove(png(60000, 60000, 8, 2, b""), "a.png")


def test_pillows_global_switches_do_not_matter_and_are_left_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(BadImage, match="Premature end"):
        prove(CLEAN["rgb.jpg"][:-2], "a.jpg")
    assert prove(CLEAN["rgb.jpg"], "a.jpg").how == "kept"
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True
    assert Image.MAX_IMAGE_PIXELS == 10


@given(
    st.sampled_from(sorted(CLEAN)), st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=6)
)
def test_damaged_bytes_are_refused_or_become_a_clean_image(name: str, changes: list[tuple[float, int]]):
    data = bytearray(CLEAN[name])
    for where, value in changes:
        data[int(where * len(data))] = value
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            stored = prove(bytes(data), name, Policy(max_pixels=10**6))
        except BadImage:
            return
        # What is stored needs no second look.
        again = prove(stored.data, f"a.{stored.ext}", Policy(max_pixels=10**6))
    assert again.data == stored.data
    assert (again.width, again.height, again.channels) == (stored.width, stored.height, stored.channels)
