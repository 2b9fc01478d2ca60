"""What the trainer asks of a method, so that it can run any of them in chunks."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn


class StepOutput(NamedTuple):
    """What a method's forward returns. A tuple, so that DistributedDataParallel finds the tensors in it."""

    loss: Tensor
    """Scalar, float32, with gradient: a mean over the images it was made from."""
    metrics: dict[str, Tensor]
    """Scalars, detached, on the device: reading one waits for it, so do that on logging steps only. All are means over images
    but those of `collapse.batch_statistics`, which are made from `features`."""
    features: Tensor
    """The first view's backbone features (N, D), detached."""


class Method(nn.Module):
    """A student and what it is compared with, in parts that a step may run on some of the images at a time.

    One step over a batch of views is

        targets = method.targets(method.teacher_features(views))       # no gradient
        output = method.loss(method.student_features(views), targets)
        output.loss.backward(); optimizer.step(); method.remember(targets); method.update_teacher(momentum)

    and `forward` does the first two lines. `teacher_features` and `student_features` run on any chunk of the images; their results
    joined go through `targets`, once for the whole batch, so that its BatchNorm and its gathering over ranks see all images. The
    loss of a chunk counts its images alone, against the targets of the whole batch, and `first` says where the chunk begins in the
    batch of this process: the mean of the chunks' losses, weighted by their sizes, is the loss of the batch.
    """

    backbone: nn.Module
    """The student's backbone, which is what a run is for: images (N, C, H, W) -> features (N, backbone.num_features)."""

    def check_views(self, num_global: int, num_local: int) -> None:
        """Raise UserError where the method cannot use so many global and, smaller, local views of each image."""

    def forward(self, views: list[Tensor], targets: Any = None, first: int = 0) -> StepOutput:
        """The loss of these views, each (N, C, H, W), against `targets`, or against their own where there are none."""
        raise NotImplementedError

    def teacher_features(self, views: list[Tensor]) -> list[Tensor]:
        """The teacher's backbone features of each view, without gradient."""
        raise NotImplementedError

    def targets(self, features: list[Tensor]) -> Any:
        """What the student is compared with, from the teacher's features of a whole batch; of all ranks, without gradient."""
        raise NotImplementedError

    def student_features(self, views: list[Tensor]) -> list[Tensor]:
        """The student's backbone features of each view, with gradient."""
        raise NotImplementedError

    def loss(self, features: list[Tensor], targets: Any, first: int = 0) -> StepOutput:
        """Heads and loss from the student's features of images `first`, `first` + 1, ... of this process's batch."""
        raise NotImplementedError

    def backbones(self) -> list[nn.Module]:
        """The modules that `student_features` and `teacher_features` run, the student's first."""
        raise NotImplementedError

    def heads(self) -> list[nn.Module]:
        """The student's trained modules that `loss` runs."""
        raise NotImplementedError

    def remember(self, targets: Any) -> None:
        """Called after the last backward of a step; a method with a memory of earlier steps fills it here."""

    def update_teacher(self, momentum: float | Tensor) -> None:
        """Move the teacher towards the student; nothing where there is no teacher. A tensor: a scalar on the device."""

    def teacher_distance(self) -> Tensor | None:
        """How far the teacher's parameters are from the student's, as a share of those (see `ema.relative_distance`)."""
        return None

    def teacher_momentum(self, progress: float) -> float:
        """The momentum for `update_teacher` at `progress`, the share of the run done in [0, 1]."""
        return 1.0
