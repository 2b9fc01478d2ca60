"""The search for the largest chunk that fits, with a memory that is only pretended."""

import copy

import pytest
import torch

from fastssl.core.distributed import Dist
from fastssl.core.optimizers import OptimConfig
from fastssl.methods import MoCoV3
from fastssl.methods.moco_v3 import Config
from fastssl.pretraining.micro_batch import choose_micro_batch, find_micro_batch, largest_that_fits
from fastssl.pretraining.run_config import load
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


def test_where_nothing_fits_the_ways_out_are_named() -> None:
    def run(size: int) -> None:
        raise torch.OutOfMemoryError

    with pytest.raises(UserError, match=r"Not even 2 images at a time fit .*--train.checkpointing blocks"):
        largest_that_fits(8, run)


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
    found = find_micro_batch(
        method,
        OptimConfig(),
        CPU,
        torch.float32,
        view_shape=(3, 4, 4),
        batch=16,
        world=1,
        exact_heads=exact_heads,
        clip_grad=1.0,
    )
    assert found == 4
    assert sizes[:2] == [16, 8]
    for name, value in method.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in method.parameters())
    assert method.queue is not None
    assert method.queue.count == 0


def test_a_cpu_takes_the_whole_batch_and_says_so() -> None:
    resolved = load(None, ["--train.micro-batch", "auto"])
    here = Dist(rank=0, world=1, local_rank=0, device=CPU)

    def choose(asked: int | str) -> int:
        return choose_micro_batch(asked, make_method(Normed()), resolved, here, torch.float32, (3, 4, 4))

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
