"""The search for the largest chunk that fits, with a memory that is only pretended."""

import copy
from pathlib import Path

import pytest
import torch

from fastssl.core.distributed import Dist
from fastssl.core.optimizers import OptimConfig
from fastssl.methods import MoCoV3
from fastssl.methods.moco_v3 import MoCoV3Config as Config
from fastssl.pretraining.micro_batch import (
    GPUViews,
    TrialStep,
    choose_micro_batch,
    find_micro_batch,
    gpu_views,
    largest_that_fits,
)
from fastssl.pretraining.run_config import Resolved, load
from fastssl.pretraining.step import StepOptions
from pipelines.loading.chunk_slot import BlankViews
from pipelines.streaming.cache import decoded_sizes
from shards.dataset.order import epoch_order
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError
from tests.fastssl.tiny import Normed, make_method

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("count", "room", "found"), [(64, 100, 64), (64, 63, 32), (100, 13, 13), (100, 12, 7), (9, 2, 2)]
)
def test_the_first_of_the_halves_that_fits(count: int, room: int, found: int) -> None:
    tried = []

    def run(size: int) -> None:
        tried.append(size)
        if size > room:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    assert largest_that_fits(count, run) == found
    assert tried == sorted(set(tried), reverse=True)


def test_other_faults_are_not_taken_for_a_lack_of_memory() -> None:
    def run(size: int) -> None:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        largest_that_fits(8, run)


def test_a_lack_of_memory_in_other_words_is_one_too_and_is_told_at_the_end() -> None:
    tried = []

    def run(size: int) -> None:
        tried.append(size)
        raise RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear\nif you ...")

    with pytest.raises(
        UserError, match=r"memory \(cuDNN error: CUDNN_STATUS_NOT_SUPPORTED\. .*appear\): try "
    ):
        largest_that_fits(8, run)
    assert tried == [8, 4, 2]


def test_where_nothing_fits_the_ways_out_are_named() -> None:
    def run(size: int) -> None:
        raise torch.OutOfMemoryError

    with pytest.raises(UserError, match=r"Not even 2 images at a time fit .*--train.checkpointing blocks"):
        largest_that_fits(8, run)


def test_steps_are_tried_as_late_in_a_run_when_nothing_is_frozen_any_more() -> None:
    method, epochs = make_method(Normed()), []
    method.after_backward = lambda: epochs.append(method.clock.epoch)
    find_micro_batch(method, TrialStep(OptimConfig(), CPU, torch.float32, ((3, 4, 4),) * 2, 4))
    assert len(epochs) == 2
    assert min(epochs) > 10_000


@pytest.mark.parametrize("exact_heads", [False, True])
def test_trying_leaves_everything_as_it_was(exact_heads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    method = make_method(Normed(), Config(dim=5, hidden_dim=7, queue=32))
    before = copy.deepcopy(method.state_dict())
    student_features = MoCoV3.student_features
    sizes: list[int] = []

    def limited(self, views):
        sizes.append(len(views[0]))
        if sizes[-1] > 5:
            raise torch.OutOfMemoryError
        return student_features(self, views)

    monkeypatch.setattr(MoCoV3, "student_features", limited)
    options = StepOptions(exact_heads=exact_heads, clip_grad=1.0)
    trial = TrialStep(
        OptimConfig(), CPU, torch.float32, view_shapes=((3, 4, 4),) * 2, batch=16, options=options
    )
    found = find_micro_batch(method, trial)
    assert found == 4
    assert sizes[:2] == [16, 8]
    for name, value in method.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in method.parameters())
    assert method.queue is not None
    assert method.queue.count == 0


def views_of(shards: Path, *flags: str, share: int = 12) -> tuple[GPUViews | None, ShardSet, Resolved]:
    data = ShardSet.open(shards)
    settings = ["--recipe.size", "32", "--train.precision", "bf16", "--data.augment-on", "gpu", *flags]
    resolved = load(None, settings)
    return gpu_views(resolved, data, Dist(0, 1, 0, CPU), share), data, resolved


def test_views_come_from_the_host_where_the_cpu_or_another_engine_makes_them(shards: Path) -> None:
    assert views_of(shards, "--data.augment-on", "cpu")[0] is None
    assert views_of(shards, "--data.engine", "kornia")[0] is None
    _, _, resolved = views_of(shards)
    assert gpu_views(resolved, None, Dist(0, 1, 0, CPU), 12) is None


