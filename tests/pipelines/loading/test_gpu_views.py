"""What only a CUDA device shows of the views: the batched kernels on it against the same on the CPU, and the stream around them."""

import dataclasses
import warnings
from importlib import import_module

import numpy as np
import pytest
import torch

from pipelines.augment.draws import draw
from pipelines.augment.recipe import RECIPES, Recipe
from pipelines.kernels import kernel_choice, torch_crop, torch_kernels
from pipelines.kernels.batched_views import BatchedViews
from pipelines.kernels.view_params import TYPES, Form, pack
from pipelines.loading.loader import open_loader
from shards.conversion.convert import convert
from shards.dataset.shard_set import ShardSet
from shards.images.pixels import write_npy
from tests import needs
from tests.pictures import photo
from tests.pipelines.augment.test_channels import SPECTRAL, bands, flat
from tests.pipelines.kernels.test_deep_views import RGB
from tests.pipelines.kernels.test_torch_kernels import end_to_end

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("preset", ["moco_v3", "satellite"])
@pytest.mark.parametrize("cache", ["none", "ram", "gpu"])
def test_views_made_on_a_gpu_are_near_the_cpus(shard_set, preset, cache):
    recipe = Recipe(**{**vars(RECIPES[preset]), "size": 32, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)})
    on_cpu = open_loader(shard_set, recipe, batch=8, seed=0)
    on_gpu = open_loader(shard_set, recipe, batch=8, seed=0, device="cuda", augment_on="gpu", cache=cache)
    for epoch in range(3):
        for a, b in zip(on_cpu.epoch(epoch), on_gpu.epoch(epoch), strict=True):
            assert a.sample_ids.tolist() == b.sample_ids.tolist()
            for expected, view in zip(a.views, b.views, strict=True):
                assert view.device.type == "cuda"
                assert (view.cpu() - expected).abs().mean() * 255 < 1.0


def test_views_made_on_a_gpu_outlive_the_next_batches(shard_set):
    loader = open_loader(shard_set, Recipe(size=24), batch=4, seed=1, device="cuda", augment_on="gpu")
    kept = [(batch.views[0], batch.views[0].clone()) for batch in loader.epoch(0)]
    for view, copy in kept:
        torch.testing.assert_close(view, copy, rtol=0, atol=0)


def test_launching_does_not_wait_for_the_gpu(shard_set):
    loader = open_loader(shard_set, Recipe(size=24), batch=8, seed=1, device="cuda", augment_on="gpu")
    list(loader.epoch(0))  # warm
    batches = loader.epoch(1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ids = np.concatenate([batch.sample_ids for batch in batches])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(ids) == 40


@pytest.mark.parametrize("side_stream", [True, False])
@pytest.mark.parametrize("how", [{}, {"augment_on": "gpu"}, {"augment_on": "gpu", "cache": "gpu"}], ids=str)
def test_a_busy_device_changes_no_view(shard_set, how, side_stream):
    """Views are read late, while others are made and memory goes round: an order that is only mostly right shows here."""
    made = []
    for busy in (False, True):
        loader = open_loader(
            shard_set, Recipe(size=64), batch=8, seed=2, device="cuda", side_stream=side_stream, **how
        )
        kept = []
        for epoch in range(3):
            for batch in loader.epoch(epoch):
                if busy:
                    torch.cuda._sleep(30_000_000)
                kept += [view * 1 for view in batch.views]
                # What is freed here lies in the way of whatever takes the same memory too early.
                for view in batch.views:
                    torch.full_like(view, torch.nan)
                if not busy:
                    torch.cuda.synchronize()
        made.append(kept)
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


def test_triton_is_what_makes_the_views():
    """Compiled and near enough: it does not give way to torch's functions."""
    kernel_choice.choose_kernels.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        kernels = kernel_choice.choose_kernels(torch.device("cuda"))
    assert kernels.__name__ == "pipelines.kernels.triton_kernels"  # type: ignore[attr-defined]


def test_triton_is_what_makes_views_in_floats():
    kernel_choice.choose_kernels.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        kernels = kernel_choice.choose_kernels(torch.device("cuda"), True)
    assert kernels.__name__ == "pipelines.kernels.triton_kernels"  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["triton_kernels", "torch_kernels"])
@pytest.mark.parametrize("kind", [("uint16", 3), ("float32", 3), ("uint16", 13), ("uint8", 4)], ids=str)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_views_in_floats_are_those_of_the_cpu(name, kind, interpolation):
    """Each kernel by itself: nothing is rounded on the way, so that what differs is the order of sums."""
    dtype, channels = kind
    recipe = dataclasses.replace(
        SPECTRAL if channels != 3 else RGB, size=32, interpolation=interpolation, **flat(channels)
    )
    images = [bands(channels, dtype, 40 + 9 * i, 90 - 7 * i, seed=i) for i in range(8)]
    heights, widths = np.array([image.shape[:2] for image in images]).T
    draws = draw(recipe, 0, 0, np.arange(8), widths, heights)
    pixels, first_bytes, _ = end_to_end(images)
    types = np.full(8, TYPES.index(dtype))
    expected = BatchedViews(recipe, torch.device("cpu"))(pixels, first_bytes, widths, draws, types)
    make = BatchedViews(recipe, torch.device("cuda"), import_module(f"pipelines.kernels.{name}"))
    for view, wanted in zip(make(pixels.cuda(), first_bytes, widths, draws, types), expected, strict=True):
        off = (view.cpu() - wanted).abs()
        assert off.max() < 1e-4
        assert off.mean() < 1e-6


