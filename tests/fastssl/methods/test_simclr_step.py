"""A step of SimCLR: views that share BatchNorm's statistics, chunks, several processes against one."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastssl.core.distributed import Dist
from fastssl.methods import ViewPlan
from fastssl.methods.simclr import SimCLR
from fastssl.methods.simclr import SimCLRConfig as Config
from fastssl.models.backbones import build_backbone
from fastssl.models.model_config import ModelConfig
from fastssl.models.stochastic_depth import step_keys
from fastssl.pretraining.build import spread
from fastssl.pretraining.step import Step, StepOptions, tell_chunks
from tests.fastssl.methods.test_simclr import make
from tests.fastssl.pretraining.test_step import (
    CPU,
    chunks_alone,
    gradients,
    in_float64,
    large_views,
    largest_difference,
    make_step,
    take_steps,
)
from tests.fastssl.tiny import Normed, Plain, make_views
from tests.gloo import run_ranks


def make_vit(drop_path: float = 0.0) -> SimCLR:
    torch.manual_seed(0)
    return SimCLR(build_backbone(ModelConfig(backbone="test_vit", drop_path=drop_path), 32), Config(dim=8))


def without_norms(method: SimCLR) -> SimCLR:
    """The same with a head that has no batch statistics."""
    torch.manual_seed(3)
    method.projector = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    return method


# ---------------------------------------------------------------- views and BatchNorm


def test_both_views_share_a_forward_and_the_statistics_of_batchnorm() -> None:
    method = make(Normed())
    dark, bright = make_views()
    views = [0.1 * dark, 3 * bright]
    sizes: list[int] = []
    for part in (method.backbone, method.projector):
        part.register_forward_hook(lambda _m, args, _out: sizes.append(len(args[0])))
    together = method(views).loss
    assert sizes == [12, 12]
    apart = make(Normed())
    apart.plan = ViewPlan(teacher=())
    assert abs(apart(views).loss.item() - together.item()) > 1e-3


# ---------------------------------------------------------------- chunks

# 14 images in 1, 3 and 7 chunks.
SIZES = (14, 5, 2)


@pytest.mark.parametrize("size", SIZES)
def test_chunks_give_the_gradient_of_the_batch(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    method, views = make(Plain()), make_views(14)
    whole, told = gradients(method, views)
    parts, told_parts = gradients(method, views, micro_batch=size)
    assert largest_difference(parts, whole) < 1e-5
    assert told_parts == pytest.approx(told, rel=1e-5)
    in_float64(monkeypatch)
    method, views = method.double(), [view.double() for view in views]
    whole, told = gradients(method, views)
    parts, told_parts = gradients(method, views, micro_batch=size)
    assert largest_difference(parts, whole) < 1e-10
    assert told_parts == pytest.approx(told, rel=1e-10)


@pytest.mark.parametrize("size", SIZES)
def test_chunks_give_a_vit_with_random_depths_the_gradient_of_the_batch(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_float64(monkeypatch)
    views = [view.double() for view in large_views(14)]

    def found(step: int, **options: int) -> dict[str, Tensor]:
        method = make_vit(drop_path=0.5).double()
        make_step(method, **options).gradients(views, keys=step_keys(0, step, np.arange(14)))
        return {name: p.grad for name, p in method.named_parameters() if p.grad is not None}

    whole = found(3)
    assert largest_difference(found(3, micro_batch=size), whole) < 1e-10
    assert largest_difference(found(4, micro_batch=size), whole) > 1e-2


def test_a_chunk_by_itself_would_give_another_gradient() -> None:
    """What the gradient cache is worth."""
    method, views = without_norms(make(Plain())), make_views(10)
    whole, _ = gradients(method, views)
    assert largest_difference(chunks_alone(method, views), whole) > 0.05


def test_chunks_see_each_image_twice_and_the_head_the_whole_batch_once() -> None:
    method = make(Plain())
    seen: dict[str, list[int]] = {"backbone": [], "projector": []}
    for name, sizes in seen.items():
        method.get_submodule(name).register_forward_hook(
            lambda _m, args, _out, sizes=sizes: sizes.append(len(args[0]))
        )
    step = make_step(method, micro_batch=4)
    assert step.cached
    step.gradients(make_views(10))
    assert seen == {"backbone": [6, 6, 8] * 2, "projector": [20]}
    assert "heads" not in tell_chunks(make(Normed()), 10, 3, cached=True)


# ---------------------------------------------------------------- several processes

SHARE, NUM_STEPS = 5, 2


def _rank_steps(here: Dist, micro_batch: int) -> dict:
    method = without_norms(make(Plain()))
    mine = slice(here.rank * SHARE, (here.rank + 1) * SHARE)
    views_of = [
        [view[mine] for view in make_views(SHARE * here.world, seed=step)] for step in range(NUM_STEPS)
    ]
    model = spread(method, here)
    assert isinstance(model, DistributedDataParallel)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
    return take_steps(method, Step(method, model, optimizer, CPU, options=StepOptions(micro_batch)), views_of)


@pytest.mark.parametrize(("num_ranks", "micro_batch"), [(2, 0), (2, 3), (3, 2)])
def test_ranks_equal_one_process_on_the_whole_batch(num_ranks: int, micro_batch: int) -> None:
    """Negatives of other ranks, and the gradient that others' losses have for this rank's images."""
    found = run_ranks(_rank_steps, micro_batch, world=num_ranks)
    alone = without_norms(make(Plain()))
    views_of = [make_views(SHARE * num_ranks, seed=step) for step in range(NUM_STEPS)]
    expected = take_steps(alone, make_step(alone), views_of)
    for rank in found:
        for step in range(NUM_STEPS):
            assert largest_difference(rank["grads"][step], expected["grads"][step]) < 1e-4
            for name in ("loss", "ce", "ce_norm", "acc"):
                assert rank["metrics"][step][name] == pytest.approx(expected["metrics"][step][name], rel=1e-5)
        for name, value in expected["state"].items():
            torch.testing.assert_close(rank["state"][name], value, msg=name)
            assert torch.equal(rank["state"][name], found[0]["state"][name]), name
