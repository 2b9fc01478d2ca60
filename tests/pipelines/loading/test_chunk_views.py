"""Views made chunk by chunk: the same bits as a whole batch's, in the memory of a chunk."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from pipelines.augment.channels import fit_recipe
from pipelines.augment.draws import draw
from pipelines.augment.recipe import RECIPES, Recipe
from pipelines.engines.engine_table import make_engine
from pipelines.kernels import batched_views
from pipelines.kernels.batched_views import BatchedViews
from pipelines.kernels.torch_kernels import Form
from pipelines.loading.chunk_slot import BlankViews, ChunkBuffer, ChunkSlot
from pipelines.loading.gpu_decode import DeviceDecoding
from pipelines.loading.gpu_slot import GpuSlot, GpuStore
from pipelines.loading.loader import Loader, open_loader
from pipelines.loading.loader_options import LoaderOptions
from pipelines.loading.mask_slot import with_masks
from pipelines.loading.slots import gpu_slots, whole_only
from pipelines.streaming.bad_samples import BadSamples
from pipelines.streaming.batch import BatchRequest
from pipelines.streaming.batch_stream import SLOTS
from pipelines.streaming.cache import Samples, Unreadable, decoded_sizes, open_samples
from pipelines.streaming.lazy_views import LazyViews, count_samples, rows_of
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError

CPU = torch.device("cpu")
RECIPE = Recipe(
    **{
        **vars(RECIPES["satellite"]),
        "size": 16,
        "local_views": 1,
        "local_size": 8,
        "blur_p": (0.5,),
        "solarize_p": (0.2,),
        "channel_drop_p": 0.3,
    }
)
PARTS = [slice(0, 3), slice(3, 7), slice(7, 10)]


def job(shards: ShardSet, *ids: int) -> BatchRequest:
    chosen = np.array(ids)
    return BatchRequest(chosen, draw(RECIPE, 0, 0, chosen, shards.widths[chosen], shards.heights[chosen]))


def samples_of(shards: ShardSet) -> Samples:
    return Samples(shards, make_engine("fused", RECIPE).decode, 3)


def fill(slot: GpuSlot, work: BatchRequest) -> None:
    slot.begin(work)
    for i, sample_id in enumerate(work.ids):
        slot.fill(i, int(sample_id), work.draws[:, i])
    for i in slot.complete():
        slot.fill(i, int(work.ids[i]), work.draws[:, i])
    slot.launch()


def whole(shards: ShardSet, work: BatchRequest) -> list[torch.Tensor]:
    """The views of a batch made at once."""
    slot = GpuSlot(samples_of(shards), RECIPE, CPU)
    fill(slot, work)
    return list(slot.views())


def assert_chunks(views, expected: list[torch.Tensor], parts: list[slice] = PARTS) -> None:
    assert isinstance(views, LazyViews)
    for part in parts:
        for made, view in zip(views.rows(part), expected, strict=True):
            assert torch.equal(made, view[part])


def some_decoder(refused: set[int]):
    """A device's decoder, which leaves every place in `refused` to the CPU."""

    def decode(encoded, stream):
        made = [make_engine("fused", RECIPE).decode(memoryview(data)) for data in encoded]
        return [None if i in refused else torch.from_numpy(x) for i, x in enumerate(made)]

    return decode


# ---------------------------------------------------------------- bits


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("refused", [None, set(), {1, 4, 5}, set(range(10))], ids=str)
def test_chunks_are_the_whole_batch_cut_each_time_they_are_made(shard_set, cached, refused):
    samples = samples_of(shard_set)
    store = GpuStore(samples, CPU) if cached else None
    decoding = None if refused is None else DeviceDecoding(some_decoder(refused))  # type: ignore[arg-type]
    slot = ChunkSlot(ChunkBuffer(CPU, False), samples, RECIPE, CPU, None, store, decoding=decoding)
    for ids in (range(10), range(5, 15), range(10)):
        work = job(shard_set, *ids)
        fill(slot, work)
        views, expected = slot.views(), whole(shard_set, work)
        assert (count_samples(views), len(views)) == (10, 3)
        assert_chunks(views, expected)
        assert_chunks(views, expected, [*reversed(PARTS), slice(0, 10), slice(4, 5)])
        # As a list of views it is the whole batch.
        assert torch.equal(views[1], expected[1])
        assert all(torch.equal(a, b) for a, b in zip(views, expected, strict=True))
        slot.done()


