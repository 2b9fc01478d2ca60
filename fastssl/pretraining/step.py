"""One optimizer step over a batch: gradients of the whole batch, in chunks where it does not fit, then the update."""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from fastssl.core.distributed import any_over_ranks
from fastssl.core.optimizers import clip_each
from fastssl.core.schedules import Clock
from fastssl.methods.collapse import batch_statistics
from fastssl.methods.method import Method, StepOutput
from fastssl.methods.trees import join_rows, tensors_of
from fastssl.models.batch_norm import depends_on_batch, frozen_statistics
from fastssl.models.grouped_batch_norm import GroupedBatchNorm, commit_statistics
from pipelines.streaming.batch_stream import hand_over
from pipelines.streaming.lazy_views import LazyViews, count_samples, rows_of
from shards.counter_hash import UInt64


class DDPWrapper(nn.Module):
    """Run any part of a method through DistributedDataParallel, which wraps `forward` only."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method

    def forward(self, run: Callable[..., Any], *args: Any) -> Any:
        return run(*args)


@dataclass(frozen=True)
class StepOptions:
    """How `Step` divides a batch and what it does with the gradients; the settings of `TrainConfig` of the same names."""

    micro_batch: int = 0
    """Images of a chunk at most; 0: the whole batch at once."""
    exact_heads: bool = False
    clip_grad: float = 0.0
    nonfinite: Literal["stop", "skip"] = "stop"
    group: int = 1
    """Images that share BatchNorm's statistics (model.bn_group): chunks hold whole groups."""


WHOLE_BATCH = StepOptions()
START = Clock()


