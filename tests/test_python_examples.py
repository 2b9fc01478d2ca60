"""The Python of the pages and of the notebooks runs as it stands, on small data."""

import base64
import contextlib
import io
import json
import re
import types
import warnings
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from shards.conversion.convert import convert
from shards.images.mask_images import MaskFolder
from shards.sources.image_folder import FolderSource
from shards.storage.opening import open_place
from tests import needs
from tests.pictures import photo

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(?:<!-- needs (\w+) -->\n)?```python\n(.*?)```", re.DOTALL)
BLOCKS = BLOCK.findall((ROOT / "docs" / "python.md").read_text())
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a reader of the page would be: `photos/` in two classes, `photo-shards/`, `mask-shards/` with five classes, `configs/`."""
    root: Path = tmp_path_factory.mktemp("examples")
    (root / "masks" / "a").mkdir(parents=True)
    for i in range(96):
        file = root / "photos" / "ab"[i % 2] / f"{i:02d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        photo(72, 54, seed=i).save(file, quality=90)
        if i % 2 == 0:
            mask = np.random.default_rng(i).integers(0, 5, (54, 72)).astype(np.uint8)
            Image.fromarray(mask).save(root / "masks" / "a" / f"{i:02d}.png")
    convert(root / "photos", root / "photo-shards", workers=0)
    masked = FolderSource(open_place(root / "photos" / "a"), MaskFolder(open_place(root / "masks" / "a")))
    convert(masked, root / "mask-shards", workers=0)
    (root / "configs").symlink_to(ROOT / "configs")
    return root


@pytest.mark.parametrize(("package", "block"), BLOCKS, ids=[f"block {i}" for i in range(len(BLOCKS))])
def test_a_block_of_the_page_runs(package: str, block: str, folder: Path, monkeypatch: pytest.MonkeyPatch):
    if package:
        needs.module(package)
        # Those of another library, of which a user is told once.
        warnings.simplefilter("ignore")
    monkeypatch.chdir(folder)
    if "load_backbone" in block and not Path("runs/photos").exists():
        # The block above it, where this one runs alone.
        [before] = [block for _, block in BLOCKS if "import pretrain" in block]
        exec(compile(before, "docs/python.md", "exec"), {"__name__": "__main__"})
    exec(compile(block, "docs/python.md", "exec"), {"__name__": "__main__"})


def test_the_page_shows_what_a_reader_looks_for():
    text = "".join(block for _, block in BLOCKS)
    for words in (
        "import convert",
        "load_state_dict",
        "LightningModule",
        "eval_batches",
        "masks=True",
        "pretrain(",
        "load_backbone(",
        "(Trainer)",
    ):
        assert words in text
    assert sum(bool(package) for package, _ in BLOCKS) == 1


def test_the_loop_of_the_page_resumes_in_the_midst_of_an_epoch(folder, monkeypatch, tmp_path):
    """Its output says so: what it prints is where it stopped."""
    [block] = [block for _, block in BLOCKS if "load_state_dict" in block]
    (tmp_path / "photo-shards").symlink_to(folder / "photo-shards")
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(compile(block, "docs/python.md", "exec"), {"__name__": "__main__"})
    lines = said.getvalue().splitlines()
    assert re.search(r"^step 2, .* at epoch 0, step 2\)$", lines[0])
    assert re.search(r"^step 4, .* at epoch 1, step 1\)$", lines[1])


# ---------------------------------------------------------------- notebooks


def cells(notebook: Path) -> list[dict[str, Any]]:
    return json.loads(notebook.read_text())["cells"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    shown: list[np.ndarray] = []

    def show(*args, **kwargs) -> None:
        for number in plt.get_fignums():
            plt.figure(number).canvas.draw()
            shown.append(np.asarray(plt.figure(number).canvas.buffer_rgba()).copy())
        plt.close("all")

    plt.switch_backend("agg")
    monkeypatch.setattr(plt, "show", show)
    space = types.ModuleType("__main__").__dict__
    for number, cell in enumerate(cells(notebook)):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{notebook.name}, cell {number}", "exec"), space)
    assert shown
    # Pictures with something in them.
    assert all(len(np.unique(pixels.reshape(-1, 4), axis=0)) > 1000 for pixels in shown)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_as_it_ran_and_without_a_machines_paths(notebook: Path):
    text = notebook.read_text()
    assert not re.search(r"/(?:home|Users|root|work|tmp|mnt)/", text)
    assert len(text) < 200_000
    code = [cell for cell in cells(notebook) if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    pictures = [output["data"]["image/jpeg"] for output in outputs if "image/jpeg" in output.get("data", {})]
    assert pictures
    for picture in pictures:
        assert Image.open(io.BytesIO(base64.b64decode(picture))).width > 300


def test_there_is_a_notebook():
    assert [path.name for path in NOTEBOOKS] == ["01_views_from_your_images.ipynb"]
