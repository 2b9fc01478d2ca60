"""BatchNorm over groups of a fixed number of samples: the same result however a batch is divided into chunks and over ranks."""

# pyright: reportPrivateImportUsage=false
# torch's multi-tensor operations (torch._foreach_*) have no public name; its own optimizers use them too.

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from fastssl.core.distributed import average_over_ranks
from shards.errors import UserError


class GroupedBatchNorm(_BatchNorm):
    """BatchNorm whose statistics in training are those of `rows` consecutive samples; `group_batch_norm` makes it.

    A training forward takes (N, C) or (N, C, ...), N a multiple of rows * views. Each rows * views of them are normalised by their own
    mean and biased variance, as F.batch_norm does it for them alone. With several views (see `views_in_pass`) the rows come sample by
    sample: sample 0 view 0, sample 0 view 1, sample 1 view 0, ... In evaluation it is BatchNorm.

    With `dealt` D above 1, the samples of D neighbouring groups are dealt among them like cards: group i of them has samples i, i + D,
    i + 2 D, ... So a teacher's groups hold other samples than its student's, and shared statistics do not give the right pair away
    (shuffled BatchNorm, arXiv 1911.05722, section 3.3). N is then a multiple of rows * views * D.

    Running statistics do not move in a forward. Means and unbiased variances are averaged over the groups of every forward since the
    last `commit_statistics`, which moves the running statistics by that average, once a step. Without a commit the average takes in
    ever more groups, in the same few buffers, which are no part of the state dict. `frozen_statistics` keeps a forward out of it.

    Raises:
        UserError: N is not a multiple of rows * views.
    """

    rows: int
    """Samples of a group."""
    dealt: int
    """Neighbouring groups among which samples are dealt; 1: none."""
    views: int
    """Views of each sample that a forward holds. A Python number, so that compiled code needs no value from the device."""
    group_statistics: Tensor | None
    """(2, C), the dtype of running_mean: averages over the groups of means and of unbiased variances."""
    num_groups: Tensor | None
    """Scalar, same dtype: the number of these groups."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        size = self.rows * self.views
        # Not divmod, which the compiler refuses for sizes that vary.
        num_groups = input.shape[0] // size
        if input.shape[0] % (size * self.dealt):
            views = "" if self.views == 1 else f" ({self.rows} samples x {self.views} views)"
            dealt = "" if self.dealt == 1 else f" and are dealt by {self.dealt}"
            raise UserError(
                f"BatchNorm received {input.shape[0]} rows, but its groups have {size}{views}{dealt}: let every process and every "
                f"chunk take a multiple of {self.rows * self.dealt} samples (train.batch, train.micro_batch), or choose another "
                "model.bn_group."
            )
        channels_last = input.ndim == 4 and input.is_contiguous(memory_format=torch.channels_last)
        normalise = _at_once if num_groups > 1 and torch.compiler.is_compiling() else _one_by_one
        if self.dealt > 1:
            output, statistics = normalise(self, self._exchange(input, self.rows, self.dealt), size)
            output = self._exchange(output, self.dealt, self.rows)
            if channels_last:
                output = output.contiguous(memory_format=torch.channels_last)
        else:
            output, statistics = normalise(self, input, size)
        if self.tracks and statistics is not None:
            assert self.group_statistics is not None
            assert self.num_groups is not None
            self.num_groups.add_(num_groups)
            self.group_statistics.lerp_(
                statistics.to(self.group_statistics.dtype), num_groups / self.num_groups
            )
        return output

    def _exchange(self, rows: Tensor, outer: int, inner: int) -> Tensor:
        """Return the rows (N, C, ...) with the samples of each block of outer * inner, read as a table, column by column.

        (rows, dealt) deals a block's samples to its groups, (dealt, rows) brings them back.
        """
        return rows.unflatten(0, (-1, outer, inner, self.views)).transpose(1, 2).flatten(0, 3)

    @property
    def tracks(self) -> bool:
        """Whether a training forward counts for the running statistics: there are some, and `frozen_statistics` is not in effect."""
        return self.num_batches_tracked is not None

    def reset_running_stats(self) -> None:
        super().reset_running_stats()
        drop_statistics(self)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rows={self.rows}"


class GroupedBatchNorm1d(GroupedBatchNorm, nn.BatchNorm1d):
    """`GroupedBatchNorm` for (N, C) and (N, C, L)."""


class GroupedBatchNorm2d(GroupedBatchNorm, nn.BatchNorm2d):
    """`GroupedBatchNorm` for (N, C, H, W)."""


class GroupedBatchNormAct2d(GroupedBatchNorm2d):
    """The same with the dropout and the activation of timm's BatchNormAct2d."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))


