"""Images of any type and number of channels on the GPU's path, on CPU tensors: against the CPU engine and the reference."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.augment.channels import fit_recipe, is_deep, num_channels
from pipelines.augment.draws import draw
from pipelines.augment.recipe import RECIPES, Recipe
from pipelines.engines.engine_table import make_engine
from pipelines.kernels import reference
from pipelines.kernels.batched_views import BatchedViews
from pipelines.kernels.view_params import TYPES, Form, pack
from pipelines.loading.gpu_slot import GpuStore
from pipelines.loading.loader import Loader, open_loader
from pipelines.loading.loader_options import LoaderOptions
from pipelines.loading.slots import gpu_slots, view_shapes
from pipelines.streaming.bad_samples import BadSamples
from pipelines.streaming.cache import Samples
from shards.conversion.convert import convert
from shards.dataset.shard_set import ShardSet
from shards.images.pixels import write_npy
from tests.pictures import photo
from tests.pipelines.augment.test_channels import SPECTRAL, bands, flat
from tests.pipelines.kernels.test_torch_kernels import end_to_end

CPU = torch.device("cpu")
SIZES = [(40, 32), (17, 60), (24, 24), (3, 30), (1, 1), (90, 25), (31, 35), (12, 13)]
EVERYTHING = {"blur_p": (0.6,), "solarize_p": (0.4,), "noise_p": 0.5, "erase_p": 0.5, "channel_drop_p": 0.3}
RGB = dataclasses.replace(RECIPES["satellite"], size=24, gray_p=0.4, hue=0.5, **EVERYTHING, **flat(3))
# Weights and sums are float32 here and float64 there: measured at most 1.5e-6, on average 9e-8.
MOST, MEAN = 1e-5, 1e-6


def three_ways(
    recipe: Recipe, images: list[np.ndarray]
) -> tuple[list[torch.Tensor], list[np.ndarray], list[np.ndarray]]:
    """The views (N, C, S, S) of each number by the batched kernels, by `fused`, and by the reference for floats."""
    heights, widths = np.array([image.shape[:2] for image in images]).T
    draws = draw(recipe, 0, 0, np.arange(len(images)), widths, heights)
    types = np.array([TYPES.index(image.dtype.name) for image in images])
    pixels, first_bytes, _ = end_to_end(images)
    made = BatchedViews(recipe, CPU, dtypes=TYPES)(pixels, first_bytes, widths, draws, types)
    shapes = view_shapes(recipe)
    fused = [np.empty((len(images), *shape), np.float32) for shape in shapes]
    slow = [np.empty((len(images), *shape), np.float32) for shape in shapes]
    engine = make_engine("fused", recipe)
    for i, image in enumerate(images):
        engine.render(image, draws[:, i].copy(), [views[i] for views in fused])
        for view, shape in enumerate(shapes):
            if is_deep(image, recipe):
                slow[view][i] = reference.deep_view(image, draws[view, i], recipe, shape[-1])
            else:
                slow[view][i] = fused[view][i]
    return made, fused, slow


def compare(recipe: Recipe, images: list[np.ndarray]) -> None:
    made, fused, slow = three_ways(recipe, images)
    for ours, *theirs in zip(made, fused, slow, strict=True):
        assert ours.std() > 0.05
        for expected in theirs:
            off = np.abs(ours.numpy() - expected)
            assert off.max() < MOST
            assert off.mean() < MEAN


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("channels", [2, 4, 13])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_any_channels_are_as_on_the_cpu(channels, dtype, interpolation):
    recipe = dataclasses.replace(SPECTRAL, interpolation=interpolation, **EVERYTHING, **flat(channels))
    compare(recipe, [bands(channels, dtype, w, h, seed=i) for i, (w, h) in enumerate(SIZES)])


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
@pytest.mark.parametrize("erase_value", ["mean", "random", 0.5])
def test_three_deep_channels_have_all_colour_operations(dtype, erase_value):
    recipe = dataclasses.replace(RGB, erase_value=erase_value, local_views=2, local_size=9)
    compare(recipe, [bands(3, dtype, w, h, seed=i) for i, (w, h) in enumerate(SIZES * 2)])


@pytest.mark.parametrize("dtype", TYPES)
def test_a_value_range_stretches_each_channel(dtype):
    """Images of 8 bits too are then worked on in floats."""
    low, high = (0.02, 0.05, 0.1), (0.2, 0.25, 0.28)
    recipe = dataclasses.replace(RGB, value_low=low, value_high=high)
    images = [bands(3, dtype, w, h, seed=i) for i, (w, h) in enumerate(SIZES)]
    compare(recipe, images)
    plain = dataclasses.replace(recipe, value_low=(), value_high=())
    assert (three_ways(recipe, images)[0][0] - three_ways(plain, images)[0][0]).abs().mean() > 0.1


def test_large_crops_are_as_exact():
    """Places in a crop of thousands of pixels leave float32 fewer bits for the weights."""
    rng = np.random.default_rng(0)
    recipe = dataclasses.replace(SPECTRAL, crop_scale=(0.5, 1.0), num_views=1, blur_p=(0.5,), **flat(2))
    compare(recipe, [rng.integers(0, 65536, (1500, 4000, 2)).astype(np.uint16), bands(2, "uint16")])


def test_what_is_no_number_is_zero():
    images = [bands(4, "float32", w, h, seed=i) for i, (w, h) in enumerate(SIZES)]
    for image in images:
        image[::5, :, 1] = np.nan
        image[1::7, :, 2] = np.inf
        image[2::7, :, 3] = -np.inf
    compare(dataclasses.replace(SPECTRAL, **flat(4)), images)


@pytest.mark.parametrize("form", [Form(), Form(torch.bfloat16, channels_last=True)])
def test_types_may_be_mixed_in_a_batch(form):
    """Each view has the values that it has in a batch of its own type, in the form that was asked for."""
    images = [bands(3, TYPES[i % 3], w, h, seed=i) for i, (w, h) in enumerate(SIZES)]
    heights, widths = np.array([image.shape[:2] for image in images]).T
    draws = draw(RGB, 0, 0, np.arange(len(images)), widths, heights)
    types = np.arange(len(images)) % 3
    pixels, first_bytes, _ = end_to_end(images)
    make = BatchedViews(RGB, CPU, form=form, dtypes=TYPES)
    together = make(pixels, first_bytes, widths, draws, types)
    for view in together:
        assert view.is_contiguous(memory_format=form.memory_format)
    for kind in range(3):
        some = np.flatnonzero(types == kind)
        alone = make(pixels, first_bytes[some], widths[some], draws[:, some], types[some])
        for ours, theirs in zip(together, alone, strict=True):
            torch.testing.assert_close(ours[some], theirs, rtol=0, atol=1e-6 if form == Form() else 2**-7)
    _, fused, _ = three_ways(RGB, images)
    for ours, theirs in zip(together, fused, strict=True):
        off = np.abs(ours.float().numpy() - theirs)
        assert off[types > 0].max() < (MOST if form == Form() else 2**-7)
        assert off.mean() * 255 < 1


# ---------------------------------------------------------------- data sets


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """30 images: 8-bit RGB and grey PNG, arrays of 16 bits in 3 channels and in 1, of floats in 3; of odd sizes."""
    root: Path = tmp_path_factory.mktemp("mixed")
    (root / "source").mkdir()
    for i in range(30):
        name, (w, h) = root / "source" / f"{i:02d}", (31 + i, 23 + i % 7)
        if i % 5 < 2:
            picture = photo(w, h, seed=i)
            (picture if i % 5 else picture.convert("L")).save(name.with_suffix(".png"))
        else:
            kind = [(3, "uint16"), (1, "uint16"), (3, "float32")][i % 5 - 2]
            name.with_suffix(".npy").write_bytes(write_npy(bands(*kind, w, h, seed=i)))
    convert(root / "source", root / "shards", workers=0, samples_per_shard=8)
    shards = ShardSet.open(root / "shards")
    assert sorted(shards.manifest.dtypes) == sorted(TYPES)
    return shards


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """20 tiles of 5 channels and 16 bits."""
    root: Path = tmp_path_factory.mktemp("tiles")
    (root / "source").mkdir()
    for i in range(20):
        (root / "source" / f"{i:02d}.npy").write_bytes(write_npy(bands(5, "uint16", 30 + i, 27, seed=i)))
    convert(root / "source", root / "shards", workers=0, samples_per_shard=8)
    return ShardSet.open(root / "shards")


def on_gpu_path(shards: ShardSet, recipe: Recipe, *, store: bool, batch: int = 10) -> Loader:
    samples = Samples(shards, make_engine("fused", recipe).decode, num_channels(shards))
    bad = BadSamples(shards, recipe, 0, 0.5, lambda line: None)
    options = LoaderOptions(threads=2, cache="gpu" if store else "none")
    slots = gpu_slots(samples, recipe, options)
    return Loader(samples, slots, recipe, bad, batch=batch, seed=0, options=options)


def same_batches(ours: Loader, theirs: Loader, most: float, epochs: int = 2) -> None:
    """`most`: mean difference of a view, in the numbers of views."""
    for epoch in range(epochs):
        for a, b in zip(ours.epoch(epoch), theirs.epoch(epoch), strict=True):
            assert a.sample_ids.tolist() == b.sample_ids.tolist()
            for made, expected in zip(a.views, b.views, strict=True):
                assert (made - expected).abs().mean(dim=(1, 2, 3)).max() < most


@pytest.mark.parametrize("store", [False, True])
def test_a_data_set_of_mixed_types(mixed, store):
    recipe = dataclasses.replace(RGB, size=16, hue=0.1)
    same_batches(
        on_gpu_path(mixed, recipe, store=store), open_loader(mixed, recipe, batch=10, seed=0), 2 / 255
    )


@pytest.mark.parametrize("store", [False, True])
@pytest.mark.parametrize("value_range", ["type", "percentiles"])
def test_tiles_of_16_bits_and_many_channels(tiles, store, value_range):
    recipe = fit_recipe(dataclasses.replace(RECIPES["multispectral"], size=16), tiles, value_range)
    plain = open_loader(tiles, recipe, batch=10, seed=0, value_range=value_range)
    same_batches(on_gpu_path(tiles, recipe, store=store), plain, 1e-4)


@pytest.mark.parametrize("store", [False, True])
def test_stand_ins_of_another_type_and_size(mixed, store, monkeypatch):
    """A stand-in lies behind the others, and begins at a multiple of its elements' size too."""
    read, bad = ShardSet.read, set(range(0, 30, 3))
    monkeypatch.setattr(
        ShardSet, "read", lambda self, i: memoryview(b"junk" * 8) if i in bad else read(self, i)
    )
    recipe = dataclasses.replace(RGB, size=16, hue=0.1)
    ours = on_gpu_path(mixed, recipe, store=store, batch=15)
    theirs = open_loader(mixed, recipe, batch=15, seed=0, max_bad_share=0.5, log=lambda line: None)
    same_batches(ours, theirs, 2 / 255)
    assert ours.bad.samples == theirs.bad.samples == len(bad)


