"""A batch whose views are made chunk by chunk: gradients, what is alive when, whole runs. The batched kernels run on a CPU here."""

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fastssl.methods import MoCoV3
from fastssl.methods.moco_v3 import MoCoV3Config as Config
from fastssl.models.backbones import build_backbone
from fastssl.models.model_config import ModelConfig
from fastssl.pretraining.replay import Replay, replay
from fastssl.pretraining.run import train
from fastssl.pretraining.step import DDPWrapper, Step, StepOptions, chunks
from pipelines.augment.draws import draw
from pipelines.augment.recipe import RECIPES, Recipe
from pipelines.engines.engine_table import make_engine
from pipelines.loading import loader as loading
from pipelines.loading.loader import Loader
from pipelines.loading.loader_options import LoaderOptions
from pipelines.loading.slots import gpu_slots
from pipelines.streaming.batch import BatchRequest
from pipelines.streaming.cache import Samples
from pipelines.streaming.lazy_views import LazyViews
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError
from tests.fastssl.pretraining.test_resume import resume_after_crashes
from tests.fastssl.runs import STEPS, TINY_VIT, assert_same_end, newest, resolve
from tests.fastssl.tiny import Plain, make_method, make_views
from tests.streams import FakeStream, Log, pretend_streams

CPU = torch.device("cpu")
RECIPE = Recipe(**{**vars(RECIPES["moco_v3"]), "size": 32})


def vit() -> MoCoV3:
    torch.manual_seed(0)
    backbone = build_backbone(ModelConfig(backbone="test_vit", drop_path=0.3), 32)
    return MoCoV3(backbone, Config(dim=8, hidden_dim=16))


def make_step(method: MoCoV3, **options) -> Step:
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
    return Step(method, DDPWrapper(method), optimizer, CPU, options=StepOptions(**options))


def batch_views(shards: Path, num: int, in_chunks: bool):
    """The slot of a batch, which holds its images, and its views."""
    data = ShardSet.open(shards)
    ids = np.arange(num)
    job = BatchRequest(ids, draw(RECIPE, 0, 0, ids, data.widths[ids], data.heights[ids]))
    samples = Samples(data, make_engine("fused", RECIPE).decode, 3)
    slot = gpu_slots(samples, RECIPE, LoaderOptions())(in_chunks=in_chunks)[0]
    slot.begin(job)
    for i in range(num):
        slot.fill(i, i, job.draws[:, i])
    slot.launch()
    return slot, slot.views()


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("exact_heads", [False, True])
@pytest.mark.parametrize("micro_batch", [4, 5, 10])
def test_gradients_are_those_of_views_made_at_once_and_cut(shards: Path, exact_heads: bool, micro_batch: int):
    """In every bit, since the views are."""
    whole, lazy = (batch_views(shards, 10, in_chunks) for in_chunks in (False, True))
    assert isinstance(lazy[1], LazyViews)
    assert isinstance(whole[1], list)
    found = []
    for views in (whole[1], lazy[1], lazy[1]):
        method = vit()
        step = make_step(method, micro_batch=micro_batch, exact_heads=exact_heads)
        metrics = step.gradients(views, torch.manual_seed)
        found.append({**metrics, **{n: p.grad for n, p in method.named_parameters() if p.grad is not None}})
    expected, *others = found
    assert len(expected) > 20
    for other in others:
        assert other.keys() == expected.keys()
        assert all(torch.equal(other[name], value) for name, value in expected.items())


# ---------------------------------------------------------------- what is made when


class Counted(LazyViews):
    """Views that are copies of others, and a note of those that are alive."""

    def __init__(self, views: list[Tensor], say: Callable[[str], None] = lambda line: None) -> None:
        self._views, self._say = views, say
        self.num_samples, self.num_views = len(views[0]), len(views)
        self.asked: list[slice] = []
        self.most = 0
        self._known: list[tuple[StorageWeakRef, int]] = []

    def rows(self, part: slice) -> list[Tensor]:
        self._say("made")
        self.asked.append(part)
        made = [view[part].clone() for view in self._views]
        self._known += [(StorageWeakRef(view.untyped_storage()), view.nbytes) for view in made]
        self.most = max(self.most, self.alive())
        return made

    def alive(self) -> int:
        return sum(count for storage, count in self._known if not storage.expired())


@pytest.mark.parametrize(("exact_heads", "passes"), [(False, 2), (True, 3)])
def test_every_pass_asks_for_the_same_chunks_and_holds_one(exact_heads: bool, passes: int):
    views = Counted(make_views(12))
    make_step(make_method(Plain()), micro_batch=3, exact_heads=exact_heads).gradients(views)
    assert views.asked == chunks(12, 3) * passes
    assert views.most == 2 * 3 * 3 * 4 * 4 * 4  # two views of 3 images
    assert views.alive() == 0


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    return pretend_streams(monkeypatch)