def _one_by_one(norm: GroupedBatchNorm, rows: Tensor, size: int) -> tuple[Tensor, Tensor | None]:
    """Normalise groups of `size` rows one after the other; return the output and their average mean and unbiased variance, (2, C).

    Without compilation this is the fastest way: nothing but the outputs is copied.
    """
    statistics = mean = var = None
    if norm.running_mean is not None:
        statistics = norm.running_mean.new_zeros(2, norm.num_features)
        mean, var = statistics.unbind()
    groups = rows.split(size) if len(rows) > size else [rows]
    # With momentum 1 / number, F.batch_norm itself leaves the average over the groups so far in mean and var.
    outputs = [
        functional.batch_norm(group, mean, var, norm.weight, norm.bias, True, 1 / number, norm.eps)
        for number, group in enumerate(groups, start=1)
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs), statistics


def _at_once(norm: GroupedBatchNorm, rows: Tensor, size: int) -> tuple[Tensor, Tensor | None]:
    """Do the same for all groups at once, by the formula and in the dtypes of F.batch_norm.

    The compiler fuses it like one BatchNorm, and its graph does not grow with the number of groups. Without it this is slow.
    """
    values = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
    groups = values.unflatten(0, (-1, size))
    var, mean = torch.var_mean(groups, (1, *range(3, groups.ndim)), correction=0)  # (groups, C)

    def of_each_row(statistic: Tensor) -> Tensor:
        """(groups, C) -> (N, C, 1, ...)."""
        return statistic.unsqueeze(1).expand(-1, size, -1).flatten(0, 1).view(*rows.shape[:2], *ones)

    ones = [1] * (rows.ndim - 2)
    output = (values - of_each_row(mean)) * of_each_row((var + norm.eps).rsqrt())
    if norm.weight is not None:
        output = output * norm.weight.view(-1, *ones)
    if norm.bias is not None:
        output = output + norm.bias.view(-1, *ones)
    num = groups[0, :, 0].numel()
    statistics = torch.stack([mean.mean(0), var.mean(0) * (num / (num - 1))]).detach()
    return output.to(rows.dtype), statistics


def group_batch_norm(module: nn.Module, rows: int) -> None:
    """Give every BatchNorm1d, BatchNorm2d and timm BatchNormAct2d of `module` statistics over groups of `rows` samples, in place.

    The layers stay the same objects with the same parameters, buffers, hooks and state-dict keys; only their class changes. Layers
    that have groups already get the new number. Call it before `checkpoint_blocks` and before compiling.

    Raises:
        UserError: `rows` is below 2, or there is another layer with batch statistics. Nothing is changed then.
    """
    # timm takes 2 s to import, which a command's --help should not wait for.
    from timm.layers.norm_act import BatchNormAct2d

    if rows < 2:
        raise UserError(
            f"Groups of BatchNorm were given {rows} samples, but need at least 2: set model.bn_group to 2 or more."
        )
    grouped: dict[type, type] = {
        nn.BatchNorm1d: GroupedBatchNorm1d,
        nn.BatchNorm2d: GroupedBatchNorm2d,
        BatchNormAct2d: GroupedBatchNormAct2d,
    }
    found = []
    for name, layer in module.named_modules():
        if type(layer) in grouped or isinstance(layer, GroupedBatchNorm):
            found.append(layer)
        elif isinstance(layer, _BatchNorm) or getattr(layer, "running_var", None) is not None:
            raise UserError(
                f"The layer {name or 'itself'} is a {type(layer).__name__}, for which there are no groups, only for BatchNorm1d, "
                "BatchNorm2d and BatchNormAct2d: choose another model, or leave model.bn_group out."
            )
    for layer in found:
        # A forward that was wrapped before would go on without groups.
        assert "forward" not in vars(layer)
        if not isinstance(layer, GroupedBatchNorm):
            layer.__class__ = grouped[type(layer)]
            mean = layer.running_mean
            for name, shape in (("group_statistics", (2, layer.num_features)), ("num_groups", ())):
                buffer = None if mean is None else mean.new_zeros(shape)
                layer.register_buffer(name, buffer, persistent=False)
        layer.rows, layer.views, layer.dealt = rows, 1, 1


