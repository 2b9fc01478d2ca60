"""Which file of a folder of masks is an image's mask."""

from pathlib import Path

import numpy as np
from PIL import Image

from shards.conversion.convert import convert
from shards.images.mask_images import MaskFolder
from shards.sources.image_folder import FolderSource
from shards.storage.opening import open_place
from tests.pictures import encoded, picture


def write_mask(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((16, 24), value, np.uint8)).save(
        path, "TIFF" if path.suffix.lower()[1:3] == "ti" else "PNG"
    )


def test_endings_in_capitals_are_found(tmp_path: Path):
    for name in ("S.TIF", "a/T.tif", "a/U.Png", "a/b/V.png"):
        path = tmp_path / "i" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(1), "PNG"))
    for value, name in enumerate(("S.TIF", "a/T.TIFF", "a/U.PNG", "a/b/V.Tif")):
        write_mask(tmp_path / "m" / name, value)
    masks = MaskFolder(open_place(tmp_path / "m"))
    found = {
        row["source"]: row["mask"]
        for batch in FolderSource(open_place(tmp_path / "i"), masks).entries()
        for row in batch.to_pylist()
    }
    assert found == {"S.TIF": "S.TIF", "a/T.tif": "a/T.TIFF", "a/U.Png": "a/U.PNG", "a/b/V.png": "a/b/V.Tif"}
    assert masks.warnings() == []
    manifest = convert(
        FolderSource(open_place(tmp_path / "i"), MaskFolder(open_place(tmp_path / "m"))), tmp_path / "out"
    )
    assert manifest is not None
    assert manifest.num_masks == 4
