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
from fastssl.methods.collapse import batch_statistics
from fastssl.methods.method import Method, StepOutput
from fastssl.models.batch_norm import depends_on_batch, frozen_statistics
from pipelines.streaming.batch_stream import hand_over
from pipelines.streaming.lazy_views import LazyViews, count_samples, rows_of


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


WHOLE_BATCH = StepOptions()


class Step:
    """Compute the gradients of a batch and apply them; `model` is the method's `DDPWrapper`, under DDP with several ranks.

    With `micro_batch` m > 0 the batch of this process runs through the backbones in chunks of at most m images, of nearly equal size.
    The teacher comes first: its backbone in chunks, its heads once over the whole batch, its keys gathered once. Then one of these:

    - The student runs in chunks, each against the targets of the whole batch, with a backward pass per chunk. The gradient is that of
      the undivided batch, at no extra forward (8 forwards an image). Only BatchNorm is inexact (the student's, and that of the
      teacher's backbone): it sees one chunk.
    - With `exact_heads`, the student's backbone runs in chunks without gradient, heads and loss run once over the whole batch, and the
      backbone runs in chunks again with the gradient of its features (gradient cache, Gao et al. 2021, arXiv 2101.06983; 10 forwards
      an image). Only BatchNorm in the backbones is inexact. Running statistics follow the first forward only.

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
        self.micro_batch, self.exact_heads = options.micro_batch, options.exact_heads
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

    def gradients(
        self, views: Sequence[Tensor], seed: Callable[[int], None] | None = None
    ) -> dict[str, Tensor]:
        """Compute the gradients of the batch into the parameters and return its metrics (see `StepOutput.metrics`).

        Args:
            views: (N, C, H, W) each, on the device; or float32 on the host, to be copied chunk by chunk; or `LazyViews`, to be made
                chunk by chunk, anew for each pass over them.
            seed: called with the number of a chunk before the student's forward on it, to fix its random draws.
        """
        parts = chunks(count_samples(views), self.micro_batch)
        self._before = [buffer.clone() for buffer in self._statistics]
        targets = self._targets(views, parts)
        run = self._exact if self.exact_heads and len(parts) > 1 else self._by_chunk
        outputs = run(views, parts, targets, seed or (lambda number: None))
        self.method.remember(targets)
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
        parameters = [p for p in self.method.parameters() if p.grad is not None]
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        bad = ~self.loss.isfinite()
        if self.scaler.is_enabled():
            # Gradients are summed over ranks, but each rank has its own loss.
            bad = any_over_ranks(bad)
        else:
            bad |= ~norm.isfinite()
        if not self._skip:
            self._stopped = bad = bad | self._stopped
        if self.clip_grad:
            nn.utils.clip_grads_with_norm_(parameters, self.clip_grad, norm)
        self._apply(bad)
        self.optimizer.zero_grad(set_to_none=True)
        self._move_teacher(momentum, bad)
        self.grad_norm, self.applied = norm, norm.isfinite() & ~bad
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
        features = []
        for chunk in self._on_device(views, parts):
            with self._autocast():
                features.append(self.method.teacher_features(chunk))
        with self._autocast():
            return self.method.targets(_joined(features))

    def _by_chunk(
        self, views: Sequence[Tensor], parts: list[slice], targets: Any, seed: Callable[[int], None]
    ) -> list[StepOutput]:
        outputs = []
        for number, (rows, chunk) in enumerate(zip(parts, self._on_device(views, parts), strict=True)):
            seed(number)
            with self._gradients_of_ranks(rows is parts[-1]):
                output = self._run(self.method.forward, chunk, targets, rows.start)
                share = (rows.stop - rows.start) / parts[-1].stop
                self.scaler.scale(output.loss * share).backward()
            outputs.append(output._replace(loss=output.loss.detach()))
        return outputs

    def _exact(
        self, views: Sequence[Tensor], parts: list[slice], targets: Any, seed: Callable[[int], None]
    ) -> list[StepOutput]:
        kept = []
        for number, chunk in enumerate(self._on_device(views, parts)):
            seed(number)
            with torch.no_grad(), self._autocast():
                kept.append(self.method.student_features(chunk))
        features = [feature.requires_grad_() for feature in _joined(kept)]
        with self._gradients_of_ranks(False):
            output = self._run(self.method.loss, features, targets)
            self.scaler.scale(output.loss).backward()
        pulls = [feature.grad for feature in features]
        for number, (rows, chunk) in enumerate(zip(parts, self._on_device(views, parts), strict=True)):
            # Stochastic depth skips the same blocks again.
            seed(number)
            last = rows is parts[-1]
            with self._gradients_of_ranks(last):
                with frozen_statistics(self.method.backbone):
                    again = self._run(self._features_again, chunk, last)
                pull = [p[rows] for p in pulls if p is not None]
                torch.autograd.backward(again, pull + [torch.ones_like(x) for x in again[len(pull) :]])
        return [output._replace(loss=output.loss.detach())]

    def _features_again(self, views: list[Tensor], last: bool) -> list[Tensor]:
        """Return the student's features and, for DDP's last pass, a zero made from the heads: DDP waits for every parameter."""
        features = self.method.student_features(views)
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


def chunks(count: int, micro_batch: int) -> list[slice]:
    """Divide 0 .. count - 1 into the fewest parts of at most `micro_batch` (0: one part), whose sizes differ by at most one."""
    num = -(-count // micro_batch) if micro_batch else 1
    edges = [part * count // num for part in range(num + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


def steady_statistics(method: Method, num_chunks: int, exact_heads: bool) -> None:
    """Lower BatchNorm's momentum so that updates once a chunk equal one update a step: momentum 1 - (1 - m)^(1 / chunks)."""
    for module in [*method.backbones(), *([] if exact_heads else method.heads())]:
        for norm in module.modules():
            if isinstance(norm, _BatchNorm) and norm.momentum:
                norm.momentum = 1 - (1 - norm.momentum) ** (1 / num_chunks)


def tell_chunks(method: Method, count: int, num_chunks: int, exact_heads: bool) -> str:
    """Return a line for the screen: how the `count` images of a process are divided, and which gradients are inexact."""
    inexact = []
    if any(map(depends_on_batch, method.backbones())):
        inexact.append("the backbones")
    if not exact_heads and any(map(depends_on_batch, method.heads())):
        inexact.append("the student's heads")
    line = f"{count} images a process in {num_chunks} chunks of at most {-(-count // num_chunks)}, each against the keys of all"
    if not inexact:
        return f"{line}: the gradient of the undivided batch"
    way_out = "" if exact_heads else ", --train.exact-heads True gives the heads the whole batch"
    return f"{line}; BatchNorm in {' and '.join(inexact)} sees one chunk at a time{way_out}"


def _joined(parts: list[list[Tensor]]) -> list[Tensor]:
    """Concatenate the chunks of each view."""
    return parts[0] if len(parts) == 1 else [torch.cat(view) for view in zip(*parts, strict=True)]
