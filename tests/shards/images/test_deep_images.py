"""More than 8 bits or 4 channels, what a policy changes, masks, and the statistics of pixels."""

import io

import numpy as np
import pytest
from PIL import Image

from shards.errors import UserError
from shards.images.channel_statistics import Statistics
from shards.images.mask_images import prove_mask
from shards.images.pixels import BadImage, pixels_hash, read_npy, to_8_bit
from shards.images.policy import Policy
from shards.images.proof import prove, prove_pixels
from tests import needs
from tests.pictures import encoded, exif, picture, png
from tests.shards.images.test_proof import pixels

DEEP = np.arange(6 * 5, dtype=np.uint16).reshape(6, 5) * 2000
MANY = np.random.default_rng(0).integers(0, 4000, (6, 5, 7), dtype=np.uint16)


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def geotiff(array: np.ndarray) -> bytes:
    """A TIFF of many bands, (H, W, C)."""
    rasterio = needs.module("rasterio")
    height, width, count = array.shape
    options = {"driver": "GTiff", "height": height, "width": width, "count": count, "dtype": array.dtype.name}
    with rasterio.MemoryFile() as memory:
        with pytest.warns(rasterio.errors.NotGeoreferencedWarning), memory.open(**options) as raster:
            raster.write(np.moveaxis(array, 2, 0))
        return memory.read()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_kept_without_loss(kind: str):
    stored = prove(encoded(Image.fromarray(DEEP), kind), "a")
    assert (stored.ext, stored.dtype, stored.channels, stored.width, stored.height) == (
        "npy",
        "uint16",
        1,
        5,
        6,
    )
    assert np.array_equal(read_npy(stored.data)[:, :, 0], DEEP)


def test_16_bit_colour_and_many_bands_are_kept_without_loss():
    needs.module("rasterio")
    stored = prove(png(1, 1, 16, 2, bytes([0, 1, 2, 3, 4, 5, 6])), "a.png")
    assert read_npy(stored.data).tolist() == [[[0x0102, 0x0304, 0x0506]]]
    stored = prove(geotiff(MANY), "a.tif")
    assert (stored.ext, stored.channels) == ("npy", 7)
    assert np.array_equal(read_npy(stored.data), MANY)


def test_floats_are_kept_and_equal_pixels_hash_alike():
    values = np.linspace(-3, 3, 20, dtype=np.float32).reshape(4, 5)
    stored = prove(encoded(Image.fromarray(values), "TIFF"), "a.tif")
    assert np.array_equal(read_npy(stored.data)[:, :, 0], values)
    assert prove(npy(values), "a.npy").pixels_hash == stored.pixels_hash == pixels_hash(values[:, :, None])
    assert prove(npy(values.astype(">f4")), "a.npy").pixels_hash == stored.pixels_hash
    assert prove(npy(values.T), "a.npy").pixels_hash != stored.pixels_hash


def test_arrays_that_would_lose_something_are_refused():
    assert prove(npy(np.array([[0, 40000]], np.int32)), "a.npy").dtype == "float32"
    assert prove(npy(np.array([[-1, 5]], np.int16)), "a.npy").dtype == "float32"
    for array in (
        np.array([[2**25 + 1]], np.int64),
        np.array([[0.1]]),
        np.array([["a"]]),
        np.zeros(3),
        np.zeros((2, 0)),
    ):
        with pytest.raises(BadImage):
            prove(npy(array), "a.npy")
    with pytest.raises(BadImage, match="Python objects"):
        prove(npy(np.array([[None]], object)), "a.npy")


def test_8_bits_by_formula():
    assert to_8_bit(np.array([[[0, 128, 257, 65535]]], np.uint16)).tolist() == [[[0, 0, 1, 255]]]
    assert to_8_bit(np.array([[[0, 0.5, 1]]], np.float32)).tolist() == [[[0, 128, 255]]]
    with pytest.raises(BadImage, match=r"from 0 to 2; only 0 to 1"):
        to_8_bit(np.array([[[0, 2]]], np.float32))
    stored = prove(npy(DEEP), "a.npy", Policy(deep="8bit"))
    assert np.array_equal(pixels(stored.data), to_8_bit(DEEP))
    with pytest.raises(BadImage, match="policy refuses"):
        prove(npy(DEEP), "a.npy", Policy(deep="refuse"))


