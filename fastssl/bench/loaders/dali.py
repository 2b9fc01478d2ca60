"""DALI's CPU graph of a recipe, to be measured beside ours.

It follows DALI's documentation: encoded bytes come from `external_source`, and operations with a probability are conditionals, so
that only the drawn samples are computed.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from fastssl.bench.loaders.work import Work
    from pipelines.augment.recipe import Recipe


def decoded_batches(work: Work) -> Generator[int]:
    """Yield the size of each batch that DALI has decoded on the CPU; raise ImportError without DALI."""
    from nvidia.dali.pipeline import pipeline_def

    @pipeline_def
    def decoded():
        return _images(work)

    yield from _run(decoded, work)


def _images(work: Work):
    from nvidia.dali import fn, types

    ids = work.batches()

    def encoded() -> list[np.ndarray]:
        return [np.frombuffer(work.shards.read(int(i)), np.uint8) for i in next(ids)[1]]

    data = fn.external_source(source=encoded, batch=True, dtype=types.DALIDataType.UINT8, ndim=1)
    return fn.decoders.image(data, device="cpu", output_type=types.DALIImageType.RGB)


def view_batches(work: Work) -> Generator[int]:
    """Yield the size of each batch of views that DALI has made on the CPU: decoded once, with a chain of operators per view.

    Raises:
        ImportError: DALI is not installed.
    """
    from nvidia.dali.pipeline import pipeline_def

    work.refuse_turns_and_noise("DALI")

    @pipeline_def(enable_conditionals=True)
    def views():
        image = _images(work)
        return tuple(view_of(image, work.recipe, number) for number in range(work.recipe.num_views))

    yield from _run(views, work)


def view_of(image: Any, recipe: Recipe, number: int) -> Any:
    """Return nodes that make view `number` of decoded images (H, W, 3), on the images' device: float32 (3, S, S)."""
    from nvidia.dali import fn, types

    def chance(p: float) -> Any:
        # If the outcome is certain, a Python condition: the graph does not split the batch.
        if p in (0, 1):
            return p == 1
        return fn.random.coin_flip(probability=p, dtype=types.DALIDataType.BOOL)

    def factor(reach: float):
        return fn.random.uniform(range=(max(0.0, 1 - reach), 1 + reach))

    brightness, contrast, saturation, hue = recipe.strengths(number)
    degrees = 360 * hue
    view: Any = fn.random_resized_crop(
        image,
        size=recipe.size,
        random_area=recipe.crop_scale,
        random_aspect_ratio=recipe.crop_ratio,
        num_attempts=10,
        antialias=True,
    )
    if chance(recipe.per_view("jitter_p", number)):
        view = fn.color_twist(
            view,
            brightness=factor(brightness),
            contrast=factor(contrast),
            saturation=factor(saturation),
            hue=fn.random.uniform(range=(-degrees, degrees)),
        )
    if chance(recipe.per_view("gray_p", number)):
        gray = fn.color_space_conversion(
            view, image_type=types.DALIImageType.RGB, output_type=types.DALIImageType.GRAY
        )
        view = fn.cat(gray, gray, gray, axis=2)
    if chance(recipe.per_view("blur_p", number)):
        view = fn.gaussian_blur(view, sigma=fn.random.uniform(range=recipe.blur_sigma))
    if chance(recipe.per_view("solarize_p", number)):
        high = view >= 128
        view = fn.cast_like(high * (255 - view) + (high ^ True) * view, view)
    if chance(recipe.vflip_p):
        view = fn.flip(view, horizontal=0, vertical=1)
    return fn.crop_mirror_normalize(
        view,
        mirror=fn.random.coin_flip(probability=recipe.hflip_p),
        mean=[255 * x for x in recipe.mean],
        std=[255 * x for x in recipe.std],
        dtype=types.DALIDataType.FLOAT,
        output_layout="CHW",
    )


def _run(graph: Callable, work: Work) -> Generator[int]:
    pipeline = graph(batch_size=work.batch, num_threads=work.threads, device_id=None, seed=0)
    pipeline.build()
    made: Any = None
    try:
        while True:
            made = pipeline.run()
            # Views are handed to PyTorch without a copy.
            if made[0].is_dense_tensor():
                made = [torch.from_dlpack(output.as_tensor()) for output in made]
            yield len(made[0])
    finally:
        # The pipeline refers to itself and its threads run until it is collected: collect it before the next peer is measured.
        made = pipeline = None
        gc.collect()
