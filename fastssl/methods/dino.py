"""DINO (Caron et al.: Emerging Properties in Self-Supervised Vision Transformers, arXiv 2104.14294).

Where the paper is silent, the authors' code (facebookresearch/dino) tells what was done.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.core.distributed import gather_keys
from fastssl.core.optimizers import OptimConfig, ParamGroup
from fastssl.core.schedules import Clock, cosine_momentum
from fastssl.methods.collapse import batch_statistics
from fastssl.methods.ema import ema_update, relative_distance, teacher_of
from fastssl.methods.method import Method, StepOutput
from fastssl.methods.method_defaults import Family, MethodDefaults
from fastssl.methods.view_plan import ViewPlan
from shards.errors import UserError


@dataclass(frozen=True)
class DINOConfig:
    """Settings of DINO. The defaults are those published for ViTs with 300 epochs and more."""

    out_dim: int = 65536
    """Outputs of the head, between which the softmax divides."""
    hidden_dim: int = 2048
    """Width of the hidden layers of the head."""
    bottleneck_dim: int = 256
    """Dimension of the unit vectors that the last layer is applied to."""
    batch_norm: bool = False
    """BatchNorm in the head's hidden layers; the published runs have none."""
    norm_last_layer: bool = True
    """Keep each row of the last layer's weight at length 1. False trains the lengths: better for ViT-S, unstable for larger ViTs."""
    student_temperature: float = 0.1
    """Softmax temperature of the student."""
    teacher_temperature: float = 0.07
    """Softmax temperature of the teacher after its warm-up; above 0.07 is unstable in most runs."""
    warmup_teacher_temperature: float = 0.04
    """Softmax temperature of the teacher at the start of the run, lower if the loss does not fall."""
    warmup_teacher_epochs: int = 30
    """Epochs in which the teacher's temperature rises linearly; 0: it is teacher_temperature from the start."""
    center_momentum: float = 0.9
    """Momentum of the centre, the average of the teacher's outputs over the last steps."""
    momentum: float = 0.996
    """Momentum of the teacher at the start of the run, which rises to 1 by half a cosine; 0.9995 for batches of 256."""
    freeze_last_layer: int = 1
    """Epochs in which the last layer stays as it is; more, if the loss does not fall."""
    clip_grad: float = 3.0
    """Clip the gradient of each parameter by itself to this L2 norm; 0: no clipping. train.clip_grad clips that of all together."""

    def __post_init__(self) -> None:
        least = {"out_dim": 2, "hidden_dim": 1, "bottleneck_dim": 1}
        least |= {"warmup_teacher_epochs": 0, "freeze_last_layer": 0, "clip_grad": 0}
        for name, low in least.items():
            # `not`, so that nan is refused too.
            if not getattr(self, name) >= low:
                raise UserError(f"method.{name} is {getattr(self, name):g} but must be {low} or more.")
        for name in ("student_temperature", "teacher_temperature", "warmup_teacher_temperature"):
            if not getattr(self, name) > 0:
                raise UserError(f"method.{name} is {getattr(self, name):g} but must be greater than 0.")
        for name in ("momentum", "center_momentum"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"method.{name} is {getattr(self, name):g} but must lie between 0 and 1.")


class WeightNormLinear(nn.Module):
    """Linear layer (..., D) -> (..., K) without bias, whose weight has rows of length 1, or of a trained length each.

    That is weight normalisation (Salimans, Kingma, arXiv 1602.07868). It starts as PyTorch's linear layer, in its directions.
    """

    def __init__(self, num_in: int, num_out: int, unit_length: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_out, num_in))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self.length = None if unit_length else nn.Parameter(torch.ones(num_out, 1))

    def forward(self, rows: Tensor) -> Tensor:
        weight = F.normalize(self.weight, dim=1)
        return F.linear(rows, weight if self.length is None else self.length * weight)


