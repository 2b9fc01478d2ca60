"""Backbones of a few weights, for tests of methods."""

import torch
from torch import Tensor, nn

from fastssl.methods.moco_v3 import MoCoV3
from fastssl.methods.moco_v3 import MoCoV3Config as Config


class Plain(nn.Module):
    """A backbone without batch statistics."""

    num_features = 6

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 6), nn.Tanh())
        self.num_calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.num_calls += 1
        return self.body(images)


class Normed(Plain):
    """The same with a BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )


SMALL = Config(dim=5, hidden_dim=7, temperature=0.2)


def make_method(backbone: nn.Module, cfg: Config = SMALL, seed: int = 0) -> MoCoV3:
    """A method around `backbone`, with weights that depend on `seed` alone."""
    torch.manual_seed(seed)
    for module in backbone.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
    return MoCoV3(backbone, cfg)


def make_views(num: int = 6, seed: int = 1) -> list[Tensor]:
    """Two views of `num` images of 4 x 4 pixels."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(num, 3, 4, 4, generator=generator) for _ in range(2)]
