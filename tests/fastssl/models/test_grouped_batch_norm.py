"""BatchNorm in groups: against formulas, and the same for any chunks and ranks."""

import copy
from collections.abc import Iterator

import pytest
import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from fastssl.core.distributed import Dist
from fastssl.models.batch_norm import depends_on_batch, frozen_statistics
from fastssl.models.grouped_batch_norm import (
    GroupedBatchNorm,
    average_statistics,
    commit_statistics,
    drop_statistics,
    group_batch_norm,
    views_in_pass,
)
from fastssl.pretraining.build import convert_batch_norm
from shards.errors import UserError
from tests.gloo import run_ranks

ROWS, CHANNELS = 4, 3
SHAPES = {"1d": (CHANNELS,), "1d long": (CHANNELS, 5), "2d": (CHANNELS, 4, 5), "act": (CHANNELS, 4, 5)}
compiles = pytest.mark.filterwarnings("default")  # the compiler hides warnings of its own


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


class Third(nn.Module):
    """A dropout that draws nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return x / 3


def draw(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) + 1


def make_norm(kind: str, affine: bool = True, momentum: float | None = 0.1) -> nn.Module:
    """A layer in float64 whose scales, shifts and running statistics are not the initial ones."""
    if kind == "act":
        norm = BatchNormAct2d(CHANNELS, affine=affine, act_layer=nn.SiLU, drop_layer=Third, inplace=False)
        norm.momentum = momentum
    else:
        norm = (nn.BatchNorm2d if kind == "2d" else nn.BatchNorm1d)(
            CHANNELS, affine=affine, momentum=momentum
        )
    norm = norm.double()
    with torch.no_grad():
        for seed, values in enumerate([*norm.parameters(), norm.running_mean, norm.running_var]):
            assert isinstance(values, Tensor)
            values.copy_(draw(CHANNELS, seed=seed).abs())
    return norm


def by_formula(norm: nn.Module, inputs: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, and the averages over groups of `size` rows of mean and unbiased variance (Ioffe and Szegedy, arXiv 1502.03167)."""

    def wide(values: Tensor) -> Tensor:
        return values.view(-1, *[1] * (inputs.ndim - 2))

    outputs, means, variances = [], [], []
    for start in range(0, len(inputs), size):
        group = inputs[start : start + size]
        values = group.transpose(0, 1).flatten(1)
        mean = values.sum(1) / values.shape[1]
        squares = (values - mean[:, None]).square().sum(1)
        output = (group - wide(mean)) / (wide(squares / values.shape[1]) + norm.eps).sqrt()
        if norm.weight is not None:
            output = output * wide(norm.weight) + wide(norm.bias)
        outputs.append(norm.act(norm.drop(output)) if hasattr(norm, "act") else output)
        means.append(mean.detach())
        variances.append(squares.detach() / (values.shape[1] - 1))
    return torch.cat(outputs), torch.stack(means).mean(0), torch.stack(variances).mean(0)


@compiles
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("num_groups", [1, 3])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", SHAPES)
def test_each_group_is_normalised_by_itself(kind: str, affine: bool, num_groups: int, compiled: bool) -> None:
    plain = make_norm(kind, affine)
    norm = copy.deepcopy(plain)
    group_batch_norm(norm, ROWS)
    run = torch.compile(norm, backend="eager", fullgraph=True) if compiled else norm
    inputs, pull = draw(num_groups * ROWS, *SHAPES[kind]), draw(num_groups * ROWS, *SHAPES[kind], seed=2)
    ours, theirs = inputs.clone().requires_grad_(), inputs.clone().requires_grad_()
    output = run(ours)
    expected, mean, var = by_formula(plain, theirs, ROWS)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    output.backward(pull)
    expected.backward(pull)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-10)
    for (name, one), (_, other) in zip(norm.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-10, msg=name)
    before = copy.deepcopy(plain.state_dict())
    for name, value in norm.state_dict().items():
        assert torch.equal(value, before[name]), name
    commit_statistics(norm)
    now = norm.state_dict()
    torch.testing.assert_close(
        now["running_mean"], 0.9 * before["running_mean"] + 0.1 * mean, rtol=1e-12, atol=0
    )
    torch.testing.assert_close(
        now["running_var"], 0.9 * before["running_var"] + 0.1 * var, rtol=1e-12, atol=0
    )
    assert int(now["num_batches_tracked"]) == 1


