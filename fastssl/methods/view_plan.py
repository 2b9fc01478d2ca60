"""Which views of an image go through which network, and which of them share a forward pass."""

from __future__ import annotations

from dataclasses import dataclass

from shards.errors import UserError


@dataclass(frozen=True)
class ViewPlan:
    """The views that a method uses, by their numbers: the global views come first, then the local ones."""

    student: tuple[int, ...] = (0, 1)
    teacher: tuple[int, ...] = (0, 1)
    """Empty for a method without a teacher."""
    together: bool = False
    """Whether views of one size share a forward pass, and thus the statistics of BatchNorm, as in SimCLR, SwAV and DINO. Else each
    view has statistics of its own, as in MoCo v3 and BYOL."""


def need_two_views(method: str, num_global: int, num_local: int) -> None:
    """Raise UserError, which names the method, unless a recipe makes two global views of each image and no local ones."""
    if num_local:
        raise UserError(
            f"{method} compares 2 global views but the recipe makes {num_local} local ones, too: set --recipe.local-views 0, or "
            "choose another --recipe."
        )
    if num_global != 2:
        raise UserError(
            f"{method} compares 2 views of each image but the recipe makes {num_global}: set --recipe.num-views 2, or choose "
            "another --recipe."
        )