@pytest.mark.parametrize("cache", ["none", "gpu"])
@pytest.mark.parametrize("channels", [3, 5])
def test_data_sets_of_16_bits_on_a_gpu_are_as_on_the_cpu(tmp_path, cache, channels):
    (tmp_path / "source").mkdir()
    for i in range(24):
        path = tmp_path / "source" / f"{i:02d}"
        if channels == 3 and i % 3 == 1:  # types may be mixed
            photo(40 + i, 33, seed=i).save(path.with_suffix(".png"))
        else:
            path.with_suffix(".npy").write_bytes(write_npy(bands(channels, "uint16", 41, 30 + i, seed=i)))
    convert(tmp_path / "source", tmp_path / "shards", workers=0)
    shards = ShardSet.open(tmp_path / "shards")
    recipe = dataclasses.replace(RECIPES["moco_v3" if channels == 3 else "multispectral"], size=32)
    on_cpu = open_loader(shards, recipe, batch=8, seed=0)
    on_gpu = open_loader(shards, recipe, batch=8, seed=0, device="cuda", augment_on="gpu", cache=cache)
    for epoch in range(2):
        for a, b in zip(on_cpu.epoch(epoch), on_gpu.epoch(epoch), strict=True):
            assert a.sample_ids.tolist() == b.sample_ids.tolist()
            assert b.replaced == 0
            for expected, view in zip(a.views, b.views, strict=True):
                assert (view.cpu() - expected).abs().mean() * 255 * 0.225 < (1.0 if channels == 3 else 0.1)


def test_parameters_in_flight_are_not_overwritten():
    """Many calls while the device is busy: each has pinned memory of its own until its copy is done."""
    draws = draw(RECIPES["moco_v3"], 0, 0, np.arange(64), np.full(64, 90), np.full(64, 70))[0]
    torch.cuda._sleep(200_000_000)
    made = [pack(draws, np.full(64, 3 * i), np.full(64, 90), "cuda") for i in range(50)]
    for i, params in enumerate(made):
        assert (params.source[:, 0].cpu() == 3 * i).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_views_leave_as_the_model_takes_them(shard_set, dtype):
    recipe = Recipe(**{**vars(RECIPES["satellite"]), "size": 32, "erase_p": 0.5})
    where = {"batch": 8, "seed": 0, "device": "cuda", "augment_on": "gpu"}
    plain = open_loader(shard_set, recipe, **where)
    ours = open_loader(shard_set, recipe, **where, form=Form(dtype, channels_last=True))
    for a, b in zip(plain.epoch(0), ours.epoch(0), strict=True):
        for expected, view in zip(a.views, b.views, strict=True):
            assert view.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(view, expected.to(dtype))


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """40 JPEGs of photographs' usual sizes, colour and grey, baseline and progressive."""
    root = tmp_path_factory.mktemp("jpegs")
    (root / "source").mkdir()
    for i in range(40):
        picture = photo(200 + 7 * i, 150 + 5 * (i % 9), seed=i)
        picture = picture.convert("L") if i % 13 == 5 else picture
        picture.save(root / "source" / f"{i:02d}.jpg", quality=90, progressive=i % 7 == 3)
    convert(root / "source", root / "shards", workers=0)
    return ShardSet.open(root / "shards")


