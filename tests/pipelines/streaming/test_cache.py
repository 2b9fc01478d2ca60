"""Caches give the views that reading gives; and the batched path on CPU tensors, with and without its store."""

import numpy as np
import pytest
import torch

from pipelines.augment.recipe import RECIPES, Recipe
from pipelines.engines.engine_table import make_engine
from pipelines.loading.data_config import DataConfig
from pipelines.loading.evaluation_views import eval_batches, eval_cache
from pipelines.loading.gpu_slot import GpuStore
from pipelines.loading.loader import Loader, open_loader
from pipelines.loading.loader_options import LoaderOptions
from pipelines.loading.slots import gpu_slots
from pipelines.streaming import cache
from pipelines.streaming.bad_samples import BadSamples
from pipelines.streaming.cache import (
    DecodedCache,
    EncodedCache,
    Samples,
    Unreadable,
    decoded_sizes,
    fill_ahead,
    free_memory,
    open_samples,
)
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError

SMALL = Recipe(size=16)


def views(loader, epochs=2) -> list[torch.Tensor]:
    return [view.clone() for epoch in range(epochs) for batch in loader.epoch(epoch) for view in batch.views]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def batched(shards: ShardSet, *, store: bool, recipe: Recipe = SMALL, batch: int = 8) -> Loader:
    """The GPU's path on CPU tensors."""
    samples = Samples(shards, make_engine("fused", recipe).decode, 3)
    bad = BadSamples(shards, recipe, 0, 0.5, lambda line: None)
    options = LoaderOptions(threads=2, cache="gpu" if store else "none")
    slots = gpu_slots(samples, recipe, options)
    return Loader(samples, slots, recipe, bad, batch=batch, seed=0, options=options)


@pytest.fixture
def count_reads(monkeypatch) -> list[int]:
    """The ids of all samples that are read from their shards."""
    ids, read = [], ShardSet.read
    monkeypatch.setattr(ShardSet, "read", lambda self, i: (ids.append(i), read(self, i))[1])
    return ids


@pytest.mark.parametrize("engine", ["fused", "reference"])
def test_views_are_the_same_from_the_cache(shard_set, engine):
    def run(**how):
        return views(open_loader(shard_set, SMALL, batch=8, seed=0, engine=engine, threads=2, **how))

    encoded = (shard_set.sizes.sum() + 1) / 1e9
    plain = run()
    assert equal(plain, run(cache="ram"))
    assert equal(plain, run(cache="ram", cache_gb=encoded))


@pytest.mark.parametrize("kind", [DecodedCache, EncodedCache])
def test_a_second_epoch_reads_nothing_and_decoded_pixels_are_not_decoded_again(shard_set, count_reads, kind):
    decode, decoded = make_engine("fused", SMALL).decode, []
    held = kind(shard_set, lambda data: (decoded.append(1), decode(data))[1], 3)
    first = [held.pixels(i).copy() for i in range(41)]
    assert len(count_reads) == len(decoded) == 41
    assert all(np.array_equal(held.pixels(i), first[i]) for i in range(41))
    assert len(count_reads) == 41
    assert len(decoded) == (41 if kind is DecodedCache else 82)


@pytest.mark.parametrize("kind", [Samples, DecodedCache, EncodedCache])
def test_bytes_of_a_copy_that_was_removed_are_not_kept(shard_set, monkeypatch, kind):
    """Remote shards: the copy on this machine was damaged, and the next reading brings another."""
    read, whole = ShardSet.read, []
    junk = memoryview(bytes(int(shard_set.sizes[5])))
    monkeypatch.setattr(ShardSet, "read", lambda self, i: read(self, i) if whole else junk)
    monkeypatch.setattr(ShardSet, "mend", lambda self, i: not whole and not whole.append(i))
    decode = make_engine("fused", SMALL).decode
    held = kind(shard_set, decode, 3)
    for _ in range(2):
        np.testing.assert_array_equal(held.pixels(5), decode(read(shard_set, 5)))
    assert whole == [5]


def test_pixels_are_kept_where_they_fit_and_bytes_where_not(shard_set):
    decode = make_engine("fused", SMALL).decode
    decoded = int((shard_set.widths.astype(int) * shard_set.heights * 3).sum())
    encoded = int(shard_set.sizes.sum())
    assert encoded < decoded
    for allowed, kind, word in (
        (decoded, DecodedCache, "pixels"),
        (decoded - 1, EncodedCache, "encoded bytes"),
    ):
        samples = open_samples(shard_set, decode, 3, "ram", allowed / 1e9)
        assert type(samples) is kind
        assert f"so {word} are kept" in samples.note
        assert "41 images are 0.00 GB decoded" in samples.note
    with pytest.raises(
        UserError, match=r"data.cache ram: the 41 images are .* more than the 0.00 GB allowed"
    ):
        open_samples(shard_set, decode, 3, "ram", (encoded - 1) / 1e9)


