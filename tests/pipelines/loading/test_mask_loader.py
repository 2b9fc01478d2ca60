"""Batches with masks: those of a reference written with Pillow and numpy, on every engine and layout, and through faults."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.augment.draws import draw
from pipelines.augment.recipe import RECIPES, Recipe
from pipelines.engines.engine_table import make_engine
from pipelines.loading import mask_slot
from pipelines.loading.data_config import DataConfig
from pipelines.loading.evaluation_views import eval_batches
from pipelines.loading.loader import Loader, open_loader
from pipelines.loading.loader_options import LoaderOptions
from pipelines.loading.mask_slot import Masks, with_masks
from pipelines.loading.masks import decode_mask
from pipelines.loading.slots import gpu_slots
from pipelines.streaming.bad_samples import BadSamples
from pipelines.streaming.cache import Keeps, Samples
from shards.conversion.convert import convert
from shards.dataset.order import epoch_order
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError
from shards.images.mask_images import MaskFolder
from shards.sources.image_folder import FolderSource
from shards.storage.opening import open_place
from tests import needs
from tests.pictures import photo

COUNT, WITHOUT, DEEP = 30, (4, 11), 3
# Sides of which no pixel's centre lies on the border of two pixels of images below 64, where rounding would decide.
RECIPE = dataclasses.replace(
    RECIPES["satellite"],
    size=32,
    local_views=1,
    local_size=16,
    solarize_p=(0.2,),
    blur_p=(0.5,),
    erase_p=0.6,
    crop_scale=(0.1, 1.0),
)


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """30 pictures of different sizes below 64; every third has a mask of 16 bits, two have none, the others hold 0 to 20 and 255."""
    root: Path = tmp_path_factory.mktemp("masked")
    for name in ("source", "masks"):
        (root / name).mkdir()
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        width, height = 30 + i, 24 + i % 7
        photo(width, height, seed=i).save(root / "source" / f"{i:03d}.png")
        mask = rng.integers(0, 22, (height, width)).astype(np.uint8)
        mask[mask == 21] = 255
        deep = rng.integers(0, 65536, (height, width)).astype(np.uint16)
        if i not in WITHOUT:
            Image.fromarray(deep if i % DEEP == 0 else mask).save(root / "masks" / f"{i:03d}.png")
    source = FolderSource(open_place(root / "source"), MaskFolder(open_place(root / "masks")))
    convert(source, root / "shards", workers=0, samples_per_shard=8)
    return ShardSet.open(root / "shards")


def reference(mask: np.ndarray | None, one: np.void, side: int, ignore: int) -> np.ndarray:
    """The mask of one view, int32 (side, side), by Pillow and numpy."""
    if mask is None:
        return np.full((side, side), ignore, dtype=np.int32)
    left, top = int(one["left"]), int(one["top"])
    box = (left, top, left + int(one["width"]), top + int(one["height"]))
    image = Image.fromarray(mask.astype(np.int32)).crop(box).resize((side, side), Image.Resampling.NEAREST)
    view = np.array(image)
    view = np.fliplr(view) if one["hflip"] else view
    view = np.flipud(view) if one["vflip"] else view
    view = np.rot90(view, k=int(one["turns"])).copy()
    top, left = int(one["erase_top"]), int(one["erase_left"])
    view[top : top + int(one["erase_height"]), left : left + int(one["erase_width"])] = ignore
    return view


def stored(shards: ShardSet, sample_id: int) -> np.ndarray | None:
    data = shards.read_mask(sample_id)
    return None if data is None else decode_mask(data)


def collect(batches) -> tuple[np.ndarray, list[torch.Tensor]]:
    """The ids of all samples and the masks of each view, copied: their buffers are used again."""
    with contextlib.closing(batches):
        made = [(b.sample_ids, [mask.clone() for mask in b.masks]) for b in batches]
    return np.concatenate([ids for ids, _ in made]), [
        torch.cat(parts) for parts in zip(*(m for _, m in made), strict=True)
    ]


def loader(shards: ShardSet, batch: int = 10, recipe: Recipe = RECIPE, **how) -> Loader:
    in_chunks = how.pop("in_chunks", False)
    made = open_loader(
        shards, recipe, batch=batch, seed=3, masks=True, **{"threads": 2, "log": lambda line: None, **how}
    )
    return made.in_chunks() if in_chunks else made


@pytest.mark.parametrize("ignore", [255, -100])
def test_masks_are_those_of_the_reference(masked, ignore):
    ids, masks = collect(loader(masked, mask_ignore=ignore).epoch(1))
    assert [tuple(m.shape) for m in masks] == [(30, 32, 32)] * 2 + [(30, 16, 16)]
    assert all(m.dtype == torch.int32 for m in masks)
    draws = draw(RECIPE, 3, 1, ids, masked.widths[ids], masked.heights[ids])
    assert sum(stored(masked, i) is None for i in range(COUNT)) == len(WITHOUT)
    for view, made in enumerate(masks):
        for place, sample_id in enumerate(ids.tolist()):
            mask = stored(masked, sample_id)
            expected = reference(mask, draws[view, place], RECIPE.side(view), ignore)
            np.testing.assert_array_equal(made[place].numpy(), expected)
            if mask is not None:
                assert set(np.unique(made[place])) <= {*np.unique(mask).tolist(), ignore}
    assert max(int(m.max()) for m in masks) > 60_000


@pytest.mark.parametrize("engine", ["reference", "dali", "kornia"])
def test_every_engine_gives_the_same_masks(masked, engine):
    if engine in ("dali", "kornia"):
        needs.module({"dali": "nvidia.dali"}.get(engine, engine))
    recipe = dataclasses.replace(RECIPE, erase_value="mean")
    ids, masks = collect(loader(masked, recipe=recipe).epoch(0))
    other_ids, other = collect(loader(masked, recipe=recipe, engine=engine).epoch(0))
    assert ids.tolist() == other_ids.tolist()
    assert all(torch.equal(a, b) for a, b in zip(masks, other, strict=True))


def test_the_batched_path_of_the_gpu_gives_the_same_masks(masked):
    """On CPU tensors."""
    for store in (False, True):
        samples = Samples(masked, make_engine("fused", RECIPE).decode, 3)
        options = LoaderOptions(threads=2, cache="gpu" if store else "none")
        slots = with_masks(gpu_slots(samples, RECIPE, options), samples, [32, 32, 16], 10, options)
        bad = BadSamples(masked, RECIPE, 3, 0.5)
        made = Loader(samples, slots, RECIPE, bad, batch=10, seed=3, options=options)
        assert_same(collect(made.epoch(0)), collect(loader(masked).epoch(0)))


def assert_same(a: tuple[np.ndarray, list[torch.Tensor]], b: tuple[np.ndarray, list[torch.Tensor]]) -> None:
    assert a[0].tolist() == b[0].tolist()
    assert all(torch.equal(x, y) for x, y in zip(a[1], b[1], strict=True))


@pytest.mark.parametrize(
    "how",
    [
        {"batch": 6, "threads": 1},
        {"batch": 15, "threads": 3},
        {"cache": "ram"},
        {"cache": "ram", "cache_gb": "encoded"},
        {"in_chunks": True},
    ],
)
def test_batch_size_threads_and_cache_change_nothing(masked, how):
    if "cache_gb" in how:
        how = {**how, "cache_gb": (masked.sizes.sum() + masked.mask_sizes.sum() + 1) / 1e9}
    expected = collect(loader(masked).steps(0, 6))  # two epochs
    steps = 6 * 10 // how.get("batch", 10)
    assert_same(collect(loader(masked, **how).steps(0, steps)), expected)


def test_ranks_and_resuming_change_nothing(masked):
    whole = [collect(iter_once(b)) for b in loader(masked).steps(0, 4)]
    ranks = [[collect(iter_once(b)) for b in loader(masked, rank=r, world=2).steps(0, 4)] for r in range(2)]
    for step, (ids, masks) in enumerate(whole):
        parts = [rank[step] for rank in ranks]
        joined = [torch.cat(views) for views in zip(*(p[1] for p in parts), strict=True)]
        assert_same((np.concatenate([p[0] for p in parts]), joined), (ids, masks))
    for start in range(1, 4):
        rest = [collect(iter_once(b)) for b in loader(masked).steps(start, 4)]
        for a, b in zip(whole[start:], rest, strict=True):
            assert_same(a, b)


def iter_once(batch):
    yield batch


def test_operations_on_colours_leave_masks_alone(masked):
    plain = dataclasses.replace(RECIPE, jitter_p=0, gray_p=0, blur_p=(0.0,), solarize_p=(0.0,), noise_p=0.0)
    strong = dataclasses.replace(RECIPE, jitter_p=1, gray_p=1, blur_p=(1.0,), solarize_p=(1.0,), noise_p=1.0)
    assert_same(*(collect(loader(masked, recipe=recipe).epoch(0)) for recipe in (plain, strong)))


def test_a_second_epoch_from_memory_reads_no_mask(masked, monkeypatch):
    read, seen = ShardSet.read_mask, []
    monkeypatch.setattr(ShardSet, "read_mask", lambda self, i: (seen.append(i), read(self, i))[1])
    for keep in get_args(Keeps):
        masks, seen[:] = Masks(masked, keep), []
        first, second = ([masks.mask(i) for i in range(COUNT)] for _ in range(2))
        assert sorted(set(seen)) == [i for i in range(COUNT) if read(masked, i) is not None]
        assert len(seen) == (COUNT - len(WITHOUT)) * (2 if keep == "nothing" else 1)
        for i, (a, b) in enumerate(zip(first, second, strict=True)):
            assert (a is None) == (b is None) == (read(masked, i) is None)
            if a is not None and b is not None:
                np.testing.assert_array_equal(a, b)
                assert np.shares_memory(b, masks.mask(i)) == (keep == "decoded")


@pytest.mark.parametrize(("keep", "decodes"), [("encoded", 0), ("decoded", 1)])
def test_filling_ahead_does_what_is_kept_and_no_more(masked, monkeypatch, keep, decodes):
    """Encoded masks are read, decoded ones decoded, once each; afterwards none is read."""
    none = [i for i in range(COUNT) if stored(masked, i) is None]
    decode, decoded = mask_slot.decode_mask, []
    monkeypatch.setattr(mask_slot, "decode_mask", lambda data: (decoded.append(1), decode(data))[1])
    masks = Masks(masked, keep)
    for sample_id in range(COUNT):
        masks.fill(sample_id)
    assert len(decoded) == decodes * (COUNT - len(WITHOUT))
    monkeypatch.setattr(ShardSet, "read_mask", lambda self, i: pytest.fail("it was read again"))
    for sample_id in range(COUNT):
        assert (masks.mask(sample_id) is None) == (sample_id in none)


@pytest.mark.parametrize("keep", get_args(Keeps))
def test_a_mask_of_a_copy_that_was_removed_is_read_again(masked, monkeypatch, keep):
    read, whole = ShardSet.read_mask, []
    [sample_id] = [i for i in range(COUNT) if stored(masked, i) is not None][:1]
    expected = stored(masked, sample_id)
    monkeypatch.setattr(
        ShardSet, "read_mask", lambda self, i: (read(self, i) or b"")[: None if whole else -40]
    )
    monkeypatch.setattr(ShardSet, "mend", lambda self, i: not whole and not whole.append(i))
    masks = Masks(masked, keep)
    for _ in range(2):
        np.testing.assert_array_equal(masks.mask(sample_id), expected)
    assert whole == [sample_id]


@pytest.mark.parametrize("fault", ["junk", "cut", "size"])
def test_a_bad_mask_is_a_bad_sample(masked, monkeypatch, fault):
    read = ShardSet.read_mask
    broken = set([i for i in range(COUNT - 1) if read(masked, i) is not None][4:20:6])

    def spoiled(self, i):
        data = read(self, i)
        if i not in broken or data is None:
            return data
        return {"junk": memoryview(b"junk"), "cut": data[: len(data) // 2], "size": read(self, i + 1)}[fault]

    expected = epoch_order(COUNT, 3, 0)
    monkeypatch.setattr(ShardSet, "read_mask", spoiled)
    lines = []
    base = collect(loader(masked, log=lines.append).epoch(0))
    assert not broken & set(base[0].tolist())
    assert np.count_nonzero(base[0] != expected) == 3
    assert len(lines) == 3
    assert all("its mask: " in line for line in lines)
    layouts: tuple[dict[str, Any], ...] = ({"batch": 6, "threads": 3}, {"batch": 15}, {"cache": "ram"})
    for how in layouts:
        assert_same(collect(loader(masked, **how).epoch(0)), base)
    halves = [collect(loader(masked, 30, rank=r, world=2).epoch(0)) for r in range(2)]
    assert np.concatenate([ids for ids, _ in halves]).tolist() == base[0].tolist()
    # The stand-in's own mask, by the stand-in's own draws: a mask that was there is not left behind.
    bad = BadSamples(masked, RECIPE, 3, 0.5)
    for place in np.flatnonzero(base[0] != expected):
        other, draws = bad.stand_in(0, int(expected[place]), 0)
        assert other == base[0][place]
        made = reference(stored(masked, other), draws[0], 32, 255)
        np.testing.assert_array_equal(base[1][0][place].numpy(), made)
    with pytest.raises(UserError, match=r"sample \d+ of .*its mask: "):
        list(eval_batches(masked, RECIPE, np.array(sorted(broken)), masks=True))


def test_evaluation_has_the_masks_of_its_fixed_view(masked):
    ids = np.array([7, 4, 29, 0])
    recipe = dataclasses.replace(RECIPES["segmentation"], size=32)
    _, [masks] = collect(eval_batches(masked, recipe, ids, batch=3, masks=True))
    for made, i in zip(masks, ids.tolist(), strict=True):
        mask, side = stored(masked, i), int(masked.heights[i])
        one = draw(recipe, 0, 0, np.array([i]), masked.widths[[i]], masked.heights[[i]])[0, 0].copy()
        one["top"], one["left"], one["hflip"] = 0, (masked.widths[i] - side) // 2, 0
        one["height"] = one["width"] = side
        np.testing.assert_array_equal(made.numpy(), reference(mask, one, 32, 255))
    assert [b.masks for b in eval_batches(masked, recipe, ids)] == [[]]


def test_without_masks_they_are_refused_with_the_way_out(shard_set, masked):
    with pytest.raises(
        UserError, match=r"holds no masks: convert with .*--masks FOLDER.*leave out --data.masks"
    ):
        loader(shard_set)
    with pytest.raises(UserError, match="holds no masks"):
        eval_batches(shard_set, RECIPE, np.arange(3), masks=True)
    part = masked.subset(np.array([i for i in range(COUNT) if stored(masked, i) is None]), "bare")
    with pytest.raises(UserError, match=r"the split 'bare' of .* holds no masks"):
        loader(part, batch=2)
    batch = next(open_loader(masked, RECIPE, batch=10, seed=0).steps(0, 1))
    assert batch.masks == []


def test_the_settings_reach_the_loader():
    options = DataConfig(masks=True, mask_ignore=65535).options()
    assert (options.masks, options.mask_ignore) == (True, 65535)
    with pytest.raises(UserError, match=r"data.mask_ignore is 4294967295.*32 bits"):
        DataConfig(mask_ignore=2**32 - 1)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"augment_on": "gpu"},
        {"augment_on": "gpu", "cache": "gpu"},
        {"engine": "dali", "augment_on": "gpu"},
    ],
)
def test_masks_go_to_the_gpu_with_their_views(masked, how):
    if how.get("engine") == "dali":
        needs.module("nvidia.dali")
    expected = collect(loader(masked).epoch(0))
    kept = [(b.sample_ids, b.masks) for b in loader(masked, device="cuda", **how).epoch(0)]
    assert all(mask.device.type == "cuda" for _, masks in kept for mask in masks)
    made = [torch.cat([mask.cpu() for mask in view]) for view in zip(*(m for _, m in kept), strict=True)]
    assert_same((np.concatenate([ids for ids, _ in kept]), made), expected)
