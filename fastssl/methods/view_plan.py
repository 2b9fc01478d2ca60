"""Which views of an image go through which network, and which of them share a forward pass."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ViewPlan:
    """The views that a method uses, by their numbers: the global views come first, then the local ones."""

    student: tuple[int, ...] = (0, 1)
    teacher: tuple[int, ...] = (0, 1)
    """Empty for a method without a teacher."""
    together: bool = False
    """Whether views of one size share a forward pass, and thus the statistics of BatchNorm, as in SimCLR, SwAV and DINO. Else each
    view has statistics of its own, as in MoCo v3 and BYOL."""