def test_by_itself_the_cache_takes_a_share_of_the_free_memory(shard_set, monkeypatch):
    monkeypatch.setattr(cache, "free_memory", lambda: int(2 * shard_set.sizes.sum()) - 2)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    with pytest.raises(UserError, match=r"data.cache ram: the 41 images"):
        open_samples(shard_set, make_engine("fused", SMALL).decode, 3, "ram")
    monkeypatch.setattr(cache, "free_memory", lambda: int(8 * shard_set.sizes.sum()))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # a quarter of the half: just enough
    assert type(open_samples(shard_set, make_engine("fused", SMALL).decode, 3, "ram")) is EncodedCache


def test_free_memory_is_a_plausible_number():
    assert 1e6 < free_memory() < 1e14


def test_a_bad_sample_is_not_kept(shard_set, monkeypatch):
    samples = open_samples(shard_set, make_engine("fused", SMALL).decode, 3, "ram")
    read = ShardSet.read
    with monkeypatch.context() as patch:
        patch.setattr(ShardSet, "read", lambda self, i: memoryview(b"junk" * 8))
        with pytest.raises(Unreadable):
            samples.pixels(3)
    assert ShardSet.read is read
    assert samples.pixels(3).shape == (shard_set.heights[3], shard_set.widths[3], 3)


@pytest.mark.parametrize("preset", ["moco_v3", "satellite"])
def test_batched_views_are_near_those_of_the_cpu_kernels(shard_set, preset):
    recipe = RECIPES[preset]
    recipe = Recipe(**{**vars(recipe), "size": 24, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)})
    plain = views(open_loader(shard_set, recipe, batch=8, seed=0), 1)
    ours = views(batched(shard_set, store=False, recipe=recipe), 1)
    assert [v.shape for v in ours] == [v.shape for v in plain]
    errors = [(a - b).abs().mean().item() * 255 for a, b in zip(ours, plain, strict=True)]
    assert max(errors) < 1.0
    assert np.mean(errors) < 0.5


def test_the_store_gives_the_same_views_and_reads_each_image_once(shard_set, count_reads):
    plain = views(batched(shard_set, store=False), 3)
    before = len(count_reads)
    assert equal(plain, views(batched(shard_set, store=True), 3))
    # A batch whose images are on their way may be read again by the ones made ahead of it, but not once they are there.
    assert len(count_reads) - before <= 41 + 8


def test_batch_size_changes_no_batched_view(shard_set):
    whole, parts = (batched(shard_set, store=False, batch=batch) for batch in (40, 8))
    joined = [torch.cat([b.views[v].clone() for b in parts.epoch(1)]) for v in range(2)]
    assert equal(views_of(whole, 1), joined)


def views_of(loader: Loader, epoch: int) -> list[torch.Tensor]:
    [batch] = loader.epoch(epoch)
    return [view.clone() for view in batch.views]


def test_batched_views_of_two_sizes_with_erasing(shard_set):
    local = {"local_views": 2, "local_size": 8, "blur_p": (0.5,), "solarize_p": (0.2,)}
    recipe = Recipe(size=16, interpolation="bicubic", erase_p=0.5, erase_value="random", **local)
    [expected, *_] = open_loader(shard_set, recipe, batch=41, seed=0).epoch(0)
    [batch] = batched(shard_set, store=False, recipe=recipe, batch=41).epoch(0)
    assert [view.shape[-1] for view in batch.views] == [16, 16, 8, 8]
    for ours, theirs in zip(batch.views, expected.views, strict=True):
        assert (ours - theirs).abs().mean() * 255 * 0.226 < 0.5


@pytest.mark.parametrize("store", [False, True])
def test_stand_ins_of_other_sizes_in_batched_views(shard_set, monkeypatch, store):
    read = ShardSet.read
    bad = {0, 3, 9, 40}
    monkeypatch.setattr(
        ShardSet, "read", lambda self, i: memoryview(b"junk" * 8) if i in bad else read(self, i)
    )
    by_host = open_loader(shard_set, SMALL, batch=41, seed=0, max_bad_share=0.5, log=lambda line: None)
    [expected] = by_host.epoch(0)
    for epoch_again in range(2):
        loader = batched(shard_set, store=store, batch=41)
        [batch] = loader.epoch(0)
        assert batch.sample_ids.tolist() == expected.sample_ids.tolist()
        for ours, theirs in zip(batch.views, expected.views, strict=True):
            assert (ours - theirs).abs().amax(dim=(1, 2, 3)).max() < 0.2, epoch_again


def test_a_store_that_does_not_fit_is_refused(shard_set):
    samples = Samples(shard_set, make_engine("fused", SMALL).decode, 3)
    with pytest.raises(
        UserError, match=r"data.cache gpu: the 41 images are .* decoded, more than the 0.00 GB allowed"
    ):
        GpuStore(samples, torch.device("cpu"), cache_gb=1e-6)


