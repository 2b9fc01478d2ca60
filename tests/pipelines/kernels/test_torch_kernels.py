"""The batched kernels on CPU tensors against the per-image reference, in 0..255 levels; bounds are those of the design or tighter."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.augment.draws import DRAW, draw
from pipelines.augment.noise import unit_noise
from pipelines.augment.recipe import RECIPES, Recipe
from pipelines.kernels import reference, torch_crop, torch_kernels
from pipelines.kernels.batched_views import BatchedViews
from pipelines.kernels.view_params import CropOptions, Form, pack
from tests.pictures import colours, photo

SIZE = 48
PLAIN = {
    "jitter": 0,
    "gray": 0,
    "sigma": 0,
    "solarize": 0,
    "hflip": 0,
    "vflip": 0,
    "turns": 0,
    "noise_std": 0,
}
BARE = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def both(
    images: list[Image.Image], draws: np.ndarray, size: int = SIZE, recipe: Recipe = RECIPES["moco_v3"]
) -> tuple[np.ndarray, np.ndarray]:
    """The views of images by their DRAW records (M,), batched and by the reference: float32 (M, 3, size, size), levels."""
    pixels, first_bytes, widths = end_to_end([np.asarray(image) for image in images])
    params = pack(draws, first_bytes, widths)
    views = torch_kernels.crop(pixels, params, CropOptions(size, recipe.interpolation))
    views = torch_kernels.blur(torch_kernels.colour(views, params), params)
    recipe = dataclasses.replace(recipe, size=size, **BARE)
    erased = torch.tensor(recipe.erased())
    out = torch_kernels.finish(views, params, torch.zeros(3), torch.ones(3))
    out = torch_kernels.erase(out, params, erased)
    expected = [reference.make_view(i, one, recipe, size) for i, one in zip(images, draws, strict=True)]
    return out.numpy() * 255, np.stack(expected) * 255


def end_to_end(images: list[np.ndarray]) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """Images of any types in one buffer, uint8, where each begins in it, at multiples of 4, and their widths."""
    places = np.cumsum([0] + [-(-image.nbytes // 4) * 4 for image in images])
    flat = np.zeros(places[-1], dtype=np.uint8)
    for image, first in zip(images, places, strict=False):
        flat[first : first + image.nbytes] = image.reshape(-1).view(np.uint8)
    return torch.from_numpy(flat), places[:-1], np.array([image.shape[1] for image in images])


def drawn(images: list[Image.Image] | list[np.ndarray], recipe: Recipe, **fields) -> np.ndarray:
    """DRAW records (M,) of view 0, some fields set."""
    heights, widths = np.array([np.asarray(image).shape[:2] for image in images]).T
    draws = draw(recipe, 0, 0, np.arange(len(images)), widths, heights)[0].copy()
    for name, value in fields.items():
        draws[name] = value
    return draws


def whole(count: int, **fields) -> np.ndarray:
    """DRAW records (count,) that take all of a SIZE x SIZE image and do nothing else than `fields` say."""
    draws = np.zeros(count, dtype=DRAW)
    draws["height"] = draws["width"] = SIZE
    for name, value in fields.items():
        draws[name] = value
    return draws


PHOTOS = [
    photo(w, h, seed=i)
    for i, (w, h) in enumerate([(160, 120), (90, 200), (33, 47), (48, 48), (20, 300), (400, 31)])
]
SQUARES = [colours(SIZE, i) if i % 2 else photo(SIZE, SIZE, i) for i in range(16)]


def test_crop_flip_and_turn_of_ragged_images():
    recipe = dataclasses.replace(RECIPES["satellite"], size=SIZE, crop_scale=(0.08, 1.0))
    images = PHOTOS * 4
    keep = dict.fromkeys(("jitter", "gray", "sigma", "solarize", "noise_std"), 0)
    ours, theirs = both(images, drawn(images, recipe, **keep))
    errors = np.abs(ours - theirs)
    assert errors.mean(axis=(1, 2, 3)).max() < 0.5
    assert errors.max() < 2.01  # two roundings meet where an axis is enlarged many times


def test_jitter_in_every_order():
    rng = np.random.default_rng(0)
    draws = whole(48, jitter=1)
    draws["order"] = np.array([rng.permutation(4) for _ in range(48)])
    for name, low, high in (
        ("brightness", 0.6, 1.4),
        ("contrast", 0.6, 1.4),
        ("saturation", 0.8, 1.2),
        ("hue", -0.1, 0.1),
    ):
        draws[name] = rng.uniform(low, high, 48)
    ours, theirs = both(SQUARES * 3, draws)
    assert np.abs(ours - theirs).mean(axis=(1, 2, 3)).max() < 0.1  # float32 rounds another way on few pixels


@pytest.mark.parametrize("part", range(4))
def test_one_part_of_the_jitter(part):
    """Four times the same part would show a factor in the wrong place; the factors of the other parts are far off."""
    draws = whole(16, jitter=1, order=part, brightness=3, contrast=3, saturation=3, hue=0.4)
    name = ("brightness", "contrast", "saturation", "hue")[part]
    draws[name] = 0.07 if part == 3 else 0.9
    ours, theirs = both(SQUARES, draws)
    assert np.abs(ours - theirs).mean() < 0.1


@pytest.mark.parametrize("sigma", [0.1, 0.5, 0.8, 1.3, 1.99, 2.0])
def test_blur_is_exact(sigma):
    np.testing.assert_allclose(*both(SQUARES, whole(16, sigma=sigma)), atol=2e-4)


def test_blur_only_where_it_is_drawn():
    draws = whole(16)
    draws["sigma"][[3, 9]] = 1.5
    ours, theirs = both(SQUARES, draws)
    others = [i for i in range(16) if i not in (3, 9)]
    np.testing.assert_allclose(ours[others], theirs[others], atol=2e-4)
    assert np.abs(ours[3] - np.asarray(SQUARES[3]).transpose(2, 0, 1)).mean() > 2


@pytest.mark.parametrize("hflip", [0, 1])
@pytest.mark.parametrize("vflip", [0, 1])
@pytest.mark.parametrize("turns", range(4))
def test_grey_solarise_flips_and_turns_are_exact(hflip, vflip, turns):
    for gray, solarize in ((0, 0), (1, 0), (0, 1), (1, 1)):
        draws = whole(16, gray=gray, solarize=solarize, hflip=hflip, vflip=vflip, turns=turns)
        np.testing.assert_allclose(*both(SQUARES, draws), atol=2e-4)


def test_noise_is_the_same_as_on_the_cpu():
    seeds = np.array([0, 1, 2**63 + 5, 2**64 - 1], dtype=np.uint64)
    ours = torch_kernels.unit_noise(torch.from_numpy(seeds.view(np.int64)), 3 * 7 * 7)
    np.testing.assert_array_equal(ours.numpy(), np.stack([unit_noise(int(s), 147) for s in seeds]))
    draws = whole(16, noise_std=0.05, turns=1)
    draws["noise_seed"] = np.arange(16, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    np.testing.assert_allclose(*both(SQUARES, draws), atol=2e-3)


@pytest.mark.parametrize("preset", RECIPES)
def test_whole_recipes(preset):
    images, recipe = PHOTOS * 6, dataclasses.replace(RECIPES[preset], size=SIZE)
    ours, theirs = both(images, drawn(images, recipe), recipe=recipe)
    assert np.abs(ours - theirs).mean() < 0.5


def test_normalisation_and_dtype():
    white = torch.full((1, 3, 4, 4), 255, dtype=torch.uint8)
    params = pack(whole(1), np.zeros(1, dtype=np.int64), np.array([4]))
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.5])
    out = torch_kernels.finish(white, params, mean, std, Form(torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert out[0, :, 0, 0].tolist() == pytest.approx([3.0, 2.0, 0.8], rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_views_leave_as_the_model_takes_them(dtype):
    """The numbers are those of the plain form, rounded once; every view lies densely in the layout that was asked for."""
    recipe = dataclasses.replace(
        RECIPES["dino"],
        size=16,
        local_size=8,
        local_views=1,
        erase_p=1.0,
        noise_p=0.5,
        noise_std=(0.01, 0.05),
    )
    heights, widths = (np.array([image.size[axis] for image in PHOTOS]) for axis in (1, 0))
    draws = draw(recipe, 0, 0, np.arange(len(PHOTOS)), widths, heights)
    how = (*end_to_end([np.asarray(image) for image in PHOTOS]), draws, np.zeros(len(PHOTOS), dtype=int))
    plain = BatchedViews(recipe, torch.device("cpu"))(*how)
    made = BatchedViews(recipe, torch.device("cpu"), form=Form(dtype, channels_last=True))(*how)
    assert len(made) == len(plain) == recipe.total_views == 3
    for ours, theirs in zip(made, plain, strict=True):
        assert theirs.is_contiguous()
        assert ours.is_contiguous(memory_format=torch.channels_last)
        assert ours.dtype == dtype
        assert torch.equal(ours, theirs.to(dtype))


def test_crops_of_large_images_are_made_in_smaller_parts(monkeypatch):
    """The padded sources of all views at once would take gigabytes."""
    images = [photo(90, 70, seed=i) for i in range(5)]
    draws = drawn(images, dataclasses.replace(RECIPES["moco_v2"], num_views=1))
    pixels, first_bytes, widths = end_to_end([np.asarray(image) for image in images])
    how = (pixels, pack(draws, first_bytes, widths), CropOptions(12))
    whole_batch, parts, split = torch_kernels.crop(*how), [], torch.Tensor.split
    monkeypatch.setattr(
        torch.Tensor, "split", lambda self, size, dim=0: parts.append(size) or split(self, size, dim)
    )
    monkeypatch.setattr(
        torch_crop, "CROP_BYTES", 36 * int(draws["height"].max()) * int(draws["width"].max()) * 2
    )
    assert torch.equal(torch_kernels.crop(*how), whole_batch)
    assert parts == [2]
