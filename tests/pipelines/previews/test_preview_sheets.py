from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.augment.draws import draw
from pipelines.augment.operations import OPERATIONS
from pipelines.augment.recipe import RECIPES, Recipe
from pipelines.previews.preview_sheets import (
    columns,
    contact_sheet,
    describe,
    engines_sheet,
    operations_sheet,
)
from pipelines.previews.sheet import overlay
from shards.conversion.convert import convert
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError
from shards.images.mask_images import MaskFolder
from shards.sources.image_folder import FolderSource
from shards.storage.opening import open_place
from tests.pictures import photo
from tests.pipelines.augment.test_channels import bands, save

CELL, STEP = 100, 106


def cell(sheet: np.ndarray, row: int, column: int) -> np.ndarray:
    """The pixels of one picture."""
    y, x = 26 + 124 * row, 6 + STEP * column
    return sheet[y : y + CELL, x : x + CELL]


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as sheet:
        return np.asarray(sheet)


def test_sheet_shows_originals_and_views(shard_set, tmp_path):
    recipe = Recipe(size=32)
    path = contact_sheet(shard_set, recipe, tmp_path / "views.png", rows=3, epochs=2, cell=100)
    with Image.open(path) as sheet:
        assert sheet.format == "PNG"
        assert sheet.size == (6 + 5 * 106, 26 + 3 * 124)
        pixels = np.asarray(sheet)
    cells = [pixels[30:110, 10 + 106 * column : 90 + 106 * column] for column in range(5)]
    assert all(cell.std() > 5 for cell in cells)
    assert all((cells[i] != cells[i + 1]).any() for i in range(4))


def test_same_seed_same_bytes(shard_set, tmp_path):
    a, b = (
        contact_sheet(shard_set, RECIPES["satellite"], tmp_path / f"{n}.png", rows=2).read_bytes()
        for n in "ab"
    )
    assert a == b


def test_description_names_what_was_drawn():
    record = draw(RECIPES["satellite"], 0, 0, np.array([0]), np.array([50]), np.array([50]))[0, 0].copy()
    for operation in OPERATIONS.values():
        if operation.switch and operation.name != "crop":
            record[operation.switch] = 0
    assert describe(record) == ""
    record["turns"], record["sigma"], record["hflip"] = 3, 1.25, 1
    assert describe(record) == "blur 1.2 flip 270°"
    record["channel_drop"], record["vflip"] = 2, 1
    assert describe(record) == "blur 1.2 drop 2 flip 270°"


def test_operations_are_shown_one_by_one(shard_set, tmp_path):
    """Each column differs from the centre; mirror and turn by nothing but their order of pixels."""
    recipe = Recipe(
        size=100,
        num_views=1,
        blur_p=(1.0,),
        solarize_p=(0.5,),
        vflip_p=0.5,
        quarter_turns=True,
        noise_p=0.5,
        erase_p=0.5,
        channel_drop_p=0.5,
    )
    ops = columns(recipe)
    assert [column for _, column in ops] == [c for op in OPERATIONS.values() for c in op.columns]
    sheet = pixels(operations_sheet(shard_set, recipe, tmp_path / "ops.png", rows=1, cell=CELL))
    assert sheet.shape[1] == 6 + STEP * (2 + len(ops))
    centre = cell(sheet, 0, 1)
    shown = {f"{op.title} {op.fields[0]}": cell(sheet, 0, 2 + i) for i, (_, op) in enumerate(ops)}
    assert all((picture != centre).any() for name, picture in shown.items())
    np.testing.assert_array_equal(shown["mirror hflip"], centre[:, ::-1])
    np.testing.assert_array_equal(shown["mirror vflip"], centre[::-1])
    assert any((shown["turn turns"] == np.rot90(centre, k)).all() for k in (1, 2, 3))
    assert (np.ptp(shown["grayscale gray"], axis=2) == 0).all()
    dropped = (shown["channel drop channel_drop"] != centre).any(axis=(0, 1))
    assert dropped.sum() == 1
    assert (shown["channel drop channel_drop"][..., dropped] == 0).all()


def test_operations_that_a_recipe_lacks_have_no_column(shard_set, tmp_path):
    sheet = pixels(operations_sheet(shard_set, RECIPES["linear"], tmp_path / "ops.png", rows=1, cell=CELL))
    assert sheet.shape[1] == 6 + STEP * 4  # original, centre, crop, mirror


def test_engines_are_compared_with_the_first(shard_set, tmp_path):
    recipe = Recipe(size=32)
    path = engines_sheet(
        shard_set, recipe, tmp_path / "e.png", ("reference", "fused", "reference"), rows=2, cell=CELL
    )
    sheet = pixels(path)
    assert sheet.shape[1] == 6 + STEP * (1 + 2 * 5)
    for row in range(2):
        assert cell(sheet, row, 3)[8:-8, 8:-8].max() < 60, "a level or two, eight times"
        assert cell(sheet, row, 5)[8:-8, 8:-8].max() == 0, "the reference with itself"
        np.testing.assert_array_equal(cell(sheet, row, 4), cell(sheet, row, 1))


def test_many_channels_are_stretched_and_chosen(tmp_path):
    shards = save(tmp_path, [bands(5, "uint16", 100, 100, seed=s) for s in range(2)])
    recipe = RECIPES["multispectral"]
    for value_range in ("type", "percentiles"):
        sheets = [
            pixels(
                contact_sheet(
                    shards,
                    recipe,
                    tmp_path / "b.png",
                    cell=CELL,
                    epochs=1,
                    bands=chosen,
                    value_range=value_range,
                )
            )
            for chosen in ((), (1, 2, 3), (3, 2, 1))
        ]
        np.testing.assert_array_equal(sheets[0], sheets[1])
        first, swapped = cell(sheets[1], 0, 0), cell(sheets[2], 0, 0)
        np.testing.assert_array_equal(first, swapped[:, :, ::-1])
        assert first.min() < 10
        assert first.max() > 245
    with pytest.raises(UserError, match="--bands is 1 2 6, but it must be three of the channels 1 to 5"):
        contact_sheet(shards, recipe, tmp_path / "b.png", bands=(1, 2, 6))


def test_masks_lie_over_originals_and_views(tmp_path):
    for name in ("source", "masks"):
        (tmp_path / name).mkdir()
    photo(100, 100).save(tmp_path / "source" / "a.png")
    labels = np.zeros((100, 100), dtype=np.uint8)
    labels[20:60, 30:80] = 1
    Image.fromarray(labels).save(tmp_path / "masks" / "a.png")
    source = FolderSource(open_place(tmp_path / "source"), MaskFolder(open_place(tmp_path / "masks")))
    convert(source, tmp_path / "shards", workers=0)
    shards = ShardSet.open(tmp_path / "shards")
    sheet = pixels(contact_sheet(shards, RECIPES["eval"], tmp_path / "m.png", cell=CELL, epochs=1))
    original = np.asarray(photo(100, 100))
    changed = (cell(sheet, 0, 0) != original).any(axis=2)
    np.testing.assert_array_equal(changed, labels == 1)


def test_a_mask_without_classes_changes_nothing():
    picture = photo(8, 8)
    for empty in (0, 255):
        same = overlay(picture, np.full((8, 8), empty, dtype=np.uint8))
        np.testing.assert_array_equal(np.asarray(same), np.asarray(picture))