@pytest.mark.parametrize("other", [("float32", 5), ("uint16", 4)])
def test_an_image_of_another_type_than_the_data_set_has_is_a_bad_sample(tiles, other, monkeypatch):
    dtype, channels = other
    read = ShardSet.read

    def changed(self, i):
        if i != 4:
            return read(self, i)
        return memoryview(write_npy(bands(channels, dtype, int(self.widths[i]), int(self.heights[i]))))

    monkeypatch.setattr(ShardSet, "read", changed)
    lines: list[str] = []
    recipe = fit_recipe(dataclasses.replace(RECIPES["multispectral"], size=16), tiles)
    made = on_gpu_path(tiles, recipe, store=False, batch=20)
    made.bad.log = lines.append
    [batch] = made.epoch(0)
    assert 4 not in batch.sample_ids
    assert made.bad.samples == 1
    assert (
        "4 channels, and 5 are wanted"
        if channels == 4
        else "5 x float32, but the table has 5 channels of uint16"
    ) in lines[0]


def test_a_store_counts_every_type_at_its_size(mixed, tiles):
    for shards, channels, item in ((mixed, 3, 4), (tiles, 5, 2)):
        store = GpuStore(Samples(shards, lambda data: np.empty(0), channels), CPU)
        pixels = int((shards.widths.astype(np.int64) * shards.heights).sum())
        assert len(store.pixels) == pixels * channels * item
        assert not (store.first_bytes % item).any()


