"""The interface of a method, which lets the trainer run any of them in chunks."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, Self

from torch import Tensor, nn


class StepOutput(NamedTuple):
    """Result of a method's forward: a tuple, so that DistributedDataParallel finds the tensors in it."""

    loss: Tensor
    """Scalar, float32, with gradient: the mean over the images."""
    metrics: dict[str, Tensor]
    """Scalars, detached, on the device; reading one waits for it, so read them on logging steps only. All are means over images
    except those of `collapse.batch_statistics`, which are computed from `features`."""
    features: Tensor
    """The first view's backbone features (N, D), detached."""


class Method(nn.Module):
    """A student and its targets, in parts that a step may run on some of the images at a time.

    One step over a batch of views is

        targets = method.targets(method.teacher_features(views))       # no gradient
        output = method.loss(method.student_features(views), targets)
        output.loss.backward(); optimizer.step(); method.remember(targets); method.update_teacher(momentum)

    and `forward` does the first two lines. `teacher_features` and `student_features` run on any chunk of the images. The teacher's
    features are concatenated and go through `targets` once for the whole batch, so that BatchNorm and the all-gather see all images.
    The loss of a chunk is the mean over its images, against the targets of the whole batch; `first` is where the chunk begins in the
    batch of this process. So the mean of the chunks' losses, weighted by their sizes, is the loss of the batch.
    """

    backbone: nn.Module
    """The student's backbone: images (N, C, H, W) -> features (N, backbone.num_features)."""
    evaluated: ClassVar[str] = "backbone"
    """Dotted path of the branch that is the result of a run: a backbone of the run's architecture, such as "teacher_backbone".

    It is evaluated during the run, and `load_backbone` and `eval` take it from the checkpoints, which store the path.
    """
    external: ClassVar[tuple[str, ...]] = ()
    """Dotted paths of frozen parts whose weights come from elsewhere, such as a distilling teacher read from a file.

    They stay in evaluation mode. A checkpoint does not copy them: it stores a digest of each, and a run that continues from it must
    have built the same ones. See `methods.method_weights`.
    """

    def evaluated_backbone(self) -> nn.Module:
        """Return the branch that `evaluated` names."""
        return self.get_submodule(self.evaluated)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all parts but the external ones, which stay in evaluation mode; return the method."""
        super().train(mode)
        for name in self.external:
            self.get_submodule(name).eval()
        return self

    def check_views(self, num_global: int, num_local: int) -> None:
        """Raise UserError where the method cannot use this number of global and of (smaller) local views of each image."""

    def forward(self, views: list[Tensor], targets: Any = None, first: int = 0) -> StepOutput:
        """Return the loss of these views, each (N, C, H, W), against `targets`; None: against their own."""
        raise NotImplementedError

    def teacher_features(self, views: list[Tensor]) -> list[Tensor]:
        """Return the teacher's backbone features of each view, (N, D), without gradient."""
        raise NotImplementedError

    def targets(self, features: list[Tensor]) -> Any:
        """Return what the student is compared with, over all ranks, from the teacher's features of the whole batch; no gradient."""
        raise NotImplementedError

    def student_features(self, views: list[Tensor]) -> list[Tensor]:
        """Return the student's backbone features of each view, (N, D), with gradient."""
        raise NotImplementedError

    def loss(self, features: list[Tensor], targets: Any, first: int = 0) -> StepOutput:
        """Return the loss from the student's features of images `first`, `first` + 1, ... of this process's batch."""
        raise NotImplementedError

    def backbones(self) -> list[nn.Module]:
        """Return the modules that `student_features` and `teacher_features` run, the student's first."""
        raise NotImplementedError

    def heads(self) -> list[nn.Module]:
        """Return the student's trained modules that `loss` runs."""
        raise NotImplementedError

    def remember(self, targets: Any) -> None:
        """Fill a memory of earlier steps, if the method has one; called after the last backward of a step."""

    def update_teacher(self, momentum: float | Tensor) -> None:
        """Move the teacher, if there is one, towards the student; a tensor `momentum` is a scalar on the device."""

    def teacher_distance(self) -> Tensor | None:
        """Return the relative distance of the teacher's parameters from the student's (see `ema.relative_distance`)."""
        return None

    def teacher_momentum(self, progress: float) -> float:
        """Return the momentum for `update_teacher` at `progress`, the share of the run done, in [0, 1]."""
        return 1.0