def test_rows_of_a_list_are_where_they_lie():
    views = [torch.arange(6).view(6, 1), torch.arange(6, 12).view(6, 1)]
    assert count_samples(views) == 6
    parts = rows_of(views, slice(2, 4))
    assert [part.flatten().tolist() for part in parts] == [[2, 3], [8, 9]]
    assert parts[0].data_ptr() == views[0][2:].data_ptr()


def test_a_stand_in_that_is_larger_is_in_its_chunk(shard_set):
    """It lies behind all others, and leaves a gap."""
    slot = ChunkSlot(ChunkBuffer(CPU, False), samples_of(shard_set), RECIPE, CPU)
    work, other = job(shard_set, *range(10)), job(shard_set, 0, 1, 40, 3, 4, 39, 6, 7, 8, 9)
    slot.begin(work)
    for i in reversed(range(10)):
        slot.fill(i, int(other.ids[i]), other.draws[:, i])
    slot.launch()
    assert_chunks(slot.views(), whole(shard_set, other), [*PARTS, slice(2, 3), slice(5, 6)])


def test_views_of_a_batch_that_was_given_back_are_refused(shard_set):
    """Its images are overwritten: they would be those of another batch."""
    slots = gpu_slots(samples_of(shard_set), RECIPE, LoaderOptions())
    made = loader(shard_set, slots).in_chunks()
    batches = made.steps(0, 3)
    first = next(batches)
    first.views.rows(slice(0, 2))
    next(batches)
    with pytest.raises(RuntimeError, match="after the next batch"):
        first.views.rows(slice(0, 2))
    batches.close()


def loader(shards: ShardSet, slots, samples: Samples | None = None, batch: int = 10, **more) -> Loader:
    bad = BadSamples(shards, RECIPE, 3, 0.5, lambda line: None)
    options = LoaderOptions(threads=2, **more)
    return Loader(samples or samples_of(shards), slots, RECIPE, bad, batch=batch, seed=3, options=options)


@pytest.mark.parametrize("cached", [False, True])
def test_a_stream_in_chunks_is_that_of_whole_batches(shard_set, cached, monkeypatch):
    """Over two epochs, with bad samples and stand-ins for them, from any step on, and with masks."""
    pixels = Samples.pixels

    def damaged(self, sample_id):
        if sample_id % 7 == 2:
            raise Unreadable("damaged for the test")
        return pixels(self, sample_id)

    monkeypatch.setattr(Samples, "pixels", damaged)
    samples = samples_of(shard_set)
    expected = loader(
        shard_set, gpu_slots(samples, RECIPE, LoaderOptions(cache="gpu" if cached else "none")), samples
    )
    kept = [([view.clone() for view in b.views], b.sample_ids, b.replaced) for b in expected.steps(0, 8)]
    assert sum(replaced for _, _, replaced in kept) > 4
    made = loader(
        shard_set, gpu_slots(samples, RECIPE, LoaderOptions(cache="gpu" if cached else "none")), samples
    ).in_chunks()
    for start in (0, 3):
        for batch, (views, ids, replaced) in zip(made.steps(start, 8), kept[start:], strict=True):
            assert batch.sample_ids.tolist() == ids.tolist()
            assert batch.replaced == replaced
            for part in (*PARTS, *PARTS):
                pairs = zip(batch.views.rows(part), views, strict=True)
                assert all(torch.equal(rows, view[part]) for rows, view in pairs)


