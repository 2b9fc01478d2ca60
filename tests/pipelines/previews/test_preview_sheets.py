from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.augment.draws import draw
from pipelines.augment.operations import OPERATIONS
from pipelines.augment.recipe import RECIPES, Recipe
from pipelines.previews.preview_sheets import (
    SheetOptions,
    columns,
    contact_sheet,
    crop_box,
    describe,
    engines_sheet,
    heat,
    operations_sheet,
    scale_end,
)
from pipelines.previews.sheet import (
    FOOT,
    FRAME,
    GAP,
    HEAD,
    LEGEND,
    LETTERS,
    SMALLEST_LETTERS,
    TITLE,
    WIDEST_TITLE,
    Sheet,
    frame_colours,
    text_width,
)
from shards.conversion.convert import convert
from shards.dataset.order import epoch_order
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError
from shards.images.mask_images import MaskFolder
from shards.overview.mask_overlay import class_colour
from shards.sources.image_folder import FolderSource
from shards.storage.opening import open_place
from tests.pictures import photo
from tests.pipelines.augment.test_channels import bands, save

CELL, STEP, TOP, DOWN = 100, 100 + GAP, TITLE + HEAD, 100 + GAP + FOOT
ONE = SheetOptions(rows=1, cell=CELL)


def cell(sheet: np.ndarray, row: int, column: int) -> np.ndarray:
    """The pixels of one picture."""
    y, x = TOP + DOWN * row, GAP + STEP * column
    return sheet[y : y + CELL, x : x + CELL]


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as sheet:
        return np.asarray(sheet)


def test_sheet_shows_originals_and_views(shard_set, tmp_path):
    recipe = Recipe(size=32)
    path = contact_sheet(shard_set, recipe, tmp_path / "views.png", SheetOptions(rows=3, cell=CELL), epochs=2)
    with Image.open(path) as sheet:
        assert sheet.format == "PNG"
        assert sheet.size == (GAP + 5 * STEP, TOP + 3 * DOWN)
        pixels = np.asarray(sheet)
    cells = [cell(pixels, 0, column) for column in range(5)]
    assert all(cell.std() > 5 for cell in cells)
    assert all((cells[i] != cells[i + 1]).any() for i in range(4))


def test_same_seed_same_bytes(shard_set, tmp_path):
    a, b = (
        contact_sheet(
            shard_set, RECIPES["satellite"], tmp_path / f"{n}.png", SheetOptions(rows=2)
        ).read_bytes()
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
    sheet = pixels(operations_sheet(shard_set, recipe, tmp_path / "ops.png", ONE))
    assert sheet.shape[1] == GAP + STEP * (2 + len(ops))
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
    sheet = pixels(operations_sheet(shard_set, RECIPES["linear"], tmp_path / "ops.png", ONE))
    assert sheet.shape[1] == GAP + STEP * 4  # original, centre, crop, mirror


def test_engines_are_compared_with_the_first(shard_set, tmp_path):
    recipe = Recipe(size=32)
    engines, options = ("reference", "fused", "reference"), SheetOptions(rows=2, cell=CELL)
    path = engines_sheet(shard_set, recipe, tmp_path / "e.png", engines, options)
    sheet = pixels(path)
    assert sheet.shape[:2] == (TOP + 2 * DOWN + LEGEND, GAP + STEP * (1 + 2 * 5))
    for row in range(2):
        same = cell(sheet, row, 5)[8:-8, 8:-8]
        assert (same == heat(np.zeros(1), 1)).all(), "the reference with itself"
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
                    SheetOptions(cell=CELL, bands=chosen, value_range=value_range),
                    epochs=1,
                )
            )
            for chosen in ((), (1, 2, 3), (3, 2, 1))
        ]
        np.testing.assert_array_equal(sheets[0], sheets[1])
        first, swapped = cell(sheets[1], 0, 0), cell(sheets[2], 0, 0)
        # All but the boxes of the crops.
        boxes = [(first == colour).all(axis=2) for colour in frame_colours(2)]
        first, swapped = first[~boxes[0] & ~boxes[1]], swapped[~boxes[0] & ~boxes[1]]
        np.testing.assert_array_equal(first, swapped[:, ::-1])
        assert first.min() < 10
        assert first.max() > 245
    with pytest.raises(UserError, match="--bands is 1 2 6, but it must be three of the channels 1 to 5"):
        contact_sheet(shards, recipe, tmp_path / "b.png", SheetOptions(bands=(1, 2, 6)))


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
    original = np.asarray(photo(100, 100))
    sheets = [
        pixels(
            contact_sheet(
                shards, RECIPES["eval"], tmp_path / "m.png", SheetOptions(cell=CELL, masks=masks), epochs=1
            )
        )
        for masks in (True, False)
    ]
    inside = np.zeros((100, 100), dtype=bool)
    # Without the box of the crop.
    inside[15:-15, 15:-15] = True
    masked, plain = ((cell(sheet, 0, 0) != original).any(axis=2) for sheet in sheets)
    np.testing.assert_array_equal(masked[inside], labels[inside] == 1)
    assert not plain[inside].any()
    # The row of the legend: its first square has the colour of class 1.
    assert sheets[0].shape[0] == sheets[1].shape[0] + LEGEND
    assert tuple(sheets[0][TOP + DOWN + 8, GAP + 5]) == class_colour(1)