# ---------------------------------------------------------------- parameters


def test_parameters_say_what_the_draws_say():
    recipe = dataclasses.replace(RGB, size=24)
    draws = draw(recipe, 0, 0, np.arange(37), np.full(37, 90), np.full(37, 70))[0]
    first_bytes = np.arange(37) * 90 * 70 * 6 + 2**35
    params = pack(draws, first_bytes, np.full(37, 90), item_bytes=2)
    box = [draws[name] for name in ("top", "left", "height", "width")]
    rows = np.cumsum(draws["height"]) - draws["height"]
    expected = {
        "source": np.stack([first_bytes // 2, np.full(37, 90), *box, rows], axis=1),
        "jitter": np.stack([draws[n] for n in ("brightness", "contrast", "saturation", "hue")], axis=1),
        "order": np.where(draws["jitter"][:, None] > 0, draws["order"].astype(int), -1),
        "gray": draws["gray"] > 0,
        "blurred": np.flatnonzero(draws["sigma"] > 0),
        "solarize": draws["solarize"] > 0,
        "symmetry": draws["turns"].astype(int) + 4 * draws["hflip"] + 8 * draws["vflip"],
        "noise_std": draws["noise_std"],
        "noise_seed": draws["noise_seed"].view(np.int64),
        "erase": np.stack([draws[f"erase_{n}"] for n in ("top", "left", "height", "width")], axis=1),
        "erase_seed": draws["erase_seed"].view(np.int64),
    }
    for name, values in expected.items():
        np.testing.assert_array_equal(getattr(params, name).numpy(), values, err_msg=name)
    # Pillow's box for a Gaussian of sigma: the middle pixels' weights and the outer ones' make 2^24, but for rounding down.
    reach, inner, outer = params.boxes.numpy().T
    assert len(reach) == (draws["sigma"] > 0).sum()
    assert set(reach) == {0, 1}
    assert (np.abs((2 * reach + 1) * inner + 2 * outer - 2**24) <= 1).all()
    np.testing.assert_array_equal(params.heights, draws["height"])


@pytest.mark.parametrize("count", [1, 2, 7, 512])
def test_parameters_travel_in_one_buffer_that_no_other_call_has(count):
    draws = draw(RGB, 0, 0, np.arange(count), np.full(count, 90), np.full(count, 70))[0]
    first, second = (pack(draws, np.zeros(count), np.full(count, 90)) for _ in range(2))
    tensors = [value for value in vars(first).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 12
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    assert first.source.untyped_storage().data_ptr() != second.source.untyped_storage().data_ptr()
    # Triton compiles its kernels anew for pointers that are aligned in another way.
    assert all(tensor.data_ptr() % 16 == 0 for tensor in tensors)