@pytest.mark.parametrize(
    ("flags", "in_chunks", "images", "views"),
    [
        ((), True, 0.0, 0),
        (("--data.cache", "gpu"), True, 0.0, 0),
        (("--data.decode", "gpu"), True, 3.0, 0),
        # Beside the batch's own images, which the trial has: 3 buffers that have grown by a quarter.
        ((), False, 3 * 1.25 - 1, 1),
        (("--data.cache", "gpu"), False, 0.0, 1),
        (("--data.decode", "gpu"), False, 3 * 1.25 - 1 + 3, 1),
    ],
)
def test_what_waits_on_the_device_is_counted(
    flags: tuple[str, ...], in_chunks: bool, images: float, views: int, shards: Path
) -> None:
    made, data, resolved = views_of(shards, *flags)
    assert made is not None
    ids = data.ids[epoch_order(len(data), resolved.config.train.seed, 0)[:12]]
    image_bytes = int(decoded_sizes(data, 3, ids).sum())
    assert made.views.num_samples == 12
    assert made.waiting_bytes(in_chunks) == int(images * image_bytes) + views * 2 * 12 * 3 * 32 * 32 * 2


@pytest.mark.parametrize("exact_heads", [False, True])
def test_a_trial_makes_its_views_as_the_run_will(
    exact_heads: bool, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunk by chunk, by the batched kernels, in the precision of the step; and beside what waits on the device."""
    made, *_ = views_of(shards, "--data.decode", "gpu")
    assert made is not None
    sizes, held, rows, empty = [], [], BlankViews.rows, torch.empty

    def noted(self, part):
        views = rows(self, part)
        assert {view.dtype for view in views} == {torch.bfloat16}
        sizes.append(len(views[0]))
        if sizes[-1] > 4:
            raise torch.OutOfMemoryError
        return views

    def taken(*shape, **more):
        held.extend(shape[:1] if more.get("dtype") is torch.uint8 and isinstance(shape[0], int) else [])
        return empty(*shape, **more)

    monkeypatch.setattr(BlankViews, "rows", noted)
    monkeypatch.setattr(torch, "empty", taken)
    trial = TrialStep(
        OptimConfig(),
        CPU,
        torch.bfloat16,
        view_shapes=((3, 32, 32),) * 2,
        batch=12,
        options=StepOptions(exact_heads=exact_heads),
        gpu_views=made,
    )
    found = find_micro_batch(make_method(Normed()), trial)
    assert found == 3
    assert sizes[:3] == [12, 6, 3]
    assert sizes[2:] == [3] * 4 * (3 if exact_heads else 2) * 2
    waiting = {in_chunks: made.waiting_bytes(in_chunks) for in_chunks in (False, True)}
    assert [n for n in held if n in waiting.values()] == [waiting[False], waiting[True], waiting[True]]


def test_a_batch_in_one_piece_has_the_next_one_s_views_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    held, empty = [], torch.empty

    def taken(*shape, **more):
        held.extend(shape[:1] if more.get("dtype") is torch.uint8 else [])
        return empty(*shape, **more)

    monkeypatch.setattr(torch, "empty", taken)

    def find(batch: int, room: int) -> int:
        def limited(self, views):
            if len(views[0]) > room:
                raise torch.OutOfMemoryError
            return features(self, views)

        features = MoCoV3.student_features
        with monkeypatch.context() as patch:
            patch.setattr(MoCoV3, "student_features", limited)
            trial = TrialStep(OptimConfig(), CPU, torch.float32, view_shapes=((3, 4, 4),) * 2, batch=batch)
            return find_micro_batch(make_method(Normed()), trial)

    assert find(8, 8) == 8
    assert held == [2 * 8 * 48 * 4]
    assert find(8, 4) == 4
    assert held[1:] == [2 * 8 * 48 * 4, 0]


def test_a_cpu_takes_the_whole_batch_and_says_so() -> None:
    resolved = load(None, ["--train.micro-batch", "auto"])
    here = Dist(rank=0, world=1, local_rank=0, device=CPU)

    def choose(asked: int | str) -> int:
        return choose_micro_batch(asked, make_method(Normed()), resolved, here, torch.float32)

    with pytest.warns(UserWarning, match="on a CPU it takes the whole batch at once"):
        assert choose("auto") == 0
    assert choose(64) == 64
    assert choose(1000) == 0  # more than the 256 of the batch: one chunk
    resolved = load(None, ["--train.compile", "True"])
    assert choose(64) == 64
    with pytest.warns(
        UserWarning, match="micro_batch 100 cuts 256 images into chunks of 85 and 86, .* a divisor"
    ):
        assert choose(100) == 100
