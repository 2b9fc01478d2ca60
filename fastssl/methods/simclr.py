"""SimCLR (Chen et al.: A Simple Framework for Contrastive Learning of Visual Representations, arXiv 2002.05709)."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.core.distributed import gather_with_gradient, rank
from fastssl.core.optimizers import OptimConfig
from fastssl.methods.collapse import batch_statistics
from fastssl.methods.heads import mlp
from fastssl.methods.losses import ContrastiveLoss
from fastssl.methods.method import Method, StepOutput
from fastssl.methods.method_defaults import Family, MethodDefaults
from fastssl.methods.view_plan import ViewPlan, need_two_views
from shards.errors import UserError


@dataclass(frozen=True)
class SimCLRConfig:
    """Settings of SimCLR. The defaults are those published for ResNet-50 on ImageNet."""

    dim: int = 128
    """Dimension of the projections that are compared."""
    hidden_dim: int = 0
    """Width of the hidden layer of the projector; 0: as wide as the backbone's features, as in the paper (2048 for ResNet-50)."""
    temperature: float = 0.1
    """Softmax temperature: 0.1 is the paper's best for ImageNet at batch 4096 (table 5), 0.5 its choice for CIFAR-10."""

    def __post_init__(self) -> None:
        for name in ("dim", "temperature"):
            # `not`, so that nan is refused too.
            if not getattr(self, name) > 0:
                raise UserError(f"method.{name} is {getattr(self, name):g} but must be greater than 0.")
        if self.hidden_dim < 0:
            raise UserError(
                f"method.hidden_dim is {self.hidden_dim} but must be 0 (as wide as the features) or more."
            )


class SimCLR(Method):
    """Each view of an image must find the other one among all other views of the batch; there is no teacher.

    `backbone` maps images (N, C, H, W) to features (N, backbone.num_features). Both views go through backbone and projector together,
    so that BatchNorm's statistics are those of all of them, as in the authors' code. With several GPUs they span the processes (the
    paper's global BN, section 2.2: a process's own statistics would tell the pairs apart from the rest).

    Every image is a negative of every other one, with gradient on both sides, so the loss is no mean over images: a batch in chunks
    takes the gradient cache. Projections of other ranks are gathered with their gradient.
    """

    Config = SimCLRConfig
    cfg: SimCLRConfig
    separable = False

    def __init__(self, backbone: nn.Module, cfg: SimCLRConfig) -> None:
        super().__init__(backbone, cfg)
        self.projector = build_projector(backbone, cfg)
        self.plan = self.plan_views(2, 0)

    @classmethod
    def defaults(cls, family: Family) -> MethodDefaults:
        """Return the paper's recipe and optimizer for "cnn" (section 2.3: lr 4.8 at batch 4096, weight decay 1e-6, 10 warm-up epochs).

        For "vit": AdamW as MoCo v3's authors trained SimCLR (arXiv 2104.02057, figure 6), with their warm-up of 40 epochs. They froze
        the patch embedding, which gave 0.8 % more; here it is trained unless model.stop_grad_conv1 is set.
        """
        optim = (
            OptimConfig(name="adamw", lr=2e-4, weight_decay=0.1, warmup_epochs=40)
            if family == "vit"
            else OptimConfig(name="lars", lr=0.3, weight_decay=1e-6, warmup_epochs=10)
        )
        return MethodDefaults("simclr", optim, {"stop_grad_conv1": False})

    def plan_views(self, num_global: int, num_local: int) -> ViewPlan:
        """Return the plan for two global views, which share BatchNorm's statistics; raise UserError for others."""
        need_two_views("SimCLR", num_global, num_local)
        return ViewPlan(student=(0, 1), teacher=(), together=True)

    def heads(self) -> list[nn.Module]:
        return [self.projector]

    def loss(self, features: list[Tensor], targets: Any = None, first: int = 0) -> StepOutput:
        """Return the NT-Xent loss of both views of this rank's images among those of all ranks.

        Metrics: loss; ce, the same cross-entropy in nats; ce_norm, ce / ln(number of candidates), 1 at chance; acc, the share of
        views that find their other one, 0 to 1; feature_std of the first view's backbone features (see `collapse.feature_std`). May
        run under autocast: the loss is computed in float32 outside of it.
        """
        projections = self.projector(torch.cat(features))
        with torch.autocast(projections.device.type, enabled=False):
            # (N, 2, dim), so that the images of all ranks follow each other.
            pairs = gather_with_gradient(torch.stack(projections.float().chunk(2), dim=1))
            found = nt_xent(pairs, self.cfg.temperature, rank() * len(features[0]), len(features[0]))
        ce, candidates = found.ce.detach(), 2 * len(pairs) - 1
        metrics = {
            "loss": ce,
            "ce": ce,
            "ce_norm": ce / math.log(candidates) if candidates > 1 else ce,
            "acc": found.accuracy,
            **batch_statistics(features[0].detach()),
        }
        return StepOutput(found.ce, metrics, features[0].detach())


def nt_xent(pairs: Tensor, temperature: float, first: int = 0, count: int | None = None) -> ContrastiveLoss:
    """Return the normalised, temperature-scaled cross-entropy (NT-Xent, equation 1 of arXiv 2002.05709) of some images' views.

    A view i whose image has the other view j costs -log(exp(s_ij / t) / sum over k != i of exp(s_ik / t)), with cosines s and k over
    both views of all images. The result is the mean over both views of images `first` ... `first` + count - 1. There are 2 M - 1
    candidates, so it is ln(2 M - 1) at chance.

    Args:
        pairs: projections of both views of all M images, (M, 2, D), any floating dtype; L2-normalised here, in float32.
        temperature: t, above 0.
        count: images whose views are queries; None: all from `first` on.
    """
    num = len(pairs)
    rows = slice(first, num if count is None else first + count)
    # (2, M, D): all first views, then all second ones.
    views = F.normalize(pairs.float(), dim=2).transpose(0, 1)
    logits = views[:, rows].flatten(0, 1) @ views.flatten(0, 1).T / temperature
    images = torch.arange(rows.start, rows.stop, device=logits.device)
    own, other = torch.cat([images, num + images]), torch.cat([num + images, images])
    # No view is its own candidate.
    logits.scatter_(1, own[:, None], -math.inf)
    with torch.no_grad():
        accuracy = (logits.argmax(dim=1) == other).float().mean()
    return ContrastiveLoss(F.cross_entropy(logits, other), accuracy)


def build_projector(backbone: nn.Module, cfg: SimCLRConfig) -> nn.Sequential:
    """Return the head (N, backbone.num_features) -> (N, cfg.dim) of the authors' code (google-research/simclr, model_util.py).

    Two linear layers without bias, a BatchNorm behind each, ReLU between. The last BatchNorm has a scale and no shift: its bias is
    frozen at 0. (SimCLR v2, arXiv 2006.10029, has three layers.) The initialisation is PyTorch's default; theirs is normal with a
    standard deviation of 0.01, whose scale BatchNorm removes.
    """
    num_features = backbone.num_features
    assert isinstance(num_features, int)
    projector = mlp([num_features, cfg.hidden_dim or num_features, cfg.dim], last_norm="none")
    norm = nn.BatchNorm1d(cfg.dim)
    norm.bias.requires_grad_(False)
    return projector.append(norm)