def test_golden_values() -> None:
    norm = nn.BatchNorm1d(1, eps=1e-12)
    group_batch_norm(norm, 2)
    # Means 1 and 12, deviations 1 and 2, unbiased variances 2 and 8.
    assert norm(torch.tensor([[0.0], [2.0], [10.0], [14.0]])).flatten().tolist() == pytest.approx(
        [-1, 1, -1, 1]
    )
    commit_statistics(norm)
    assert norm.running_mean.tolist() == pytest.approx([0.1 * 6.5])  # pyright: ignore[reportOptionalMemberAccess]
    assert norm.running_var.tolist() == pytest.approx([0.9 + 0.1 * 5])  # pyright: ignore[reportOptionalMemberAccess]


def test_one_group_is_plain_batch_norm() -> None:
    plain = make_norm("2d")
    norm = copy.deepcopy(plain)
    group_batch_norm(norm, 2 * ROWS)
    output, expected = (layer(draw(2 * ROWS, *SHAPES["2d"])) for layer in (norm, plain))
    assert torch.equal(output, expected)
    assert type(output.grad_fn) is type(expected.grad_fn)  # no copy follows


def make_net(seed: int = 0) -> nn.Sequential:
    """All three kinds of layers, in float64."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 5, 2),
        BatchNormAct2d(5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 6, bias=False),
        nn.BatchNorm1d(6, affine=False, momentum=None),
    ).double()


def run_step(net: nn.Module, images: Tensor, pull: Tensor, chunk: int) -> Tensor:
    """Outputs of a step in chunks; gradients are left in the parameters, and statistics committed."""
    outputs = []
    for part, weights in zip(images.split(chunk), pull.split(chunk), strict=True):
        outputs.append(net(part))
        (outputs[-1] * weights).sum().backward()
    commit_statistics(net)
    return torch.cat(outputs).detach()


def run_steps(net: nn.Module, num: int, chunk: int, here: slice = slice(None)) -> dict[str, Tensor]:
    """Outputs, gradients and state of three steps on `num` images, or on those of a rank."""
    found: dict[str, Tensor] = {}
    for step in range(3):
        images, pull = draw(num, 3, 5, 5, seed=step)[here], draw(num, 6, seed=10 + step)[here]
        found[f"output {step}"] = run_step(net, images, pull, chunk)
    found |= {f"gradient {name}": p.grad for name, p in net.named_parameters() if p.grad is not None}
    average_statistics(net)
    return found | net.state_dict()


def assert_alike(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("groups_of_chunk", [1, 3, 7])
def test_chunks_change_nothing(groups_of_chunk: int) -> None:
    found = []
    for chunk in (21 * ROWS, groups_of_chunk * ROWS):
        net = make_net()
        group_batch_norm(net, ROWS)
        found.append(run_steps(net, 21 * ROWS, chunk))
    assert_alike(found[1], found[0])
    assert found[0]["8.num_batches_tracked"] == 3


def _rank_steps(here: Dist, num: int, chunk: int) -> dict[str, Tensor]:
    net = make_net()
    group_batch_norm(net, ROWS)
    share = num // here.world
    return run_steps(net, num, chunk, slice(here.rank * share, (here.rank + 1) * share))


def test_two_ranks_equal_one_process() -> None:
    num = 12 * ROWS
    net = make_net()
    group_batch_norm(net, ROWS)
    expected = run_steps(net, num, num)
    first, second = run_ranks(_rank_steps, num, 2 * ROWS)
    together = {name: value for name, value in first.items() if name in net.state_dict()}
    for name in expected:
        if name.startswith("output"):
            together[name] = torch.cat([first[name], second[name]])
        elif name.startswith("gradient"):
            together[name] = first[name] + second[name]
        else:
            assert torch.equal(first[name], second[name]), name
    assert_alike(together, expected)


@compiles
@pytest.mark.parametrize("compiled", [False, True])
def test_views_of_a_sample_share_a_group(compiled: bool) -> None:
    norm = make_norm("2d")
    plain = copy.deepcopy(norm)
    group_batch_norm(norm, ROWS)
    run = torch.compile(norm, backend="eager", fullgraph=True) if compiled else norm
    views = [draw(2 * ROWS, *SHAPES["2d"], seed=seed) for seed in range(3)]
    inputs = torch.stack(views, dim=1).flatten(0, 1)
    alone = run(views[0])
    drop_statistics(norm)
    with views_in_pass(norm, 3):
        found = run(inputs)
    assert torch.equal(run(views[0]), alone)
    for sample in (0, ROWS):
        group = torch.cat([view[sample : sample + ROWS] for view in views])
        expected = by_formula(plain, group, len(group))[0]
        together = found.unflatten(0, (-1, 3))[sample : sample + ROWS].transpose(0, 1).flatten(0, 1)
        torch.testing.assert_close(together, expected, rtol=1e-10, atol=1e-10)


def test_views_end_with_the_context_even_after_an_error() -> None:
    net = make_net()
    group_batch_norm(net, ROWS)
    with pytest.raises(ZeroDivisionError), views_in_pass(net, 2):
        raise ZeroDivisionError
    assert [m.views for m in net.modules() if isinstance(m, GroupedBatchNorm)] == [1, 1, 1]


@compiles
@pytest.mark.parametrize("compiled", [False, True])
def test_other_numbers_of_rows_are_refused(compiled: bool) -> None:
    norm = make_norm("1d")
    group_batch_norm(norm, 32)
    run = torch.compile(norm, backend="eager") if compiled else norm
    with pytest.raises(
        UserError, match=r"received 48 rows, but its groups have 32: let .* a multiple of 32 samples"
    ):
        run(draw(48, CHANNELS))
    with (
        views_in_pass(norm, 2),
        pytest.raises(UserError, match=r"96 rows, .* have 64 \(32 samples x 2 views\)"),
    ):
        run(draw(96, CHANNELS))
    # In evaluation any number will do.
    assert norm.eval()(draw(5, CHANNELS)).shape == (5, CHANNELS)


def test_layers_keep_their_objects_hooks_and_state() -> None:
    net = make_net()
    net(draw(8, 3, 5, 5))
    plain = copy.deepcopy(net)
    parameters, modules = list(net.parameters()), list(net.modules())
    seen = []
    net[1].register_forward_hook(lambda *args: seen.append(args))
    group_batch_norm(net, ROWS)
    assert all(one is other for one, other in zip(net.parameters(), parameters, strict=True))
    assert all(one is other for one, other in zip(net.modules(), modules, strict=True))
    assert "rows=4" in repr(net[1])
    assert type(net[4].act) is nn.ReLU
    net(draw(8, 3, 5, 5))
    assert len(seen) == 1
    commit_statistics(net)
    assert list(net.state_dict()) == list(plain.state_dict())
    # There and back again.
    plain.load_state_dict(net.state_dict())
    images = draw(7, 3, 5, 5)
    assert torch.equal(plain.eval()(images), net.eval()(images))
    group_batch_norm(plain, 2)
    net.load_state_dict(plain.state_dict())
    assert depends_on_batch(net)
    group_batch_norm(net, 8)
    assert {m.rows for m in net.modules() if isinstance(m, GroupedBatchNorm)} == {8}


def test_without_running_statistics() -> None:
    norm = nn.BatchNorm1d(CHANNELS, track_running_stats=False)
    group_batch_norm(norm, ROWS)
    inputs = draw(8, CHANNELS, dtype=torch.float32)
    assert torch.equal(norm(inputs)[:4], norm(inputs[:4]))
    commit_statistics(norm)
    assert depends_on_batch(norm)
    assert not norm.state_dict().keys() - {"weight", "bias"}
    assert not torch.equal(norm.eval()(inputs)[:4], norm(inputs[:4]))  # by the batch, as BatchNorm


def test_what_cannot_be_grouped_is_refused_before_anything_changes() -> None:
    net = nn.Sequential(nn.BatchNorm1d(2), nn.Sequential(nn.BatchNorm3d(2)))
    with pytest.raises(UserError, match=r"layer 1\.0 is a BatchNorm3d, .*: choose another model"):
        group_batch_norm(net, ROWS)
    assert type(net[0]) is nn.BatchNorm1d
    with pytest.raises(UserError, match="given 1 samples, but need at least 2"):
        group_batch_norm(net[0], 1)
    group_batch_norm(nn.Sequential(nn.InstanceNorm1d(2), nn.Linear(2, 2)), ROWS)


def test_synchronisation_leaves_grouped_layers_alone() -> None:
    net = nn.Sequential(make_net(), nn.Sequential(nn.BatchNorm1d(2)))
    group_batch_norm(net[0], ROWS)
    convert_batch_norm(net)
    assert sum(isinstance(m, GroupedBatchNorm) for m in net.modules()) == 3
    assert [type(m) for m in net.modules() if isinstance(m, nn.SyncBatchNorm)] == [nn.SyncBatchNorm]


def test_frozen_forwards_do_not_count() -> None:
    found = []
    for frozen in (False, True):
        net = make_net()
        group_batch_norm(net, ROWS)
        images = draw(8, 3, 5, 5)
        output = net(images)
        if frozen:
            with frozen_statistics(net):
                assert torch.equal(net(images), output)
                net(100 * images)
        commit_statistics(net)
        found.append(net.state_dict())
    assert_alike(found[1], found[0])
    assert int(found[1]["1.num_batches_tracked"]) == 1


def test_a_step_that_is_not_applied_leaves_no_trace() -> None:
    net = make_net()
    group_batch_norm(net, ROWS)
    before, images = copy.deepcopy(net.state_dict()), draw(8, 3, 5, 5)
    for drop in (
        drop_statistics,
        lambda n: commit_statistics(n, False),
        lambda n: commit_statistics(n, torch.tensor(False)),
    ):
        net(images * float("nan"))
        drop(net)
        assert_alike(dict(net.state_dict()), before)
    net(images)
    commit_statistics(net, torch.tensor(True))
    once = copy.deepcopy(net.state_dict())
    assert not torch.equal(once["1.running_mean"], before["1.running_mean"])
    assert all(value.isfinite().all() for value in once.values())
    # No forward since: nothing moves.
    commit_statistics(net)
    assert_alike(dict(net.state_dict()), once)


def test_nothing_grows_without_commits() -> None:
    norm = make_norm("1d")
    group_batch_norm(norm, ROWS)
    before = {name: (buffer.shape, buffer.clone()) for name, buffer in norm.named_buffers()}
    inputs = draw(2 * ROWS, CHANNELS)
    for _ in range(50):
        norm(inputs)
    after = dict(norm.named_buffers())
    assert {name: buffer.shape for name, buffer in after.items()} == {n: s for n, (s, _) in before.items()}
    _, mean, var = by_formula(norm, inputs, ROWS)
    torch.testing.assert_close(after["group_statistics"], torch.stack([mean, var]))
    norm.reset_running_stats()  # pyright: ignore[reportCallIssue]
    assert int(after["num_groups"]) == 0


@compiles
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_the_memory_format_stays(memory_format: torch.memory_format, compiled: bool) -> None:
    norm = make_norm("act")
    group_batch_norm(norm, ROWS)
    run = torch.compile(norm, backend="eager", fullgraph=True) if compiled else norm
    inputs = draw(3 * ROWS, *SHAPES["act"])
    expected = norm(inputs)
    inputs = inputs.to(memory_format=memory_format).requires_grad_()
    output = run(inputs)
    assert output.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    output.sum().backward()
    assert inputs.grad is not None
    assert inputs.grad.is_contiguous(memory_format=memory_format)
