"""Other libraries' loaders from encoded images to views, written as their users write them, to be measured beside ours.

Each generator yields the number of source images of every batch; closing it stops its workers. The note of a peer says what it
computes differently. Sources: the recipe is that of MoCo v3 (arXiv 2104.02057); DALI and Kornia as their documentation
shows them.
"""

from __future__ import annotations

import io
import itertools
import multiprocessing
import random
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as v1
from torchvision.transforms import v2

from fastssl.bench.loaders.dali import decoded_batches, view_batches
from fastssl.bench.loaders.work import MeasuredLoader, Work
from pipelines.augment.recipe import Recipe
from pipelines.kernels.decode import decode_rgb
from shards.dataset.shard_set import ShardSet

# ------------------------------------------------------------------------------------------- PyTorch's DataLoader


class Blur:
    """Pillow's Gaussian blur with a standard deviation drawn per image."""

    def __init__(self, sigma: tuple[float, float]):
        self.sigma = sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(*self.sigma)))


class Solarize:
    """Pillow's inversion of all values from 128 on."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return ImageOps.solarize(image, threshold=128)


class TurnAndNoise:
    """Quarter turns and noise of a float image (3, S, S) in [0, 1], if the recipe has them."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe

    def __call__(self, image: Tensor) -> Tensor:
        if self.recipe.quarter_turns:
            image = image.rot90(random.randrange(4), (1, 2))
        if random.random() < self.recipe.noise_p:
            image = (image + random.uniform(*self.recipe.noise_std) * torch.randn_like(image)).clamp(0, 1)
        return image


class PILViews(Dataset):
    """Data set of views by sample id, made as in MoCo v3's own loader: torchvision's transforms on PIL images."""

    def __init__(self, shards: ShardSet, recipe: Recipe):
        self.shards = shards
        self.transforms = [self.transform(recipe, view) for view in range(recipe.num_views)]

    @staticmethod
    def transform(recipe: Recipe, view: int) -> v1.Compose:
        """Return the transforms of a view."""
        jitter = v1.ColorJitter(*recipe.strengths(view))
        return v1.Compose(
            [
                v1.RandomResizedCrop(recipe.size, scale=recipe.crop_scale, ratio=recipe.crop_ratio),
                v1.RandomApply([jitter], p=recipe.per_view("jitter_p", view)),
                v1.RandomGrayscale(p=recipe.per_view("gray_p", view)),
                v1.RandomApply([Blur(recipe.blur_sigma)], p=recipe.per_view("blur_p", view)),
                v1.RandomApply([Solarize()], p=recipe.per_view("solarize_p", view)),
                v1.RandomHorizontalFlip(recipe.hflip_p),
                v1.RandomVerticalFlip(recipe.vflip_p),
                v1.ToTensor(),
                TurnAndNoise(recipe),
                v1.Normalize(recipe.mean, recipe.std),
            ]
        )

    def __getitem__(self, sample_id: int) -> list[Tensor]:
        image: Any = Image.open(io.BytesIO(self.shards.read(sample_id))).convert("RGB")
        return [transform(image) for transform in self.transforms]


class LightlyViews(PILViews):
    """Data set with Lightly's MoCo transform: torchvision's and Pillow's operations, the same chance of blur in both views."""

    def __init__(self, shards: ShardSet, recipe: Recipe):
        from lightly.transforms.moco_transform import MoCoV2Transform

        self.shards = shards
        self.transforms = []
        for view in range(2):
            brightness, contrast, saturation, hue = recipe.strengths(view)
            both = MoCoV2Transform(
                input_size=recipe.size,
                cj_prob=recipe.per_view("jitter_p", view),
                cj_bright=brightness,
                cj_contrast=contrast,
                cj_sat=saturation,
                cj_hue=hue,
                min_scale=recipe.crop_scale[0],
                random_gray_scale=recipe.per_view("gray_p", view),
                gaussian_blur=sum(recipe.per_view("blur_p", view) for view in range(2)) / 2,
                sigmas=recipe.blur_sigma,
                vf_prob=recipe.vflip_p,
                hf_prob=recipe.hflip_p,
                normalize={"mean": list(recipe.mean), "std": list(recipe.std)},
            )
            self.transforms.append(both.transforms[view])


