"""BatchNorm in groups: a batch in chunks, or over ranks, has the very gradients and statistics of the undivided batch."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from fastssl.core.distributed import Dist
from fastssl.methods import MoCoV3, ViewPlan
from fastssl.methods.moco_v3 import MoCoV3Config
from fastssl.models.grouped_batch_norm import (
    GroupedBatchNorm,
    average_statistics,
    deal_groups,
    group_batch_norm,
)
from fastssl.models.model_config import ModelConfig
from fastssl.pretraining import run_config
from fastssl.pretraining.build import build_method, check_groups, spread
from fastssl.pretraining.step import Step, StepOptions, chunks, tell_chunks
from shards.errors import UserError
from tests.fastssl.pretraining.test_step import CPU, in_float64, largest_difference, make_step
from tests.fastssl.tiny import Normed, make_method, make_views
from tests.gloo import run_ranks

GROUP, NUM = 4, 28  # seven groups


def grouped(together: bool) -> MoCoV3:
    method = make_method(Normed(), MoCoV3Config(dim=5, hidden_dim=7))
    group_batch_norm(method, GROUP)
    method.plan = ViewPlan(together=together)
    return method


def stepped(
    method: MoCoV3, views: list[Tensor], group: int = GROUP, **options: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of a step on a copy of the method, and its buffers after the step."""
    method = copy.deepcopy(method)
    step = make_step(method, group=group, **options)
    step.gradients(views)
    grads = {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}
    step.update(1.0)
    return grads, dict(method.named_buffers())


@pytest.mark.parametrize(
    ("count", "size", "sizes"),
    [(28, 0, [28]), (28, 4, [4] * 7), (28, 11, [4, 8, 8, 8]), (28, 12, [8, 8, 12]), (28, 3, [4] * 7)],
)
def test_chunks_hold_whole_groups(count: int, size: int, sizes: list[int]) -> None:
    assert sorted(part.stop - part.start for part in chunks(count, size, GROUP)) == sizes