@pytest.mark.parametrize("exact_heads", [False, True])
@pytest.mark.parametrize("micro_batch", [2, 3, 12])
def test_a_gpu_makes_a_chunk_ahead_on_a_stream_of_its_own_and_holds_two(
    log: Log, micro_batch: int, exact_heads: bool
):
    method = make_method(Plain())
    expected = copy.deepcopy(method)
    views = Counted(make_views(12), log.add)
    step = make_step(method, micro_batch=micro_batch, exact_heads=exact_heads)
    step._copies = FakeStream(log, "copies")  # type: ignore[assignment]
    for backbone in method.backbones():
        backbone.register_forward_pre_hook(lambda _module, _images: log.add("computed"))
    step.gradients(views)
    assert {where for what, where in log.lines if what == "made"} == {"copies"}
    assert {where for what, where in log.lines if what == "computed"} == {"compute"}
    chunk_bytes = 2 * micro_batch * 3 * 4 * 4 * 4
    assert views.most == chunk_bytes * min(2, 12 // micro_batch)
    assert views.alive() == 0
    made = ready = used = 0
    for what, _ in log.lines:
        made += what == "made"
        # An event each, recorded after a chunk is made and waited for before it is used.
        ready += what == "wait for copies"
        used += what == "computed"
        assert (used + 1) // 2 <= ready <= made  # a chunk is two views, each with a forward of its own
        assert made <= ready + 2
    assert (made, ready) == (len(views.asked), len(views.asked))
    assert log.kinds().count("record") == made
    assert log.lines.count(("in use by", "compute")) == 2 * made
    # The second is made before the first is computed with.
    if micro_batch < 12:
        assert log.kinds()[: log.kinds().index("computed")].count("made") == 2
    make_step(expected, micro_batch=micro_batch, exact_heads=exact_heads).gradients(make_views(12))
    for p, q in zip(method.parameters(), expected.parameters(), strict=True):
        assert p.grad is None if q.grad is None else torch.equal(p.grad, q.grad)  # type: ignore[arg-type]


# ---------------------------------------------------------------- runs


@pytest.fixture
def views_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Loaders make views as a GPU does; the sizes of the chunks that were asked for."""
    asked: list[int] = []

    def open_slots(shards, recipe, batch, options):
        samples = Samples(shards, make_engine(options.engine, recipe).decode, 3)
        return samples, gpu_slots(samples, recipe, options)

    from pipelines.loading.chunk_slot import ChunkSlot

    chunk = ChunkSlot.chunk
    monkeypatch.setattr(loading, "open_slots", open_slots)
    monkeypatch.setattr(
        ChunkSlot, "chunk", lambda self, part: (asked.append(part.stop - part.start), chunk(self, part))[1]
    )
    return asked


CHANGES = {"train": {"micro_batch": 3, "exact_heads": True, "channels_last": False}}
CACHED = {"data": {"cache": "gpu"}}


@pytest.mark.parametrize("cache", [{}, CACHED], ids=["images on the host", "cache"])
def test_a_run_is_that_of_whole_batches_and_resumes_with_the_same_bits(
    cache: dict, shards: Path, tmp_path: Path, views_of_a_gpu: list[int], monkeypatch: pytest.MonkeyPatch
):
    changes = (TINY_VIT, CHANGES, cache)
    with monkeypatch.context() as patch:
        patch.setattr(Loader, "in_chunks", lambda self: self)
        train(resolve(shards, tmp_path / "expected", *changes))
    assert not views_of_a_gpu
    resume_after_crashes(resolve(shards, tmp_path / "run", *changes), (2, STEPS + 3))
    assert set(views_of_a_gpu) == {2, 3}
    assert len(views_of_a_gpu) >= 2 * STEPS * 3 * 3
    assert_same_end(tmp_path / "run", tmp_path / "expected")


def test_a_batch_in_one_piece_is_made_at_once(shards: Path, tmp_path: Path, views_of_a_gpu: list[int]):
    train(resolve(shards, tmp_path / "run", TINY_VIT, {"train": {"micro_batch": 8, "epochs": 1}}))
    assert not views_of_a_gpu
    assert newest(tmp_path / "run")["step"] == STEPS


def test_a_replay_makes_its_views_in_chunks(
    shards: Path, tmp_path: Path, views_of_a_gpu: list[int], monkeypatch: pytest.MonkeyPatch
):
    steps, bad = Loader.steps, STEPS + 2

    class Spoiled(LazyViews):
        def __init__(self, views: LazyViews) -> None:
            self._views, self.num_samples, self.num_views = views, views.num_samples, views.num_views

        def rows(self, part: slice) -> list[Tensor]:
            views = self._views.rows(part)
            if part.start <= 4 < part.stop:
                views[1][4 - part.start, 1, 2, 2] = float("nan")
            return views

    def spoiled(self, start, stop):
        with contextlib.closing(steps(self, start, stop)) as batches:
            for step, batch in enumerate(batches, start + 1):
                if step == bad:
                    vars(batch)["views"] = Spoiled(batch.views)
                yield batch

    run = resolve(shards, tmp_path / "run", TINY_VIT, CHANGES)
    with monkeypatch.context() as patch:
        patch.setattr(Loader, "steps", spoiled)
        with pytest.raises(UserError, match=f"at step {bad}, replay it"):
            train(run)
        path = str(tmp_path / "run" / f"nonfinite-step-{bad:09d}.pt")
        views_of_a_gpu.clear()
        lines = replay(Replay(path, device="cpu"))
        assert set(views_of_a_gpu) == {2, 3}
        assert "views      not finite: view 1" in lines
    views_of_a_gpu.clear()
    # The pixel was ours: done again, all is finite.
    lines = replay(Replay(path, device="cpu", micro_batch=4))
    assert set(views_of_a_gpu) == {4}
    assert "views      finite" in lines
    assert lines[-1].startswith("The step is finite when repeated")
    assert not any(line.startswith("note") for line in lines)
