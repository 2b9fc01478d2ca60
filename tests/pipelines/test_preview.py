import numpy as np
from PIL import Image

from pipelines.draws import draw
from pipelines.preview import contact_sheet, describe
from pipelines.recipe import RECIPES, Recipe


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
    for name in ("jitter", "gray", "sigma", "solarize", "hflip", "vflip", "turns", "noise_std"):
        record[name] = 0
    assert describe(record) == ""
    record["turns"], record["sigma"], record["hflip"] = 3, 1.25, 1
    assert describe(record) == "blur 1.2 flip 270°"