BARE = {"size": 64, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


@pytest.mark.parametrize("cache", ["none", "gpu"])
def test_views_of_images_that_the_gpu_decoded_are_near_the_cpus(jpegs, cache):
    needs.module("nvidia.nvimgcodec")
    recipe = Recipe(**{**vars(RECIPES["moco_v3"]), **BARE})
    on_cpu = open_loader(jpegs, recipe, batch=8, seed=0)
    how = {"device": "cuda", "augment_on": "gpu", "decode": "gpu", "cache": cache}
    on_gpu = open_loader(jpegs, recipe, batch=8, seed=0, **how)
    for epoch in range(2):
        for a, b in zip(on_cpu.epoch(epoch), on_gpu.epoch(epoch), strict=True):
            assert b.replaced == 0
            for expected, view in zip(a.views, b.views, strict=True):
                assert (view.cpu() - expected).abs().mean() * 255 < 2.0


@pytest.mark.parametrize(("engine", "package"), [("kornia", "kornia"), ("dali", "nvidia.dali")])
def test_other_engines_on_a_gpu_are_near_themselves_on_the_cpu(jpegs, engine, package):
    needs.module(package)
    recipe = Recipe(**{**vars(RECIPES["moco_v3"]), **BARE})
    on_cpu = open_loader(jpegs, recipe, batch=8, seed=0, engine=engine)
    on_gpu = open_loader(jpegs, recipe, batch=8, seed=0, engine=engine, device="cuda", augment_on="gpu")
    kept = []
    for a, b in zip(on_cpu.epoch(0), on_gpu.epoch(0), strict=True):
        kept.append((b.views[0], b.views[0].clone()))
        for expected, view in zip(a.views, b.views, strict=True):
            assert (view.cpu() - expected).abs().mean() * 255 < 2.0
    for view, copy in kept:  # they outlive the next batches
        assert torch.equal(view, copy)


@pytest.mark.parametrize("name", ["triton_kernels", "torch_kernels"])
def test_images_beyond_the_reach_of_32_bits(name):
    """A cache on the GPU is one buffer of many gigabytes."""
    first = 5 * 2**30 + 3
    if torch.cuda.mem_get_info()[0] < 2 * first:
        pytest.skip("not enough memory on the device")
    device, recipe = torch.device("cuda"), Recipe(**{**vars(RECIPES["satellite"]), "size": 32})
    image = np.asarray(photo(90, 70))
    draws = draw(recipe, 0, 0, np.arange(4), np.full(4, 90), np.full(4, 70))
    widths, types = np.full(4, 90), np.zeros(4, dtype=int)
    small = torch.from_numpy(image.reshape(-1).copy())
    expected = BatchedViews(recipe, torch.device("cpu"))(
        small, np.zeros(4, dtype=np.int64), widths, draws, types
    )
    pixels = torch.zeros(first + image.size, dtype=torch.uint8, device=device)
    pixels[first:] = small.to(device)
    make = BatchedViews(recipe, device, import_module(f"pipelines.kernels.{name}"))
    for view, wanted in zip(make(pixels, np.full(4, first), widths, draws, types), expected, strict=True):
        assert (view.cpu() - wanted).abs().mean() * 255 * 0.225 < 1.0


def test_memory_of_a_batch_of_large_images_is_bounded():
    """Torch's functions pad the crops of a batch to the largest."""
    device, size = torch.device("cuda"), (2000, 3000)
    recipe = Recipe(**{**vars(RECIPES["moco_v2"]), "size": 32, "crop_scale": (0.9, 1.0)})
    draws = draw(recipe, 0, 0, np.arange(8), np.full(8, size[1]), np.full(8, size[0]))
    pixels = torch.zeros(3 * size[0] * size[1], dtype=torch.uint8, device=device)
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    BatchedViews(recipe, device, torch_kernels)(
        pixels, np.zeros(8, dtype=np.int64), np.full(8, size[1]), draws, np.zeros(8, dtype=int)
    )
    assert torch.cuda.max_memory_allocated() - held < 4 * torch_crop.CROP_BYTES


@pytest.mark.parametrize("cache", ["none", "gpu"])
def test_chunks_on_a_busy_device_are_the_whole_batch_cut(shard_set, cache):
    """Made on a stream beside the step's while that is late, twice each, as a step in chunks asks for them."""
    how = {"batch": 8, "seed": 2, "device": "cuda", "augment_on": "gpu", "cache": cache}
    loader = open_loader(shard_set, Recipe(size=64), **how)
    expected = [[view.clone() for view in batch.views] for epoch in range(3) for batch in loader.epoch(epoch)]
    aside, made = torch.cuda.Stream(), []
    chunked = open_loader(shard_set, Recipe(size=64), **how).in_chunks()
    for epoch in range(3):
        for batch in chunked.epoch(epoch):
            passes = []
            for _ in range(2):
                parts = []
                for start in (0, 3, 6):
                    torch.cuda._sleep(10_000_000)
                    with torch.cuda.stream(aside):
                        views = batch.views.rows(slice(start, min(start + 3, 8)))
                    torch.cuda.current_stream().wait_stream(aside)
                    for view in views:
                        view.record_stream(torch.cuda.current_stream())
                    parts.append([view * 1 for view in views])
                    for view in views:
                        torch.full_like(view, torch.nan)
                passes.append([torch.cat(view) for view in zip(*parts, strict=True)])
            made.append(passes)
    for whole, passes in zip(expected, made, strict=True):
        for views in passes:
            assert all(torch.equal(a, b) for a, b in zip(whole, views, strict=True))


def test_asking_for_chunks_does_not_wait_for_the_gpu(shard_set):
    how = {"batch": 8, "seed": 1, "device": "cuda", "augment_on": "gpu"}
    loader = open_loader(shard_set, Recipe(size=24), **how).in_chunks()
    for batch in loader.epoch(0):  # warm
        batch.views.rows(slice(0, 8))
    batches, count = loader.epoch(1), 0
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            count += sum(len(batch.views.rows(slice(a, a + 4))[0]) for a in (0, 4))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert count == 40
