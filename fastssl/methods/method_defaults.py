"""What a method brings along where a configuration is silent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fastssl.core.optimizers import OptimConfig

Family = Literal["vit", "cnn"]
# Parts of the names of timm's models that are transformers.
TRANSFORMERS = ("vit", "deit", "beit", "eva", "swin", "cait", "xcit", "hiera", "pit_")


@dataclass(frozen=True)
class MethodDefaults:
    """A method's own values of settings outside its section, for one family of backbones."""

    recipe: str = "moco_v3"
    """Name of a preset."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    model: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the section `model`, such as stop_grad_conv1."""


def family_of(backbone: str) -> Family:
    """Return whether a backbone's name is that of a transformer."""
    return "vit" if any(part in backbone for part in TRANSFORMERS) else "cnn"
