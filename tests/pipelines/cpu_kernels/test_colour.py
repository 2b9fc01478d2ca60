"""The compiled kernels against PIL and torchvision: equal, value by value."""

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import functional as tvf

from pipelines.augment import noise
from pipelines.augment.draws import DRAW
from pipelines.cpu_kernels import colour
from shards.counter_hash import mix64
from tests.pictures import colours, photo

SIDE = 64
NOTHING = np.zeros(3, dtype=np.float32)
PICTURES = {
    "photo": photo(SIDE, SIDE),
    "colours": colours(SIDE),
    "flat": Image.new("RGB", (SIDE, SIDE), (7, 7, 7)),
}


def planar(image: Image.Image) -> np.ndarray:
    return np.array(np.asarray(image).transpose(2, 0, 1), order="C")


@pytest.fixture(params=PICTURES)
def image(request) -> Image.Image:
    return PICTURES[request.param]


@pytest.mark.parametrize("factor", [0.0, 0.6, 0.8123, 1.0, 1.1777, 1.4, 2.5])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_enhancements_equal_torchvision_on_pil(image, name, factor):
    view = planar(image)
    getattr(colour, f"adjust_{name}")(view, np.float32(factor))
    expected = getattr(tvf, f"adjust_{name}")(image, float(np.float32(factor)))
    np.testing.assert_array_equal(view, planar(expected))


@pytest.mark.parametrize("shift", [-0.5, -0.1, -0.0517, -0.001, 0.0, 0.02, 0.0999, 0.37, 0.5])
def test_hue_equals_torchvision_on_pil(image, shift):
    view = planar(image)
    colour.adjust_hue(view, np.float32(shift))
    np.testing.assert_array_equal(view, planar(tvf.adjust_hue(image, float(np.float32(shift)))))


def test_hue_equals_torchvision_for_a_quarter_million_colours():
    cube = np.stack(np.meshgrid(*[np.arange(0, 256, 4) + np.arange(64) % 4] * 3, indexing="ij"), axis=-1)
    image = Image.fromarray(cube.reshape(512, 512, 3).astype(np.uint8))
    view = planar(image)
    colour.adjust_hue(view, np.float32(0.07))
    np.testing.assert_array_equal(view, planar(tvf.adjust_hue(image, float(np.float32(0.07)))))


def test_gray_and_solarize_equal_pil(image):
    view = planar(image)
    colour.to_gray(view)
    np.testing.assert_array_equal(view, planar(image.convert("L").convert("RGB")))
    view = planar(image)
    colour.solarize(view)
    np.testing.assert_array_equal(view, planar(ImageOps.solarize(image, threshold=128)))


@pytest.mark.parametrize("sigma", np.linspace(0.02, 2.0, 34).round(4).tolist())
def test_blur_equals_pil(image, sigma):
    view, spare = planar(image), np.empty((2, SIDE, SIDE), dtype=np.uint8)
    colour.gaussian_blur(view, np.float32(sigma), spare)
    expected = image.filter(ImageFilter.GaussianBlur(radius=float(np.float32(sigma))))
    np.testing.assert_array_equal(view, planar(expected))


@pytest.mark.parametrize("side", [1, 2, 3])
def test_blur_of_tiny_views_repeats_edges_as_pil(side):
    image = photo(side, side)
    view, spare = planar(image), np.empty((2, side, side), dtype=np.uint8)
    colour.gaussian_blur(view, np.float32(1.9), spare)
    np.testing.assert_array_equal(
        view, planar(image.filter(ImageFilter.GaussianBlur(radius=float(np.float32(1.9)))))
    )


def finish(view: np.ndarray, fill: np.ndarray = NOTHING, **fields) -> np.ndarray:
    draws = np.zeros(1, dtype=DRAW)
    for name, value in fields.items():
        draws[name] = value
    out, ones = np.empty(view.shape, dtype=np.float32), np.ones(3, dtype=np.float32)
    colour.complete(view.copy(), draws, 0, ones, 0 * ones, fill, noise.noise_table(), out)
    return out


@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("hflip", [0, 1])
@pytest.mark.parametrize("vflip", [0, 1])
def test_flips_then_turns_are_exact(turns, hflip, vflip):
    view = planar(PICTURES["photo"])
    expected = view[:, :: -1 if vflip else 1, :: -1 if hflip else 1]
    expected = np.rot90(expected, k=turns, axes=(1, 2)).astype(np.float32) / np.float32(255)
    np.testing.assert_allclose(finish(view, turns=turns, hflip=hflip, vflip=vflip), expected, rtol=2e-7)


def test_noise_is_the_hashed_quantile_of_each_output_pixel():
    view = np.full((3, SIDE, SIDE), 128, dtype=np.uint8)
    seed = np.uint64(0xDEADBEEF12345678)
    expected = 128 / 255 + 0.05 * noise.unit_noise(int(seed), view.size).reshape(view.shape)
    np.testing.assert_allclose(finish(view, noise_std=0.05, noise_seed=seed), expected, atol=1e-6)
    # Noise belongs to the output: turning the picture under it does not turn it.
    np.testing.assert_array_equal(
        finish(view, noise_std=0.05, noise_seed=seed),
        finish(view, noise_std=0.05, noise_seed=seed, turns=1, hflip=1),
    )


def test_noise_has_the_stated_distribution_and_is_clamped():
    values = noise.unit_noise(99, 400_000).astype(np.float64)
    assert abs(values.mean()) < 4 / np.sqrt(values.size)
    assert abs(values.std() - 1) < 4 / np.sqrt(2 * values.size)
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 4 / np.sqrt(values.size)
    assert noise.noise_table().std() == pytest.approx(1, abs=1e-6)
    dark = finish(np.zeros((3, SIDE, SIDE), dtype=np.uint8), noise_std=0.2, noise_seed=1)
    assert dark.min() == 0
    assert 0 < dark.max() <= 1


def test_compiled_hash_is_the_hash():
    words = np.arange(1000, dtype=np.uint64) * np.uint64(0x123456789ABCDEF)
    np.testing.assert_array_equal([colour._mix(word) for word in words], mix64(words))


def test_a_rectangle_is_erased_last():
    """Its place is that of the finished view, whatever the flips and turns; it has neither noise nor the mean in it."""
    view, fill = planar(PICTURES["photo"]), np.array([-1, 0.5, 2], dtype=np.float32)
    box = {"erase_top": 5, "erase_left": 40, "erase_height": 20, "erase_width": 9}
    rest = {"turns": 3, "hflip": 1, "noise_std": 0.1, "noise_seed": 7}
    expected = finish(view, **rest)
    expected[:, 5:25, 40:49] = fill[:, None, None]
    np.testing.assert_array_equal(finish(view, fill, **rest, **box), expected)
    expected[:, 5:25, 40:49] = noise.unit_noise(99, view.size).reshape(view.shape)[:, 5:25, 40:49]
    none = np.empty(0, dtype=np.float32)
    np.testing.assert_array_equal(finish(view, none, **rest, **box, erase_seed=99), expected)
