"""Several shard folders as one set: ids, classes, masks, order over ranks and resume, draws, and what is refused."""

import copy
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import Recipe, eval_batches, open_loader
from pipelines.loading.data_config import DataConfig
from pipelines.loading.loader_state import describe_run
from shards import ShardSet, SplitRule, UserError, convert, split
from shards.dataset.mixed_set import MixedShardSet
from shards.dataset.order import epoch_order, mixed_order, mixed_shares
from shards.images.channel_statistics import PERCENTILES, Statistics, join_summaries
from tests.pictures import photo

SMALL = Recipe(size=16)


def make(root: Path, count: int, classes: str, seed: int = 0, masks: bool = False) -> ShardSet:
    for i in range(count):
        name = f"{classes[i % len(classes)]}/{i:03d}"
        path = root / "source" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(24 + i % 5, 20 + i % 7, seed=seed + i).save(path)
        if masks:
            mask = root / "masks" / f"{name}.png"
            mask.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (24 + i % 5, 20 + i % 7), i % 3).save(mask)
    source = root / "source"
    if masks:
        from shards.images.mask_images import MaskFolder
        from shards.sources.image_folder import FolderSource
        from shards.storage.opening import open_place

        source = FolderSource(open_place(source), MaskFolder(open_place(root / "masks")))
    convert(source, root / "shards", workers=0, samples_per_shard=8)
    return ShardSet.open(root / "shards")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[ShardSet, ShardSet]:
    """20 pictures of the classes a and b; 12 of c and b with masks."""
    root = tmp_path_factory.mktemp("mix")
    return make(root / "one", 20, "ab"), make(root / "two", 12, "cb", 100, masks=True)


def taken(loader, epoch: int = 0, start: int = 0) -> list[tuple[list[int], list[torch.Tensor]]]:
    return [(b.sample_ids.tolist(), [view.clone() for view in b.views]) for b in loader.epoch(epoch, start)]


def test_a_mix_has_the_samples_of_its_sets_with_classes_by_name(both):
    one, two = both
    mix = MixedShardSet(both)
    assert len(mix) == mix.num_samples == 32
    assert mix.classes == ["a", "b", "c"]
    for i in range(32):
        part, own = (one, i) if i < 20 else (two, i - 20)
        assert mix.read(i) == part.read(own)
        assert mix.name(i) == part.name(own)
        assert mix.shard_path(i) == part.shard_path(own)
        assert mix.read_mask(i) == part.read_mask(own)
        assert (mix.widths[i], mix.heights[i], mix.sizes[i]) == (
            part.widths[own], part.heights[own], part.sizes[own]
        )  # fmt: skip
        assert mix.classes[mix.labels[i]] == part.classes[part.labels[own]] == mix.name(i)[0]
        assert mix[i].sample_id == i
    assert mix.mask_sizes[:20].sum() == 0
    assert mix.mask_sizes[20:].tolist() == two.mask_sizes.tolist()
    for wrong in (-1, 32):
        with pytest.raises(IndexError):
            mix.read(wrong)
    again = pickle.loads(pickle.dumps(mix))
    assert again.manifest.options_sha256 == mix.manifest.options_sha256
    assert again.read(25) == mix.read(25)


def test_without_weights_each_sample_comes_once_and_in_the_order_of_a_single_set(both):
    loader = open_loader([both[0].folder, both[1].folder], SMALL, batch=4, seed=5)
    for epoch in range(3):
        assert loader.order(epoch).tolist() == epoch_order(32, 5, epoch).tolist()
    assert [i for ids, _ in taken(loader) for i in ids] == loader.order(0).tolist()
    blocks = open_loader(list(both), SMALL, batch=4, seed=5, order="blocks", block_shards=2)
    assert sorted(blocks.order(1).tolist()) == list(range(32))