@pytest.mark.parametrize("exact_heads", [False, True])
@pytest.mark.parametrize("together", [False, True])
def test_one_three_and_seven_chunks_are_one_batch(
    together: bool, exact_heads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_float64(monkeypatch)
    method, views = grouped(together).double(), [view.double() for view in make_views(NUM)]
    whole, buffers = stepped(method, views)
    for micro_batch, num in ((12, 3), (GROUP, 7)):
        assert len(chunks(NUM, micro_batch, GROUP)) == num
        found, after = stepped(method, views, micro_batch=micro_batch, exact_heads=exact_heads)
        assert largest_difference(found, whole) < 1e-10
        for name, buffer in buffers.items():
            torch.testing.assert_close(after[name], buffer, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("size", [96, 32])
def test_in_float32_too(size: int) -> None:
    """Groups as large as in use."""
    method, views = make_method(Normed(), MoCoV3Config(dim=5, hidden_dim=7)), make_views(7 * 32)
    group_batch_norm(method, 32)
    found = []
    for micro_batch in (0, size):
        step = make_step(copy.deepcopy(method), group=32, micro_batch=micro_batch)
        step.gradients(views)
        grads = [p.grad.flatten() for p in step.method.parameters() if p.grad is not None]
        found.append(torch.cat(grads))
    # Of the whole gradient: those of biases before BatchNorm are zero but for rounding.
    whole, parts = found
    assert (parts - whole).norm() / whole.norm() < 1e-5


def test_views_together_share_a_group_with_their_image() -> None:
    """By a slow reference: each group's rows, both views of it, by themselves."""
    views = make_views(8)
    method = grouped(together=True)
    plain = make_method(Normed(), MoCoV3Config(dim=5, hidden_dim=7))
    for part in (slice(0, 4), slice(4, 8)):
        of_group = plain.backbone(torch.cat([view[part] for view in views])).chunk(2)
        for found, expected in zip(method.student_features(views), of_group, strict=True):
            torch.testing.assert_close(found[part], expected)
    apart = grouped(together=False).student_features(views)
    assert not torch.allclose(apart[0], method.student_features(views)[0], atol=1e-3)


def _rank_steps(here: Dist, micro_batch: int) -> dict[str, Any]:
    method = grouped(together=False)
    share = 16 // here.world
    mine = slice(here.rank * share, (here.rank + 1) * share)
    model = spread(method, here)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
    step = Step(method, model, optimizer, CPU, options=StepOptions(micro_batch, group=GROUP))
    for number in range(2):
        step.gradients([view[mine] for view in make_views(16, seed=number)])
        step.update(0.5)
    average_statistics(method)
    return method.state_dict()


@pytest.mark.parametrize("micro_batch", [0, GROUP])
def test_two_ranks_are_one_process(micro_batch: int) -> None:
    found = run_ranks(_rank_steps, micro_batch)
    expected = _rank_steps(Dist(0, 1, 0, CPU), 0)
    for rank in found:
        for name, value in expected.items():
            torch.testing.assert_close(rank[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_a_teacher_s_dealt_groups_are_exact_in_chunks_and_other_than_its_student_s(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_float64(monkeypatch)
    views, among = [view.double() for view in make_views(6 * GROUP)], 3
    neighbours = grouped(together=False).double()
    dealt = copy.deepcopy(neighbours)
    layers = deal_groups(dealt, among, but=(dealt.backbone, *dealt.heads()))
    assert 0 < layers < sum(isinstance(module, GroupedBatchNorm) for module in dealt.modules())
    block = among * GROUP
    whole, buffers = stepped(dealt, views, block)
    found, after = stepped(dealt, views, block, micro_batch=block)
    assert len(chunks(len(views[0]), block, block)) == 2
    assert largest_difference(found, whole) < 1e-10
    for name, buffer in buffers.items():
        torch.testing.assert_close(after[name], buffer, rtol=1e-10, atol=1e-12, msg=name)
    assert largest_difference(stepped(neighbours, views)[0], whole) > 1e-4
    # The student's own features stay those of neighbours.
    for one, other in zip(dealt.student_features(views), neighbours.student_features(views), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert not torch.allclose(dealt.teacher_features(views)[0], neighbours.teacher_features(views)[0])


def test_a_configuration_deals_the_teacher_s_groups() -> None:
    def build(**flags: Any) -> list[int]:
        small = {"model.backbone": "resnet10_w32", "recipe.size": 16, "train.batch": 32, "model.bn_group": 4}
        resolved = run_config.load_config(None, small | flags)
        check_groups(resolved.config, 1)
        method, _ = build_method(resolved, CPU)
        return sorted({m.dealt for m in method.modules() if isinstance(m, GroupedBatchNorm)})

    assert build() == [1]
    assert build(**{"model.bn_shuffle": 8}) == [1, 8]
    with pytest.raises(
        UserError,
        match=r"bn_group is 4 and model.bn_shuffle 3, together 12 images, but .*set --train.batch 36",
    ):
        build(**{"model.bn_shuffle": 3})
    with pytest.raises(
        UserError, match=r"bn_shuffle 4, together 16 images, but train.micro_batch 8 is smaller than a group"
    ):
        build(**{"model.bn_shuffle": 4, "train.micro_batch": 8})
    with pytest.raises(
        UserError, match="bn_shuffle is 2, but simclr has no teacher with BatchNorm: leave it out"
    ):
        build(**{"model.bn_shuffle": 2, "method.name": "simclr"})
    with pytest.raises(UserError, match="bn_shuffle is 2, but there are no groups to deal images among"):
        ModelConfig(bn_shuffle=2)
    with pytest.raises(UserError, match="bn_shuffle is 1 but"):
        ModelConfig(bn_shuffle=1, bn_group=4)


def test_groups_are_said_to_be_exact() -> None:
    assert tell_chunks(grouped(together=False), 16, 4, cached=False).endswith(
        "the gradient of the undivided batch"
    )


def test_batches_of_other_than_whole_groups_are_refused() -> None:
    def checked(world: int = 1, **train: Any) -> None:
        flags = {"model.bn_group": 32, **{f"train.{name}": value for name, value in train.items()}}
        check_groups(run_config.load_config(None, flags).config, world)

    checked(batch=256)
    checked(world=8, batch=256)
    checked(batch=256, micro_batch=32)
    with pytest.raises(
        UserError, match=r"train.batch 256 gives 25.6 images to each of 10 .* set --train.batch 320"
    ):
        checked(world=10, batch=256)
    with pytest.raises(UserError, match=r"micro_batch 16 is smaller than a group"):
        checked(batch=256, micro_batch=16)
    with pytest.raises(UserError, match="bn_group is 1 but"):
        ModelConfig(bn_group=1)
