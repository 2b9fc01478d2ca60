"""The Triton kernels under Triton's interpreter, on CPU tensors, against torch's functions.

Run by `test_triton_kernels` in a process of its own: the variable TRITON_INTERPRET has to be set before anything imports Triton.
"""

import dataclasses

import numpy as np
import pytest
import torch

from pipelines.augment.draws import draw
from pipelines.augment.recipe import RECIPES
from pipelines.kernels import batched_views, torch_kernels, triton_kernels
from tests.pictures import photo
from tests.pipelines.kernels.test_torch_kernels import drawn

SIZE = 12
SIZES = [(37, 24), (24, 40), (12, 12), (31, 35), (3, 30), (1, 1), (20, 9), (14, 14)]


def batch(**fields):
    """Pixels, parameters and DRAW records of ragged pictures under a recipe with everything in it."""
    images = [photo(w, h, seed=i) for i, (w, h) in enumerate(SIZES)]
    recipe = dataclasses.replace(
        RECIPES["satellite"], size=SIZE, blur_p=(0.6,), solarize_p=(0.4,), num_views=1
    )
    draws = drawn(images, recipe, **fields)
    arrays = [np.asarray(image) for image in images]
    ends = np.cumsum([array.size for array in arrays])
    pixels = torch.from_numpy(np.concatenate([array.reshape(-1) for array in arrays]))
    widths = np.array([image.width for image in images])
    params = torch_kernels.pack(draws, ends - [array.size for array in arrays], widths)
    return pixels, params, draws


def levels(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.float() - b.float()).abs()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_crop(monkeypatch, interpolation):
    pixels, params, draws = batch()
    how = (pixels, params, SIZE, draws["height"], draws["width"], interpolation)
    wanted, made = torch_kernels.crop(*how), triton_kernels.crop(*how)
    assert levels(made, wanted).max() <= 2  # two roundings meet where an axis is enlarged many times
    assert levels(made, wanted).mean() < 0.1  # a half is rounded up here, to even there
    cut = triton_kernels.chunks(draws["height"], 3 * SIZE, limit=3 * SIZE * 50)
    assert len(cut) > 1
    monkeypatch.setattr(triton_kernels, "chunks", lambda *_: cut)
    torch.testing.assert_close(triton_kernels.crop(*how), made, rtol=0, atol=0)


def test_colours_are_those_of_torch():
    pixels, params, draws = batch(jitter=1)
    views = torch_kernels.crop(pixels, params, SIZE, draws["height"], draws["width"])
    wanted = torch_kernels.colour(views.clone(), params)
    assert levels(views, wanted).mean() > 5
    torch.testing.assert_close(triton_kernels.colour(views.clone(), params), wanted, rtol=0, atol=0)


def test_blur_is_that_of_torch():
    pixels, params, draws = batch()
    assert 0 < len(params.blurred) < len(draws)
    assert {int(r) for r in params.boxes[:, 0]} == {0, 1}
    views = torch_kernels.crop(pixels, params, SIZE, draws["height"], draws["width"])
    wanted = torch_kernels.blur(views.clone(), params)
    torch.testing.assert_close(triton_kernels.blur(views.clone(), params), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rest_is_that_of_torch(dtype, channels_last):
    pixels, params, draws = batch()
    assert len({int(s) for s in params.symmetry}) > 4
    assert 0 < int((params.noise_std > 0).sum()) < len(draws)
    views = torch_kernels.crop(pixels, params, SIZE, draws["height"], draws["width"])
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.5])
    form = torch_kernels.Form(dtype, channels_last)
    wanted = torch_kernels.finish(views, params, mean, std, form)
    made = triton_kernels.finish(views, params, mean, std, form)
    assert made.dtype == dtype
    assert made.stride() == wanted.stride()
    # The interpreter cuts bfloat16 off where a GPU rounds to nearest: the last of its 8 bits.
    torch.testing.assert_close(made, wanted, rtol=2**-7 if dtype == torch.bfloat16 else 0, atol=0)


def test_all_views_of_a_batch_are_those_of_torch():
    """Through the parameters' packing, with local views of a side of their own and erasing behind the kernels."""
    recipe = dataclasses.replace(
        RECIPES["satellite"],
        size=SIZE,
        local_views=2,
        local_size=5,
        erase_p=0.5,
        blur_p=(0.5,),
        solarize_p=(0.5,),
    )
    images = [np.asarray(photo(w, h, seed=i)) for i, (w, h) in enumerate(SIZES)]
    heights, widths = np.array([image.shape[:2] for image in images]).T
    first_bytes = np.cumsum([image.size for image in images]) - [image.size for image in images]
    pixels = torch.from_numpy(np.concatenate([image.reshape(-1) for image in images]))
    draws = draw(recipe, 0, 0, np.arange(len(images)), widths, heights)
    wanted, made = (
        batched_views.BatchedViews(recipe, torch.device("cpu"), kernels)(pixels, first_bytes, widths, draws)
        for kernels in (torch_kernels, triton_kernels)
    )
    assert [view.shape[-1] for view in made] == [SIZE, SIZE, 5, 5]
    for ours, theirs in zip(made, wanted, strict=True):
        assert levels(ours, theirs).mean() * 0.225 * 255 < 1


def test_self_test_passes_good_kernels_and_not_others():
    assert batched_views.self_test(triton_kernels, torch.device("cpu")) < batched_views.ALLOWED_LEVELS

    class NoBlur:
        crop, colour, finish = torch_kernels.crop, torch_kernels.colour, torch_kernels.finish

        @staticmethod
        def blur(views, params):
            return views

    class Upside(NoBlur):
        blur = torch_kernels.blur

        @staticmethod
        def crop(*args):
            return torch_kernels.crop(*args).flip(2)

    for broken in (NoBlur, Upside):
        assert batched_views.self_test(broken, torch.device("cpu")) > batched_views.ALLOWED_LEVELS
