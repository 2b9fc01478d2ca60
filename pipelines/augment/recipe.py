"""An augmentation recipe as frozen data, and the published presets.

A recipe says *what* may happen to an image; `pipelines.augment.draws` decides what does happen to one sample, and an engine applies
it, in the order of `pipelines.augment.operations`.

With multi-crop a recipe makes two groups of views: `num_views` global ones of side `size`, then `local_views` local ones of side
`local_size`, which cover less of the image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Literal

from pipelines.augment.operations import JITTER, PER_VIEW, POINTWISE
from shards.errors import UserError, nearest

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PerView = float | tuple[float, ...]


@dataclass(frozen=True, repr=False)
class Recipe:
    """What may happen to an image on its way to a view. Probabilities are in [0, 1]; pixels are in [0, 1] until the last step."""

    size: int = 224
    """Side of the square views, in pixels."""
    num_views: int = 2
    """Views of that side made of each image: all of them, or, with local views, the global ones."""
    crop: Literal["random", "center"] = "random"
    """What is cut out: a random box, or the centred square of `eval_crop`, as in evaluation."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Share of the image's area that a random crop covers: least, most."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width / height of a random crop: least, most (drawn log-uniformly)."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """How crops are resized; both filter out what the view is too small for (antialias)."""
    local_views: int = 0
    """Further, small views of each image (multi-crop: SwAV, DINO); they come after the others."""
    local_size: int = 96
    """Side of the local views, in pixels."""
    local_crop_scale: tuple[float, float] = (0.05, 0.4)
    """Share of the image's area that the crop of a local view covers: least, most."""
    jitter_p: PerView = 0.8
    """Probability of colour jitter: one value for all views, or several, as for blur_p."""
    brightness: PerView = 0.4
    """Brightness factor is drawn from [1 - x, 1 + x]; x is one value, or several, as for blur_p."""
    contrast: PerView = 0.4
    """Contrast factor is drawn from [1 - x, 1 + x]; as for brightness."""
    saturation: PerView = 0.2
    """Saturation factor is drawn from [1 - x, 1 + x]; as for brightness."""
    hue: PerView = 0.1
    """Hue shift is drawn from [-x, x], in turns of the colour circle, at most 0.5; as for brightness."""
    gray_p: PerView = 0.2
    """Probability of turning to grayscale; one value, or several, as for blur_p."""
    blur_p: tuple[float, ...] = (1.0, 0.1)
    """Probability of Gaussian blur: one value for all views, or one per view, or one per global view and one for all local ones."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Standard deviation of the blur, in pixels of the view: least, most."""
    channel_drop_p: PerView = 0.0
    """Probability that one channel, each equally likely, becomes 0 (before normalisation); one value, or several, as for blur_p."""
    solarize_p: tuple[float, ...] = (0.0, 0.2)
    """Probability of inverting every value of 128 (of 255) and above: as many values as for blur_p."""
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
    erase_p: float = 0.0
    """Probability of erasing a rectangle of the finished view (random erasing, Zhong et al. 2017, arXiv 1708.04896)."""
    erase_scale: tuple[float, float] = (0.02, 0.33)
    """Share of the view's area that is erased: least, most."""
    erase_ratio: tuple[float, float] = (0.3, 3.3)
    """Height / width of the rectangle: least, most (drawn log-uniformly)."""
    erase_value: Literal["mean", "random"] | float = "mean"
    """What fills it: mean (0 after normalisation), random (standard normal numbers after it), or a level in [0, 1] (before it)."""
    value_low: tuple[float, ...] = ()
    """Value of each channel that becomes 0, as a share of its type's range (255, 65535, for floats 1); without: the type's 0."""
    value_high: tuple[float, ...] = ()
    """Value of each channel that becomes 1, likewise; without: the type's largest. data.value_range fills both in."""
    value_range: Literal["type", "percentiles"] = "type"
    """What data.value_range auto means for a preset; ignored where value_low and value_high are there."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Mean per channel that normalisation subtracts; ImageNet's give way to the data set's where it has other than 3 channels."""
    std: tuple[float, ...] = IMAGENET_STD
    """Standard deviation per channel that normalisation divides by; as for mean."""
    eval_crop: float = 0.875
    """Share of the shorter side that the centred square for evaluation covers (224 of 256 is 0.875)."""

    def __post_init__(self) -> None:
        def need(ok: bool, name: str, rule: str) -> None:
            if not ok:
                raise UserError(f"recipe.{name} is {getattr(self, name)}, but it must be {rule}.")

        least = {"size": 1, "num_views": 1, "local_views": 0, "local_size": 1}
        for name, low in least.items():
            need(getattr(self, name) >= low, name, f"at least {low}")
        for name in ("crop_scale", "local_crop_scale", "erase_scale"):
            low, high = getattr(self, name)
            need(0 < low <= high <= 1, name, "two shares, 0 < least <= most <= 1")
        for name in ("crop_ratio", "erase_ratio"):
            low, high = getattr(self, name)
            need(0 < low <= high < math.inf, name, "two ratios, 0 < least <= most")
        for name in (field.name for field in fields(self) if field.name.endswith("_p")):
            rule = "probabilities between 0 and 1" if name in PER_VIEW else "a probability between 0 and 1"
            need(all(0 <= p <= 1 for p in self.values(name)), name, rule)
        counts = f"one value, or {self.total_views} (one per view)"
        if self.local_views > 1:
            counts += f", or {self.num_views + 1} (the last for all local views)"
        for name in PER_VIEW:
            need(len(self.values(name)) in self._counts(), name, counts)
        need(all(0 <= x <= 0.5 for x in self.values("hue")), "hue", "between 0 and 0.5 turns")
        for name in ("brightness", "contrast", "saturation"):
            need(all(0 <= x < math.inf for x in self.values(name)), name, "at least 0")
        # Above sigma 2 the extended box filter of the CPU kernel would need more than its five taps.
        need(
            0 <= self.blur_sigma[0] <= self.blur_sigma[1] <= 2,
            "blur_sigma",
            "two widths, 0 <= least <= most <= 2 pixels",
        )
        need(
            0 <= self.noise_std[0] <= self.noise_std[1] < math.inf,
            "noise_std",
            "two widths, 0 <= least <= most",
        )
        level = self.erase_value
        need(isinstance(level, str) or 0 <= level <= 1, "erase_value", "mean, random, or a level in [0, 1]")
        need(
            len(self.std) == len(self.mean) > 0, "std", f"{len(self.mean)} values, as many as recipe.mean has"
        )
        unit = "in every channel, since pixels are in [0, 1] (divide values of 8 bits by 255)"
        need(all(0 <= m <= 1 for m in self.mean), "mean", f"between 0 and 1 {unit}")
        need(all(0 < s <= 1 for s in self.std), "std", f"above 0 and at most 1 {unit}")
        ranges = list(zip(self.value_low, self.value_high, strict=False))
        need(
            len(self.value_low) == len(self.value_high) == len(ranges) and all(a < b for a, b in ranges),
            "value_high",
            f"above recipe.value_low, {self.value_low}, in every channel",
        )
        need(0 < self.eval_crop <= 1, "eval_crop", "a share above 0 and at most 1")
        for operation in POINTWISE.values():
            if operation.check:
                operation.check(self, need)

    def __repr__(self) -> str:
        """Show the settings that differ from the defaults, which are MoCo v3's."""
        values = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if getattr(self, field.name) != field.default
        }
        return f"Recipe({', '.join(f'{name}={value!r}' for name, value in values.items())})"

    @property
    def total_views(self) -> int:
        """Return the number of global and local views together."""
        return self.num_views + self.local_views

    def side(self, view: int) -> int:
        """Return the side of view number `view`, in pixels."""
        return self.size if view < self.num_views else self.local_size

    def scale(self, view: int) -> tuple[float, float]:
        """Return the share of the image's area that the crop of view number `view` covers: least, most."""
        return self.crop_scale if view < self.num_views else self.local_crop_scale

    def groups(self) -> list[range]:
        """Return the numbers of the global views, and of the local ones where there are any."""
        ranges = range(self.num_views), range(self.num_views, self.total_views)
        return [views for views in ranges if views]

    def erased(self) -> tuple[float, ...]:
        """Return what erased pixels become after normalisation, per channel; empty where they become random numbers."""
        if isinstance(self.erase_value, str):
            return () if self.erase_value == "random" else (0.0,) * len(self.mean)
        return tuple((self.erase_value - m) / s for m, s in zip(self.mean, self.std, strict=True))

    def _counts(self) -> set[int]:
        """Return how many values a setting with values per view may have."""
        return {1, self.total_views, min(self.num_views + 1, self.total_views)}

    def values(self, name: str) -> tuple[float, ...]:
        """Return the values of a setting that may have several: one, or one per view, or per global view and for all local ones."""
        given = getattr(self, name)
        return given if isinstance(given, tuple) else (given,)

    def per_view(self, name: str, view: int) -> float:
        """Return the value of such a setting that holds for view number `view`."""
        values = self.values(name)
        return values[min(view, len(values) - 1)]

    def strengths(self, view: int) -> tuple[float, float, float, float]:
        """Return the settings of `JITTER` that hold for view number `view`."""
        brightness, contrast, saturation, hue = (self.per_view(name, view) for name in JITTER)
        return brightness, contrast, saturation, hue

    def reach(self, name: str, view: int) -> float:
        """Return how far a part of `JITTER` may move in view number `view`: 0 where there is no jitter."""
        return self.per_view(name, view) if self.per_view("jitter_p", view) > 0 else 0.0


