"""The table of operations: what it states is what recipes, draws, engines, masks and documents have."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.augment.channels import check_operations
from pipelines.augment.draws import DRAW, draw
from pipelines.augment.operations import OPERATIONS, PER_VIEW, POINTWISE
from pipelines.augment.recipe import RECIPES, Recipe
from pipelines.engines.engine_table import engine_names, make_engine, operations_of
from pipelines.kernels import reference
from pipelines.kernels.batched_views import BatchedViews
from pipelines.kernels.view_params import TYPES
from pipelines.loading.masks import mask_view
from shards.errors import UserError
from tests.pictures import photo
from tests.pipelines.augment.test_channels import bands, flat

ROOT = Path(__file__).parents[3]
SIDE, COUNT = 32, 12
DRAWN = [name for name, operation in OPERATIONS.items() if operation.switch]
# A recipe whose every view meets every operation.
ALL = Recipe(
    size=SIDE,
    num_views=1,
    erase_scale=(0.1, 0.4),
    noise_std=(0.02, 0.05),
    quarter_turns=True,
    blur_sigma=(0.5, 2.0),
    **dict.fromkeys(("blur_p", "solarize_p"), (1.0,)),
    **dict.fromkeys(("jitter_p", "gray_p", "channel_drop_p", "hflip_p", "vflip_p"), 1.0),
    **dict.fromkeys(("noise_p", "erase_p"), 1.0),
    **flat(3),  # type: ignore[arg-type]
)


def everything(recipe: Recipe = ALL) -> np.ndarray:
    """DRAW records (COUNT,) of pictures of SIDE x SIDE pixels that take all of them and meet every operation."""
    sides = np.full(COUNT, SIDE)
    draws = draw(recipe, 0, 0, np.arange(COUNT), sides, sides)[0].copy()
    draws["top"] = draws["left"] = 0
    draws["height"] = draws["width"] = SIDE
    draws["turns"] = np.arange(COUNT) % 3 + 1
    return draws


def only(names: set[str], draws: np.ndarray) -> np.ndarray:
    """Records that keep some operations, and the crop."""
    out = draws.copy()
    for name, operation in OPERATIONS.items():
        if operation.switch and name not in names | {"crop"}:
            out[operation.switch] = 0
    return out


def views(engine: str, recipe: Recipe, images: list[np.ndarray], draws: np.ndarray) -> np.ndarray:
    """The view of each image by its record, float32 (COUNT, C, SIDE, SIDE)."""
    if engine == "batched":
        item = images[0].dtype.itemsize
        pixels = torch.from_numpy(np.concatenate([image.reshape(-1) for image in images]).view(np.uint8))
        places = np.arange(COUNT) * images[0].size * item
        kind = np.full(COUNT, TYPES.index(images[0].dtype.name))
        batched = BatchedViews(recipe, torch.device("cpu"), dtypes=TYPES)
        return batched(pixels, places, np.full(COUNT, SIDE), draws[None], kind)[0].numpy()
    out, maker = np.empty((COUNT, len(recipe.mean), SIDE, SIDE), np.float32), make_engine(engine, recipe)
    for image, one, view in zip(images, draws, out, strict=True):
        maker.render(image, np.atleast_1d(one), [view])  # type: ignore[union-attr,arg-type,call-arg]
    return out


KINDS = {"8-bit RGB": ("uint8", 3), "16-bit RGB": ("uint16", 3), "floats of 5 channels": ("float32", 5)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*DRAWN, "all"])
@pytest.mark.parametrize("engine", ["fused", "batched"])
def test_each_operation_and_all_together_are_those_of_the_reference(engine, name, kind):
    dtype, channels = KINDS[kind]
    recipe = dataclasses.replace(ALL, erase_value="random", **flat(channels))  # type: ignore[arg-type]
    images = [bands(channels, dtype, SIDE, SIDE, seed=i) for i in range(COUNT)]
    if dtype == "uint16":  # up to four fifths of their range, so that some are solarised
        images = [image * 3 for image in images]
    draws = everything(recipe) if name == "all" else only({name}, everything(recipe))
    made, wanted = (views(who, recipe, images, draws) for who in (engine, "reference"))
    errors = np.abs(made - wanted) * 255
    assert errors.mean() < 0.1
    assert np.quantile(errors, 0.99) < 1.1
    still = views("reference", recipe, images, only(set(), draws))
    changed = not np.array_equal(wanted, still)
    # Without red, green and blue there is no gray: such a recipe is refused before.
    assert changed == (name != "crop" and not (name == "gray" and channels != 3))


def test_the_reference_applies_operations_in_the_order_of_the_table(monkeypatch):
    image = np.asarray(photo(SIDE, SIDE))
    one = only({"hflip", "turn"}, everything())[:1]
    usual = views("reference", ALL, [image] * COUNT, np.repeat(one, COUNT))
    names = list(OPERATIONS)
    names.remove("hflip")
    names.insert(names.index("turn") + 1, "hflip")
    monkeypatch.setattr(reference, "OPERATIONS", {name: OPERATIONS[name] for name in names})
    other = views("reference", ALL, [image] * COUNT, np.repeat(one, COUNT))
    np.testing.assert_array_equal(
        other, usual[:, :, ::-1, ::-1]
    )  # a flip before a quarter turn is the other flip after it
    assert (other != usual).any()


def test_the_order_is_the_published_one():
    """Changing it changes what every run sees."""
    assert list(OPERATIONS) == [
        "crop",
        "jitter",
        "gray",
        "blur",
        "channel_drop",
        "solarize",
        "hflip",
        "vflip",
        "turn",
        "noise",
        "normalize",
        "erase",
    ]


def test_engines_find_pointwise_operations_in_one_place():
    names = list(OPERATIONS)
    assert names[names.index("blur") + 1 : names.index("solarize")] == list(POINTWISE)


def test_settings_are_those_of_the_recipe():
    settings = [name for operation in OPERATIONS.values() for name in operation.settings]
    known = {field.name for field in dataclasses.fields(Recipe)}
    assert len(set(settings)) == len(settings)
    assert set(settings) < known
    # What is left is about views and pixels, and draws nothing.
    rest = {"size", "num_views", "local_views", "local_size", "eval_crop"}
    rest |= {"value_low", "value_high", "value_range"}
    assert known - set(settings) == rest
    assert set(PER_VIEW) <= set(settings)


def test_counters_are_no_two_operations_and_fields_come_in_the_order_of_their_age():
    counters = [number for operation in OPERATIONS.values() for number in operation.counters]
    assert len(set(counters)) == len(counters)
    fields = [name for operation in OPERATIONS.values() for name in operation.fields]
    assert sorted(fields) == sorted(DRAW.names or ())
    assert (DRAW.names or ())[:23][-1] == "erase_seed"
    assert (DRAW.names or ())[23:] == ("channel_drop",)


@pytest.mark.parametrize("name", DRAWN)
def test_reach_says_whether_an_operation_can_be_drawn(name):
    """None of the other settings of a recipe draws it, and its own does."""
    operation = OPERATIONS[name]
    assert operation.possible(ALL)
    assert (everything()[operation.switch] > 0).all()
    if name == "crop":
        return
    switch = next(
        setting for setting in operation.settings if setting.endswith("_p") or setting == "quarter_turns"
    )
    value = getattr(ALL, switch)
    off = dataclasses.replace(ALL, **{switch: (0.0,) if isinstance(value, tuple) else type(value)(0)})
    assert not operation.possible(off)
    sides = np.full(50, SIDE)
    assert not draw(off, 0, 0, np.arange(50), sides, sides)[operation.switch].any()


@pytest.mark.parametrize("name", DRAWN)
def test_masks_are_under_the_geometric_operations_and_no_others(name):
    mask = np.random.default_rng(0).integers(0, 9, (SIDE, SIDE)).astype(np.uint8)
    draws = only({name}, everything())
    if name == "crop":
        draws["top"], draws["height"] = 3, 20
    still = only(set(), everything())
    moved = any(
        (mask_view(mask, a, SIDE) != mask_view(mask, b, SIDE)).any()
        for a, b in zip(draws, still, strict=True)
    )
    assert moved == OPERATIONS[name].geometric


def test_what_needs_red_green_and_blue_is_refused_for_other_channels():
    plain = dataclasses.replace(RECIPES["multispectral"], **flat(4))
    check_operations(dataclasses.replace(plain, channel_drop_p=0.5))
    needing = {name for operation in OPERATIONS.values() for name in operation.rgb}
    assert needing == {"saturation", "hue", "gray_p"}
    for name in needing:
        with pytest.raises(UserError, match=f"recipe.{name} need"):
            check_operations(dataclasses.replace(plain, **{name: 0.1}))


@pytest.mark.parametrize("engine", engine_names())
def test_engines_have_operations_of_the_table_and_refuse_the_others(engine):
    has = operations_of(engine)
    assert has <= set(OPERATIONS)
    assert set(OPERATIONS) - has == (set(POINTWISE) if engine == "dali" else set())


def documented() -> str:
    """The table of docs/recipes.md."""
    rows = ["| operation | settings | red, green and blue | masks |", "|---|---|---|---|"]
    for operation in OPERATIONS.values():
        settings = ", ".join(f"`{name}`" for name in operation.settings)
        needed = ", ".join(f"`{name}`" for name in operation.rgb)
        rows.append(f"| {operation.title} | {settings} | {needed} | {'too' if operation.geometric else ''} |")
    return "\n".join(rows)


def test_the_documents_have_the_table():
    page = (ROOT / "docs" / "recipes.md").read_text()
    [found] = re.findall(r"<!-- operations -->\n(.*?)\n<!-- end of operations -->", page, re.DOTALL)
    assert found == documented()
