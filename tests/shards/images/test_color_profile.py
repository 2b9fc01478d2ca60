"""Colors of images that lose their ICC profile, against the formulas of the ICC and of sRGB (IEC 61966-2-1)."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from shards.images.policy import Policy
from shards.images.proof import prove
from tests.pictures import colours, encoded, exif
from tests.shards.images.test_proof import pixels

# Columns: red, green and blue as XYZ under D50, which profiles refer to.
P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
GAMMA = 2.2


def profile(colorants: np.ndarray) -> bytes:
    """A display profile of version 2 with these colorants and a gamma of 2.2."""

    def xyz(values: np.ndarray) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(float(v) * 65536)) for v in values)

    name = b"test\0"
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(GAMMA * 256)) + b"\0\0"
    about = b"desc\0\0\0\0" + struct.pack(">I", len(name)) + name + bytes(78 + 1)
    tags = {
        b"desc": about,
        b"cprt": b"text\0\0\0\0none\0\0\0\0",
        b"wtpt": xyz(np.array([0.9642, 1.0, 0.8249])),
    }
    tags |= {bytes([letter]) + b"XYZ": xyz(colorants[:, i]) for i, letter in enumerate(b"rgb")}
    tags |= {bytes([letter]) + b"TRC": curve for letter in b"rgb"}
    at, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for tag, data in tags.items():
        data += bytes(-len(data) % 4)
        table += tag + struct.pack(">II", at + len(body), len(data))
        body += data
    head = struct.pack(">I4sI4s4s4s", at + len(body), b"none", 0x02100000, b"mntr", b"RGB ", b"XYZ ")
    head += (
        struct.pack(">6H", 2026, 1, 1, 0, 0, 0)
        + b"acsp"
        + bytes(28)
        + struct.pack(">3i", 63190, 65536, 54061)
        + bytes(48)
    )
    return head[:128] + struct.pack(">I", len(tags)) + table + body


def expected(values: np.ndarray) -> np.ndarray:
    linear = (values / 255) ** GAMMA @ (np.linalg.inv(SRGB) @ P3).T
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


WIDE = profile(P3)
IMAGE = colours(24)


@pytest.mark.parametrize(
    ("data", "policy"),
    [
        (encoded(IMAGE, "PNG", icc_profile=WIDE, exif=exif(3)), Policy()),
        (encoded(IMAGE, "PNG", icc_profile=WIDE), Policy(store="npy")),
        (encoded(IMAGE, "TIFF", icc_profile=WIDE), Policy()),
        (encoded(IMAGE, "WEBP", icc_profile=WIDE, lossless=True), Policy(store="png")),
        (encoded(IMAGE.convert("RGBA"), "PNG", icc_profile=WIDE), Policy()),
        (encoded(IMAGE.convert("RGBA"), "PNG", icc_profile=WIDE), Policy(alpha="keep")),
    ],
)
def test_a_wide_gamut_becomes_srgb_where_the_profile_is_lost(data: bytes, policy: Policy):
    stored = prove(data, "a", policy)
    found = pixels(stored.data) if stored.ext == "png" else np.load(io.BytesIO(stored.data))
    if stored.turn:
        found = found[::-1, ::-1]
    assert np.abs(found[..., :3] - expected(np.asarray(IMAGE, np.float64))).max() <= 2
    assert "colors to sRGB" in stored.how
    if stored.ext == "png":
        assert "icc_profile" not in Image.open(io.BytesIO(stored.data)).info


def test_a_jpeg_that_is_scaled_becomes_srgb_and_one_that_is_kept_keeps_its_profile():
    flat = Image.new("RGB", (64, 48), (30, 200, 60))
    data = encoded(flat, "JPEG", icc_profile=WIDE, quality=98, subsampling=0)
    kept = prove(data, "a.jpg")
    assert (kept.data, kept.how) == (data, "kept")
    scaled = prove(data, "a.jpg", Policy(short_side=24))
    wanted = expected(np.array([30.0, 200.0, 60.0]))
    assert np.abs(pixels(scaled.data) - wanted).max() <= 4
    assert np.abs(wanted - (30, 200, 60)).max() > 10
    assert scaled.how == "re-encoded: colors to sRGB, scaled down"


@pytest.mark.parametrize(
    "icc",
    [
        profile(SRGB),
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        b"damaged",
        WIDE[:200],
    ],
)
def test_srgb_and_damaged_profiles_change_nothing(icc: bytes):
    image = IMAGE if not icc.startswith(b"\0\0") or len(icc) > 1000 else colours(24, 1)
    stored = prove(encoded(image, "PNG", icc_profile=icc, exif=exif(2)), "a.png")
    if icc == profile(SRGB):  # of another curve than sRGB's, by some levels
        assert np.abs(pixels(stored.data)[:, ::-1].astype(int) - np.asarray(image)).max() <= 8
        return
    assert np.array_equal(pixels(stored.data)[:, ::-1], np.asarray(image))
    assert "sRGB" not in stored.how


def test_gray_and_palette_images_with_a_profile():
    gray = IMAGE.convert("L")
    stored = prove(encoded(gray, "PNG", icc_profile=WIDE, exif=exif(2)), "a.png")
    assert np.array_equal(pixels(stored.data)[:, ::-1], np.asarray(gray))
    palette = IMAGE.quantize(16)
    stored = prove(encoded(palette, "PNG", icc_profile=WIDE), "a.png")
    assert np.abs(pixels(stored.data) - expected(np.asarray(palette.convert("RGB"), np.float64))).max() <= 2
