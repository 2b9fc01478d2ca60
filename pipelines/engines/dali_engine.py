"""NVIDIA DALI, driven by our draws: encoded bytes and records go in, views come out, all of it one DALI graph on the CPU or a GPU.

Each operation with a probability is a DALI conditional, so that only the samples that were drawn are computed. What leaves the graph
is handed to PyTorch without a copy. Seeds of DALI's own are not used: whatever is random comes from the records, and noise is made
from their seeds and fed in.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Sequence
from queue import LifoQueue
from typing import Any

import numpy as np
import torch
from nvidia.dali import types
from nvidia.dali.pipeline import Pipeline, pipeline_def
from PIL import Image

from pipelines.augment.draws import DRAW
from pipelines.augment.noise import unit_noise
from pipelines.augment.operations import JITTER, OPERATIONS, POINTWISE
from pipelines.augment.recipe import Recipe
from pipelines.engines.batch_engine import ALONE, BadItems, BatchEngine, BatchOptions
from pipelines.engines.engine_table import refuse_channels
from pipelines.kernels import dali_operations
from pipelines.kernels.decode import decode_rgb
from pipelines.streaming.cache import Samples, Unreadable
from shards.errors import UserError

# Hue costs most by far and stands once in the graph: up to three parts of the jitter come before it and up to three after.
SLOTS = 3
_HUE = JITTER.index("hue")  # its number in DRAW's `order`
_NONE = -1
_BLENDS = JITTER[:_HUE]  # 0, 1, 2 in `order`
HARDWARE_SHARE = 0.9  # of the images that a JPEG engine of the GPU decodes, where it has one
fn = dali_operations.fn
_FILTERS = {
    "bilinear": types.DALIInterpType.INTERP_LINEAR,
    "bicubic": types.DALIInterpType.INTERP_CUBIC,
}
_TYPES = {
    np.dtype(np.uint8): types.DALIDataType.UINT8,
    np.dtype(np.bool_): types.DALIDataType.BOOL,
    np.dtype(np.int16): types.DALIDataType.INT16,
    np.dtype(np.int32): types.DALIDataType.INT32,
    np.dtype(np.float32): types.DALIDataType.FLOAT,
}


class DaliEngine(BatchEngine):
    """The views of a recipe by a DALI graph."""

    foreign_memory = True

    def __init__(self, recipe: Recipe, options: BatchOptions = ALONE):
        """Raise UserError where the recipe has other than three channels."""
        refuse_channels("dali", recipe)
        super().__init__(recipe)
        self._options = options
        self._device = torch.device(options.device)
        if self._device.type == "cpu" and options.threads > 1:
            # While the threads of one pipeline wait for each other at the end of an operation, those of the other work.
            self.workers = 2
        # A pipeline makes one batch at a time. One that is not built yet stands as None: last, as those in use come back on top.
        self._idle: LifoQueue[Pipeline | None] = LifoQueue()
        for _ in range(self.workers):
            self._idle.put(None)
        self._building = threading.Lock()  # both at once would make the first batch wait for both

    def load(self, samples: Samples, sample_id: int) -> np.ndarray:
        """As `BatchEngine.load`: the encoded bytes, uint8 (B,), after a look at the size that their header states."""
        data = samples.encoded(sample_id)
        wanted = int(samples.shards.widths[sample_id]), int(samples.shards.heights[sample_id])
        try:
            with Image.open(io.BytesIO(data)) as header:
                size = header.size
        except (OSError, SyntaxError, ValueError) as error:
            raise Unreadable(str(error)) from error
        if size != wanted:
            raise Unreadable(f"it is {size[0]} x {size[1]}, but {wanted[0]} x {wanted[1]} in the table")
        return self.prepare(data)

    def prepare(self, data: memoryview) -> np.ndarray:
        """As `BatchEngine.prepare`: the bytes as they are, uint8 (B,)."""
        return np.frombuffer(data, dtype=np.uint8)

    def render(self, items: Sequence[np.ndarray], draws: np.ndarray) -> list[torch.Tensor]:
        """As `BatchEngine.render`."""
        asked = [name for name in POINTWISE if (draws[OPERATIONS[name].switch] > 0).any()]
        assert not asked, f"the graph has no {asked}: make_engine refuses recipes that draw it"
        inputs: dict[str, Any] = {"encoded": list(items)}
        for view, of_view in enumerate(draws):
            for name, values in _arguments(self.recipe, view, of_view).items():
                inputs[f"{name}_{view}"] = values
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        pipeline = self._idle.get()
        try:
            if pipeline is None:
                with self._building:
                    pipeline = self._build(len(items))
            made = pipeline.run(stream, **inputs)
        except RuntimeError as error:
            pipeline = None  # one that failed cannot be used again
            raise _errors(items, error) from error
        finally:
            self._idle.put(pipeline)
        views = [torch.from_dlpack(output.as_tensor()) for output in made]
        return [self.erase(view, of_view) for view, of_view in zip(views, draws, strict=True)]

    def _build(self, count: int) -> Pipeline:
        gpu = self._device.type == "cuda"
        pipeline = _graph(
            self.recipe,
            [_inputs(self.recipe, view) for view in range(self.recipe.total_views)],
            gpu,
            self._options.largest,
            batch_size=max(self._options.batch, count),
            num_threads=self._options.threads,
            device_id=(self._device.index or 0) if gpu else None,
            exec_dynamic=True,
            prefetch_queue_depth=1,  # batches ahead are the stream's matter
        )
        pipeline.build()
        return pipeline


@pipeline_def(enable_conditionals=True)
def _graph(recipe: Recipe, inputs: list[dict[str, tuple[Any, int]]], gpu: bool, largest: tuple[int, int]):
    """Return the graph of a recipe: `if` of an input is a conditional of DALI, every other `if` is Python's.

    Args:
        inputs: of each view, the type and number of dimensions of each input by name; an operation without its input is left out.
        largest: width and height of the largest image.
    """
    encoded = fn.external_source(name="encoded", dtype=_TYPES[np.dtype(np.uint8)], ndim=1)
    options: dict[str, Any] = {}
    if gpu:
        options = {
            "hw_decoder_load": HARDWARE_SHARE,
            "preallocate_width_hint": largest[0],
            "preallocate_height_hint": largest[1],
            "jpeg_fancy_upsampling": True,  # as libjpeg-turbo does; the GPU's own way is another picture
        }
    images = fn.decoders.image(
        encoded,
        device="mixed" if gpu else "cpu",
        output_type=types.DALIImageType.RGB,
        adjust_orientation=False,  # was done when the shards were made
        **options,
    )
    outputs = []
    for view in range(recipe.total_views):
        given = {
            name: fn.external_source(name=f"{name}_{view}", dtype=kind, ndim=ndim)
            for name, (kind, ndim) in inputs[view].items()
        }
        outputs.append(_view(images, recipe, recipe.side(view), given))
    return tuple(outputs)


def _view(images: Any, recipe: Recipe, size: int, given: dict[str, Any]) -> Any:
    """Return one view of every image: float32 (3, S, S), normalised."""
    # Cut first: with a region of interest the filter would see pixels beyond the box at its border, up to 89 levels in a small image.
    image = fn.slice(
        images,
        given["start"],
        given["end"] - given["start"],
        axes=[0, 1],
        normalized_anchor=False,
        normalized_shape=False,
    )
    # The filter is stretched by the scale, as Pillow's and torchvision's is.
    image = fn.resize(
        image,
        size=[size, size],
        interp_type=_FILTERS[recipe.interpolation],
        antialias=True,
    )
    image = dali_operations.planes(image)
    if "turned" in given:
        image = _jitter(image, given, size)
    if given.get("gray"):
        image = dali_operations.gray(image)
    image = fn.reshape(image, shape=[3, size, size], layout="CHW")
    if "taps" in given and given["blurred"]:
        image = dali_operations.blur(image, given["taps"])
    if given.get("solarize"):
        image = dali_operations.solarize(image)
    if given.get("transposed"):
        image = fn.transpose(image, perm=[0, 2, 1], transpose_layout=False)
    if "vertical" in given:
        image = fn.flip(image, horizontal=0, vertical=given["vertical"])
    image = fn.crop_mirror_normalize(
        image,
        mirror=given["horizontal"],
        mean=[255 * x for x in recipe.mean],
        std=[255 * x for x in recipe.std],
        dtype=types.DALIDataType.FLOAT,
        output_layout="CHW",
    )
    if "noise" in given and given["noisy"]:
        image = dali_operations.add_noise(image, given["noise"], recipe.mean, recipe.std)
    return image


def _jitter(image: Any, given: dict[str, Any], size: int) -> Any:
    """Colour jitter in the order of each sample."""
    for slot in range(SLOTS):
        image = _blend(image, given, slot, size)
    if given["turned"]:
        image = dali_operations.turn_hue(image, given["levels"])
    for slot in range(SLOTS, 2 * SLOTS):
        image = _blend(image, given, slot, size)
    return image


def _blend(image: Any, given: dict[str, Any], slot: int, size: int) -> Any:
    if given[f"blended{slot}"]:
        image = dali_operations.blend(image, given[f"taps{slot}"], given[f"of_mean{slot}"], size)
    return image


def _arguments(recipe: Recipe, view: int, draws: np.ndarray) -> dict[str, np.ndarray]:
    """Return what DRAW records (N,) mean as inputs of the graph, by name: arrays (N, ...). Only what the recipe can draw."""
    start = np.stack([draws["top"], draws["left"]], axis=1).astype(np.float32)
    given: dict[str, np.ndarray] = {
        "start": start,
        "end": start + np.stack([draws["height"], draws["width"]], axis=1).astype(np.float32),
    }
    meets = {name: operation.reach(recipe, view) > 0 for name, operation in OPERATIONS.items()}
    if meets["jitter"]:
        jitter = draws["jitter"] > 0
        # Whole levels, as in Pillow's HSV, whose bytes wrap around.
        levels = np.trunc(draws["hue"] * 255).astype(np.int16).astype(np.uint8)
        given |= {"turned": jitter, "levels": levels}
        for slot, part in enumerate(_slots(draws["order"])):
            factor = np.choose(part, [draws[name] for name in _BLENDS], mode="clip")
            given[f"blended{slot}"] = jitter & (part != _NONE)
            given[f"taps{slot}"], given[f"of_mean{slot}"] = dali_operations.blend_taps(part, factor)
    if meets["gray"]:
        given["gray"] = draws["gray"] > 0
    if meets["blur"]:
        given |= {"blurred": draws["sigma"] > 0, "taps": dali_operations.blur_taps(draws["sigma"])}
    if meets["solarize"]:
        given["solarize"] = draws["solarize"] > 0
    transposed, horizontal, vertical = dali_operations.symmetry(draws)
    given["horizontal"] = horizontal
    if meets["turn"]:
        given["transposed"] = transposed
    if meets["turn"] or meets["vflip"]:
        given["vertical"] = vertical
    if meets["noise"]:
        given["noisy"] = draws["noise_std"] > 0
        size = recipe.side(view)
        shape = (len(draws), 3, size, size)
        given["noise"] = np.zeros(shape, dtype=np.float32)
        for i in np.flatnonzero(given["noisy"]):
            noise = unit_noise(int(draws["noise_seed"][i]), int(np.prod(shape[1:])))
            given["noise"][i] = draws["noise_std"][i] * noise.reshape(shape[1:])
    return given


def _inputs(recipe: Recipe, view: int) -> dict[str, tuple[Any, int]]:
    """Return the type of each input and its dimensions for one sample."""
    given = _arguments(recipe, view, np.zeros(1, dtype=DRAW))
    return {name: (_TYPES[values.dtype], values.ndim - 1) for name, values in given.items()}


def _slots(order: np.ndarray) -> np.ndarray:
    """Return the parts of the jitter, of orders (N, 4), by slot before and after hue: int32 (2 * SLOTS, N), -1 where nothing is."""
    out = np.full((2 * SLOTS, len(order)), _NONE, dtype=np.int32)
    hue = (order == _HUE).argmax(axis=1)
    for place in range(order.shape[1]):
        slot = np.where(place < hue, place, SLOTS + place - hue - 1)
        chosen = np.flatnonzero((order[:, place] != _HUE) & (order == _HUE).any(axis=1))
        out[slot[chosen], chosen] = order[chosen, place]
    return out


def _errors(items: Sequence[np.ndarray], error: RuntimeError) -> Exception:
    """Return which items of a batch that DALI could not make do not decode; UserError where all do."""
    errors: dict[int, str] = {}
    for i, item in enumerate(items):
        try:
            decode_rgb(item.data)
        except RuntimeError as reason:
            errors[i] = str(reason)
    if errors:
        return BadItems(errors)
    words = " ".join(str(error).split())
    return UserError(
        f"DALI cannot make this batch, although its images decode: {words[:300]}. Choose --data.engine fused."
    )
