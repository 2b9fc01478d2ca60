"""A batch as trainers hold it."""

import numpy as np
import torch

from pipelines import Batch


def test_a_batch_moves_as_trainers_ask() -> None:
    """To the meta device, which stands for a GPU: views and masks move, ids and labels stay as they are."""
    masks = [torch.zeros(2, 4, 4, dtype=torch.int32)]
    batch = Batch([torch.zeros(2, 3, 4, 4)] * 2, np.arange(2), np.array([1, -1]), 1, masks)
    moved = batch.to("meta", non_blocking=True)
    assert {tensor.device.type for tensor in (*moved.views, *moved.masks)} == {"meta"}
    assert (moved.sample_ids is batch.sample_ids, moved.labels is batch.labels, moved.replaced) == (
        True,
        True,
        1,
    )
    assert batch.views[0].device.type == "cpu"
