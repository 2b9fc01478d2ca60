"""MoCo v3 (Chen, Xie, He: Training Self-Supervised Vision Transformers, arXiv 2104.02057)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastssl.core.distributed import gather_keys, rank, world
from fastssl.core.schedules import Clock, cosine_momentum
from fastssl.methods.collapse import batch_statistics
from fastssl.methods.ema import ema_update, relative_distance, teacher_of
from fastssl.methods.heads import mlp
from fastssl.methods.losses import info_nce
from fastssl.methods.method import Method, StepOutput
from fastssl.methods.queue import KeyQueue
from fastssl.methods.view_plan import ViewPlan, need_two_views
from fastssl.models.batch_norm import depends_on_batch
from shards.errors import UserError


@dataclass(frozen=True)
class MoCoV3Config:
    """Settings of MoCo v3. The defaults are those published for ViTs; ResNet-50 has temperature 1.0."""

    dim: int = 256
    """Dimension of queries and keys."""
    hidden_dim: int = 4096
    """Width of the hidden layers of the heads."""
    temperature: float = 0.2
    """Softmax temperature: 0.2 for ViTs, 1.0 for ResNets."""
    momentum: float = 0.99
    """Momentum of the teacher at the start of the run (0.996 for 1000 epochs)."""
    momentum_cosine: bool = True
    """Raise the teacher's momentum to 1 over the run by half a cosine; False: keep it constant."""
    head: Literal["auto", "resnet", "vit"] = "auto"
    """resnet: projector of 2 layers, predictor without a final BatchNorm; vit: projector of 3 layers, predictor with one. auto:
    vit for ViTs and for backbones without BatchNorm, resnet for the others."""
    ema: Literal["foreach", "loop"] = "foreach"
    """Implementation of the teacher's average: one multi-tensor operation, or (for comparison) a loop over the tensors."""
    queue: int = 0
    """Keys of earlier steps that serve as further negatives, a multiple of train.batch; 0: the keys of the batch only, as in the
    paper. For small batches: MoCo v2 has 65536."""

    def __post_init__(self) -> None:
        for name in ("dim", "hidden_dim", "temperature"):
            if getattr(self, name) <= 0:
                raise UserError(f"method.{name} is {getattr(self, name):g} but must be greater than 0.")
        if self.queue < 0:
            raise UserError(f"method.queue is {self.queue} but must be 0 (none) or more.")
        if not 0 <= self.momentum <= 1:
            raise UserError(f"method.momentum is {self.momentum:g} but must lie between 0 and 1.")


class Keys(NamedTuple):
    """The keys of each view, float32 (M, dim): those of the batch in rank order, then those of the queue."""

    first: Tensor
    second: Tensor
    num_batch: int
    """Number of keys of the batch."""


