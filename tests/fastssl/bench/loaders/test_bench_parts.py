"""`fastssl bench parts`: that the parts are the kernels of the engine, and the report."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastssl.bench import bench_command
from fastssl.bench.loaders.bench_parts import LOADER, ONE_CALL, PARTS, REST, _one_view, to_rows
from pipelines.augment.draws import draw
from pipelines.augment.recipe import RECIPES
from pipelines.engines.fused_engine import FusedEngine
from shards.conversion.convert import convert
from shards.errors import UserError
from tests.pictures import photo, photo_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photo_shards(tmp_path_factory.mktemp("pictures"), 6, 50, 40)


@pytest.mark.parametrize("preset", ["moco_v3", "satellite", "byol"])
def test_the_parts_together_make_the_engine_s_view(preset: str) -> None:
    recipe, pixels = replace(RECIPES[preset], size=24), np.array(photo(60, 50))
    met = set()
    for sample in range(12):
        draws = draw(recipe, 3, 0, np.array([sample]), np.array([60]), np.array([50]))[:, 0].copy()
        expected = [np.empty((3, 24, 24), np.float32) for _ in draws]
        FusedEngine(recipe).render(pixels, draws, expected)
        for number, wanted in enumerate(expected):
            found = np.empty_like(wanted)
            met |= {name for name, _ in _one_view(pixels, draws, number, recipe, found)}
            np.testing.assert_array_equal(found, wanted)
    assert met <= set(PARTS)
    assert {"crop", PARTS[-1]} <= met


def test_the_rest_is_what_the_parts_leave_of_the_loader() -> None:
    turns = [dict.fromkeys(PARTS, ms) | {ONE_CALL: 10.0, LOADER: 20.0 + ms} for ms in (1.0, 2.0, 3.0)]
    rows = {row["name"]: row for row in to_rows(turns)}
    assert list(rows) == [*PARTS, REST, LOADER, ONE_CALL]
    assert (rows["crop"]["ms"], rows["crop"]["spread"]) == (2.0, [1.0, 3.0])
    assert rows[REST]["ms"] == pytest.approx(22 - 2 * len(PARTS))
    assert rows["crop"]["share"] == pytest.approx(2 / 22)


def test_the_report(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "parts.json"
    flags = ["--size", "16", "--images", "4", "--repeats", "1", "--json", str(path)]
    assert bench_command.run(["parts", str(shards), *flags]) == 0
    report = json.loads(path.read_text())
    assert report["kind"] == "parts"
    ms = {row["name"]: row["ms"] for row in report["parts"]}
    assert all(ms[name] > 0 for name in ("read", "decode", "crop", ONE_CALL, LOADER))
    shown = capsys.readouterr().out
    assert "an image with recipe moco_v3 at 16 px, one thread" in shown
    assert all(len(line) <= 80 for line in shown.splitlines() if line.lstrip().startswith(PARTS))


def test_images_that_the_kernels_are_not_for_are_refused(tmp_path: Path) -> None:
    for i in range(3):
        tile = np.random.default_rng(i).integers(0, 3000, (20, 20, 5), dtype=np.uint16)
        (tmp_path / "source").mkdir(exist_ok=True)
        np.save(tmp_path / "source" / f"{i}.npy", tile)
    convert(tmp_path / "source", tmp_path / "shards", workers=0)
    with pytest.raises(UserError, match="holds uint16 of 5: give other shards"):
        bench_command.run(["parts", str(tmp_path / "shards")])
