"""The table of operations: their order, and what each is, states and needs. Nothing else in the house states it again.

To add a simple operation, which changes the pixels of a view and moves none, write its file as `channel_drop` does and give it its
line below, between blur and solarise: that is the place which every engine has for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pipelines.augment.channel_drop import CHANNEL_DROP
from pipelines.augment.operation import Operation, PreviewColumn, RecipeSettings

# The settings of how far each part of colour jitter moves; also the fields of DRAW that hold what was drawn.
JITTER = ("brightness", "contrast", "saturation", "hue")


def _always(recipe: RecipeSettings, view: int) -> float:
    return 1.0


def _chance(name: str):
    return lambda recipe, view: float(recipe.per_view(name, view))


def _jitter(name: str):
    """Return how far a part of the jitter reaches: 0 where there is no jitter."""
    return lambda recipe, view: recipe.per_view(name, view) if recipe.per_view("jitter_p", view) > 0 else 0.0


def _factor(name: str) -> PreviewColumn:
    return PreviewColumn(name, ("jitter", name), lambda draw: f"x {draw[name]:.2f}", _jitter(name))


def _flag(name: str, title: str, **more: Any) -> Operation:
    """An operation that happens or not, with one probability of its own."""
    return Operation(
        name=name,
        title=title,
        settings=(f"{name}_p",),
        fields={name: "uint8"},
        switch=name,
        reach=_chance(f"{name}_p"),
        **more,
    )


_ORDER: tuple[Operation, ...] = (
    Operation(
        name="crop",
        title="crop and resize",
        settings=("crop", "crop_scale", "crop_ratio", "interpolation", "local_crop_scale"),
        # The box, in pixels of the decoded image.
        fields={"top": "int32", "left": "int32", "height": "int32", "width": "int32"},
        switch="height",
        counters=tuple(range(64)),
        reach=_always,
        geometric=True,
        columns=(
            PreviewColumn(
                "crop",
                ("top", "left", "height", "width"),
                lambda draw: f"{draw['width']} x {draw['height']} px",
            ),
        ),
        caption=lambda draw: "",
        row="crop",
    ),
    Operation(
        name="jitter",
        title="colour jitter",
        settings=("jitter_p", *JITTER),
        per_view=("jitter_p", *JITTER),
        fields={
            "jitter": "uint8",  # 1: apply the four parts below in `order`
            "order": ("uint8", (4,)),  # 0 brightness, 1 contrast, 2 saturation, 3 hue, as in torchvision
            "brightness": "float32",  # factors, 1 leaves the image as it is
            "contrast": "float32",
            "saturation": "float32",
            "hue": "float32",  # shift in turns, 0 leaves the image as it is
        },
        switch="jitter",
        counters=tuple(range(64, 70)),
        reach=_chance("jitter_p"),
        rgb={"saturation": _jitter("saturation"), "hue": _jitter("hue")},
        columns=(
            *(_factor(name) for name in ("brightness", "contrast", "saturation")),
            PreviewColumn(
                "hue", ("jitter", "hue"), lambda draw: f"{360 * float(draw['hue']):+.0f}°", _jitter("hue")
            ),
        ),
        caption=lambda draw: "jitter",
        row="jitter",
    ),
    _flag(
        "gray",
        "grayscale",
        per_view=("gray_p",),
        counters=(70,),
        rgb={"gray_p": _chance("gray_p")},
        columns=(PreviewColumn("grayscale", ("gray",), lambda draw: ""),),
        caption=lambda draw: "gray",
        row="gray",
    ),
    Operation(
        name="blur",
        title="blur",
        settings=("blur_p", "blur_sigma"),
        per_view=("blur_p",),
        fields={"sigma": "float32"},  # pixels of the view, 0: none
        switch="sigma",
        counters=(71, 72),
        reach=_chance("blur_p"),
        columns=(PreviewColumn("blur", ("sigma",), lambda draw: f"sigma {draw['sigma']:.2f} px"),),
        caption=lambda draw: f"blur {draw['sigma']:.1f}",
        row="blur",
    ),
    CHANNEL_DROP,
    _flag(
        "solarize",
        "solarise",
        per_view=("solarize_p",),
        counters=(73,),
        columns=(PreviewColumn("solarise", ("solarize",), lambda draw: ""),),
        caption=lambda draw: "solar",
        row="solarise",
    ),
    _flag(
        "hflip",
        "mirror left and right",
        counters=(74,),
        geometric=True,
        columns=(PreviewColumn("mirror", ("hflip",), lambda draw: "left - right"),),
        caption=lambda draw: "flip",
        row="flips and turns",
    ),
    _flag(
        "vflip",
        "mirror top and bottom",
        counters=(75,),
        geometric=True,
        columns=(PreviewColumn("mirror", ("vflip",), lambda draw: "top - bottom"),),
        caption=lambda draw: "flip",
        row="flips and turns",
    ),
    Operation(
        name="turn",
        title="quarter turns",
        settings=("quarter_turns",),
        fields={"turns": "uint8"},  # counter-clockwise, 0 to 3
        switch="turns",
        counters=(76,),
        reach=_chance("quarter_turns"),
        geometric=True,
        columns=(PreviewColumn("turn", ("turns",), lambda draw: f"{90 * int(draw['turns'])}°"),),
        caption=lambda draw: f"{90 * int(draw['turns'])}°",
        row="flips and turns",
    ),
    Operation(
        name="noise",
        title="noise",
        settings=("noise_p", "noise_std"),
        fields={"noise_std": "float32", "noise_seed": "uint64"},  # where pixels are in [0, 1]; 0: none
        switch="noise_std",
        counters=(77, 78, 79),
        reach=lambda recipe, view: recipe.per_view("noise_p", view) * recipe.values("noise_std")[-1],
        columns=(
            PreviewColumn(
                "noise",
                ("noise_std", "noise_seed"),
                lambda draw: f"std {255 * float(draw['noise_std']):.1f} levels",
            ),
        ),
        row="noise",
    ),
    Operation(
        name="normalize",
        title="normalise",
        settings=("mean", "std"),
        fields={},
        switch="",
        counters=(),
        reach=_always,
        caption=lambda draw: "",
    ),
    Operation(
        name="erase",
        title="erase a rectangle",
        settings=("erase_p", "erase_scale", "erase_ratio", "erase_value"),
        # The rectangle, in pixels of the finished view, height 0: none; the seed is of what fills it where erase_value is random.
        fields={
            "erase_top": "int32",
            "erase_left": "int32",
            "erase_height": "int32",
            "erase_width": "int32",
            "erase_seed": "uint64",
        },
        switch="erase_height",
        counters=(80, 81, *range(96, 160)),
        reach=_chance("erase_p"),
        geometric=True,
        columns=(
            PreviewColumn(
                "erase",
                ("erase_top", "erase_left", "erase_height", "erase_width", "erase_seed"),
                lambda draw: f"{draw['erase_width']} x {draw['erase_height']} px",
            ),
        ),
        caption=lambda draw: "erase",
    ),
)

# By name, in the order in which every engine applies them.
OPERATIONS: Mapping[str, Operation] = MappingProxyType({op.name: op for op in _ORDER})
# Those that lie in one file and that engines call between blur and solarise.
POINTWISE = {op.name: op.pointwise for op in _ORDER if op.pointwise}
# RecipeSettings that may have one value for each view.
PER_VIEW = tuple(name for op in _ORDER for name in op.per_view)


def draw_fields() -> list[tuple[Any, ...]]:
    """Return the fields of a DRAW record, as NumPy's dtype takes them.

    They are in the order of their operations' counters, which is that of their age: an operation that is new in any place of the
    table has its fields at the end, and records of earlier versions are the beginning of today's.
    """
    drawn = sorted((op for op in _ORDER if op.fields), key=lambda op: op.counters[0])
    return [
        (name, *(kind if isinstance(kind, tuple) else (kind,)))
        for op in drawn
        for name, kind in op.fields.items()
    ]
