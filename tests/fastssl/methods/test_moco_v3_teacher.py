"""MoCo v3's teacher, the order of a step, and two processes against one."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastssl.core.distributed import Dist, mean_over_ranks
from fastssl.core.schedules import Clock
from fastssl.methods import MoCoV3
from fastssl.methods.ema import ema_update, teacher_of
from fastssl.methods.moco_v3 import Keys
from fastssl.methods.moco_v3 import MoCoV3Config as Config
from fastssl.models.backbones import build_backbone
from fastssl.models.model_config import ModelConfig
from tests.fastssl.tiny import Normed, Plain, make_method, make_views
from tests.gloo import run_ranks

# Teacher


def test_the_teacher_starts_as_the_student_projector_included() -> None:
    method = make_method(Normed())
    for part in ("backbone", "projector"):
        student = getattr(method, part).state_dict()
        teacher = getattr(method, f"teacher_{part}").state_dict()
        assert student.keys() == teacher.keys()
        assert all(torch.equal(student[key], teacher[key]) for key in student)
        for p in getattr(method, f"teacher_{part}").parameters():
            assert not any(p is q for q in method.backbone.parameters())


def test_a_teacher_skips_no_blocks_and_shares_nothing_with_the_student() -> None:
    student = build_backbone(ModelConfig(backbone="test_vit", drop_path=0.9), 32)
    teacher = teacher_of(student)
    images = torch.rand(4, 3, 32, 32)
    assert teacher.training
    assert torch.equal(teacher(images), student.eval()(images))
    assert not torch.equal(student.train()(images), teacher(images))
    assert all(p.requires_grad for name, p in student.named_parameters() if "patch_embed" not in name)
    with torch.no_grad():
        for p in teacher.parameters():
            assert not p.requires_grad
            p.zero_()
    assert student.eval()(images).any()


def test_keys_do_not_pass_through_a_predictor() -> None:
    method = make_method(Plain())
    keys = method.keys(make_views())
    nn.init.zeros_(method.predictor[0].weight)
    assert all(torch.equal(a, b) for a, b in zip(keys, method.keys(make_views()), strict=True))
    assert not any(key.requires_grad for key in keys)


def test_ema_values() -> None:
    teacher, student = (
        [torch.tensor([1.0, -2.0]), torch.tensor(4.0)],
        [torch.tensor([3.0, 2.0]), torch.tensor(0.0)],
    )
    ema_update(teacher, student, 0.75)
    torch.testing.assert_close(teacher, [torch.tensor([1.5, -1.0]), torch.tensor(3.0)])
    ema_update(teacher, student, 1.0)
    torch.testing.assert_close(teacher, [torch.tensor([1.5, -1.0]), torch.tensor(3.0)])
    ema_update(teacher, student, 0.0)
    torch.testing.assert_close(teacher, student)


def test_buffers_are_not_averaged() -> None:
    method = make_method(Normed())
    method(make_views())
    with torch.no_grad():
        for p in method.backbone.parameters():
            p.add_(1.0)
    before = {name: buffer.clone() for name, buffer in method.named_buffers()}
    old = {name: p.clone() for name, p in method.named_parameters()}
    method.update_teacher(0.9)
    for name, buffer in method.named_buffers():
        assert torch.equal(buffer, before[name]), name
    assert (
        int(method.get_buffer("teacher_backbone.body.1.num_batches_tracked")) == 2
    )  # both views, and no average
    for name, p in method.named_parameters():
        if not name.startswith("teacher_"):
            assert torch.equal(p, old[name]), name
        else:
            expected = 0.9 * old[name] + 0.1 * old[name.removeprefix("teacher_")]
            torch.testing.assert_close(p.data, expected.data)


def test_the_teacher_keeps_running_statistics_of_its_own() -> None:
    method = make_method(Normed())
    with torch.no_grad():
        method.teacher_backbone.body[0].weight.mul_(2)
    method(make_views())
    student, teacher = (
        part.get_buffer("body.1.running_mean") for part in (method.backbone, method.teacher_backbone)
    )
    assert method.teacher_backbone.training
    assert teacher.any()
    assert not torch.allclose(student, teacher)


def test_teacher_momentum() -> None:
    method = MoCoV3(Plain(), Config(dim=4, hidden_dim=4, momentum=0.99))
    assert [round(method.teacher_momentum(Clock(s, 100)), 6) for s in (-1, 24, 49, 99)] == [
        *(0.99, 0.991464, 0.995, 1.0)
    ]
    constant = MoCoV3(Plain(), Config(dim=4, hidden_dim=4, momentum=0.996, momentum_cosine=False))
    assert [constant.teacher_momentum(Clock(s, 100)) for s in (0, 49, 99)] == [0.996] * 3


def test_updating_after_the_step_equals_the_published_order() -> None:
    """The published order: queries, then the average with this step's momentum, then keys, loss, optimiser
    step."""
    num_steps = 5
    ours, published = make_method(Normed()), make_method(Normed())
    fields = ("backbone", "projector", "predictor")
    first, second = (
        torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.5, momentum=0.9)
        for m in (ours, published)
    )
    for step in range(num_steps):
        views = make_views(seed=step)
        loss = ours(views).loss
        first.zero_grad()
        loss.backward()
        first.step()
        ours.update_teacher(ours.teacher_momentum(Clock(step, num_steps)))

        q1, q2 = (published.predictor(published.projector(published.backbone(view))) for view in views)
        momentum = published.teacher_momentum(Clock(step - 1, num_steps))
        with torch.no_grad():
            for part in ("backbone", "projector"):
                pairs = zip(
                    getattr(published, f"teacher_{part}").parameters(),
                    getattr(published, part).parameters(),
                    strict=True,
                )
                for teacher, student in pairs:
                    teacher.lerp_(student, 1 - momentum)
        expected = published._output(q1, q2, Keys(*published.keys(views), len(q1)), q1).loss
        second.zero_grad()
        expected.backward()
        second.step()

        assert torch.equal(loss, expected), f"step {step}"
        for field in fields:
            for p, q in zip(
                getattr(ours, field).parameters(), getattr(published, field).parameters(), strict=True
            ):
                assert torch.equal(p, q), f"step {step}, {field}"


# Two processes


def _free_of_batchnorm() -> MoCoV3:
    """A method whose heads have no batch statistics, so that ranks differ from one process in nothing but the
    keys."""
    method = make_method(Plain())
    torch.manual_seed(3)
    method.projector, method.predictor = (
        nn.Linear(6, 5),
        nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)),
    )
    method.teacher_projector = copy.deepcopy(method.projector).requires_grad_(False)
    return method


def _train_two_steps(method: MoCoV3, runner: nn.Module, views_of: list[list[Tensor]]) -> dict:
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
    losses, metrics, grads = [], [], {}
    for views in views_of:
        output = runner(views)
        optimizer.zero_grad()
        output.loss.backward()
        grads = {n: p.grad.clone() for n, p in method.named_parameters() if p.grad is not None}
        optimizer.step()
        method.update_teacher(0.5)
        losses.append(output.loss.item())
        metrics.append({name: value.item() for name, value in mean_over_ranks(output.metrics).items()})
    return {"losses": losses, "metrics": metrics, "grads": grads, "state": method.state_dict()}


def _rank_steps(here: Dist) -> dict:
    method = _free_of_batchnorm()
    mine = slice(here.rank * 4, here.rank * 4 + 4)
    views_of = [[view[mine] for view in make_views(8, seed=step)] for step in range(2)]
    return _train_two_steps(method, DistributedDataParallel(method), views_of)


def test_two_processes_equal_one_on_the_whole_batch() -> None:
    ranks = run_ranks(_rank_steps)
    method = _free_of_batchnorm()
    alone = _train_two_steps(method, method, [make_views(8, seed=step) for step in range(2)])
    for step in range(2):
        assert ranks[0]["losses"][step] != ranks[1]["losses"][step]
        mean = (ranks[0]["losses"][step] + ranks[1]["losses"][step]) / 2
        assert mean == pytest.approx(alone["losses"][step], rel=1e-5)
        for name in ("loss", "ce", "ce_norm", "acc"):
            for rank in ranks:
                assert rank["metrics"][step][name] == pytest.approx(alone["metrics"][step][name], rel=1e-5)
    for rank in ranks:
        assert rank["grads"].keys() == alone["grads"].keys()
        for name, grad in alone["grads"].items():
            torch.testing.assert_close(rank["grads"][name], grad)
    for name, value in ranks[0]["state"].items():
        assert torch.equal(value, ranks[1]["state"][name]), name  # teachers included
        torch.testing.assert_close(value, alone["state"][name])