def test_settings_that_need_a_gpu_are_refused_on_a_cpu(shard_set):
    with pytest.raises(UserError, match=r"data.cache gpu needs the views to be made on the GPU"):
        open_loader(shard_set, SMALL, batch=8, seed=0, cache="gpu")
    with pytest.raises(UserError, match=r"data.augment_on gpu needs"):
        open_loader(shard_set, SMALL, batch=8, seed=0, augment_on="gpu")


def test_the_section_gives_all_options_of_the_loader(shard_set):
    options = DataConfig(shards="x", threads=1, cache="ram", order="blocks", block_shards=2).options()
    assert not hasattr(options, "shards")
    loader = open_loader(shard_set, SMALL, batch=8, seed=0, options=options)
    assert loader.note.startswith("cache in RAM")
    for name, value in (("block_shards", 0), ("cache_gb", -1.0), ("max_bad_share", 2.0)):
        with pytest.raises(UserError, match=f"data.{name} is"):
            DataConfig(**{name: value})


@pytest.mark.parametrize("gb", ["decoded", "encoded"])
def test_a_cache_that_is_filled_ahead_reads_nothing_later(shard_set, count_reads, gb):
    allowed = 0 if gb == "decoded" else (shard_set.sizes.sum() + 1) / 1e9
    plain = views(open_loader(shard_set, SMALL, batch=8, seed=0, threads=2))
    count_reads.clear()
    loader, counts = (
        open_loader(shard_set, SMALL, batch=8, seed=0, threads=2, cache="ram", cache_gb=allowed),
        [],
    )
    assert (loader.samples.keeps, count_reads) == (gb, [])
    loader.fill_cache(lambda done, total: counts.append((done, total)))
    assert sorted(count_reads) == list(range(41))
    assert counts == sorted(counts)
    assert counts[-1] == (41, 41)
    assert equal(plain, views(loader))
    assert len(count_reads) == 41


def test_a_bad_sample_is_left_for_the_stream(shard_set, monkeypatch):
    read = ShardSet.read
    monkeypatch.setattr(
        ShardSet, "read", lambda self, i: memoryview(b"junk" * 8) if i == 7 else read(self, i)
    )
    lines: list[str] = []
    options = {"batch": 41, "seed": 0, "threads": 2, "max_bad_share": 0.5, "log": lines.append}
    [expected] = [batch.sample_ids.copy() for batch in open_loader(shard_set, SMALL, **options).epoch(0)]
    loader = open_loader(shard_set, SMALL, **options, cache="ram")
    lines.clear()
    loader.fill_cache()
    assert lines == []
    [found] = [batch.sample_ids.copy() for batch in loader.epoch(0)]
    assert found.tolist() == expected.tolist()
    assert 7 not in found
    assert len(lines) == 1


def test_what_does_not_fit_is_refused_with_both_numbers_before_anything_is_decoded(shard_set, monkeypatch):
    def decode(data):
        raise AssertionError("it was decoded")

    encoded, decoded = int(shard_set.sizes.sum()), int(decoded_sizes(shard_set, 3).sum())
    monkeypatch.setattr(cache, "GB", 1.0)
    monkeypatch.setattr(cache, "free_memory", lambda: encoded - 1)
    # What is asked for counts for no more than there is.
    for asked, allowed in ((0, (encoded - 1) / 2), (10**9, encoded - 1)):
        with pytest.raises(UserError) as refused:
            open_samples(shard_set, decode, 3, "ram", asked)
        text = str(refused.value)
        assert f"{decoded:.2f} GB decoded and {encoded:.2f} GB encoded" in text
        assert (
            f"more than the {allowed:.2f} GB allowed ({encoded - 1:.2f} GB are free on this machine" in text
        )
        assert "set --data.cache none" in text
        assert ("raise --data.cache-gb" in text) == (asked == 0)


def test_images_for_evaluation_are_kept_too(shard_set, count_reads):
    ids = np.array([3, 9, 12, 40])
    plain = [batch.views[0].clone() for batch in eval_batches(shard_set, SMALL, ids, batch=3)]
    kept = eval_cache(shard_set, SMALL, ids)
    assert kept.num_bytes == int(decoded_sizes(shard_set, 3, ids).sum())
    count_reads.clear()
    fill_ahead(kept, 2, ids=ids)
    for _ in range(2):
        again = [
            batch.views[0].clone() for batch in eval_batches(shard_set, SMALL, ids, batch=3, samples=kept)
        ]
        assert equal(plain, again)
    assert sorted(count_reads) == ids.tolist()
    # Beside another cache less is left, and in the end not even the bytes fit.
    encoded, decoded = int(shard_set.sizes[ids].sum()), kept.num_bytes
    for left, keeps in ((decoded, "decoded"), (decoded - 1, "encoded"), (encoded, "encoded")):
        assert eval_cache(shard_set, SMALL, ids, 1.0, taken=10**9 - left).keeps == keeps
    with pytest.raises(
        UserError, match=r"4 images for evaluation are .* allowed beside 1.00 GB of other caches"
    ):
        eval_cache(shard_set, SMALL, ids, 1.0, taken=10**9 - encoded + 1)