def deal_groups(module: nn.Module, among: int, but: Iterable[nn.Module] = ()) -> int:
    """Deal the samples of every `among` neighbouring groups in the layers of `module`, those inside `but` excepted.

    Returns:
        The number of layers that deal.
    """
    kept = {id(layer) for part in but for layer in part.modules()}
    layers = [layer for layer in _layers(module) if id(layer) not in kept]
    for layer in layers:
        layer.dealt = among
    return len(layers)


def _layers(module: nn.Module) -> list[GroupedBatchNorm]:
    return [layer for layer in module.modules() if isinstance(layer, GroupedBatchNorm)]


def _tracking(module: nn.Module) -> list[GroupedBatchNorm]:
    return [layer for layer in _layers(module) if layer.tracks]


@contextlib.contextmanager
def views_in_pass(module: nn.Module, count: int) -> Iterator[None]:
    """Inside, a forward holds `count` views of each sample, sample by sample, which share the statistics of their group.

    It has no effect on layers without groups. Use it around compiled code: another count compiles once more.
    """
    assert count > 0
    layers = _layers(module)
    before = [layer.views for layer in layers]
    for layer in layers:
        layer.views = count
    try:
        yield
    finally:
        for layer, views in zip(layers, before, strict=True):
            layer.views = views


@torch.no_grad()
def commit_statistics(module: nn.Module, applied: Tensor | bool = True) -> None:
    """Move the running statistics of grouped layers by those of the forwards since the last commit, as one batch; call it once a step.

    running = (1 - momentum) * running + momentum * average over the groups, of mean and of unbiased variance; num_batches_tracked
    grows by 1, and a momentum of None is 1 / num_batches_tracked, as in BatchNorm. Layers that saw no group stay as they are.

    Args:
        applied: a bool, or a boolean scalar on the device, which is not waited for. False: only `drop_statistics`.
    """
    by_momentum: dict[float | None, list[GroupedBatchNorm]] = {}
    for layer in _tracking(module):
        by_momentum.setdefault(layer.momentum, []).append(layer)
    for momentum, layers in by_momentum.items():
        _move(layers, momentum, applied)
    drop_statistics(module)


def _move(layers: list[GroupedBatchNorm], momentum: float | None, applied: Tensor | bool) -> None:
    """Move the running statistics of layers with the same momentum, in a few operations for all of them."""
    used = (torch.stack([layer.get_buffer("num_groups") for layer in layers]) > 0) & applied
    num_batches = [layer.get_buffer("num_batches_tracked") for layer in layers]
    torch._foreach_add_(num_batches, list(used.long().unbind()))
    running = [layer.get_buffer(name) for layer in layers for name in ("running_mean", "running_var")]
    sizes = [len(buffer) for buffer in running]

    def repeated(values: Tensor) -> Tensor:
        """One value a layer -> one for each of its running statistics."""
        return torch.cat([v.expand(2 * n.num_features) for v, n in zip(values.unbind(), layers, strict=True)])

    old = torch.cat(running)
    new = torch.cat([layer.get_buffer("group_statistics").flatten() for layer in layers])
    share = repeated(1 / torch.stack(num_batches).to(old.dtype)) if momentum is None else momentum
    moved = torch.where(repeated(used), old.lerp(new, share), old)
    torch._foreach_copy_(running, list(moved.split(sizes)))


@torch.no_grad()
def drop_statistics(module: nn.Module) -> None:
    """Forget the statistics of the forwards since the last commit, as after a step that was not applied."""
    layers = _tracking(module)
    for name in ("group_statistics", "num_groups"):
        if layers:
            torch._foreach_zero_([layer.get_buffer(name) for layer in layers])


def average_statistics(module: nn.Module) -> None:
    """Replace the running statistics of grouped layers by their means over ranks, in one collective; call it on every rank.

    Each rank's statistics are those of its own groups. The rule that moves them is linear, so their mean is the exact result of all
    groups, whenever it is taken, if all ranks have equally many. At world 1 nothing happens.
    """
    names = ("running_mean", "running_var")
    average_over_ranks([layer.get_buffer(name) for layer in _tracking(module) for name in names])