def ring(shape: tuple[int, int], box: tuple[int, int, int, int]) -> np.ndarray:
    """The pixels of a rectangle's line, FRAME wide, as a mask."""
    left, top, right, bottom = box
    out = np.zeros(shape, dtype=bool)
    out[top:bottom, left:right] = True
    out[top + FRAME : bottom - FRAME, left + FRAME : right - FRAME] = False
    return out


def test_the_box_on_the_original_is_the_crop_that_is_drawn(tmp_path):
    (tmp_path / "source").mkdir()
    photo(100, 80).save(tmp_path / "source" / "a.png")
    convert(tmp_path / "source", tmp_path / "shards", workers=0)
    shards = ShardSet.open(tmp_path / "shards")
    recipe = Recipe(size=100, num_views=1, blur_p=(0.5,), solarize_p=(0.0,))
    for seed in (0, 5):
        options = SheetOptions(cell=CELL, seed=seed)
        sheet = pixels(contact_sheet(shards, recipe, tmp_path / "b.png", options, epochs=1))
        record = draw(recipe, seed, 0, np.array([0]), np.array([100]), np.array([80]))[0, 0]
        left, top = int(record["left"]), int(record["top"])
        box = (left, top, left + int(record["width"]), top + int(record["height"]))
        assert crop_box(record) == box
        # The original of 100 x 80 stands 10 pixels below the cell's upper edge.
        [colour] = frame_colours(1)
        original = cell(sheet, 0, 0)[10:90]
        changed = (original != np.asarray(photo(100, 80))).any(axis=2)
        np.testing.assert_array_equal(changed, ring((80, 100), box))
        assert (original[ring((80, 100), box)] == colour).all()
        # The view's frame, around its cell, has the same colour.
        framed = sheet[TOP - FRAME : TOP + CELL + FRAME, GAP + STEP - FRAME : GAP + STEP + CELL + FRAME]
        assert (framed[ring(framed.shape[:2], (0, 0, 104, 104))] == colour).all()


def test_a_box_is_scaled_with_its_picture(tmp_path):
    sheet = Sheet(("", ""), ["a"], 1, CELL)
    gray = Image.new("RGB", (400, 200), (9, 9, 9))
    sheet.put(0, 0, gray, boxes=[((40, 20, 240, 120), (255, 0, 0))])
    shown = cell(pixels(sheet.save(tmp_path / "s.png")), 0, 0)[25:75]
    np.testing.assert_array_equal((shown == (255, 0, 0)).all(axis=2), ring((50, 100), (10, 5, 60, 30)))


def ink(sheet: np.ndarray) -> np.ndarray:
    """Whether a column of pixels has any that is not white."""
    return (sheet < 200).any(axis=(0, 2))


def caption_of(sheet: np.ndarray, column: int) -> np.ndarray:
    """The pixels below a picture of the first row, as wide as the picture and the gap behind it."""
    x = GAP + STEP * column
    return sheet[TOP + CELL + 1 : TOP + CELL + FOOT, x : x + STEP]


@pytest.mark.parametrize("size", range(SMALLEST_LETTERS, LETTERS + 1))
def test_words_stay_apart_in_letters_of_any_size(tmp_path: Path, size: int):
    def gaps(text: str) -> list[int]:
        """The numbers of white columns between letters, ascending."""
        # A cell in which the caption has this size.
        side = text_width(text, size) + GAP
        sheet = Sheet(("", ""), [""], 1, side)
        sheet.put(0, 0, Image.new("RGB", (4, 4)), text)
        drawn = np.flatnonzero(
            ink(pixels(sheet.save(tmp_path / "s.png"))[TOP + side + 1 : TOP + side + FOOT])
        )
        return sorted((np.diff(drawn) - 1).tolist())

    for text in ("flip erase", "jitter blur flip erase", "draws of seed by fused", "epoch view"):
        words = text.count(" ")
        apart, joined = gaps(text), gaps(text.replace(" ", ""))
        assert min(apart[-words:]) >= max(2, joined[-1] + 1), (text, apart, joined)