class DINOHead(nn.Module):
    """Three linear layers with GELU between, L2 normalisation, the weight-normed last layer: (N, num_features) -> (N, out_dim)."""

    def __init__(self, num_features: int, cfg: DINOConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for num_in in (num_features, cfg.hidden_dim):
            layers.append(nn.Linear(num_in, cfg.hidden_dim))
            if cfg.batch_norm:
                layers.append(nn.BatchNorm1d(cfg.hidden_dim))
            layers.append(nn.GELU())
        self.mlp = nn.Sequential(*layers, nn.Linear(cfg.hidden_dim, cfg.bottleneck_dim))
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last_layer = WeightNormLinear(cfg.bottleneck_dim, cfg.out_dim, cfg.norm_last_layer)

    def bottleneck(self, features: Tensor) -> Tensor:
        """Return what the last layer is applied to: unit vectors, float32 (N, bottleneck_dim)."""
        return F.normalize(self.mlp(features).float(), dim=1)

    def forward(self, features: Tensor) -> Tensor:
        return self.last_layer(self.bottleneck(features))


class Targets(NamedTuple):
    """What the teacher says of the global views of this rank's batch, before its last layer.

    The outputs themselves, float32 (N, out_dim) of two views, would take 2.1 GB at 4096 images and 65,536 outputs. The last layer is
    applied to a chunk's images at a time.
    """

    bottlenecks: list[Tensor]
    """Of each view, float32 (N, bottleneck_dim)."""
    mean_output: Tensor
    """The mean of the teacher's outputs over views, images and ranks, float32 (out_dim,)."""


class DINO(Method):
    """The student predicts, from any view of an image, the teacher's distribution over outputs for every other global view.

    `backbone` maps images (N, C, H, W) to features (N, backbone.num_features). The student is backbone and head; the teacher is a
    moving average of both, without stochastic depth. Global views go through the backbone together and local ones too, so BatchNorm in
    it has the statistics of all views of a size, as in the authors' code.

    The teacher's outputs are centred by their average over the last steps, which keeps one output from taking all, and sharpened by a
    low temperature, which keeps them from being uniform. Both are needed (section 5.3): where one fails, every image gets the same
    answer. `teacher_entropy` then stays at 0 or 1, and `kl` near 0; not at 0, since outputs are cosines and never quite uniform.

    Given the teacher's bottleneck features and the centre, the loss is a mean over images: chunks give the gradient of the batch.
    """

    Config = DINOConfig
    cfg: DINOConfig
    # The teacher is better than the student all through the training (section 5.2).
    evaluated: ClassVar[str] = "teacher_backbone"

    center: Tensor

    def __init__(self, backbone: nn.Module, cfg: DINOConfig) -> None:
        super().__init__(backbone, cfg)
        num_features = backbone.num_features
        assert isinstance(num_features, int)
        self.head = DINOHead(num_features, cfg)
        self.teacher_backbone, self.teacher_head = teacher_of(backbone), teacher_of(self.head)
        self.register_buffer("center", torch.zeros(cfg.out_dim))
        self.plan = self.plan_views(2, 0)

    @classmethod
    def defaults(cls, family: Family) -> MethodDefaults:
        """Return the published settings: for "vit" AdamW and stochastic depth (of the student), for "cnn" those of the ResNet-50."""
        if family == "cnn":
            optim = OptimConfig(
                name="sgd", lr=0.03, final_lr=1e-6, weight_decay=1e-4, momentum=0.9, warmup_epochs=10
            )
            return MethodDefaults("dino", optim, {"stop_grad_conv1": False})
        optim = OptimConfig(
            name="adamw",
            lr=5e-4,
            final_lr=1e-6,
            weight_decay=0.04,
            final_weight_decay=0.4,
            warmup_epochs=10,
        )
        return MethodDefaults("dino", optim, {"stop_grad_conv1": False, "drop_path": 0.1})

    def plan_views(self, num_global: int, num_local: int) -> ViewPlan:
        """Return the plan: the student sees all views, the teacher the global ones; raise UserError for fewer than 2 global views."""
        if num_global < 2:
            raise UserError(
                f"DINO compares the global views of an image with each other but the recipe makes {num_global}: set "
                "--recipe.num-views 2, or choose another --recipe."
            )
        return ViewPlan(tuple(range(num_global + num_local)), tuple(range(num_global)), together=True)

    def backbones(self) -> list[nn.Module]:
        return [self.backbone, self.teacher_backbone]

    def heads(self) -> list[nn.Module]:
        return [self.head]

    def param_groups(self) -> list[ParamGroup]:
        """Return weights of two and more dimensions, and the rest (biases and norms), which is not decayed; each clipped by itself."""
        student = [*self.backbone.parameters(), *self.head.parameters()]
        return [
            ParamGroup([p for p in student if p.ndim >= 2], clip=self.cfg.clip_grad),
            ParamGroup([p for p in student if p.ndim < 2], decay=lambda _: 0.0, clip=self.cfg.clip_grad),
        ]

    @torch.no_grad()
    def targets(self, teacher: list[Tensor], student: Any = None) -> Targets:
        """Return the teacher's bottleneck features of this rank's batch, and the mean of its outputs over all ranks."""
        bottlenecks = self.teacher_head.bottleneck(torch.cat(teacher))
        mean = gather_keys(bottlenecks.mean(dim=0, keepdim=True)).mean(dim=0)
        with torch.autocast(mean.device.type, enabled=False):
            # The last layer is linear: the mean of its outputs is its output for the mean.
            mean_output = self.teacher_head.last_layer(mean)
        return Targets(list(bottlenecks.chunk(len(teacher))), mean_output)

    def loss(self, features: list[Tensor], targets: Targets, first: int = 0) -> StepOutput:
        """Return the mean cross-entropy of the student's views with the teacher's of the same image, a view with itself left out.

        Metrics: loss; ce, the same in nats; ce_norm, ce / ln(out_dim), 1 where the student's outputs are uniform; acc, the share of
        pairs of views in which student and teacher favour the same output, 1 / out_dim at chance; teacher_entropy, that of the
        teacher's distributions as a share of ln(out_dim), 1 where they are uniform; kl, ce less that entropy in nats, 0 where the
        student knows the teacher's answers; feature_std of the first view's backbone features (see `collapse.feature_std`). May run
        under autocast: softmax and loss are computed in float32 outside of it, as are the teacher's outputs.
        """
        logits = self.head(torch.cat(features)).chunk(len(features))
        with torch.autocast(logits[0].device.type, enabled=False):
            rows = slice(first, first + len(features[0]))
            teacher = self._teacher_log_probabilities([view[rows] for view in targets.bottlenecks])
            probabilities = [view.exp() for view in teacher]
            loss = cross_view_entropy(logits, probabilities, self.cfg.student_temperature)
            metrics = self._metrics(loss.detach(), logits, teacher, probabilities)
        first_view = features[0].detach()
        return StepOutput(loss, metrics | batch_statistics(first_view), first_view)

    def after_backward(self) -> None:
        """Leave the last layer as it is in the first epochs."""
        if self.clock.epoch < self.cfg.freeze_last_layer:
            for parameter in self.head.last_layer.parameters():
                parameter.grad = None

    @torch.no_grad()
    def remember(self, targets: Targets, applied: Tensor | None = None) -> None:
        """Move the centre towards the mean of the teacher's outputs."""
        moved = self.center.lerp(targets.mean_output.to(self.center.dtype), 1 - self.cfg.center_momentum)
        self.center.copy_(moved if applied is None else torch.where(applied, moved, self.center))

    def update_teacher(self, momentum: float | Tensor) -> None:
        """Set teacher = momentum * teacher + (1 - momentum) * student, over parameters; buffers stay as they are."""
        ema_update(*self._averaged(), momentum)

    def teacher_momentum(self, clock: Clock) -> float:
        """Return the momentum, which follows the share of the run done before the step, as in the authors' code."""
        return cosine_momentum(clock.before, self.cfg.momentum)

    def teacher_distance(self) -> Tensor:
        return relative_distance(*self._averaged())

    def teacher_temperature(self) -> float:
        """Return the teacher's temperature in the present step. The authors' rises once an epoch, in equal steps."""
        start, end = self.cfg.warmup_teacher_temperature, self.cfg.teacher_temperature
        if self.clock.epoch >= self.cfg.warmup_teacher_epochs:
            return end
        return start + (end - start) * self.clock.epoch / self.cfg.warmup_teacher_epochs

    def _averaged(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Return the teacher's parameters, and those of the student of which they are averages."""
        student = [*self.backbone.parameters(), *self.head.parameters()]
        return [*self.teacher_backbone.parameters(), *self.teacher_head.parameters()], student

    @torch.no_grad()
    def _teacher_log_probabilities(self, bottlenecks: list[Tensor]) -> list[Tensor]:
        """Return the centred and sharpened log-probabilities, float32 (n, out_dim), of bottleneck features (n, bottleneck_dim)."""
        temperature = self.teacher_temperature()
        return [
            F.log_softmax((self.teacher_head.last_layer(view) - self.center) / temperature, dim=1)
            for view in bottlenecks
        ]

    @torch.no_grad()
    def _metrics(
        self, ce: Tensor, student: Sequence[Tensor], teacher: list[Tensor], probabilities: list[Tensor]
    ) -> dict[str, Tensor]:
        entropy = -torch.stack(
            [(p * log).sum(dim=1).mean() for p, log in zip(probabilities, teacher, strict=True)]
        ).mean()
        said, guessed = ([view.argmax(dim=1) for view in views] for views in (teacher, student))
        hits = [(g == s).float().mean() for t, s in enumerate(said) for v, g in enumerate(guessed) if t != v]
        log_k = math.log(self.cfg.out_dim)
        return {
            "loss": ce,
            "ce": ce,
            "ce_norm": ce / log_k,
            "acc": torch.stack(hits).mean(),
            "teacher_entropy": entropy / log_k,
            "kl": ce - entropy,
        }


def cross_view_entropy(student: Sequence[Tensor], teacher: Sequence[Tensor], temperature: float) -> Tensor:
    """Return the mean over images and pairs of views t != s of the cross-entropy H(teacher t, student s), in nats (equation 3).

    Args:
        student: outputs (N, K) of each view, the global ones first; any floating dtype, divided by the temperature in float32 here.
        teacher: probabilities (N, K) of each of the two or more global views.
        temperature: the student's.
    """
    # H is linear in the teacher's part: one product for all its views.
    of_all = reduce(torch.add, teacher)
    total = torch.zeros_like(of_all[0, 0])
    for number, outputs in enumerate(student):
        others = [view for t, view in enumerate(teacher) if t != number]
        wanted = of_all if len(others) == len(teacher) else reduce(torch.add, others)
        total = total - (wanted * F.log_softmax(outputs.float() / temperature, dim=1)).sum(dim=1).mean()
    return total / (len(teacher) * (len(student) - 1))