class TensorViews(PILViews):
    """Data set with torchvision's v2 transforms on tensors."""

    @staticmethod
    def transform(recipe: Recipe, view: int) -> v2.Compose:  # type: ignore[override]
        """Return the transforms of a view."""
        jitter = v2.ColorJitter(*recipe.strengths(view))
        blur = v2.GaussianBlur(BLUR_TAPS, sigma=list(recipe.blur_sigma))
        return v2.Compose(
            [
                v2.RandomResizedCrop(recipe.size, recipe.crop_scale, recipe.crop_ratio, antialias=True),
                v2.RandomApply([jitter], p=recipe.per_view("jitter_p", view)),
                v2.RandomGrayscale(p=recipe.per_view("gray_p", view)),
                v2.RandomApply([blur], p=recipe.per_view("blur_p", view)),
                v2.RandomSolarize(threshold=128, p=recipe.per_view("solarize_p", view)),
                v2.RandomHorizontalFlip(recipe.hflip_p),
                v2.RandomVerticalFlip(recipe.vflip_p),
                v2.ToDtype(torch.float32, scale=True),
                TurnAndNoise(recipe),
                v2.Normalize(list(recipe.mean), list(recipe.std)),
            ]
        )

    def __getitem__(self, sample_id: int) -> list[Tensor]:
        image = decode_rgb(self.shards.read(sample_id))
        return [transform(image) for transform in self.transforms]


# Taps of a true Gaussian of sigma <= 2: three standard deviations to each side. The usual 23 are slower and no better.
BLUR_TAPS = 13


class _Batches:
    """A batch sampler without end, until `stopped` is set."""

    def __init__(self, work: Work):
        self.work = work
        self.stopped = False

    def __iter__(self) -> Iterator[list[int]]:
        return (
            ids.tolist() for _, ids in itertools.takewhile(lambda _: not self.stopped, self.work.batches())
        )


def _data_loader(views: type[PILViews]) -> Callable[[Work], Generator[int]]:
    def batches(work: Work) -> Generator[int]:
        sampler = _Batches(work)
        # Spawned, because a fork of a process whose threads hold locks may hang. Each worker computes with one thread, as always.
        loader = DataLoader(
            views(work.shards, work.recipe),
            batch_sampler=sampler,  # pyright: ignore[reportArgumentType]
            num_workers=work.threads,
            multiprocessing_context="spawn",
        )
        batches = iter(loader)
        try:
            for made in batches:
                yield len(made[0])
        except GeneratorExit:
            # A worker that has to end while it sends a batch aborts: read the batches on their way, so that it ends idle.
            sampler.stopped = True
            for _ in batches:
                pass
            raise

    return batches


class _ViewsOf:
    """Make an image's views, in a pipeline of WebDataset."""

    def __init__(self, transforms: list[v1.Compose]):
        self.transforms = transforms

    def __call__(self, sample: tuple[Image.Image]) -> list[Any]:
        return [transform(sample[0]) for transform in self.transforms]


class _Until:
    """End a pipeline of WebDataset when `stopped` is set."""

    def __init__(self, stopped: Any):
        self.stopped = stopped

    def __call__(self, items: Iterator[Any]) -> Iterator[Any]:
        return itertools.takewhile(lambda _: not self.stopped.is_set(), items)


def _web_loader(work: Work) -> Generator[int]:
    import webdataset

    # Its type stubs name no classes.
    wds: Any = webdataset
    # Whole shards without end: WebDataset reads sequentially and has no sample numbers.
    urls = sorted({str(work.shards.shard_path(int(i))) for i in work.sample_ids})
    views = PILViews(work.shards, work.recipe)
    stopped = multiprocessing.get_context("spawn").Event()
    data = (
        wds.WebDataset(urls, resampled=True, shardshuffle=False)
        .shuffle(1000)
        .decode("pilrgb")
        .to_tuple("jpg;jpeg;png;webp;tif;tiff")
        .map(_ViewsOf(views.transforms))
        .batched(work.batch, partial=False)
        .compose(_Until(stopped))
    )
    loader = wds.WebLoader(data, batch_size=None, num_workers=work.threads, multiprocessing_context="spawn")
    batches = iter(loader)
    try:
        for made in batches:
            yield len(made[0])
    except GeneratorExit:
        # As in `_data_loader`.
        stopped.set()
        for _ in batches:
            pass
        raise


def _ffcv(work: Work) -> Generator[int]:
    """Raise the reason why FFCV is not measured: it reads a format of its own, with its own resizing."""
    try:
        import ffcv  # type: ignore[import-not-found]  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "FFCV has had no release since 2023 and needs its OpenCV and TurboJPEG built from source"
        ) from error
    raise NotImplementedError("FFCV reads .beton files, not tar shards: measure it with its own tools")
    yield 0