# What the supervised recipes share: no colours, no blur.
_PLAIN = Recipe(num_views=1, jitter_p=0.0, gray_p=0.0, blur_p=(0.0,), solarize_p=(0.0,))
_MOCO_V3 = Recipe()
_SIMCLR = replace(
    _MOCO_V3, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, blur_p=(0.5,), solarize_p=(0.0,)
)
# Overhead images have no up: all eight symmetries of the square. Tiles are already at scale, so crops stay large, hue moves little
# (colour is signal there), and sensor noise is added before normalisation.
_SATELLITE = replace(
    _MOCO_V3,
    crop_scale=(0.2, 1.0),
    hue=0.05,
    blur_p=(0.5, 0.1),
    vflip_p=0.5,
    quarter_turns=True,
    noise_p=0.5,
    eval_crop=1.0,
)

RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        # Chen, Xie, He 2021 (arXiv 2104.02057), the asymmetric BYOL augmentation; ViT runs crop down to 8 % of the area.
        "moco_v3": _MOCO_V3,
        # The same paper's ResNet-50 runs: crops cover at least 20 %.
        "moco_v3_resnet": replace(_MOCO_V3, crop_scale=(0.2, 1.0)),
        # Chen, Fan, Girshick, He 2020 (arXiv 2003.04297): facebookresearch/moco, main_moco.py --aug-plus.
        "moco_v2": replace(_MOCO_V3, crop_scale=(0.2, 1.0), saturation=0.4, blur_p=(0.5,), solarize_p=(0.0,)),
        # Chen, Kornblith, Norouzi, Hinton 2020 (arXiv 2002.05709), appendix A: google-research/simclr, data_util.py, strength 1.
        "simclr": replace(_SIMCLR, interpolation="bicubic"),
        # Grill et al. 2020 (arXiv 2006.07733), appendix B and table 6. MoCo v3 took it over, with bilinear crops.
        "byol": replace(_MOCO_V3, interpolation="bicubic"),
        # Caron et al. 2021 (arXiv 2104.14294): facebookresearch/dino, main_dino.py, DataAugmentationDINO and its defaults.
        "dino": replace(
            _MOCO_V3,
            crop_scale=(0.4, 1.0),
            interpolation="bicubic",
            local_views=8,
            local_size=96,
            local_crop_scale=(0.05, 0.4),
            blur_p=(1.0, 0.1, 0.5),
            solarize_p=(0.0, 0.2, 0.0),
        ),
        # Caron et al. 2020 (arXiv 2006.09882): facebookresearch/swav, src/multicropdataset.py, 2 x 224 + 6 x 96 as in its 800 epochs.
        # The deviation of red is 0.228 there, not 0.229.
        "swav": replace(
            _SIMCLR,
            crop_scale=(0.14, 1.0),
            local_views=6,
            local_size=96,
            local_crop_scale=(0.05, 0.14),
            std=(0.228, 0.224, 0.225),
        ),
        # This project's own, for overhead images.
        "satellite": _SATELLITE,
        # As satellite, for any number of channels: without what needs red, green and blue. Reflectances fill a few per cent of
        # 16 bits, which noise of the type's range would drown.
        "multispectral": replace(_SATELLITE, saturation=0.0, hue=0.0, gray_p=0.0, value_range="percentiles"),
        # He et al. 2016 (arXiv 1512.03385) in today's form: the shorter side to 256, the centre of 224.
        "eval": replace(_PLAIN, crop="center", hflip_p=0.0),
        # Chen, Xie, He 2021: facebookresearch/moco-v3, main_lincls.py; the augmentation of ImageNet baselines.
        "linear": _PLAIN,
        # Touvron et al. 2021 (arXiv 2012.12877), table 9, without its RandAugment, which needs operations that no engine here has;
        # mixup and cutmix act on batches. Erasing as timm's RandomErasing, mode 'pixel'.
        "finetune": replace(
            _PLAIN,
            interpolation="bicubic",
            erase_p=0.25,
            erase_scale=(0.02, 1 / 3),
            erase_ratio=(0.3, 1 / 0.3),
            erase_value="random",
        ),
        # pytorch/vision, references/segmentation/presets.py: sides scaled by 0.5 to 2 of 520, a crop of 480, mirrored. As a share
        # of the image's area that crop is at least (480 / 1040)^2; here its ratio varies too. Masks take the same crop and flips.
        "segmentation": replace(_PLAIN, size=480, crop_scale=((480 / 1040) ** 2, 1.0), eval_crop=1.0),
    }
)


def get_recipe(name: str) -> Recipe:
    """Return the preset called `name`. Raise UserError, which names the nearest one, where there is none."""
    if not isinstance(name, str) or name not in RECIPES:
        raise UserError(f"There is no recipe called '{name}'.{nearest(str(name), RECIPES)}")
    return RECIPES[name]
