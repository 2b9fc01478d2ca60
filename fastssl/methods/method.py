"""The contract of a method, which lets one trainer run any of them: in chunks, on any number of ranks, with any number of views."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from fastssl.core.optimizers import ParamGroup
from fastssl.core.schedules import Clock
from fastssl.methods.method_defaults import Family, MethodDefaults
from fastssl.methods.trees import map_tensors
from fastssl.methods.view_plan import ViewPlan
from fastssl.models.batch_norm import depends_on_batch
from fastssl.models.grouped_batch_norm import GroupedBatchNorm, views_in_pass
from fastssl.models.stochastic_depth import KeyedDropPath, drawn_depths
from shards.counter_hash import UInt64
from shards.errors import UserError


class StepOutput(NamedTuple):
    """Result of a method's forward: a tuple, so that DistributedDataParallel finds the tensors in it."""

    loss: Tensor
    """Scalar, float32, with gradient: the mean over the images."""
    metrics: dict[str, Tensor]
    """Scalars, detached, on the device; reading one waits for it, so read them on logging steps only. All are means over images
    except those of `collapse.batch_statistics`, which are computed from `features`."""
    features: Tensor
    """The first view's backbone features (N, D), detached."""
    targets: Any = None
    """The targets that the loss was computed against."""


class Method(nn.Module):
    """A student and what it is compared with, in parts that a step may run on some of the images at a time.

    One step over a batch of views, each (N, C, H, W), is

        method.clock = clock; method.before_step()
        targets = method.targets(method.teacher_features(views))       # no gradient, whole batch, all ranks
        output = method.loss(method.student_features(views), targets)
        output.loss.backward(); method.after_backward()
        optimizer.step(); method.remember(targets, applied); method.update_teacher(momentum)

    and `forward` does the middle two lines. A sub-class sets `backbone`, a `Config` (a frozen dataclass, the section `method` of a
    configuration) and is built as `MyMethod(backbone, cfg)`; it writes `loss`, `heads`, and of the rest what differs from here.

    A batch that does not fit in memory is taken in chunks of its images. The teacher's features are concatenated and go through
    `targets` once for the whole batch, so that BatchNorm and the all-gather see all images. Then, where the loss is `separable`, each
    chunk has a loss of its own against the targets of the whole batch; else the step takes the gradient of the loss with respect to
    all features first and runs the student once more, chunk by chunk (gradient cache, arXiv 2101.06983).
    """

    Config: ClassVar[type[Any]]
    separable: ClassVar[bool] = True
    """Whether the loss, given the targets, is a mean over images, so that chunks add up to the gradient of the whole batch."""
    targets_from: ClassVar[Literal["teacher", "student"]] = "teacher"
    """Whose features `targets` needs; student: those of its own whole batch, as SwAV's codes."""

    evaluated: ClassVar[str] = "backbone"
    """Dotted path of the branch that is the result of a run: a backbone of the run's architecture, such as "teacher_backbone".

    It is evaluated during the run, and `load_backbone` and `eval` take it from the checkpoints, which store the path.
    """
    external: ClassVar[tuple[str, ...]] = ()
    """Dotted paths of frozen parts whose weights come from elsewhere, such as a distilling teacher read from a file.

    They stay in evaluation mode. A checkpoint does not copy them: it stores a digest of each, and a run that continues from it must
    have built the same ones. See `methods.method_weights`.
    """

    backbone: nn.Module
    """The student's backbone: images (N, C, H, W) -> features (N, backbone.num_features)."""
    clock: Clock
    """The place of the present step in the run, for schedules; set before each step."""
    plan: ViewPlan
    """The views in use; set for the run's recipe by `plan_views`."""
    draw_keys: UInt64 | None
    """Keys of the samples in the present forward, uint64 (N,), for everything that is drawn inside the model: functions of the step
    and the sample, not of chunk and rank. None: PyTorch's random numbers."""

    def __init__(self, backbone: nn.Module, cfg: Any) -> None:
        super().__init__()
        self.backbone, self.cfg = backbone, cfg
        self.plan, self.clock, self.draw_keys = ViewPlan(), Clock(), None
        self._traits: dict[nn.Module, _Traits] = {}

    # ------------------------------------------------------------------------------------------ set up, once

    @classmethod
    def defaults(cls, family: Family) -> MethodDefaults:
        """Return the settings of other sections that go with this method, for ViTs ("vit") or other backbones ("cnn")."""
        return MethodDefaults()

    def plan_views(self, num_global: int, num_local: int) -> ViewPlan:
        """Return the use of this number of global and of (smaller) local views; raise UserError where the method cannot use them."""
        raise NotImplementedError

    def check_batch(self, batch: int) -> None:
        """Raise UserError where the method cannot use batches of this many images, over all ranks."""

    def evaluated_backbone(self) -> nn.Module:
        """Return the branch that `evaluated` names."""
        return self.get_submodule(self.evaluated)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all parts but the external ones, which stay in evaluation mode; return the method."""
        super().train(mode)
        for name in self.external:
            self.get_submodule(name).eval()
        return self

    def backbones(self) -> list[nn.Module]:
        """Return the modules that `student_features` and `teacher_features` run, the student's first."""
        return [self.backbone]

    def heads(self) -> list[nn.Module]:
        """Return the student's trained modules that `loss` runs."""
        raise NotImplementedError

    def param_groups(self) -> list[ParamGroup]:
        """Return the parameters in groups that share schedules; frozen ones are left out later."""
        return [ParamGroup(list(self.parameters()))]

    # ------------------------------------------------------------------------------------------ a step

    def before_step(self) -> None:
        """Prepare the weights for a step, such as prototypes of unit length; called before any forward."""

    def forward(self, views: Sequence[Tensor], targets: Any = None, first: int = 0) -> StepOutput:
        """Return the loss of these views, each (N, C, H, W), against `targets`; None: against their own."""
        # The teacher runs first, before the student's activations fill the memory.
        if targets is None and self.targets_from == "teacher":
            targets = self.targets(self.teacher_features(views))
        features = self.student_features(views)
        if targets is None and self.targets_from == "student":
            targets = self.targets(self.teacher_features(views), map_tensors(Tensor.detach, features))
        return self.loss(features, targets, first)._replace(targets=targets)

    def teacher_features(self, views: Sequence[Tensor]) -> Any:
        """Return a tree of tensors of the teacher, whose first dimension is the image, without gradient; None without a teacher.

        Here: the features of a module `teacher_backbone`, (N, D) of each view of `plan.teacher`.
        """
        if not self.plan.teacher:
            return None
        teacher = self.get_submodule("teacher_backbone")
        with torch.no_grad():
            return self.run(teacher, views, self.plan.teacher)

    def targets(self, teacher: Any, student: Any = None) -> Any:
        """Return what the student is compared with, over all ranks and without gradient; None without targets.

        Args:
            teacher: `teacher_features` of this rank's whole batch.
            student: `student_features` of this rank's whole batch, detached; where `targets_from` is student, else None.
        """
        return None

    def student_features(self, views: Sequence[Tensor]) -> Any:
        """Return a tree of tensors of the student, whose first dimension is the image, with gradient.

        Here: the backbone's features, (N, D) of each view of `plan.student`.
        """
        return self.run(self.backbone, views, self.plan.student)

    def loss(self, features: Any, targets: Any, first: int = 0) -> StepOutput:
        """Return the loss from the student's features of images `first`, `first` + 1, ... of this rank's batch.

        Where the method is not `separable`, the features are always those of the rank's whole batch. The mean of the ranks' losses is
        the loss of the whole batch: gather features with their gradient where images of other ranks matter.
        """
        raise NotImplementedError

    def after_backward(self) -> None:
        """Change gradients before they are used, such as dropping those of weights that are frozen at this time (p.grad = None)."""

    def remember(self, targets: Any, applied: Tensor | None = None) -> None:
        """Fill a memory of earlier steps (a queue, a centre); called once after each step that had targets.

        `applied`: a boolean scalar on the device, false where the step was not finite: then the memory must stay as it is. None: true.
        """

    def update_teacher(self, momentum: float | Tensor) -> None:
        """Move the teacher, if there is one, towards the student; a tensor `momentum` is a scalar on the device."""

    def teacher_momentum(self, clock: Clock) -> float:
        """Return the momentum for `update_teacher` after the step at `clock`."""
        return 1.0

    def teacher_distance(self) -> Tensor | None:
        """Return the relative distance of the teacher's parameters from the student's (see `ema.relative_distance`)."""
        return None

    # ------------------------------------------------------------------------------------------ for sub-classes

    def run(self, backbone: nn.Module, views: Sequence[Tensor], numbers: Sequence[int]) -> list[Any]:
        """Return the features of some views, one tree for each of `numbers`.

        Views of one size go through the backbone together where they may share BatchNorm's statistics (`plan.together`), and where
        there is no BatchNorm: a forward for both launches half as many kernels.
        """
        wanted = max((*self.plan.student, *self.plan.teacher)) + 1
        if len(views) != wanted:
            raise UserError(f"The method uses {wanted} views of each image, but got {len(views)}.")
        # Looked up once: to walk through a large network takes longer than to launch a kernel.
        if backbone not in self._traits:
            self._traits[backbone] = _Traits.of(backbone)
        traits = self._traits[backbone]
        found: dict[int, Any] = {}
        for together in self._passes(traits, views, numbers):
            given, count = [views[number] for number in together], len(together)
            # BatchNorm's groups hold all views of an image: its rows must be neighbours.
            by_image = count > 1 and traits.grouped
            rows = (
                given[0]
                if count == 1
                else torch.stack(given, 1).flatten(0, 1)
                if by_image
                else torch.cat(given)
            )
            with contextlib.ExitStack() as around:
                if self.draw_keys is not None and traits.draws:
                    around.enter_context(drawn_depths(backbone, self.draw_keys, together, by_image))
                if by_image:
                    around.enter_context(views_in_pass(backbone, count))
                made = backbone(rows)
            for place, number in enumerate(together):
                found[number] = _part(made, place, count, by_image)
        return [found[number] for number in numbers]

    def _passes(self, traits: _Traits, views: Sequence[Tensor], numbers: Sequence[int]) -> list[list[int]]:
        if traits.by_batch and not self.plan.together:
            return [[number] for number in numbers]
        sizes: dict[torch.Size, list[int]] = {}
        for number in numbers:
            sizes.setdefault(views[number].shape, []).append(number)
        return list(sizes.values())


class _Traits(NamedTuple):
    """What decides how views go through a backbone."""

    by_batch: bool
    """It has statistics of the batch."""
    grouped: bool
    """They are those of groups."""
    draws: bool
    """Something is drawn inside, by `draw_keys`."""

    @classmethod
    def of(cls, backbone: nn.Module) -> _Traits:
        grouped = any(isinstance(module, GroupedBatchNorm) for module in backbone.modules())
        draws = any(isinstance(module, KeyedDropPath) and module.drop_prob for module in backbone.modules())
        return cls(depends_on_batch(backbone), grouped, draws)


def _part(made: Any, place: int, count: int, by_image: bool) -> Any:
    """Return the rows of one of `count` views that went through a backbone together, image by image or view by view."""
    if count == 1:
        return made
    return map_tensors(lambda rows: rows[place::count] if by_image else rows.chunk(count)[place], made)