def test_masks_come_beside_views_in_chunks(shard_set):
    class Half:
        """Masks of one class for every other sample."""

        def mask(self, sample_id):
            shape = int(shard_set.heights[sample_id]), int(shard_set.widths[sample_id])
            return np.full(shape, 5, dtype=np.uint8) if sample_id % 2 else None

        fill = mask

    from pipelines.loading import mask_slot

    def of(in_chunks: bool):
        samples = samples_of(shard_set)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mask_slot, "Masks", lambda *args: Half())
            slots = with_masks(
                gpu_slots(samples, RECIPE, LoaderOptions()), samples, [16, 16, 8], 10, LoaderOptions()
            )
            made = loader(shard_set, slots, samples)
            made = made.in_chunks() if in_chunks else made
            return [[mask.clone() for mask in batch.masks] for batch in made.epoch(0)]

    for a, b in zip(of(False), of(True), strict=True):
        assert len(a) == 3
        assert {5, 255} <= set(a[0].unique().tolist())
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_an_engine_that_makes_whole_batches_on_a_gpu_is_refused_in_chunks(shard_set):
    for engine, place in (("fused", "gpu"), ("kornia", "cpu"), ("dali", "cpu")):
        assert whole_only(LoaderOptions(engine=engine, augment_on=place)) == ""  # type: ignore[arg-type]
    made = loader(shard_set, lambda **how: [], engine="kornia", augment_on="gpu")
    with pytest.raises(UserError, match=r"--data.engine kornia .* train.micro_batch .* --data.engine fused"):
        made.in_chunks()
    # A batch in one piece is another matter.
    assert made.steps(0, 0) is not None


def test_views_of_the_cpu_in_chunks_are_as_ever(shard_set):
    made = open_loader(shard_set, RECIPE, batch=8, seed=0)
    for a, b in zip(made.epoch(0), made.in_chunks().epoch(0), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))


# ---------------------------------------------------------------- memory