def test_weights_give_their_shares_and_draws_of_their_own_to_repetitions(both):
    mix = MixedShardSet(both, (1, 3))
    assert mixed_shares([20, 12], (1, 3)) == [8, 24]
    loader = open_loader(mix, SMALL, batch=32, seed=2)
    order = mixed_order([20, 12], [8, 24], 2, 1)
    assert loader.order(1).tolist() == (order % 32).tolist()
    [(ids, views)] = taken(loader, epoch=1)
    counts = Counter(ids)
    assert sum(count for i, count in counts.items() if i < 20) == 8
    assert {count for i, count in counts.items() if i >= 20} == {2}
    for i in range(20, 32):
        first, second = (k for k, sample in enumerate(ids) if sample == i)
        assert not torch.equal(views[0][first], views[0][second])


@pytest.mark.parametrize("weights", [(), (1, 3)])
def test_batches_are_the_same_for_every_number_of_ranks_and_after_a_resume(both, weights):
    whole = taken(open_loader(list(both), SMALL, batch=6, seed=1, weights=weights), epoch=2)
    assert len(whole) == 5
    for world in (2, 3):
        parts = [
            taken(open_loader(list(both), SMALL, batch=6, seed=1, weights=weights, rank=r, world=world), 2)
            for r in range(world)
        ]
        for step, (ids, views) in enumerate(whole):
            assert [i for part in parts for i in part[step][0]] == ids
            for v in range(2):
                assert torch.equal(torch.cat([part[step][1][v] for part in parts]), views[v])

    kept = taken(open_loader(list(both), SMALL, batch=6, seed=1, weights=weights, cache="ram"), epoch=2)
    assert [ids for ids, _ in kept] == [ids for ids, _ in whole]
    assert all(torch.equal(a[1][0], b[1][0]) for a, b in zip(kept, whole, strict=True))

    loader = open_loader(list(both), SMALL, batch=6, seed=1, weights=weights, rank=1, world=2)
    loader.set_epoch(2)
    batches = iter(loader)
    next(batches), next(batches)
    state = loader.state_dict()
    batches.close()
    other = open_loader(list(both), SMALL, batch=6, seed=1, weights=weights)
    other.load_state_dict(state)
    rest = [(b.sample_ids.tolist(), [view.clone() for view in b.views]) for b in other]
    assert [ids for ids, _ in rest] == [ids for ids, _ in whole[2:]]
    assert all(
        torch.equal(a, b)
        for x, y in zip(rest, whole[2:], strict=True)
        for a, b in zip(x[1], y[1], strict=True)
    )


def test_the_identity_tells_sets_order_of_sets_and_shares_apart(both):
    def identity(*parts, weights=()) -> str:
        return describe_run(MixedShardSet(parts, weights), SMALL, 4, 0, 0)["data_set"]

    one, two = both
    known = [
        identity(one, two),
        identity(two, one),
        identity(one, two, weights=(1, 3)),
        identity(one, two, weights=(1, 1)),
    ]
    assert len({*known, one.manifest.options_sha256, two.manifest.options_sha256}) == 6
    # The same shares are the same order.
    assert identity(one, two, weights=(2, 6)) == known[2]
    state = open_loader(list(both), SMALL, batch=4, weights=(1, 3)).state_dict()
    with pytest.raises(UserError, match="the data set was"):
        open_loader(list(both), SMALL, batch=4, weights=(1, 2)).load_state_dict(state)
    with pytest.raises(UserError, match="the data set was"):
        open_loader(one, SMALL, batch=4).load_state_dict(state)


def test_a_split_of_each_set(both):
    for part, name in zip(both, "pq", strict=True):
        split(part.folder, SplitRule(val=0.25), "third", overwrite=True)
        assert name
    cfg = DataConfig(shards=(str(both[0].folder), str(both[1].folder)), split="third/train", weights=(3, 1))
    mix = cfg.open()
    assert isinstance(mix, MixedShardSet)
    assert (len(mix), mix.num_samples, mix.split) == (24, 32, "third/train")
    assert mix.ids.tolist() == [*mix.parts[0].ids, *(mix.parts[1].ids + 20)]
    order = open_loader(mix, SMALL, batch=4, seed=1).order(0)
    assert set(order.tolist()) <= set(mix.ids.tolist())
    assert (order < 20).sum() == 18
    ids = [i for batch in eval_batches(list(both), SMALL, split="third/val") for i in batch.sample_ids]
    assert len(ids) == 8
    assert not set(ids) & set(mix.ids.tolist())


