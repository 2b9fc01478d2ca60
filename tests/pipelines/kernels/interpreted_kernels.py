"""The Triton kernels under Triton's interpreter, on CPU tensors, against torch's functions.

Run by `test_triton_kernels` in a process of its own: the variable TRITON_INTERPRET has to be set before anything imports Triton.
"""

import dataclasses

import numpy as np
import pytest
import torch

from pipelines.augment.channels import FULL
from pipelines.augment.draws import draw
from pipelines.augment.recipe import RECIPES
from pipelines.kernels import kernel_choice, torch_kernels, triton_crop, triton_kernels
from pipelines.kernels.batched_views import BatchedViews
from pipelines.kernels.view_params import TYPES, CropOptions, Form, pack
from tests.pictures import photo
from tests.pipelines.augment.test_channels import bands
from tests.pipelines.kernels.test_torch_kernels import drawn, end_to_end

SIZE = 12
SIZES = [(37, 24), (24, 40), (12, 12), (31, 35), (3, 30), (1, 1), (20, 9), (14, 14)]
SMALL = [(9, 14), (24, 9), (12, 12), (17, 20), (3, 15), (1, 1), (13, 12), (14, 9)]  # the interpreter is slow
EIGHT_BIT = ("uint8", 3)
# Channels in one program of the crop, or in two of them.
IN_FLOATS = [("uint16", 3), ("float32", 4), ("uint8", 2)]
KINDS = [EIGHT_BIT, *IN_FLOATS]


def batch(kind=EIGHT_BIT, interpolation="bilinear", **fields):
    """Pixels, parameters and options of ragged pictures under a recipe with everything in it that there is for the channels."""
    dtype, channels = kind
    if kind == EIGHT_BIT:
        images = [np.asarray(photo(w, h, seed=i)) for i, (w, h) in enumerate(SIZES)]
    else:
        images = [bands(channels, dtype, w, h, seed=i) for i, (w, h) in enumerate(SMALL)]
    preset = RECIPES["satellite" if channels == 3 else "multispectral"]
    recipe = dataclasses.replace(preset, size=SIZE, blur_p=(0.6,), solarize_p=(0.4,), num_views=1)
    draws = drawn(images, recipe, **fields)
    pixels, first_bytes, widths = end_to_end(images)
    params = pack(draws, first_bytes, widths, item_bytes=np.dtype(dtype).itemsize)
    pixels = pixels.view(getattr(torch, dtype))
    if kind == EIGHT_BIT:
        return pixels, params, CropOptions(SIZE, interpolation)
    gain = torch.linspace(1.2, 3.5, channels) / FULL[dtype]
    return pixels, params, CropOptions(SIZE, interpolation, gain, torch.linspace(-0.2, 0.1, channels))


