"""The settings of a backbone, and what its weights must agree on to be loaded."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from shards.errors import UserError


@dataclass(frozen=True)
class ModelConfig:
    """The backbone to train."""

    backbone: str = "resnet50"
    """moco_vit_small, moco_vit_base, moco_vit_large, moco_vit_conv_small, moco_vit_conv_base (MoCo v3's own ViTs),
    resnet10_w32 (a narrow ResNet for CPUs and small data), or any model name of timm."""
    stop_grad_conv1: bool = True
    """ViTs: freeze the patch embedding at its initial values, which stabilises training (MoCo v3); no effect on conv stems and
    convolutional networks."""
    drop_path: float = 0.0
    """Stochastic depth: probability of skipping the last block; it falls to 0 at the first. MoCo v3 uses none."""
    attention: Literal["sdpa", "explicit"] = "sdpa"
    """ViTs: sdpa is PyTorch's fused attention, which chooses the fastest kernel; explicit computes the products one by one, for
    comparison. No effect on convolutional networks."""
    residual: Literal["fp32", "autocast"] = "fp32"
    """ViTs: precision of the residual stream. fp32 is what autocast gives, since the position table is float32. autocast keeps the
    stream in train.precision: fewer bytes to move in every block, but rounded sums. No effect with train.precision fp32."""
    channels: int = 3
    """Number of image channels; pretraining takes it from the shards."""
    patch_size: int = 16
    """moco_vit family: side of a patch in pixels; use 4 or 8 for small images."""
    bn_group: int = 0
    """Images that share the statistics of each BatchNorm in training: neighbours in the batch, such as 32. The result is then the same
    in any number of chunks (train.micro_batch) and processes. 0: those of a chunk or, without chunks, of all GPUs together."""
    bn_shuffle: int = 0
    """Neighbouring groups of model.bn_group among which a teacher's images are dealt, such as 8: its BatchNorm then has other images
    in a group than the student's, as MoCo's shuffled BatchNorm over 8 GPUs, on any number of them. 0: the student's groups."""
    stem_stride: Literal[1, 2, 4] = 4
    """ResNets: factor by which the stem reduces the resolution. 4 is the published stem; 2 or 1, for small images, is a 3x3
    convolution of that stride without max-pooling (1: SimCLR, arXiv 2002.05709, appendix B.9)."""

    def __post_init__(self) -> None:
        for name in ("channels", "patch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} is {getattr(self, name)} but must be 1 or more.")
        if self.bn_group < 0 or self.bn_group == 1:
            raise UserError(f"model.bn_group is {self.bn_group} but must be 0 (no groups) or at least 2.")
        if self.bn_shuffle < 0 or self.bn_shuffle == 1:
            raise UserError(
                f"model.bn_shuffle is {self.bn_shuffle} but must be 0 (no shuffling) or at least 2."
            )
        if self.bn_shuffle and not self.bn_group:
            raise UserError(
                f"model.bn_shuffle is {self.bn_shuffle}, but there are no groups to deal images among: set --model.bn-group N too."
            )
        if not 0 <= self.drop_path < 1:
            raise UserError(f"model.drop_path is {self.drop_path:g} but must be at least 0 and less than 1.")

    @property
    def bn_block(self) -> int:
        """The number of neighbouring images that BatchNorm needs at once: those of the groups that are dealt, of a group, or 1."""
        return max(1, self.bn_group) * max(1, self.bn_shuffle)


def architecture(backbone: nn.Module, cfg: ModelConfig) -> dict[str, Any]:
    """Return what weights must agree on besides their shapes, as JSON values; checkpoints store it.

    Names and shapes do not suffice: a ViT-S with 6 heads loads the weights of one with 12 and computes something else. num_heads is
    one number, a list where blocks differ, or None without attention; image_size and patch_size are None where any image fits.
    """
    heads = [m.num_heads for m in backbone.modules() if isinstance(getattr(m, "num_heads", None), int)]
    patch_embed = getattr(backbone, "patch_embed", None)
    return {
        "name": cfg.backbone,
        "num_features": backbone.num_features,
        "num_heads": heads[0] if len(set(heads)) == 1 else heads or None,
        "channels": cfg.channels,
        "image_size": _side(getattr(patch_embed, "img_size", None)),
        "patch_size": _side(getattr(patch_embed, "patch_size", None)),
        "stem_stride": cfg.stem_stride,
    }


def _side(size: Any) -> int | None:
    """Return one side, in pixels, of a timm size, which is a pair, a number or None."""
    return size[0] if isinstance(size, tuple) else size


def check_architecture(expected: dict[str, Any], found: dict[str, Any], where: str) -> None:
    """Raise UserError naming each entry of `found`, read from `where`, that differs from `expected`."""
    names = dict.fromkeys([*expected, *found])
    differing = [
        f"{name} is {found.get(name, 'missing')} there and {expected.get(name, 'missing')} here"
        for name in names
        if name not in expected or name not in found or expected[name] != found[name]
    ]
    if differing:
        raise UserError(
            f"The weights in {where} belong to another architecture: {'; '.join(differing)}. "
            "Change the model settings to match, or choose other weights."
        )