def test_one_folder_is_a_plain_set_with_its_own_identity(both):
    alone = DataConfig(shards=(str(both[0].folder),)).open()
    assert type(alone) is ShardSet
    assert describe_run(alone, SMALL, 4, 0, 0) == describe_run(both[0], SMALL, 4, 0, 0)


def deep(root: Path, name: str, array: np.ndarray) -> ShardSet:
    (root / name).mkdir(parents=True)
    np.save(root / name / "x.npy", array)
    np.save(root / name / "y.npy", array[::-1])
    convert(root / name, root / f"{name}-shards", workers=0)
    return ShardSet.open(root / f"{name}-shards")


def test_sets_that_do_not_go_together_are_refused_with_both_values(both, tmp_path: Path):
    one = both[0]
    bands = deep(tmp_path, "bands", np.random.default_rng(0).integers(0, 255, (8, 8, 4)).astype(np.uint8))
    wide = deep(tmp_path, "wide", np.random.default_rng(0).integers(0, 9999, (8, 8, 3)).astype(np.uint16))
    unit = deep(tmp_path, "unit", np.random.default_rng(0).random((8, 8, 3)).astype(np.float32))
    kelvin = deep(
        tmp_path, "kelvin", 200 + 90 * np.random.default_rng(0).random((8, 8, 3)).astype(np.float32)
    )
    for parts, message in (
        ((one, bands), "holds 3 channels and .*bands-shards' holds 4 channels"),
        ((one, wide), "holds uint8 and .*wide-shards' holds uint16"),
        ((unit, kelvin), r"floats from 0.0\d+ to 0.9\d+ .* and .* floats from 20\d[.\d]* to 28\d"),
        ((one, one), "is given twice"),
    ):
        with pytest.raises(UserError, match=message):
            MixedShardSet(parts)
    for weights, message in (
        ((1,), "has 1 number for 2 shard folders"),
        ((1, 0), "has 0, but a weight is a number above 0"),
        ((1, float("nan")), "has nan, but a weight"),
        ((1, 1e6), "1 of 1e[+]06 is less than one of the 32 samples"),
    ):
        with pytest.raises(UserError, match=message):
            MixedShardSet(both, weights)
    with pytest.raises(UserError, match="weights are for several shard folders, and there is 1"):
        open_loader(one.folder, SMALL, batch=4, weights=(1,))
    with pytest.raises(UserError, match=r"order blocks does not go with data\.weights"):
        open_loader(list(both), SMALL, batch=4, weights=(1, 2), order="blocks")
    remote = copy.copy(both[1])
    remote.near, remote.folder = object(), "s3://bucket/shards"
    with pytest.raises(UserError, match="'s3://bucket/shards' is remote, and several shard folders"):
        MixedShardSet([one, remote])


def test_joined_statistics_are_those_of_all_pixels():
    rng = np.random.default_rng(0)
    blocks = [
        rng.integers(0, 120, (4000, 3)).astype(np.uint8),
        rng.integers(60, 256, (4000, 3)).astype(np.uint8),
    ]
    parts, whole = [], Statistics()
    for block in blocks:
        own = Statistics()
        own.add(block)
        whole.add(block)
        parts.append((own.summary(), 10))
    joined, wanted = join_summaries(parts)["uint8/3"], whole.summary()["uint8/3"]
    assert joined["pixels"] == wanted["pixels"]
    for name in ("mean", "std"):
        assert joined[name] == pytest.approx(wanted[name], abs=2e-6)
    for percent in PERCENTILES:
        assert joined[f"p{percent}"] == pytest.approx(wanted[f"p{percent}"], abs=0.02)
    # A set counts by its images: 30 of the first to 10 of the second.
    thrice = Statistics()
    for block in (blocks[0], blocks[0], blocks[0], blocks[1]):
        thrice.add(block)
    weighted = join_summaries([(parts[0][0], 30), parts[1]])["uint8/3"]
    assert weighted["mean"] == pytest.approx(thrice.summary()["uint8/3"]["mean"], abs=2e-6)
    assert join_summaries([parts[0], parts[0]])["uint8/3"] | {"pixels": 0} == parts[0][0]["uint8/3"] | {
        "pixels": 0
    }
