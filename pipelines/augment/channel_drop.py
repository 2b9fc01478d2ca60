"""Channel drop: with a probability, one channel of a view, each equally likely, becomes 0 before normalisation.

A model then cannot lean on a single band, which may be missing, saturated or noisy in other data. For any number of channels; with a
value range 0 is its lower end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipelines.augment.operation import (
    Need,
    Operation,
    Pointwise,
    PreviewColumn,
    RandomNumbers,
    RecipeSettings,
)

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

FIELD = "channel_drop"  # of DRAW: 0, or 1 + the number of the channel
_DROP, _CHANNEL = COUNTERS = (82, 83)


def check(recipe: Any, need: Need) -> None:
    """A view must keep a channel."""
    need(
        len(recipe.mean) > 1 or not any(recipe.values("channel_drop_p")),
        "channel_drop_p",
        "0 for images of one channel",
    )


def draw(recipe: Any, numbers: RandomNumbers) -> Mapping[str, np.ndarray]:
    """Return the field of V views of N samples: uint16 (V, N)."""
    channels = len(recipe.mean)
    channel = (numbers.uniform(_CHANNEL) * channels).astype("uint16")
    return {FIELD: (channel + 1) * (numbers.uniform(_DROP) < numbers.setting("channel_drop_p"))}


def reference(view: np.ndarray, draw: np.void) -> None:
    """See `Pointwise.reference`."""
    view[int(draw[FIELD]) - 1] = 0


def kernel(view, draw):
    """See `Pointwise.kernel`."""
    flat = view[draw.channel_drop - 1].reshape(-1)
    for i in range(flat.size):
        flat[i] = 0


def batched(views: Tensor, drawn: Mapping[str, Tensor]) -> None:
    """See `Pointwise.batched`."""
    import torch

    channel = torch.arange(1, views.shape[1] + 1, device=views.device)
    views.masked_fill_((drawn[FIELD][:, None] == channel)[:, :, None, None], 0)


def reach(recipe: RecipeSettings, view: int) -> float:
    """See `Operation.reach`."""
    return recipe.per_view("channel_drop_p", view)


CHANNEL_DROP = Operation(
    name="channel_drop",
    title="channel drop",
    settings=("channel_drop_p",),
    per_view=("channel_drop_p",),
    fields={FIELD: "uint16"},
    switch=FIELD,
    counters=COUNTERS,
    reach=reach,
    columns=(PreviewColumn("channel drop", (FIELD,), lambda draw: f"channel {draw[FIELD]}"),),
    caption=lambda draw: f"drop {draw[FIELD]}",
    row="channel drop",
    pointwise=Pointwise(draw, reference, kernel, batched, check),
)
