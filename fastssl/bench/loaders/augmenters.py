"""Augmenters from decoded images to the views of a batch, ours and others', that `fastssl bench augment` measures.

Each is opened once and then makes batch after batch. Ours get draws; others draw for themselves, as they always do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.bench.loaders.work import Order
from pipelines.augment.draws import draw
from pipelines.augment.recipe import Recipe

if TYPE_CHECKING:
    from pipelines.kernels.batched_views import BatchedKernels

FIDELITY_IMAGES = 16
Step = Callable[[], list[Tensor]]
"""Makes the views of the next batch, (batch, 3, S, S) each; on a GPU it need not wait for them."""


@dataclass(frozen=True)
class Decoded(Order):
    """The input of every augmenter: decoded images, recipe, device."""

    images: list[np.ndarray]
    """uint8 (H, W, 3) each, contiguous."""
    recipe: Recipe
    batch: int
    device: torch.device
    threads: int

    @property
    def sample_ids(self) -> np.ndarray:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The numbers of the images, int64 (N,)."""
        return np.arange(len(self.images))

    def sides(self) -> tuple[np.ndarray, np.ndarray]:
        """Return widths and heights, (N,)."""
        height, width = np.array([image.shape[:2] for image in self.images]).T
        return width, height

    def drawn(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield sample ids (batch,) and DRAW records (V, batch) without end."""
        widths, heights = self.sides()
        for epoch, ids in self.batches():
            yield ids, draw(self.recipe, 0, epoch, ids, widths[ids], heights[ids])


@dataclass(frozen=True)
class Augmenter:
    """An augmenter, ours or another's: one row of the report."""

    name: str
    fidelity: str
    """approximate for others, which draw for themselves; empty for ours, whose fidelity is measured by `measured_levels`."""
    open: Callable[[Decoded], contextlib.AbstractContextManager[Step]]
    note: str
    peer: bool = True
    devices: tuple[str, ...] = ("cpu", "cuda")
    foreign_memory: bool = False
    """Whether it takes GPU memory without PyTorch."""


# ----------------------------------------------------------------------------------------------------------- ours


def _kernels(name: str) -> BatchedKernels:
    from importlib import import_module

    return import_module(f"pipelines.kernels.{name}")  # type: ignore[return-value]


def _batched(name: str) -> Callable[[Decoded], contextlib.AbstractContextManager[Step]]:
    @contextlib.contextmanager
    def opened(work: Decoded) -> Iterator[Step]:
        yield batched_step(work, _kernels(name))

    return opened


def batched_step(work: Decoded, kernels: BatchedKernels) -> Step:
    """Return a step of the whole-batch kernels on images that lie end to end on the device, with draws and parameters."""
    from pipelines.kernels.batched_views import BatchedViews
    from pipelines.kernels.view_params import TYPES

    sizes = np.array([image.size for image in work.images])
    first_bytes, widths = np.cumsum(sizes) - sizes, work.sides()[0]
    types = np.full(len(sizes), TYPES.index("uint8"))
    pixels = torch.from_numpy(np.concatenate([image.reshape(-1) for image in work.images])).to(work.device)
    make, drawn = BatchedViews(work.recipe, work.device, kernels), work.drawn()

    def step() -> list[Tensor]:
        ids, records = next(drawn)
        return make(pixels, first_bytes[ids], widths[ids], records, types[ids])

    return step


@contextlib.contextmanager
def _fused(work: Decoded) -> Iterator[Step]:
    """Open our CPU engine in threads, which writes into the same memory again and again."""
    from pipelines.engines.fused_engine import FusedEngine
    from pipelines.loading.slots import view_shapes

    engine, drawn = FusedEngine(work.recipe), work.drawn()
    views = [torch.empty((work.batch, *shape)) for shape in view_shapes(work.recipe)]
    arrays = [view.numpy() for view in views]
    parts = [range(k, work.batch, 4 * work.threads) for k in range(4 * work.threads)]

    def step() -> list[Tensor]:
        ids, records = next(drawn)

        def fill(part: range) -> None:
            for i in part:
                pixels, of_image = work.images[ids[i]], np.ascontiguousarray(records[:, i])
                engine.render(pixels, of_image, [array[i] for array in arrays])

        list(pool.map(fill, parts))
        return views

    with ThreadPoolExecutor(work.threads) as pool:
        yield step


@contextlib.contextmanager
def _kornia_engine(work: Decoded) -> Iterator[Step]:
    from pipelines.engines.batch_engine import BatchOptions
    from pipelines.engines.engine_table import make_engine

    engine: Any = make_engine("kornia", work.recipe, BatchOptions(work.device, work.threads, work.batch))
    drawn = work.drawn()

    def step() -> list[Tensor]:
        ids, records = next(drawn)
        return engine.render([work.images[i] for i in ids], records)

    yield step


# --------------------------------------------------------------------------------------------------------- others


@contextlib.contextmanager
def _kornia_modules(work: Decoded) -> Iterator[Step]:
    from fastssl.bench.loaders.peers import kornia_modules, kornia_side

    work.refuse_turns_and_noise("Kornia")
    side = kornia_side(work.recipe)
    squeezed = torch.stack(
        [
            F.interpolate(image[None], (side, side), mode="bilinear", antialias=True)[0]
            for image in _planes(work, "cpu")
        ]
    ).to(work.device)
    transforms = [kornia_modules(work.recipe, view).to(work.device) for view in range(work.recipe.num_views)]
    batches = work.batches()

    def step() -> list[Tensor]:
        ids = next(batches)[1]
        with torch.no_grad():
            images = squeezed[torch.from_numpy(ids).to(work.device)].float() / 255
            return [transform(images) for transform in transforms]

    yield step


@contextlib.contextmanager
def _torchvision(work: Decoded) -> Iterator[Step]:
    from fastssl.bench.loaders.peers import TensorViews

    images = _planes(work, work.device)
    transforms = [TensorViews.transform(work.recipe, view) for view in range(work.recipe.num_views)]
    batches = work.batches()

    def views_of(i: int) -> list[Tensor]:
        return [transform(images[i]) for transform in transforms]

    def step() -> list[Tensor]:
        ids = next(batches)[1].tolist()
        # On a CPU in threads; on a GPU one after the other, as one thread launches the kernels.
        made = pool.map(views_of, ids) if work.device.type == "cpu" else map(views_of, ids)
        return [torch.stack(of_view) for of_view in zip(*made, strict=True)]

    with ThreadPoolExecutor(work.threads) as pool:
        yield step


@contextlib.contextmanager
def _dali(work: Decoded) -> Iterator[Step]:
    """Open DALI's operators on images that it reads in place and copies into one buffer, as its own batches are."""
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import pipeline_def

    from fastssl.bench.loaders.dali import view_of

    work.refuse_turns_and_noise("DALI")
    on_gpu, recipe, batches = work.device.type == "cuda", work.recipe, work.batches()
    resident = [torch.from_numpy(image).to(work.device) for image in work.images]

    def some() -> list[Any]:
        ids = next(batches)[1]
        return [resident[i] for i in ids] if on_gpu else [work.images[i] for i in ids]

    @pipeline_def(enable_conditionals=True)
    def views():
        images = fn.external_source(
            source=some,
            batch=True,
            dtype=types.DALIDataType.UINT8,
            ndim=3,
            layout="HWC",
            device="gpu" if on_gpu else "cpu",
            no_copy=True,
        )
        return tuple(view_of(images, recipe, number) for number in range(recipe.num_views))

    pipeline: Any = views(
        batch_size=work.batch,
        num_threads=work.threads,
        device_id=(work.device.index or 0) if on_gpu else None,
        exec_dynamic=True,
        seed=0,
    )
    pipeline.build()

    def step() -> list[Tensor]:
        made = pipeline.run(torch.cuda.current_stream(work.device) if on_gpu else None)
        return [torch.from_dlpack(output.as_tensor()) for output in made]

    yield step


def _planes(work: Decoded, device: torch.device | str) -> list[Tensor]:
    """Return the images as tensors: uint8 (3, H, W)."""
    return [torch.from_numpy(image).permute(2, 0, 1).contiguous().to(device) for image in work.images]


AUGMENTERS: dict[str, Augmenter] = {
    augmenter.name: augmenter
    for augmenter in (
        Augmenter(
            "triton",
            "",
            _batched("triton_kernels"),
            "our Triton kernels: --data.augment-on gpu",
            peer=False,
            devices=("cuda",),
        ),
        Augmenter(
            "torch",
            "",
            _batched("torch_kernels"),
            "our whole-batch torch functions, which --data.augment-on gpu uses where Triton does not work",
            peer=False,
        ),
        Augmenter(
            "fused",
            "",
            _fused,
            "our CPU engine in threads; the views stay on the host",
            peer=False,
        ),
        Augmenter(
            "kornia",
            "",
            _kornia_engine,
            "Kornia's functions of --data.engine kornia; crops are cut on the host and copied",
            peer=False,
        ),
        Augmenter(
            "kornia-modules",
            "approximate",
            _kornia_modules,
            "Kornia's modules as documented; the images were resized to one size before, untimed; crops without antialiasing, "
            "one order of jitter a batch, a true Gaussian blur",
        ),
        Augmenter(
            "dali-graph",
            "approximate",
            _dali,
            "DALI's operators as its users and solo-learn write them, on decoded images from external_source; color_twist is one "
            "matrix: jitter in a fixed order, contrast about a constant, a linear hue",
            foreign_memory=True,
        ),
        Augmenter(
            "torchvision-v2",
            "approximate",
            _torchvision,
            "v2 transforms image by image; a true Gaussian blur and a floating-point hue",
        ),
    )
}


def measured_levels(augmenter: Augmenter, work: Decoded) -> float:
    """Return the mean difference of one of ours to PIL and torchvision, in levels of 0..255, on some of the images.

    Both get the same draws.

    Raises:
        UserError: the engine cannot make the recipe's views, or its package is not installed.
    """
    import dataclasses

    from PIL import Image

    from pipelines.kernels import reference

    count = min(FIDELITY_IMAGES, len(work.images))
    plain = dataclasses.replace(work.recipe, mean=(0.0,) * 3, std=(1.0,) * 3)
    few = dataclasses.replace(work, images=work.images[:count], recipe=plain, batch=count)
    ids, records = next(few.drawn())
    with augmenter.open(few) as step:
        made = [view.float().cpu().numpy() for view in step()]
    total = 0.0
    for view, of_view, number in zip(made, records, range(len(records)), strict=True):
        for i, sample in enumerate(ids):
            wanted = reference.make_view(
                Image.fromarray(few.images[sample]), of_view[i], plain, plain.side(number)
            )
            total += float(np.abs(view[i] - wanted).mean())
    return 255 * total / (len(records) * count)