def levels(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Of 8-bit views in levels, of floats in [0, 1]."""
    return (a.float() - b.float()).abs()


def near(made: torch.Tensor, wanted: torch.Tensor) -> None:
    """In 8 bits the same; floats are summed in another order, and the hue divides by differences of them."""
    assert made.dtype == wanted.dtype
    torch.testing.assert_close(made, wanted, rtol=0, atol=0 if made.dtype == torch.uint8 else 2e-6)


@pytest.mark.parametrize(
    ("kind", "interpolation"),
    [*((kind, "bilinear") for kind in KINDS), (EIGHT_BIT, "bicubic"), (("uint16", 3), "bicubic")],
    ids=str,
)
def test_crop(kind, interpolation):
    how = batch(kind, interpolation)
    wanted, made = torch_kernels.crop(*how), triton_kernels.crop(*how)
    if kind == EIGHT_BIT:
        assert levels(made, wanted).max() <= 2  # two roundings meet where an axis is enlarged many times
        assert levels(made, wanted).mean() < 0.1  # a half is rounded up here, to even there
    else:
        assert wanted.std() > 0.05
        assert levels(made, wanted).max() < 2e-6


def test_a_crop_in_chunks_is_that_of_the_whole_batch(monkeypatch):
    how = batch(("uint16", 3))
    made = triton_kernels.crop(*how)
    cut = triton_crop.chunks(how[1].heights, 12 * SIZE, limit=12 * SIZE * 30)
    assert len(cut) > 1
    monkeypatch.setattr(triton_crop, "chunks", lambda *_: cut)
    torch.testing.assert_close(triton_kernels.crop(*how), made, rtol=0, atol=0)


def test_what_is_no_number_is_zero_and_what_is_out_of_range_is_clamped():
    pixels, params, options = batch(("float32", 2))
    spoilt = pixels.clone()
    spoilt[7::31], spoilt[3::37], spoilt[5::41] = torch.nan, torch.inf, -torch.inf
    expected = pixels.clone()
    expected[7::31], expected[3::37], expected[5::41] = -1e9, 1e9, -1e9
    made = triton_kernels.crop(spoilt, params, options)
    assert torch.equal(made, triton_kernels.crop(expected, params, options))
    near(torch_kernels.crop(spoilt, params, options), torch_kernels.crop(expected, params, options))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_colours_are_those_of_torch(kind):
    pixels, params, options = batch(kind, jitter=1)
    views = torch_kernels.crop(pixels, params, options)
    wanted = torch_kernels.colour(views.clone(), params)
    assert levels(views, wanted).mean() > (5 if kind == EIGHT_BIT else 0.02)
    near(triton_kernels.colour(views.clone(), params), wanted)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_blur_is_that_of_torch(kind):
    pixels, params, options = batch(kind)
    assert 0 < len(params.blurred) < len(params.heights)
    assert {int(r) for r in params.boxes[:, 0]} == {0, 1}
    views = torch_kernels.crop(pixels, params, options)
    wanted = torch_kernels.blur(views.clone(), params)
    assert levels(views, wanted).max() > 0.01
    near(triton_kernels.blur(views.clone(), params), wanted)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_rest_is_that_of_torch(dtype, channels_last, kind):
    pixels, params, options = batch(kind)
    assert len({int(s) for s in params.symmetry}) > 4
    assert 0 < int((params.noise_std > 0).sum()) < len(params.heights)
    views = torch_kernels.crop(pixels, params, options)
    mean, std = torch.linspace(0.4, 0.6, kind[1]), torch.linspace(0.2, 0.5, kind[1])
    form = Form(dtype, channels_last)
    wanted = torch_kernels.finish(views, params, mean, std, form)
    made = triton_kernels.finish(views, params, mean, std, form)
    assert made.dtype == dtype
    assert made.stride() == wanted.stride()
    # The interpreter cuts bfloat16 off where a GPU rounds to nearest: the last of its 8 bits.
    torch.testing.assert_close(made, wanted, rtol=2**-7 if dtype == torch.bfloat16 else 0, atol=0)


@pytest.mark.parametrize("types", [("uint8",), ("uint8", "uint16", "float32")])
def test_all_views_of_a_batch_are_those_of_torch(types):
    """Through the parameters' packing, with local views of a side of their own and erasing behind the kernels."""
    recipe = dataclasses.replace(
        RECIPES["satellite"],
        size=SIZE,
        local_views=2,
        local_size=5,
        erase_p=0.5,
        channel_drop_p=0.5,
        blur_p=(0.5,),
        solarize_p=(0.5,),
    )
    kinds = [types[i % len(types)] for i in range(len(SMALL))]
    images = [bands(3, kind, w, h, seed=i) for i, (kind, (w, h)) in enumerate(zip(kinds, SMALL, strict=True))]
    heights, widths = np.array([image.shape[:2] for image in images]).T
    pixels, first_bytes, _ = end_to_end(images)
    draws = draw(recipe, 0, 0, np.arange(len(images)), widths, heights)
    numbers = np.array([TYPES.index(kind) for kind in kinds])
    wanted, made = (
        BatchedViews(recipe, torch.device("cpu"), kernels)(pixels, first_bytes, widths, draws, numbers)
        for kernels in (torch_kernels, triton_kernels)
    )
    assert [view.shape[-1] for view in made] == [SIZE, SIZE, 5, 5]
    for ours, theirs in zip(made, wanted, strict=True):
        assert levels(ours, theirs).mean() * 0.225 * 255 < 1
        deep = numbers > 0
        assert not deep.any() or levels(ours[deep], theirs[deep]).max() < 1e-4


@pytest.mark.parametrize(
    "trial", [kernel_choice.EIGHT_BIT, kernel_choice.IN_FLOATS[0]], ids=lambda trial: trial.images
)
def test_self_test_passes_good_kernels_and_not_others(trial):
    device = torch.device("cpu")
    assert kernel_choice.difference(triton_kernels, device, trial) < trial.allowed

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

    class Grey(NoBlur):
        blur = torch_kernels.blur

        @staticmethod
        def colour(views, params):
            return views

    for broken in (NoBlur, Upside, Grey):
        assert kernel_choice.difference(broken, device, trial) > trial.allowed
