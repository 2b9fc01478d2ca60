"""One optimiser step over a batch: gradients of the whole of it, in chunks where it does not fit, then the update."""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from fastssl.core.distributed import any_over_ranks
from fastssl.methods.collapse import batch_statistics
from fastssl.methods.method import Method, StepOutput
from fastssl.models.batch_norm import depends_on_batch, frozen_statistics
from pipelines.streaming.lazy_views import LazyViews, count_samples, rows_of
from pipelines.streaming.stream import hand_over


class DDPWrapper(nn.Module):
    """Lets any part of a method run through DistributedDataParallel, which sees `forward` alone."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method

    def forward(self, run: Callable[..., Any], *args: Any) -> Any:
        return run(*args)


class Step:
    """Computes the gradients of a batch and applies them; `model` is the method's `DDPWrapper`, under DDP with several ranks.

    With `micro_batch` m > 0 the batch of this process runs through the backbones in chunks of at most m images, as equal as can be.
    The teacher comes first: its backbone in chunks, its heads once over the whole batch, its keys gathered once. Then

    - the student in chunks, each against the targets of the whole batch, a backward pass a chunk: the gradient of the undivided batch
      at no extra forward (8 forwards an image), but for the student's BatchNorm and the teacher's backbone's, which see a chunk at a
      time; or
    - with `exact_heads`, the student's backbone in chunks without gradient, heads and loss once over the whole batch, then the
      backbone in chunks again with the gradient of its features (gradient cache, Gao et al. 2021, arXiv 2101.06983; 10 forwards an
      image): the gradient of the undivided batch but for BatchNorm in the backbones. Running statistics follow the first forward only.

    Under DDP only the last chunk's backward pass sums gradients over ranks. Nothing here waits for a GPU, fp16's scaler included.

    A step whose loss or gradient is not finite changes no weight and no state of the optimiser. With `nonfinite` "stop" no later
    one does either, so that the weights of that moment can be looked at; with "skip" the teacher and the statistics of BatchNorm
    stay as well, and the next step is taken. After each update `loss`, `features`, `grad_norm` (before clipping) and `applied`
    (bool: the optimiser has stepped) tell of it, as tensors on the device.
    """

    def __init__(
        self,
        method: Method,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        *,
        micro_batch: int = 0,
        exact_heads: bool = False,
        clip_grad: float = 0.0,
        nonfinite: Literal["stop", "skip"] = "stop",
    ) -> None:
        self.method, self.model, self.optimizer = method, model, optimizer
        self.device, self.dtype = device, dtype
        self.micro_batch, self.exact_heads, self.clip_grad = micro_batch, exact_heads, clip_grad
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.loss = self.grad_norm = torch.zeros((), device=device)
        self.applied = torch.ones((), dtype=torch.bool, device=device)
        self.features = torch.zeros((0, 0), device=device)
        self._skip = nonfinite == "skip"
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
        """Leave the gradients of the batch in the parameters and return its metrics (see `StepOutput.metrics`).

        Args:
            views: (N, C, H, W) each, on the device; or float32 on the host, to be copied chunk by chunk; or `LazyViews`, to be made
                chunk by chunk, for each pass over them anew.
            seed: called with the number of a chunk before its student's forward, to fix what that draws.
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
        # Whether it is finite matters, and its value where it is not.
        self.loss = torch.stack([output.loss for output in outputs]).sum()
        metrics = {
            name: torch.stack([o.metrics[name] * s for o, s in zip(outputs, shares, strict=True)]).sum()
            for name in outputs[0].metrics
        }
        self.features = torch.cat([output.features for output in outputs])
        return metrics | batch_statistics(self.features)

    def update(self, momentum: float) -> Tensor:
        """Clip, step and clear the gradients, then move the teacher; returns whether the step was unusable.

        That is a boolean scalar on the device, the same on every rank: the loss or the gradient was not finite, and weights and
        optimiser are as before. Under fp16's scaler, where gradients overflow as a rule from
        time to time, that is the scaler's matter, and only the loss makes a step unusable.
        """
        parameters = [p for p in self.method.parameters() if p.grad is not None]
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        bad = ~self.loss.isfinite()
        if self.scaler.is_enabled():
            bad = any_over_ranks(bad)  # the gradients are summed over ranks, each loss is a rank's own
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
        if self.device.type == "cpu":  # there is nothing to wait for
            self.method.update_teacher(1.0 if bad else momentum)
        elif self._skip:
            self.method.update_teacher(torch.where(bad, 1.0, momentum))
        else:  # the fast way: a run that is about to stop may move its teacher once more
            self.method.update_teacher(momentum)
        for now, before in zip(self._statistics, self._before, strict=True):
            now.copy_(torch.where(bad, before, now))

    def _apply(self, bad: Tensor) -> None:
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif self.device.type == "cuda" and getattr(self.optimizer, "_step_supports_amp_scaling", False):
            # As GradScaler tells them: the fused optimisers and LARS decide on the device. The others have to wait for it, and on a
            # CPU there is nothing to wait for.
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
            seed(number)  # the same blocks are skipped again
            last = rows is parts[-1]
            with self._gradients_of_ranks(last):
                with frozen_statistics(self.method.backbone):
                    again = self._run(self._features_again, chunk, last)
                pull = [p[rows] for p in pulls if p is not None]
                torch.autograd.backward(again, pull + [torch.ones_like(x) for x in again[len(pull) :]])
        return [output._replace(loss=output.loss.detach())]

    def _features_again(self, views: list[Tensor], last: bool) -> list[Tensor]:
        """The student's features and, for DDP's last pass, a zero made from the heads: it waits for every parameter to take part."""
        features = self.method.student_features(views)
        if last and isinstance(self.model, DistributedDataParallel):
            trained = [p for head in self.method.heads() for p in head.parameters() if p.requires_grad]
            features = [*features, 0 * torch.stack([p.sum() for p in trained]).sum()]
        return features

    def _run(self, part: Callable[..., Any], *args: Any) -> Any:
        with self._autocast():
            return self.model(part, *args)

    def _autocast(self) -> torch.autocast:
        # One context a forward: a weight cast within no_grad would be taken from the context's cache by a forward with gradient.
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def _gradients_of_ranks(self, wanted: bool) -> contextlib.AbstractContextManager:
        """Within, a backward pass sums gradients over ranks only if `wanted`."""
        if wanted or not isinstance(self.model, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.model.no_sync()

    def _on_device(self, views: Sequence[Tensor], parts: list[slice]) -> Iterator[list[Tensor]]:
        """The views of each part. What lies on the host, or is still to be made, is copied or made a part ahead, on a stream of its
        own, while the device computes.

        A part is emptied when the next one is asked for, so that no more than two are held at a time.
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
    """0 .. count - 1 in the fewest parts of at most `micro_batch` (0: one part), whose sizes differ by one at most."""
    num = -(-count // micro_batch) if micro_batch else 1
    edges = [part * count // num for part in range(num + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


def steady_statistics(method: Method, num_chunks: int, exact_heads: bool) -> None:
    """Let running statistics that are updated once a chunk follow as fast as if once a step: momentum 1 - (1 - m)^(1 / chunks)."""
    for module in [*method.backbones(), *([] if exact_heads else method.heads())]:
        for norm in module.modules():
            if isinstance(norm, _BatchNorm) and norm.momentum:
                norm.momentum = 1 - (1 - norm.momentum) ** (1 / num_chunks)


def tell_chunks(method: Method, count: int, num_chunks: int, exact_heads: bool) -> str:
    """A line for people: how the `count` images of a process are divided, and what is not as in the undivided batch."""
    inexact = []
    if any(map(depends_on_batch, method.backbones())):
        inexact.append("the backbones")
    if not exact_heads and any(map(depends_on_batch, method.heads())):
        inexact.append("the student's heads")
    line = f"{count} images a process in {num_chunks} chunks of at most {-(-count // num_chunks)}, each against the keys of all"
    if not inexact:
        return f"{line}: the gradient of the undivided batch"
    way_out = "" if exact_heads else ", --train.exact-heads True gives the heads the whole batch"
    return f"{line}; BatchNorm in {' and '.join(inexact)} sees a chunk at a time{way_out}"


def _joined(parts: list[list[Tensor]]) -> list[Tensor]:
    """Chunks of each view put together again."""
    return parts[0] if len(parts) == 1 else [torch.cat(view) for view in zip(*parts, strict=True)]
