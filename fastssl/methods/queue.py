"""A first-in, first-out queue of earlier steps' keys, which serve as more negatives (MoCo, arXiv 1911.05722)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class KeyQueue(nn.Module):
    """The last `size` keys of each view, the same on every rank because keys are gathered before they are pushed.

    `count`, the number of keys ever pushed, is a Python number, so that a step never waits for the device; the state dict holds it
    together with the keys.
    """

    keys: Tensor

    def __init__(self, num_views: int, size: int, dim: int) -> None:
        super().__init__()
        self.size = size
        self.count = 0
        self.register_buffer("keys", torch.zeros(num_views, size, dim))

    def filled(self) -> Tensor:
        """Return the keys in the queue, (V, n, dim), n from 0 to `size`; slots that are not yet filled are left out."""
        return self.keys[:, : min(self.count, self.size)]

    @torch.no_grad()
    def push(self, keys: Tensor, applied: Tensor | None = None) -> None:
        """Overwrite the oldest keys with (V, n, dim) keys; n must divide the size, so that a push never wraps around.

        Where `applied`, a boolean scalar on the device (None: true), is false, the oldest keys stay, so that one bad batch does not
        spoil the loss of the next steps. They still count as pushed, since the host does not wait to learn it.
        """
        num = keys.shape[1]
        assert self.size % num == 0, "the configuration is checked for this"
        start = self.count % self.size
        assert start % num == 0, "the batch does not change during a run"
        slot = self.keys[:, start : start + num]
        new = F.normalize(keys.float(), dim=2)
        slot.copy_(new if applied is None else torch.where(applied, new, slot))
        self.count += num

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.count)

    def set_extra_state(self, state: Tensor) -> None:
        self.count = int(state)