class Alive:
    """Bytes of views that are alive, and the most at any time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.known: list[tuple[StorageWeakRef, int]] = []
        self.most = 0
        make = batched_views.BatchedViews._views

        def counted(maker, *args):
            views = make(maker, *args)
            storages = {view.untyped_storage()._cdata: view.untyped_storage() for view in views}
            self.known += [(StorageWeakRef(storage), storage.nbytes()) for storage in storages.values()]
            self.most = max(self.most, self.now())
            return views

        monkeypatch.setattr(batched_views.BatchedViews, "_views", counted)

    def now(self) -> int:
        return sum(count for storage, count in self.known if not storage.expired())


def view_bytes(count: int) -> int:
    return count * 3 * 4 * (2 * 16 * 16 + 8 * 8)


def test_memory_is_that_of_the_images_and_of_a_chunk_of_views(shard_set, monkeypatch):
    alive, taken = Alive(monkeypatch), []
    memory = GpuSlot._memory
    monkeypatch.setattr(GpuSlot, "_memory", lambda self, n: (taken.append((id(self), n)), memory(self, n))[1])
    samples = samples_of(shard_set)
    made = loader(shard_set, gpu_slots(samples, RECIPE, LoaderOptions()), samples, batch=40).in_chunks()
    largest = 0
    for batch in made.steps(0, 5):
        largest = max(largest, int(decoded_sizes(shard_set, 3, batch.sample_ids).sum()))
        for _ in range(2):
            for start in range(0, 40, 4):
                rows = batch.views.rows(slice(start, start + 4))
                assert [len(view) for view in rows] == [4] * 3
                del rows
    # One chunk, of ten.
    assert alive.most == view_bytes(4)
    assert alive.now() == 0
    held = dict(taken)
    assert len(held) == SLOTS
    assert max(held.values()) <= largest * 5 // 4
    # Beside 41 images of about 3,700 bytes the views would be ten times as much.
    assert largest < view_bytes(40)
    whole_batches = loader(shard_set, gpu_slots(samples, RECIPE, LoaderOptions()), samples, batch=40)
    next(whole_batches.steps(0, 5))
    assert alive.most >= view_bytes(40)


def test_a_device_holds_the_images_of_one_chunk(shard_set):
    buffer = ChunkBuffer(CPU, False)
    slot = ChunkSlot(buffer, samples_of(shard_set), RECIPE, CPU)
    fill(slot, job(shard_set, *range(40)))
    views = slot.views()
    for a, b in itertools.pairwise(range(0, 41, 4)):
        views.rows(slice(a, b))
    sizes = decoded_sizes(shard_set, 3, np.arange(40)).reshape(10, 4).sum(axis=1)
    assert sizes.max() <= len(buffer._pixels) <= sizes.max() * 5 // 4
    assert len(slot._pixels) == 0


@pytest.mark.parametrize("cached", [False, True])
def test_blank_views_are_made_as_real_ones_and_the_largest_come_first(shard_set, cached, monkeypatch):
    seen, make = [], BatchedViews.__call__

    def noted(self, pixels, first_bytes, widths, draws, types):
        seen.append((len(pixels), first_bytes, widths))
        return make(self, pixels, first_bytes, widths, draws, types)

    monkeypatch.setattr(BatchedViews, "__call__", noted)
    ids, form = np.arange(5, 25), Form(torch.bfloat16, channels_last=True)
    blank = BlankViews(shard_set, RECIPE, ids, CPU, form=form, cached=cached)
    sizes = np.sort(decoded_sizes(shard_set, 3, ids))[::-1]
    assert blank.image_bytes == sizes.sum()
    views = blank.rows(slice(0, 8))
    assert [tuple(view.shape) for view in views] == [(8, 3, 16, 16)] * 2 + [(8, 3, 8, 8)]
    assert {view.dtype for view in views} == {torch.bfloat16}
    blank.rows(slice(8, 20))
    assert [count for count, _, _ in seen] == (
        [sizes[0], sizes[8]] if cached else [sizes[:8].sum(), sizes[8:].sum()]
    )
    assert seen[0][1].tolist() == ([0] * 8 if cached else (np.cumsum(sizes[:8]) - sizes[:8]).tolist())
    assert len(views) == 3


@pytest.mark.parametrize("store", [False, True])
@pytest.mark.parametrize("name", ["tiles", "photos"])
def test_chunks_of_any_type_of_image_are_the_whole_batch_cut(name, store):
    """Tiles of five bands of 16 bits; photographs with gray ones among them. The types go with their images."""
    shards = ShardSet.open(Path(__file__).parents[2] / "golden" / "shards" / name)
    recipe = fit_recipe(
        dataclasses.replace(RECIPES["multispectral"], size=16),
        shards,
        "percentiles" if name == "tiles" else "type",
    )
    samples = open_samples(shards, make_engine("fused", recipe).decode, len(recipe.mean))
    ids = np.arange(6)[::-1].copy()
    work = BatchRequest(ids, draw(recipe, 0, 0, ids, shards.widths[ids], shards.heights[ids]))
    made = []
    for in_chunks in (False, True):
        kept = GpuStore(samples, CPU) if store else None
        more = (samples, recipe, CPU, None, kept)
        slot = ChunkSlot(ChunkBuffer(CPU, False), *more) if in_chunks else GpuSlot(*more)
        fill(slot, work)
        made.append(slot.views())
    whole_batch, chunks = made
    assert whole_batch[0].shape[1] == (5 if name == "tiles" else 3)
    assert_chunks(chunks, list(whole_batch), [slice(0, 2), slice(2, 3), slice(3, 6)])


def test_a_trial_counts_images_of_16_bits():
    shards = ShardSet.open(Path(__file__).parents[2] / "golden" / "shards" / "tiles")
    recipe = fit_recipe(dataclasses.replace(RECIPES["multispectral"], size=16), shards, "percentiles")
    blank = BlankViews(shards, recipe, np.arange(4), CPU)
    assert blank.image_bytes == 4 * 24 * 20 * 5 * 2
    assert [view.shape for view in blank.rows(slice(1, 3))] == [(2, 5, 16, 16)] * 2
