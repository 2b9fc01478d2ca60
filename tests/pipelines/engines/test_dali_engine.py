"""The DALI engine on the CPU: what it measures against the reference, in 0..255 levels; batches, bad samples, refusals."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations

import numpy as np
import pytest
from PIL import Image

from pipelines.augment.draws import draw
from pipelines.augment.recipe import RECIPES, Recipe
from pipelines.engines.batch_engine import BatchOptions
from pipelines.engines.engine_table import make_engine
from pipelines.loading.loader import open_loader
from shards.conversion.convert import convert
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError
from tests import needs
from tests.pictures import colours, encoded, photo
from tests.pipelines.alone import in_batch_and_alone
from tests.pipelines.engines.fidelity_check import UNNORMALISED, draws_of

needs.module("nvidia.dali")
SIZE = 48
RECIPE = dataclasses.replace(
    RECIPES["satellite"], size=SIZE, num_views=1, blur_p=(0.5,), solarize_p=(0.5,), **UNNORMALISED
)


@pytest.fixture(scope="module")
def levels():
    """A function: |DALI - reference| in levels, of pictures and one DRAW record each: float32 (N, 3, S, S). One graph serves all."""
    dali = make_engine("dali", RECIPE, BatchOptions(batch=32, threads=2))
    reference = make_engine("reference", RECIPE)

    def differences(pictures: list[Image.Image], draws: np.ndarray) -> np.ndarray:
        data = [memoryview(encoded(picture, "PNG")) for picture in pictures]
        expected = np.empty((len(data), 3, SIZE, SIZE), dtype=np.float32)
        for i, one in enumerate(data):
            reference(one, draws[i : i + 1], [expected[i]])
        [made] = dali.render([dali.prepare(one) for one in data], draws[None])
        return np.abs(made.numpy() - expected) * 255

    return differences


def whole(count: int, **fields) -> np.ndarray:
    """DRAW records (count,) that take the whole of a picture of the view's size; a field's values go round."""
    draws = np.concatenate([draws_of((SIZE, SIZE), top=0, left=0, height=SIZE, width=SIZE)] * count)
    for name, values in fields.items():
        draws[name] = np.resize(np.array(values), draws[name].shape)
    return draws


PHOTOS = [photo(SIZE, SIZE, seed) for seed in range(8)]
MIXED = [colours(SIZE, seed) for seed in range(4)] + PHOTOS[:4]


def test_crops(levels):
    """The same triangle filter: only the rounding differs, and at the border, where DALI sees what lies beyond the box."""
    draws = np.concatenate([draws_of((120, 90), seed) for seed in range(12)])
    made = levels([photo(120, 90, seed) for seed in range(12)], draws)
    assert made.mean() < 0.25
    assert made[:, :, 1:-1, 1:-1].max() < 1.01


def test_flips_turns_and_solarise_are_exact(levels):
    symmetries = {"turns": [0, 1, 2, 3], "hflip": np.repeat([0, 1], 4), "vflip": np.repeat([0, 1], 8)}
    for solarize in (0, 1):
        assert levels((MIXED * 2)[:16], whole(16, **symmetries, solarize=solarize)).max() < 0.01


def test_grey(levels):
    made = levels(MIXED, whole(8, gray=1))
    assert made.mean() < 0.01
    assert made.max() < 1.01


@pytest.mark.parametrize(
    ("part", "values", "bound"),
    [
        ("brightness", (0.6, 0.9, 1.4), 0.1),
        ("contrast", (0.6, 0.9, 1.4), 0.13),
        ("saturation", (0.8, 1.2, 0.0), 0.13),
        ("hue", (-0.1, -0.004, 0.1, 0.5), 0.16),
    ],
)
def test_each_part_of_jitter(levels, part, values, bound):
    neutral = {"brightness": 1, "contrast": 1, "saturation": 1, "hue": 0}
    draws = whole(8, jitter=1, **(neutral | {part: values}))
    assert levels(MIXED, draws).mean() < bound


def test_jitter_in_every_order(levels):
    draws = draw(Recipe(num_views=1, blur_p=(0.0,), solarize_p=(0.0,)), 0, 0, *np.full((3, 24), SIZE))[0]
    wholes = whole(24, jitter=1)
    wholes["order"] = list(permutations(range(4)))
    for name in ("brightness", "contrast", "saturation", "hue"):
        wholes[name] = draws[name]
    made = levels([PHOTOS[i % 8] for i in range(24)], wholes).mean(axis=(1, 2, 3))
    assert made.max() < 0.6


def test_blur(levels):
    made = levels(PHOTOS, whole(8, sigma=[0.1, 0.3, 0.6, 0.8, 1.0, 1.3, 1.7, 2.0]))
    assert made.mean() < 0.5


def test_noise_is_that_of_the_reference(levels):
    draws = whole(8, noise_std=[0.0, 0.02, 0.05], noise_seed=np.arange(8, dtype=np.uint64) + 2**63)
    assert levels(MIXED, draws).max() < 0.01


@pytest.mark.parametrize("batch", [8, 20])
def test_a_sample_gets_the_same_view_in_any_batch(shard_set, batch):
    for view, expected in in_batch_and_alone(shard_set, "dali", batch):
        np.testing.assert_array_equal(view, expected)


def test_batches_at_the_same_time_are_those_of_one_after_another():
    recipe = Recipe(size=32)
    data = [np.frombuffer(encoded(photo(60, 40, i), "JPEG"), np.uint8) for i in range(5)]
    draws = [draw(recipe, 0, epoch, np.arange(5), np.full(5, 60), np.full(5, 40)) for epoch in range(6)]
    engine = make_engine("dali", recipe, BatchOptions(batch=5, threads=2))
    assert engine.workers == 2
    with ThreadPoolExecutor(3) as pool:  # one more than it makes at once: it waits
        together = list(pool.map(lambda drawn: engine.render(data, drawn), draws))
    for drawn, views in zip(draws, together, strict=True):
        for view, expected in zip(views, engine.render(data, drawn), strict=True):
            np.testing.assert_array_equal(view, expected)


def test_normalised_views_are_near_those_of_the_default_engine(shard_set):
    recipe = dataclasses.replace(RECIPES["satellite"], size=24)
    batches = [
        next(open_loader(shard_set, recipe, batch=20, seed=1, engine=name).steps(0, 1))
        for name in ("dali", "fused")
    ]
    assert (batches[0].sample_ids == batches[1].sample_ids).all()
    for view, expected in zip(batches[0].views, batches[1].views, strict=True):
        assert (view - expected).abs().mean() * 0.225 * 255 < 0.6


def test_bad_samples_are_replaced_as_by_the_default_engine(tmp_path):
    """What only the decoder finds out, and what the header shows; both with the default engine's stand-ins."""
    (tmp_path / "source").mkdir()
    for i in range(24):
        photo(60, 40, i).save(tmp_path / "source" / f"{i:02}.jpg")
    convert(tmp_path / "source", tmp_path / "shards", workers=0)
    shards = ShardSet.open(tmp_path / "shards")
    path = shards.shard_path(0)
    content = bytearray(path.read_bytes())
    for sample_id, cut in ((5, 0), (7, 200)):  # no header; a header and no pixels
        data = bytes(shards.read(sample_id))
        at = content.find(data)
        content[at + cut : at + len(data)] = bytes(len(data) - cut)
    path.write_bytes(content)
    seen = {}
    for name in ("dali", "fused"):
        log: list[str] = []
        loader = open_loader(
            ShardSet.open(tmp_path / "shards"),
            Recipe(size=16),
            batch=8,
            seed=0,
            engine=name,
            threads=2,
            log=log.append,
        )
        seen[name] = np.concatenate([batch.sample_ids for batch in loader.steps(0, 6)])
        assert loader.bad.samples == 2, name
        assert len(log) == 2
    assert (seen["dali"] == seen["fused"]).all()
    assert not set(seen["dali"]) & {5, 7}


