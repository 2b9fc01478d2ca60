"""Generated pictures, for measuring engines: some like photographs, others at the edges of what augmentation meets."""

from __future__ import annotations

from itertools import permutations

import numpy as np

# Width and height: how most images of ImageNet come, in about the shares that they have there.
SIZES = ((500, 375), (500, 375), (375, 500), (500, 333), (500, 375), (333, 500), (400, 300), (640, 480))


def photographs(count: int, seed: int = 0) -> list[np.ndarray]:
    """Return pictures of `SIZES`, uint8 (H, W, 3): soft colours with edges and grain.

    So no operation meets flat areas or pure noise.
    """
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        width, height = SIZES[number % len(SIZES)]
        y, x = np.mgrid[0:height, 0:width].astype(np.float32) / height
        waves, colours = rng.uniform(-6, 6, (5, 3)), rng.uniform(-22, 22, (5, 3))
        picture = np.full((height, width, 3), rng.uniform(60, 190, 3), dtype=np.float32)
        for (down, across, phase), colour in zip(waves.astype(np.float32), colours, strict=True):
            wave = np.sin(down * y + across * x + phase)
            picture += (wave + np.sign(wave))[:, :, None] * colour.astype(np.float32)
        picture += rng.standard_normal((height, width, 1), dtype=np.float32) * 6
        made.append(picture.clip(0, 255).astype(np.uint8))
    return made


def edge_cases(side: int = 64) -> dict[str, np.ndarray]:
    """Return pictures by name, uint8 (H, W, 3).

    One pixel, one row, one column; flat, saturated, striped; gradients in all channel orders.
    """
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
        "gray": np.repeat(across[:, :, None], 3, axis=2).copy(),
        "saturated": np.repeat(np.repeat(corners.reshape(2, 4, 3), side // 2, axis=0), side // 4, axis=1),
        "stripes": stripes,
    }
    for order in permutations(range(3)):
        made["gradients " + "".join("rgb"[c] for c in order)] = np.ascontiguousarray(gradients[:, :, order])
    return made
