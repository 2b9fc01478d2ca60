"""An augmentation recipe as frozen data, and the published presets.

A recipe says *what* may happen to an image; `pipelines.draws` decides what does happen to one sample, and an engine applies
it. Order of the operations, the same in every engine: crop and resize, colour jitter (its four parts in the drawn order),
greyscale, blur, solarise, horizontal flip, vertical flip, quarter turns, noise, normalise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from shards.errors import UserError, nearest

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Recipe:
    """What may happen to an image on its way to a view. Probabilities are in [0, 1]; pixels are in [0, 1] until the last step."""

    size: int = 224
    """Side of the square views, in pixels."""
    num_views: int = 2
    """Views made of each image."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Share of the image's area that a random crop covers: least, most."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width / height of a random crop: least, most (drawn log-uniformly)."""
    jitter_p: float = 0.8
    """Probability of colour jitter."""
    brightness: float = 0.4
    """Brightness factor is drawn from [1 - x, 1 + x]."""
    contrast: float = 0.4
    """Contrast factor is drawn from [1 - x, 1 + x]."""
    saturation: float = 0.2
    """Saturation factor is drawn from [1 - x, 1 + x]."""
    hue: float = 0.1
    """Hue shift is drawn from [-x, x], in turns of the colour circle; at most 0.5."""
    gray_p: float = 0.2
    """Probability of turning to greyscale."""
    blur_p: tuple[float, ...] = (1.0, 0.1)
    """Probability of Gaussian blur; one value for all views, or one per view."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Standard deviation of the blur, in pixels of the view: least, most."""
    solarize_p: tuple[float, ...] = (0.0, 0.2)
    """Probability of inverting every value of 128 (of 255) and above; one value for all views, or one per view."""
    hflip_p: float = 0.5
    """Probability of mirroring left and right."""
    vflip_p: float = 0.0
    """Probability of mirroring top and bottom."""
    quarter_turns: bool = False
    """Turn by 0, 90, 180 or 270 degrees, each equally likely: exact, no resampling."""
    noise_p: float = 0.0
    """Probability of additive Gaussian noise (before normalisation, clamped to [0, 1])."""
    noise_std: tuple[float, float] = (0.0, 0.05)
    """Standard deviation of the noise where pixels are in [0, 1]: least, most."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Mean per channel that normalisation subtracts."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Standard deviation per channel that normalisation divides by."""
    eval_crop: float = 0.875
    """Share of the shorter side that the centred square for evaluation covers (224 of 256 is 0.875)."""

    def __post_init__(self) -> None:
        def need(ok: bool, name: str, rule: str) -> None:
            if not ok:
                raise UserError(f"recipe.{name} is {getattr(self, name)}, but it must be {rule}.")

        need(self.size >= 1, "size", "at least 1 pixel")
        need(self.num_views >= 1, "num_views", "at least 1")
        need(
            0 < self.crop_scale[0] <= self.crop_scale[1] <= 1,
            "crop_scale",
            "two shares, 0 < least <= most <= 1",
        )
        need(0 < self.crop_ratio[0] <= self.crop_ratio[1], "crop_ratio", "two ratios, 0 < least <= most")
        need(0 <= self.hue <= 0.5, "hue", "between 0 and 0.5 turns")
        for name in ("brightness", "contrast", "saturation"):
            need(getattr(self, name) >= 0, name, "at least 0")
        for name in ("jitter_p", "gray_p", "hflip_p", "vflip_p", "noise_p"):
            need(0 <= getattr(self, name) <= 1, name, "a probability between 0 and 1")
        for name in ("blur_p", "solarize_p"):
            values = getattr(self, name)
            need(len(values) in (1, self.num_views), name, f"one value, or {self.num_views} (one per view)")
            need(all(0 <= p <= 1 for p in values), name, "probabilities between 0 and 1")
        # Above sigma 2 the extended box filter of the CPU kernel would need more than its five taps.
        need(
            0 <= self.blur_sigma[0] <= self.blur_sigma[1] <= 2,
            "blur_sigma",
            "two widths, 0 <= least <= most <= 2 pixels",
        )
        need(0 <= self.noise_std[0] <= self.noise_std[1], "noise_std", "two widths, 0 <= least <= most")
        need(all(s > 0 for s in self.std), "std", "above 0 in every channel")
        need(0 < self.eval_crop <= 1, "eval_crop", "a share above 0 and at most 1")

    def per_view(self, name: str, view: int) -> float:
        """The probability `name` (`blur_p` or `solarize_p`) that holds for view number `view`."""
        values = getattr(self, name)
        return values[view if len(values) > 1 else 0]


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        # Chen, Xie, He 2021 (arXiv 2104.02057), the asymmetric BYOL augmentation; ViT runs crop down to 8 % of the area.
        "moco_v3": Recipe(),
        # The same paper's ResNet-50 runs: crops cover at least 20 %.
        "moco_v3_resnet": Recipe(crop_scale=(0.2, 1.0)),
        # Overhead images have no up: all eight symmetries of the square. Tiles are already at scale, so crops stay large, hue
        # moves little (colour is signal there), and sensor noise is added before normalisation.
        "satellite": Recipe(
            crop_scale=(0.2, 1.0),
            hue=0.05,
            blur_p=(0.5, 0.1),
            vflip_p=0.5,
            quarter_turns=True,
            noise_p=0.5,
            eval_crop=1.0,
        ),
    }
)


def get_recipe(name: str) -> Recipe:
    """The preset called `name`; UserError names the nearest one where there is none."""
    if name not in RECIPES:
        raise UserError(f"There is no recipe called '{name}'.{nearest(name, RECIPES)}")
    return RECIPES[name]