class MoCoV3(Method):
    """The student learns which of the teacher's keys comes from the other view of the same image.

    `backbone` maps images (N, C, H, W) to features (N, backbone.num_features). The student is backbone, projector and predictor; the
    teacher is a moving average of the student's backbone and projector, and has no predictor.

    One training step is: loss = method(views).loss; loss.backward(); optimizer.step();
    method.update_teacher(method.teacher_momentum(clock of this step)). The paper's code updates the teacher at the start of
    the next step instead, before the keys are computed. Both give the same keys, because its first update finds teacher and student
    equal; here, forward changes no weight.

    Keys carry no gradient and queries are compared with keys only, so the loss is a mean over queries: chunks of the student's images
    against all keys give the gradient of the whole batch. Only BatchNorm is inexact: it sees one chunk.
    """

    Config = MoCoV3Config
    cfg: MoCoV3Config

    def __init__(self, backbone: nn.Module, cfg: MoCoV3Config) -> None:
        super().__init__(backbone, cfg)
        self.projector, self.predictor = build_heads(backbone, cfg)
        self.teacher_backbone, self.teacher_projector = teacher_of(backbone), teacher_of(self.projector)
        self.queue = KeyQueue(2, cfg.queue, cfg.dim) if cfg.queue else None

    def plan_views(self, num_global: int, num_local: int) -> ViewPlan:
        """Return the plan for two global views and no local ones; raise UserError for others."""
        need_two_views("MoCo v3", num_global, num_local)
        # With BatchNorm the views go one by one: in the paper each view has statistics of its own.
        return ViewPlan()

    def check_batch(self, batch: int) -> None:
        """Raise UserError unless whole batches fill the queue."""
        if self.cfg.queue % batch:
            near = max(1, round(self.cfg.queue / batch)) * batch
            raise UserError(
                f"method.queue is {self.cfg.queue} and train.batch is {batch}, but whole batches must fill the queue: "
                f"set --method.queue {near}."
            )

    def keys(self, views: list[Tensor]) -> list[Tensor]:
        """Return the teacher's keys of each view, (N, dim) each, without gradient and not yet normalised.

        In training the teacher's BatchNorm uses the batch's statistics and has running statistics of its own.
        """
        return self._project(self.teacher_features(views))

    def targets(self, teacher: list[Tensor], student: Any = None) -> Keys:
        """Return the keys of all ranks and of the queue, from the teacher's features of this rank's whole batch."""
        return self._gather(self._project(teacher))

    def loss(self, features: list[Tensor], targets: Keys, first: int = 0) -> StepOutput:
        """Return the loss of two views of this rank's images against the keys of all ranks.

        loss = 2 * temperature * (CE(q1, k2) + CE(q2, k1)), which is 4 * temperature * ln(number of keys) at
        chance. Metrics: loss; ce, the mean of the two plain cross-entropies in nats; ce_norm, ce / ln(number
        of keys), 1 at chance; acc, the share of queries that find their key, 0 to 1; feature_std of the first
        view's backbone features (see `collapse.feature_std`). May run under autocast: the loss is computed in
        float32 outside of it. Raises UserError in training for one image per process.
        """
        self._check_enough(features)
        query1, query2 = (self.predictor(self.projector(feature)) for feature in features)
        with torch.autocast(query1.device.type, enabled=False):
            return self._output(query1, query2, targets, features[0].detach(), first)

    def backbones(self) -> list[nn.Module]:
        return [self.backbone, self.teacher_backbone]

    def heads(self) -> list[nn.Module]:
        return [self.projector, self.predictor]

    def remember(self, targets: Keys, applied: Tensor | None = None) -> None:
        """Push the batch's keys into the queue, if there is one."""
        if self.queue is not None:
            self.queue.push(torch.stack([keys[: targets.num_batch] for keys in targets[:2]]), applied)

    def update_teacher(self, momentum: float | Tensor) -> None:
        """Set teacher = momentum * teacher + (1 - momentum) * student, over parameters; buffers stay as they are.

        Call it after optimizer.step(), with teacher_momentum of that step.
        """
        ema_update(*self._averaged(), momentum, self.cfg.ema)

    def teacher_distance(self) -> Tensor:
        return relative_distance(*self._averaged())

    def _averaged(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Return the teacher's parameters, and those of the student of which they are averages."""
        student = [*self.backbone.parameters(), *self.projector.parameters()]
        return [*self.teacher_backbone.parameters(), *self.teacher_projector.parameters()], student

    def teacher_momentum(self, clock: Clock) -> float:
        """Return the momentum, which follows the share of the run done after the step; see `schedules.cosine_momentum`."""
        return (
            cosine_momentum(clock.after, self.cfg.momentum) if self.cfg.momentum_cosine else self.cfg.momentum
        )

    def _check_enough(self, features: list[Tensor]) -> None:
        if self.training and len(features[0]) < 2:
            raise UserError(
                "The batch or a chunk of it has 1 image per process, but BatchNorm needs at least 2 in training: "
                "raise the batch size or train.micro_batch, or start fewer processes."
            )

    @torch.no_grad()
    def _project(self, features: list[Tensor]) -> list[Tensor]:
        self._check_enough(features)
        return [self.teacher_projector(feature) for feature in features]

    @torch.no_grad()
    def _gather(self, keys: list[Tensor]) -> Keys:
        """Return the keys of all ranks and of the queue, from this rank's keys of each view, (N, dim)."""
        # One collective for both views: a row of the gathered tensor is [k1, k2] of one image.
        first, second = gather_keys(torch.cat(keys, dim=1).float()).chunk(2, dim=1)
        num_batch = len(first)
        if self.queue is not None:
            earlier = self.queue.filled()
            first, second = torch.cat([first, earlier[0]]), torch.cat([second, earlier[1]])
        return Keys(first, second, num_batch)

    def _output(self, q1: Tensor, q2: Tensor, keys: Keys, features: Tensor, first: int = 0) -> StepOutput:
        """Return loss and metrics from queries, (N, dim) each, and features (N, D), of this rank's images from `first` on."""
        first_target = rank() * (keys.num_batch // world()) + first
        temperature = self.cfg.temperature
        one = info_nce(q1, keys.second, temperature, first_target)
        other = info_nce(q2, keys.first, temperature, first_target)
        loss = 2 * temperature * (one.ce + other.ce)
        ce = (one.ce + other.ce).detach() / 2
        metrics = {
            "loss": loss.detach(),
            "ce": ce,
            "ce_norm": ce / math.log(len(keys.first)) if len(keys.first) > 1 else ce,
            "acc": (one.accuracy + other.accuracy) / 2,
            **batch_statistics(features),
        }
        return StepOutput(loss, metrics, features)


def build_heads(backbone: nn.Module, cfg: MoCoV3Config) -> tuple[nn.Sequential, nn.Sequential]:
    """Return (projector, predictor) of the kind that cfg.head names, for a backbone of backbone.num_features features."""
    num_features = backbone.num_features
    assert isinstance(num_features, int)
    kind = cfg.head
    if kind == "auto":
        kind = "vit" if not depends_on_batch(backbone) or _is_vit(backbone) else "resnet"
    num_hidden = 2 if kind == "vit" else 1
    projector = mlp([num_features, *[cfg.hidden_dim] * num_hidden, cfg.dim], last_norm="plain")
    predictor = mlp([cfg.dim, cfg.hidden_dim, cfg.dim], last_norm="plain" if kind == "vit" else "none")
    return projector, predictor


def _is_vit(backbone: nn.Module) -> bool:
    # timm takes 2 s to import, which a command's --help should not wait for.
    from timm.models.vision_transformer import VisionTransformer

    return isinstance(backbone, VisionTransformer)
