"""Generated pictures at the edges of what augmentation meets, for measuring engines beside photographs."""

from __future__ import annotations

from itertools import permutations

import numpy as np


def edge_cases(side: int = 64) -> dict[str, np.ndarray]:
    """Pictures by name, uint8 (H, W, 3): one pixel, one row, one column; flat, saturated, striped; gradients in all channel orders."""
    ramp = np.linspace(0, 255, side).astype(np.uint8)
    across, down = np.broadcast_to(ramp, (side, side)), np.broadcast_to(ramp[:, None], (side, side))
    gradients = np.stack([across, down, 255 - across], axis=2)
    stripes = np.zeros((side, side, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    corners = np.array([[r, g, b] for r in (0, 255) for g in (0, 255) for b in (0, 255)], dtype=np.uint8)
    made = {
        "one pixel": np.array([[[200, 30, 90]]], dtype=np.uint8),
        "one row": gradients[:1].copy(),
        "one column": gradients[:, :1].copy(),
        "black": np.zeros((side, side, 3), dtype=np.uint8),
        "white": np.full((side, side, 3), 255, dtype=np.uint8),
        "grey": np.repeat(across[:, :, None], 3, axis=2).copy(),
        "saturated": np.repeat(np.repeat(corners.reshape(2, 4, 3), side // 2, axis=0), side // 4, axis=1),
        "stripes": stripes,
    }
    for order in permutations(range(3)):
        made["gradients " + "".join("rgb"[c] for c in order)] = np.ascontiguousarray(gradients[:, :, order])
    return made