def test_other_channels_are_refused():
    with pytest.raises(UserError, match="engine 'dali' makes RGB views"):
        make_engine("dali", Recipe(mean=(0.5,) * 4, std=(0.5,) * 4))  # type: ignore[arg-type]


def test_multi_crop_bicubic_and_erasing():
    """The presets' further operations: views of two sizes, bicubic crops, rectangles of random numbers."""
    recipe = Recipe(
        size=40,
        local_views=2,
        local_size=20,
        blur_p=(0.5,),
        solarize_p=(0.2,),
        interpolation="bicubic",
        erase_p=0.7,
        erase_value="random",
    )
    ids = np.arange(6)
    draws = draw(recipe, 0, 0, ids, np.full(6, 120), np.full(6, 90))
    data = [memoryview(encoded(photo(120, 90, i), "PNG")) for i in ids]
    dali, reference = make_engine("dali", recipe, BatchOptions(batch=6)), make_engine("reference", recipe)
    made = dali.render([dali.prepare(one) for one in data], draws)
    assert [view.shape for view in made] == [(6, 3, 40, 40)] * 2 + [(6, 3, 20, 20)] * 2
    for i in ids:
        expected = [np.empty(view.shape[1:], dtype=np.float32) for view in made]
        reference(data[i], np.ascontiguousarray(draws[:, i]), expected)
        for view, one in zip(made, expected, strict=True):
            assert np.abs(view[i].numpy() - one).mean() * 0.225 * 255 < 1


def test_no_image():
    with pytest.raises(RuntimeError):
        make_engine("dali", RECIPE)(memoryview(b"no image at all"), draws_of((9, 9)), [])


def test_a_view_shows_nothing_from_outside_its_box():
    """In a small image a region of interest of DALI's resize let 84 levels in."""
    plain = {"jitter_p": 0.0, "gray_p": 0.0, "blur_p": (0.0,), "solarize_p": (0.0,)}
    recipe = dataclasses.replace(RECIPES["moco_v3"], size=32, **plain, **UNNORMALISED)
    rng, dali = np.random.default_rng(0), make_engine("dali", recipe)

    def png(pixels: np.ndarray) -> memoryview:
        return memoryview(encoded(Image.fromarray(pixels), "PNG"))

    for sample in range(6):
        pixels, size = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8), np.array([32])
        draws = draw(recipe, 0, 0, np.array([sample]), size, size)[:, 0].copy()
        seen, other = ([np.empty((3, 32, 32), np.float32) for _ in draws] for _ in range(2))
        dali(png(pixels), draws, seen)
        for view, one in enumerate(draws):
            box = np.s_[one["top"] : one["top"] + one["height"], one["left"] : one["left"] + one["width"]]
            changed = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            changed[box] = pixels[box]
            dali(png(changed), draws, other)
            np.testing.assert_array_equal(other[view], seen[view])
