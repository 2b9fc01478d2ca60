"""LARS by hand, LARS against an obvious loop, and the published AdamW."""

import copy

import pytest
import torch
from torch import Tensor, nn

from fastssl.core.optimizers import LARS, OptimConfig, build_optimizer, scaled_lr, set_lr
from shards.errors import UserError


def _parameter(values: list, grad: list) -> nn.Parameter:
    parameter = nn.Parameter(torch.tensor(values))
    parameter.grad = torch.tensor(grad)
    return parameter


def test_a_lars_step_by_hand() -> None:
    weight, bias = _parameter([[3.0, 4.0]], [[0.6, 0.8]]), _parameter([1.0], [0.5])
    optimizer = LARS([weight, bias], lr=2.0, weight_decay=0.1, momentum=0.9, trust_coefficient=1e-3)
    optimizer.step()
    # d = g + 0.1 p = (0.9, 1.2), |d| = 1.5, |p| = 5, ratio = 0.001 * 5 / 1.5 = 1 / 300, mu = d / 300 =
    # (0.003, 0.004)
    torch.testing.assert_close(weight.data, torch.tensor([[2.994, 3.992]]))
    torch.testing.assert_close(bias.data, torch.tensor([0.0]))  # 1 - 2 * 0.5: neither decayed nor scaled
    set_lr(optimizer, 1.0)
    weight.grad, bias.grad = torch.tensor([[0.0, 0.0]]), torch.tensor([0.0])
    optimizer.step()
    # d = 0.1 p, ratio = 0.01, so 0.001 p is added to 0.9 mu; the old rate of 2 has left no trace in the
    # buffer.
    torch.testing.assert_close(
        weight.data, torch.tensor([[2.994 - 0.0027 - 0.002994, 3.992 - 0.0036 - 0.003992]])
    )
    torch.testing.assert_close(bias.data, torch.tensor([-0.45]))


@pytest.mark.parametrize("values", [[[0.0, 0.0]], [[1.0, 2.0]]])
def test_the_ratio_is_one_where_a_norm_is_zero(values: list) -> None:
    grad = [[0.5, 0.25]] if values == [[0.0, 0.0]] else [[0.0, 0.0]]
    weight = _parameter(values, grad)
    LARS([weight], lr=1.0, weight_decay=0.0).step()
    torch.testing.assert_close(weight.data, torch.tensor(values) - torch.tensor(grad))


def _slow_lars(params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], lr: float) -> None:
    """MoCo v3's rules, one parameter at a time: weight decay 1e-2, momentum 0.9, trust coefficient 1e-3."""
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        d = g.clone()
        if p.ndim > 1:
            d = d + 1e-2 * p
            p_norm, d_norm = p.norm().item(), d.norm().item()
            if p_norm > 0 and d_norm > 0:
                d = d * (1e-3 * p_norm / d_norm)
        buffers[i] = 0.9 * buffers[i] + d
        params[i] = p - lr * buffers[i]


def test_lars_equals_an_obvious_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 3, 3, 3), (4,), (7, 4), (1, 5), ()]
    ours = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    theirs = [p.detach().clone() for p in ours]
    buffers = [torch.zeros_like(p) for p in theirs]
    optimizer = LARS(ours, lr=1.0, weight_decay=1e-2, momentum=0.9, trust_coefficient=1e-3)
    for lr in (0.0, 0.5, 3.0, 0.1):
        grads = [torch.randn(shape, generator=generator) for shape in shapes]
        for p, g in zip(ours, grads, strict=True):
            p.grad = g.clone()
        set_lr(optimizer, lr)
        optimizer.step()
        _slow_lars(theirs, grads, buffers, lr)
        assert all(torch.equal(p.grad, g) for p, g in zip(ours, grads, strict=True))
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.data, reference)


def test_lars_waits_for_nothing_on_the_device() -> None:
    # A meta tensor has no values: reading one on the host, as .item() and `if norm > 0` do, raises.
    params = [nn.Parameter(torch.zeros(3, 2, device="meta")), nn.Parameter(torch.zeros(3, device="meta"))]
    for p in params:
        p.grad = torch.zeros_like(p)
    LARS(params, lr=1.0, weight_decay=0.1).step()