class Step:
    """Compute the gradients of a batch and apply them; `model` is the method's `DDPWrapper`, under DDP with several ranks.

    With `micro_batch` m > 0 the batch of this process runs through the backbones in chunks of at most m images, of nearly equal size.
    The teacher comes first: its backbone in chunks, its heads once over the whole batch, its targets gathered once. Then one of these:

    - The student runs in chunks, each against the targets of the whole batch, with a backward pass per chunk. The gradient is that of
      the undivided batch, at no extra forward. Only BatchNorm is inexact (the student's, and that of the teacher's backbone): it sees
      one chunk.
    - Where the method's loss is not separable, or its targets come from the student, and with `exact_heads`: the student's backbone
      runs in chunks without gradient, heads and loss run once over the whole batch, and the backbone runs in chunks again with the
      gradient of its features (gradient cache, Gao et al. 2021, arXiv 2101.06983; one more forward of the student). Only BatchNorm in
      the backbones is inexact. Running statistics follow the first forward only.

    BatchNorm in groups (`group` images) is exact in both ways: chunks hold whole groups.

    Under DDP only the last chunk's backward pass sums gradients over ranks. No step waits for a GPU, not even fp16's scaler.

    A step whose loss or gradient is not finite changes neither weights nor optimizer state. With `nonfinite` "stop" no later step does
    either, so that the weights of that moment can be inspected; with "skip" the teacher and the statistics of BatchNorm stay unchanged
    too, and training continues. After each update `loss`, `features`, `grad_norm` (before clipping) and `applied` (bool: the optimizer
    has stepped) describe it, as tensors on the device.
    """

    def __init__(
        self,
        method: Method,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        options: StepOptions = WHOLE_BATCH,
    ) -> None:
        self.method, self.model, self.optimizer = method, model, optimizer
        self.device, self.dtype = device, dtype
        self.micro_batch, self.group = options.micro_batch, options.group
        self.cached = caches_gradients(method, options.exact_heads)
        """Whether a batch in chunks takes the gradient of the loss with respect to all features first."""
        self.clip_grad = options.clip_grad
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.loss = self.grad_norm = torch.zeros((), device=device)
        self.applied = torch.ones((), dtype=torch.bool, device=device)
        self.features = torch.zeros((0, 0), device=device)
        self._skip = options.nonfinite == "skip"
        self._stopped = torch.zeros((), dtype=torch.bool, device=device)
        self._statistics = (
            [b for m in method.modules() if isinstance(m, _BatchNorm) for b in m.buffers()]
            if self._skip
            else []
        )
        self._before: list[Tensor] = []
        self._keys: UInt64 | None = None
        self.remembered: Any = None
        """The targets of the last `gradients`, until `update` lets the method remember them."""

    def gradients(
        self, views: Sequence[Tensor], clock: Clock = START, keys: UInt64 | None = None
    ) -> dict[str, Tensor]:
        """Compute the gradients of the batch into the parameters and return its metrics (see `StepOutput.metrics`).

        Args:
            views: (N, C, H, W) each, on the device; or float32 on the host, to be copied chunk by chunk; or `LazyViews`, to be made
                chunk by chunk, anew for each pass over them.
            clock: the place of the step in the run.
            keys: of the samples, uint64 (N,), for what is drawn inside the model; None: PyTorch's random numbers.
        """
        parts = chunks(count_samples(views), self.micro_batch, self.group)
        self._keys, self.method.clock = keys, clock
        self._before = [buffer.clone() for buffer in self._statistics]
        self.method.before_step()
        if len(parts) > 1 and self.cached:
            outputs = self._exact(views, parts)
        else:
            targets = self._targets(views, parts) if self.method.targets_from == "teacher" else None
            outputs = self._by_chunk(views, parts, targets)
        self.remembered = outputs[0].targets
        if len(outputs) == 1:
            self.loss, self.features = outputs[0].loss, outputs[0].features
            return outputs[0].metrics
        shares = [(rows.stop - rows.start) / parts[-1].stop for rows in parts]
        # The sum tells whether every chunk's loss is finite, and which value it has if not.
        self.loss = torch.stack([output.loss for output in outputs]).sum()
        metrics = {
            name: torch.stack([o.metrics[name] * s for o, s in zip(outputs, shares, strict=True)]).sum()
            for name in outputs[0].metrics
        }
        self.features = torch.cat([output.features for output in outputs])
        return metrics | batch_statistics(self.features)

    def update(self, momentum: float) -> Tensor:
        """Clip, step and clear the gradients, then move the teacher; return whether the step was unusable.

        The result is a boolean scalar on the device, the same on every rank. True: the loss or the gradient was not finite, and
        weights and optimizer are as before. Under fp16's scaler gradients overflow now and then, which the scaler handles; there only
        the loss makes a step unusable.
        """
        self.scaler.unscale_(self.optimizer)
        self.method.after_backward()
        parameters = [p for p in self.method.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        bad = ~self.loss.isfinite()
        if self.scaler.is_enabled():
            # Gradients are summed over ranks, but each rank has its own loss.
            bad = any_over_ranks(bad)
        else:
            bad |= ~norm.isfinite()
        if not self._skip:
            self._stopped = bad = bad | self._stopped
        clip_each(self.optimizer)
        if self.clip_grad:
            nn.utils.clip_grads_with_norm_(parameters, self.clip_grad, norm)
        self._apply(bad)
        self.optimizer.zero_grad(set_to_none=True)
        if self.group > 1:
            commit_statistics(self.method, ~bad)
        self.grad_norm, self.applied = norm, norm.isfinite() & ~bad
        if self.remembered is not None:
            self.method.remember(self.remembered, self.applied)
        self.remembered = None
        self._move_teacher(momentum, bad)
        return bad

    def _move_teacher(self, momentum: float, bad: Tensor) -> None:
        if self.device.type == "cpu":
            # On a CPU there is nothing to wait for.
            self.method.update_teacher(1.0 if bad else momentum)
        elif self._skip:
            self.method.update_teacher(torch.where(bad, 1.0, momentum))
        else:
            # The fast way: a run that is about to stop may move its teacher once more.
            self.method.update_teacher(momentum)
        for now, before in zip(self._statistics, self._before, strict=True):
            now.copy_(torch.where(bad, before, now))

    def _apply(self, bad: Tensor) -> None:
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif self.device.type == "cuda" and getattr(self.optimizer, "_step_supports_amp_scaling", False):
            # As GradScaler does it: the fused optimizers and LARS decide on the device whether to step. The others wait for the
            # device; on a CPU there is nothing to wait for.
            self.optimizer.grad_scale, self.optimizer.found_inf = None, bad.float()  # pyright: ignore[reportAttributeAccessIssue]
            self.optimizer.step()
        elif not bad:
            self.optimizer.step()

    def _targets(self, views: Sequence[Tensor], parts: list[slice]) -> Any:
        teacher = self._teacher_features(views, parts)
        with self._autocast():
            return self.method.targets(teacher)

    def _teacher_features(self, views: Sequence[Tensor], parts: list[slice]) -> Any:
        """Return the teacher's features of the whole batch; None without a teacher."""
        if not self.method.plan.teacher:
            return None
        features = []
        for rows, chunk in zip(parts, self._on_device(views, parts), strict=True):
            self._begin(rows)
            with self._autocast():
                features.append(self.method.teacher_features(chunk))
        return join_rows(features)

    def _by_chunk(self, views: Sequence[Tensor], parts: list[slice], targets: Any) -> list[StepOutput]:
        outputs = []
        for rows, chunk in zip(parts, self._on_device(views, parts), strict=True):
            self._begin(rows)
            with self._gradients_of_ranks(rows is parts[-1]):
                output = self._run(self.method.forward, chunk, targets, rows.start)
                share = (rows.stop - rows.start) / parts[-1].stop
                self.scaler.scale(output.loss * share).backward()
            outputs.append(output._replace(loss=output.loss.detach()))
        return outputs

    def _exact(self, views: Sequence[Tensor], parts: list[slice]) -> list[StepOutput]:
        method = self.method
        teacher = self._teacher_features(views, parts)
        kept = []
        for rows, chunk in zip(parts, self._on_device(views, parts), strict=True):
            self._begin(rows)
            with torch.no_grad(), self._autocast():
                kept.append(method.student_features(chunk))
        whole = join_rows(kept)
        with self._autocast():
            targets = (
                method.targets(teacher, whole)
                if method.targets_from == "student"
                else method.targets(teacher)
            )
        features = [feature.requires_grad_() for feature in tensors_of(whole) if feature.is_floating_point()]
        with self._gradients_of_ranks(False):
            output = self._run(method.loss, whole, targets)
            self.scaler.scale(output.loss).backward()
        pulls = [feature.grad for feature in features]
        for rows, chunk in zip(parts, self._on_device(views, parts), strict=True):
            # What is drawn inside the model is drawn as before.
            self._begin(rows)
            last = rows is parts[-1]
            with self._gradients_of_ranks(last):
                with frozen_statistics(method.backbone):
                    again = self._run(self._features_again, chunk, last)
                pull = [p[rows] for p in pulls if p is not None]
                torch.autograd.backward(again, pull + [torch.ones_like(x) for x in again[len(pull) :]])
        return [output._replace(loss=output.loss.detach(), targets=targets)]

    def _begin(self, rows: slice) -> None:
        """Let what is drawn inside the model follow these images."""
        self.method.draw_keys = None if self._keys is None else self._keys[rows]

    def _features_again(self, views: list[Tensor], last: bool) -> list[Tensor]:
        """Return the student's features and, for DDP's last pass, a zero made from the heads: DDP waits for every parameter."""
        features = [x for x in tensors_of(self.method.student_features(views)) if x.requires_grad]
        if last and isinstance(self.model, DistributedDataParallel):
            trained = [p for head in self.method.heads() for p in head.parameters() if p.requires_grad]
            features = [*features, 0 * torch.stack([p.sum() for p in trained]).sum()]
        return features

    def _run(self, part: Callable[..., Any], *args: Any) -> Any:
        with self._autocast():
            return self.model(part, *args)

    def _autocast(self) -> torch.autocast:
        # One context per forward: a forward with gradient must not use weights that were cast and cached under no_grad.
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def _gradients_of_ranks(self, wanted: bool) -> contextlib.AbstractContextManager:
        """Return a context in which a backward pass sums gradients over ranks only if `wanted`."""
        if wanted or not isinstance(self.model, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.model.no_sync()

    def _on_device(self, views: Sequence[Tensor], parts: list[slice]) -> Iterator[list[Tensor]]:
        """Yield the views of each part. Views on the host or still to be made are copied or made one part ahead, on a stream of
        their own, while the device computes.

        A part is freed when the next one is requested, so that at most two are held.
        """
        if self._copies is None or (not isinstance(views, LazyViews) and views[0].is_cuda):
            for rows in parts:
                chunk = [view.to(self.device) for view in rows_of(views, rows)]
                yield chunk
                chunk.clear()
            return
        ahead: deque[tuple[list[Tensor], torch.cuda.Event]] = deque()
        waiting = iter(parts)
        for _ in parts:
            for rows in itertools.islice(waiting, 2 - len(ahead)):
                ahead.append(self._bring(views, rows))
            chunk, brought = ahead.popleft()
            hand_over(chunk, brought, self.device)
            yield chunk
            chunk.clear()

    def _bring(self, views: Sequence[Tensor], rows: slice) -> tuple[list[Tensor], torch.cuda.Event]:
        with torch.cuda.stream(self._copies):
            chunk = [view.to(self.device, non_blocking=True) for view in rows_of(views, rows)]
            brought = torch.cuda.Event()
            brought.record()
        return chunk, brought


def chunks(count: int, micro_batch: int, group: int = 1) -> list[slice]:
    """Divide 0 .. count - 1 into the fewest parts of at most `micro_batch` (0: one part), whose sizes differ by at most one.

    With `group` > 1 the parts hold whole groups of that size, and at least one; their sizes differ by at most one group.
    """
    groups = count // group
    assert groups * group == count, "the configuration is checked for this"
    num = -(-groups // max(1, micro_batch // group)) if micro_batch else 1
    edges = [part * groups // num * group for part in range(num + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


def caches_gradients(method: Method, exact_heads: bool) -> bool:
    """Return whether a batch in chunks takes a gradient cache: where it was asked for, or the loss needs all features at once."""
    return exact_heads or not method.separable or method.targets_from == "student"


def steady_statistics(method: Method, num_chunks: int, cached: bool) -> None:
    """Lower BatchNorm's momentum so that updates once a chunk equal one update a step: momentum 1 - (1 - m)^(1 / chunks).

    `cached`: the heads see the whole batch at once, see `caches_gradients`.
    """
    for module in [*method.backbones(), *([] if cached else method.heads())]:
        for norm in module.modules():
            if isinstance(norm, _BatchNorm) and norm.momentum and not isinstance(norm, GroupedBatchNorm):
                norm.momentum = 1 - (1 - norm.momentum) ** (1 / num_chunks)


def depends_on_chunk(module: nn.Module) -> bool:
    """Return whether the module's output for an image depends on its chunk: groups of BatchNorm are whole in each."""
    grouped = any(isinstance(m, GroupedBatchNorm) for m in module.modules())
    return depends_on_batch(module) and not grouped


def tell_chunks(method: Method, count: int, num_chunks: int, cached: bool) -> str:
    """Return a line for the screen: how the `count` images of a process are divided, and which gradients are inexact."""
    inexact = []
    if any(map(depends_on_chunk, method.backbones())):
        inexact.append("the backbones")
    if not cached and any(map(depends_on_chunk, method.heads())):
        inexact.append("the student's heads")
    line = f"{count} images a process in {num_chunks} chunks of at most {-(-count // num_chunks)}, each against the whole batch"
    if not inexact:
        return f"{line}: the gradient of the undivided batch"
    way_out = "" if cached else ", --train.exact-heads True gives the heads the whole batch"
    return f"{line}; BatchNorm in {' and '.join(inexact)} sees one chunk at a time{way_out}"