def test_captions_and_headings_end_before_those_beside_them(tmp_path: Path):
    sheet = Sheet(("", ""), ["MMMMMMMMMMMMMMMMMMMM"] * 3, 1, CELL)
    for column in range(3):
        sheet.put(0, column, Image.new("RGB", (4, 4)), "W" * (10 + 20 * column))
    shown = pixels(sheet.save(tmp_path / "s.png"))
    for column in range(3):
        x = GAP + STEP * column
        for place in (caption_of(shown, column), shown[TITLE:TOP, x : x + STEP]):
            assert ink(place)[: CELL - 2 * GAP].any()
            assert not ink(place)[CELL - GAP + 1 :].any()


def test_a_narrow_sheet_is_as_wide_as_its_title_needs(tmp_path: Path):
    title = "Recipe moco_v3 --recipe.crop-scale 0.4 1 --recipe.erase-p 0.25 --recipe.blur-p 0.5 0.2: shards"
    shown = pixels(Sheet((title, "draws of seed 0"), ["a"], 1, CELL).save(tmp_path / "s.png"))
    assert GAP + STEP < shown.shape[1] < WIDEST_TITLE
    # All of it is there, to its last letter.
    last = np.flatnonzero(ink(shown[:TITLE]))[-1]
    assert shown.shape[1] - 3 * GAP < last < shown.shape[1] - GAP
    endless = pixels(Sheet((title * 9, ""), ["a"], 1, CELL).save(tmp_path / "s.png"))
    assert endless.shape[1] == WIDEST_TITLE + 2 * GAP


def titles(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[str, str], list[str]]]:
    """What sheets get as title and captions of originals."""
    made = []
    start, put = Sheet.__init__, Sheet.put

    def started(self, title, *args):
        made.append((title, []))
        start(self, title, *args)

    def captioned(self, row, column, picture, caption="", **more):
        if column == 0:
            made[-1][1].append(caption.split(":")[0])
        put(self, row, column, picture, caption, **more)

    monkeypatch.setattr(Sheet, "__init__", started)
    monkeypatch.setattr(Sheet, "put", captioned)
    return made


def test_samples_are_chosen_apart_from_the_draws(shard_set, tmp_path, monkeypatch):
    made = titles(monkeypatch)
    for options in (
        SheetOptions(rows=3, recipe_name="linear"),
        SheetOptions(rows=3, seed=9),
        SheetOptions(rows=3, samples_seed=1),
        SheetOptions(rows=3, samples=(5, 2)),
    ):
        contact_sheet(shard_set, RECIPES["linear"], tmp_path / "s.png", options, epochs=1)
    [first, other_draws, other_samples, named] = [ids for _, ids in made]
    assert first == other_draws == [str(i) for i in epoch_order(len(shard_set), 0, 0)[:3]]
    assert other_samples == [str(i) for i in epoch_order(len(shard_set), 1, 0)[:3]]
    assert named == ["5", "2"]
    assert made[0][0] == (
        f"Recipe linear: {shard_set.folder}",
        "draws of seed 0 · views by fused · samples chosen by seed 0",
    )
    assert made[1][0][1].startswith("draws of seed 9 ·")
    assert made[3][0][1].endswith("samples as named")
    with pytest.raises(
        UserError, match=rf"--samples names 999, which is not among the {len(shard_set)} samples of"
    ):
        contact_sheet(shard_set, RECIPES["linear"], tmp_path / "s.png", SheetOptions(samples=(1, 999)))


def test_a_split_shows_its_own_samples_and_is_in_the_title(shard_set, tmp_path, monkeypatch):
    made = titles(monkeypatch)
    part = shard_set.subset(np.array([1, 4]), "val")
    contact_sheet(part, RECIPES["linear"], tmp_path / "s.png", epochs=1)
    assert set(made[0][1]) == {"4", "1"}
    assert made[0][0][0].endswith(", split val")
    with pytest.raises(UserError, match="the split 'val' of"):
        contact_sheet(part, RECIPES["linear"], tmp_path / "s.png", SheetOptions(samples=(2,)))


def test_the_scale_of_differences_covers_them_and_its_colours_rise():
    assert scale_end([np.zeros((3, 4, 4))]) == 1
    assert scale_end([np.full((3, 4, 4), 1.5), np.full((3, 4, 4), 2.5)]) == 4
    assert scale_end([np.full((3, 4, 4), 300.0)]) == 255
    # One pixel of 2,000 does not stretch it.
    assert scale_end([np.append(np.full(1999, 0.5), 200.0)]) == 1
    colours = heat(np.array([0.0, 1.0, 2.0, 4.0, 9.0]), 4)
    assert colours.dtype == np.uint8
    assert colours.shape == (5, 3)
    assert (np.diff(colours[:4].astype(int).sum(axis=1)) > 0).all()
    assert (colours[3] == colours[4]).all()