# --------------------------------------------------------------------------------------------------------- Kornia


def kornia_modules(recipe: Recipe, view: int) -> nn.Sequential:
    """Return Kornia's modules, as in its documentation, for a view of images of one size, float32 (N, 3, H, W) in [0, 1]."""
    import kornia.augmentation as K

    return nn.Sequential(
        K.RandomResizedCrop((recipe.size, recipe.size), recipe.crop_scale, recipe.crop_ratio),
        K.ColorJitter(*recipe.strengths(view), p=recipe.per_view("jitter_p", view)),
        K.RandomGrayscale(p=recipe.per_view("gray_p", view)),
        K.RandomGaussianBlur((BLUR_TAPS, BLUR_TAPS), recipe.blur_sigma, p=recipe.per_view("blur_p", view)),
        # The defaults would also move the threshold and add a random constant.
        K.RandomSolarize((0.5, 0.5), (0.0, 0.0), p=recipe.per_view("solarize_p", view)),
        K.RandomHorizontalFlip(p=recipe.hflip_p),
        K.RandomVerticalFlip(p=recipe.vflip_p),
        K.Normalize(torch.tensor(recipe.mean), torch.tensor(recipe.std)),
    )


def kornia_side(recipe: Recipe) -> int:
    """Return the side of the square that images are resized to before: 256 pixels for views of 224."""
    return round(recipe.size * 256 / 224)


def _kornia_views(work: Work) -> Generator[int]:
    recipe = work.recipe
    work.refuse_turns_and_noise("Kornia")
    side = kornia_side(recipe)

    def resized(sample_id: int) -> Tensor:
        image = decode_rgb(work.shards.read(sample_id))
        return F.interpolate(image[None], (side, side), mode="bilinear", antialias=True)[0]

    transforms = [kornia_modules(recipe, view) for view in range(recipe.num_views)]
    before = torch.get_num_threads()
    torch.set_num_threads(work.threads)
    try:
        with ThreadPoolExecutor(work.threads) as pool:
            for _, ids in work.batches():
                images = torch.stack(list(pool.map(resized, ids.tolist()))).float() / 255
                with torch.no_grad():
                    made = [transform(images) for transform in transforms]
                yield len(made[0])
    finally:
        torch.set_num_threads(before)


MOCO_V3 = "moco-v3"
PEERS: dict[str, MeasuredLoader] = {
    loader.name: loader
    for loader in (
        MeasuredLoader(
            MOCO_V3,
            "exact",
            _data_loader(PILViews),
            "torchvision's transforms on PIL images in DataLoader workers of one thread each, as in MoCo v3's published code",
            workers=True,
        ),
        MeasuredLoader(
            "torchvision-v2",
            "approximate",
            _data_loader(TensorViews),
            f"v2 transforms on uint8 tensors in DataLoader workers of one thread each; a true Gaussian blur of {BLUR_TAPS} taps and "
            "a floating-point hue, on average 1 to 2 gray levels from PIL's",
            workers=True,
        ),
        MeasuredLoader(
            "lightly",
            "exact",
            _data_loader(LightlyViews),
            "Lightly's MoCoV2Transform in DataLoader workers of one thread each; no solarize, one chance of blur",
            workers=True,
        ),
        MeasuredLoader(
            "webdataset",
            "exact",
            _web_loader,
            "WebDataset's WebLoader over the same shards with MoCo v3's transforms on PIL images, worker processes of one thread each",
            workers=True,
        ),
        MeasuredLoader(
            "dali-graph",
            "approximate",
            view_batches,
            "DALI's CPU operators as its users and solo-learn write them; "
            "color_twist is one matrix: jitter in a fixed order, contrast about a constant, a linear hue, some "
            "10 gray levels from PIL's",
        ),
        MeasuredLoader("dali-decode", "", decoded_batches, "DALI's CPU decoder alone, no views"),
        MeasuredLoader(
            "kornia-modules",
            "approximate",
            _kornia_views,
            "Kornia's modules on images decoded and resized to one size in threads: crops without antialiasing, one order of jitter "
            "a batch, a true Gaussian blur",
        ),
        MeasuredLoader("ffcv", "", _ffcv, "FFCV, which reads .beton files"),
    )
}