@pytest.mark.parametrize(
    ("store", "ext"), [("jpeg", "jpg"), ("png", "png"), ("webp", "webp"), ("npy", "npy")]
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_the_stored_format_can_be_chosen(store: str, ext: str, kind: str):
    data = encoded(picture(0, (64, 48)), kind)
    stored = prove(data, f"a.{kind.lower()}", Policy(store=store))
    assert (stored.ext, stored.width, stored.height) == (ext, 64, 48)
    wanted = pixels(data)
    assert stored.pixels_hash == pixels_hash(wanted)
    found = read_npy(stored.data) if store == "npy" else pixels(stored.data)
    if store in ("png", "npy") or (kind, store) == ("JPEG", "jpeg"):
        assert np.array_equal(found, wanted)
    else:
        assert 0 < np.abs(found.astype(int) - wanted).mean() < 4
    assert (stored.data == data) == (ext == {"JPEG": "jpg", "PNG": "png"}[kind])


def test_short_sides_scale_down_and_never_up():
    big = picture(0, (60, 40))
    stored = prove(encoded(big, "PNG"), "a.png", Policy(short_side=20))
    assert (stored.width, stored.height, stored.how) == (30, 20, "re-encoded: scaled down")
    assert np.array_equal(pixels(stored.data), np.asarray(big.resize((30, 20), Image.Resampling.LANCZOS)))
    assert prove(encoded(big, "PNG"), "a.png", Policy(short_side=40)).how == "kept"
    assert read_npy(prove(npy(MANY), "a.npy", Policy(short_side=3)).data).shape == (4, 3, 7)


def test_alpha_policies():
    rgba = np.zeros((1, 2, 4), np.uint8)
    rgba[0, :, 0], rgba[0, :, 3] = 200, (0, 255)
    data = encoded(Image.fromarray(rgba), "PNG")
    wanted = {"white": [[255] * 3, [200, 0, 0]], "black": [[0] * 3, [200, 0, 0]], "drop": [[200, 0, 0]] * 2}
    for alpha, colours in wanted.items():
        assert pixels(prove(data, "a.png", Policy(alpha=alpha)).data).tolist() == [colours]
    kept = prove(data, "a.png", Policy(alpha="keep"))
    assert kept.ext == "npy"
    assert np.array_equal(read_npy(kept.data), rgba)
    with pytest.raises(BadImage, match="alpha channel"):
        prove(data, "a.png", Policy(alpha="refuse"))


def test_frames_cmyk_and_sides_by_policy():
    frames = encoded(picture(0), "GIF", save_all=True, append_images=[picture(1)])
    assert prove(frames, "a.gif", Policy(animated="first")).how.startswith("re-encoded: first frame")
    with pytest.raises(BadImage, match="CMYK"):
        prove(encoded(picture(0, mode="CMYK"), "JPEG"), "a.jpg", Policy(cmyk="refuse"))
    with pytest.raises(BadImage, match="24 x 16 pixels, a side below the limit of 17"):
        prove(encoded(picture(0), "PNG"), "a.png", Policy(min_side=17))
    for bad in ({"quality": 0}, {"short_side": -1}, {"max_pixels": 0}):
        with pytest.raises(UserError, match="must be"):
            Policy(**bad)


def test_damage_that_libjpeg_only_warns_about_is_found_and_can_be_mended():
    data = bytearray(encoded(picture(3, (96, 64)), "JPEG"))
    at = data.index(b"\xff\xda") + 14
    data[at + 40 : at + 60] = bytes(20)
    Image.open(io.BytesIO(data)).load()  # Pillow sees nothing
    with pytest.raises(BadImage, match="damaged"):
        prove(bytes(data), "a.jpg")
    mended = prove(bytes(data), "a.jpg", Policy(damaged="mend"))
    assert mended.how == "re-encoded: damaged JPEG data"
    assert prove(mended.data, "a.jpg").how == "kept"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_masks_turn_as_their_images_do(orientation: int):
    # The mask is the image's first channel, so that both must stay equal.
    image = picture(1, (12, 8))
    mask = image.getchannel(0)
    block = exif(orientation)
    stored = prove(encoded(image, "PNG", exif=block), "a.png", Policy(store="png"))
    turned = prove_mask(encoded(mask, "PNG"), "m.png", stored, Policy(), "file")
    assert np.array_equal(pixels(turned), pixels(stored.data)[:, :, 0])


def test_masks_keep_indices_and_refuse_colours():
    stored = prove_pixels(np.zeros((4, 6, 3), np.uint8))
    indices = np.random.default_rng(0).integers(0, 5, (4, 6), dtype=np.uint8)
    palette = Image.fromarray(indices).quantize(256)
    data = encoded(palette, "PNG")
    assert np.array_equal(
        pixels(prove_mask(data, "m", stored, Policy())), np.asarray(Image.open(io.BytesIO(data)))
    )
    with pytest.raises(BadImage, match="has colours"):
        prove_mask(encoded(picture(0, (6, 4)), "PNG"), "m", stored, Policy())
    with pytest.raises(BadImage, match="has 3 x 4 pixels, the image 6 x 4"):
        prove_mask(np.zeros((4, 3), np.uint8), "m", stored, Policy())
    small = prove_pixels(np.zeros((8, 12, 3), np.uint8), Policy(short_side=4))
    mask = np.arange(96, dtype=np.uint8).reshape(8, 12)
    assert np.array_equal(pixels(prove_mask(mask, "m", small, Policy())), mask[1::2, 1::2])


def test_statistics_are_those_of_the_pixels_in_any_order():
    rng = np.random.default_rng(0)
    parts = [rng.integers(0, 256, (n, 3), dtype=np.uint8) for n in (5, 40, 300)]
    forward, backward = Statistics(), Statistics()
    for part in parts:
        one = Statistics()
        one.add(part)
        forward.merge(Statistics.from_json(one.to_json()))
    for part in reversed(parts):
        backward.add(part)
    assert forward.summary() == backward.summary()
    summary = forward.summary()["uint8/3"]
    values = np.concatenate(parts) / 255
    assert np.allclose(summary["mean"], values.mean(0), atol=1e-6)
    assert np.allclose(summary["std"], values.std(0), atol=1e-6)
    assert np.allclose(summary["p50"], np.percentile(values, 50, axis=0, method="inverted_cdf"), atol=1e-6)
    assert summary["pixels"] == 345


def test_statistics_of_16_bit_and_float():
    deep, real = Statistics(), Statistics()
    deep.add(MANY.reshape(-1, 7))
    assert np.allclose(deep.summary()["uint16/7"]["mean"], MANY.reshape(-1, 7).mean(0) / 65535, atol=1e-6)
    values = np.random.default_rng(0).normal(5, 2, (4000, 1)).astype(np.float32)
    real.add(np.r_[values, [[np.nan]]].astype(np.float32))
    summary = real.summary()["float32/1"]
    assert summary["pixels"] == 4000
    assert summary["mean"][0] == pytest.approx(values.mean(), rel=0.005)
    assert summary["p95"][0] == pytest.approx(np.percentile(values, 95), rel=0.01)