def test_lars_skips_parameters_without_gradient_and_calls_its_closure() -> None:
    used, unused = _parameter([[1.0]], [[1.0]]), nn.Parameter(torch.ones(1, 1))
    optimizer = LARS([used, unused], lr=1.0)
    assert optimizer.step(lambda: 7.0) == 7.0
    assert unused.item() == 1.0
    assert used.item() != 1.0
    assert unused not in optimizer.state


def test_lars_continues_from_its_state() -> None:
    weight = _parameter([[1.0, 2.0]], [[0.3, 0.1]])
    optimizer = LARS([weight], lr=1.0)
    optimizer.step()
    other = copy.deepcopy(weight)
    other.grad = weight.grad
    resumed = LARS([other], lr=1.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.step()
    resumed.step()
    assert torch.equal(weight, other)


def test_adamw_decays_all_parameters_and_leaves_out_the_frozen() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 2).requires_grad_(False))
    nn.init.ones_(model[0].bias)
    optimizer = build_optimizer(model.parameters(), OptimConfig(lr=0.01, weight_decay=0.1))
    assert isinstance(optimizer, torch.optim.AdamW)
    (group,) = optimizer.param_groups
    assert len(group["params"]) == 4
    assert (group["betas"], group["weight_decay"]) == ((0.9, 0.999), 0.1)
    for p in group["params"]:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p in (model[0].bias, model[1].weight):  # biases and norms too, as published
        torch.testing.assert_close(p.data, torch.full((2,), 1 - 0.01 * 0.1))


def test_each_name_builds_its_optimizer() -> None:
    model = nn.Linear(2, 2)
    lars = build_optimizer(model.parameters(), OptimConfig(name="lars", lr=0.6, weight_decay=1e-6))
    assert isinstance(lars, LARS)
    (group,) = lars.param_groups
    assert {
        name: group[name] for name in ("lr", "weight_decay", "momentum", "trust_coefficient", "trust")
    } == {**{"lr": 0.6, "weight_decay": 1e-6, "momentum": 0.9, "trust_coefficient": 1e-3, "trust": True}}
    sgd = build_optimizer(model.parameters(), OptimConfig(name="sgd", lr=0.03, weight_decay=1e-4))
    assert isinstance(sgd, torch.optim.SGD)
    assert (sgd.defaults["momentum"], sgd.defaults["nesterov"]) == (0.9, False)


def test_the_rate_scales_with_the_batch() -> None:
    assert scaled_lr(OptimConfig(name="lars", lr=0.6), 4096) == pytest.approx(9.6)
    assert scaled_lr(OptimConfig(), 4096) == pytest.approx(2.4e-3)
    assert scaled_lr(OptimConfig(), 256) == 1.5e-4


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(UserError, match="every parameter of the model is frozen"):
        build_optimizer(nn.Linear(1, 1).requires_grad_(False).parameters(), OptimConfig())


@pytest.mark.parametrize("bad", [{"lr": 0.0}, {"weight_decay": -0.1}, {"warmup_epochs": -1}])
def test_impossible_settings_are_refused(bad: dict) -> None:
    with pytest.raises(UserError, match=next(iter(bad))):
        OptimConfig(**bad)


@pytest.mark.parametrize("clip", [False, True])
def test_lars_under_a_scaler_steps_as_without_and_leaves_out_overflows(clip: bool) -> None:
    plain, scaled = nn.Linear(4, 3), nn.Linear(4, 3)
    scaled.load_state_dict(plain.state_dict())
    settings = {"lr": 0.5, "weight_decay": 0.1, "trust_coefficient": 0.02}
    one, other = LARS(plain.parameters(), **settings), LARS(scaled.parameters(), **settings)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)

    def step(images: Tensor, overflow: bool) -> None:
        for module, optimizer in ((plain, one), (scaled, other)):
            optimizer.zero_grad()
            loss = module(images).square().sum()
            (scaler.scale(loss) if module is scaled else loss).backward()
        if overflow:
            assert scaled.weight.grad is not None
            scaled.weight.grad[1, 1] = float("inf")
        else:
            one.step()
        if clip:  # which unscales first
            scaler.unscale_(other)
        scaler.step(other)
        scaler.update()

    torch.manual_seed(1)
    for overflow in (True, False, False, True, False):
        step(torch.rand(5, 4), overflow)
        for p, q in zip(plain.parameters(), scaled.parameters(), strict=True):
            torch.testing.assert_close(q, p)
    assert scaler.get_scale() == 16.0  # halved twice
