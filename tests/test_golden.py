"""What must never change: shard bytes, order, draws, views and checkpoints, as files that an earlier version wrote.

`python -m tests.test_golden` wrote `tests/golden` with the code of 2026-11-27. It is run again only for a change of format that is
meant and told; otherwise a difference here means that old runs, shards or results can no longer be continued or compared.

Made again since: `views-fused`, `weights` and the losses on 2026-11-28, when the CPU's crops took Pillow's rounding in place of
torch's, which has weights of 16 bits: 0.006 levels apart on average, so an older run goes on with views that differ by rounding.
"""

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastssl.core import checkpoint, distributed
from fastssl.pretraining.run import train
from fastssl.pretraining.run_config import load
from pipelines.augment.draws import draw
from pipelines.augment.recipe import RECIPES
from pipelines.engines.engine_table import make_engine
from pipelines.loading.loader import open_loader
from shards.conversion.convert import convert
from shards.dataset.order import block_order, epoch_order
from shards.dataset.shard_set import ShardSet
from tests import needs
from tests.fastssl.runs import write_yaml
from tests.pictures import fingerprints, photo

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
SETS = ("photos", "tiles")
IDS, WIDTHS, HEIGHTS = np.arange(40), np.arange(40) * 17 % 480 + 30, np.arange(40) * 29 % 400 + 20
VIEWS = ("moco_v3", "dino", "satellite")
RUN: dict[str, Any] = {
    "data": {"threads": 1},
    "recipe": {"preset": "moco_v3_resnet", "size": 16},
    "model": {"backbone": "test_efficientnet"},
    "method": {"name": "moco_v3", "hidden_dim": 16, "dim": 8},
    "optim": {"name": "sgd", "lr": 0.05, "weight_decay": 1e-3, "warmup_epochs": 1},
    "train": {
        "epochs": 2,
        "batch": 4,
        "device": "cpu",
        "precision": "fp32",
        "log_every": 1,
        "save_every_steps": 4,
    },
}


def make_sources(folder: Path) -> None:
    """14 photographs in two classes (PNG, JPEG, gray JPEG), and 6 tiles of five bands of 16 bits."""
    for i in range(14):
        place = folder / "photos" / "ab"[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        image = photo(60 + 7 * i % 23, 44 + 5 * i % 19, seed=i)
        if i % 3 == 0:
            image.save(place / f"{i:02}.png")
        else:
            (image if i % 3 == 1 else image.convert("L")).save(place / f"{i:02}.jpg", quality=90)
    (folder / "tiles").mkdir()
    import rasterio

    for i in range(6):
        bands = [
            np.asarray(photo(24, 20, seed=100 + 5 * i + k).convert("L"), np.uint16) * 40 + 300
            for k in range(5)
        ]
        options = {"driver": "GTiff", "height": 20, "width": 24, "count": 5, "dtype": "uint16"}
        with rasterio.open(folder / "tiles" / f"{i}.tif", "w", **options) as raster:
            raster.write(np.stack(bands))


def to_shards(name: str, source: Path, dest: Path) -> None:
    convert(source / name, dest, workers=0, samples_per_shard=5)


def tar_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of tars and indexes; the bytes of Parquet files depend on the version of pyarrow."""
    return {name: digest for name, digest in fingerprints(folder).items() if name.endswith((".tar", ".idx"))}


def orders() -> dict[str, list[int]]:
    sizes = np.array([7, 5, 9, 4, 8])
    return {
        "global": epoch_order(33, 3, 2).tolist(),
        "blocks": block_order(sizes, 3, 2, 2).tolist(),
    }


def all_draws() -> dict[str, np.ndarray]:
    return {name: draw(recipe, 5, 3, IDS, WIDTHS, HEIGHTS) for name, recipe in RECIPES.items()}


def views(engine: str) -> dict[str, np.ndarray]:
    """Levels 0 to 255, (V * 5, 3, S, S) a preset, of five photographs; uint8."""
    shards, found = ShardSet.open(GOLDEN / "shards" / "photos"), {}
    for name in VIEWS:
        small = {"local_size": 12} if RECIPES[name].local_views else {}
        recipe = replace(RECIPES[name], size=24, mean=(0.0,) * 3, std=(1 / 255,) * 3, **small)
        maker: Any = make_engine(engine, recipe)
        for i in range(5):
            drawn = draw(recipe, 1, 2, np.array([i]), shards.widths[[i]], shards.heights[[i]])[:, 0]
            out = [np.empty((3, recipe.side(v), recipe.side(v)), np.float32) for v in range(len(drawn))]
            maker(shards.read(i), np.ascontiguousarray(drawn), out)
            for number, view in enumerate(out):
                found[f"{name}-{i}-{number}"] = np.rint(view).astype(np.uint8)
    return found


def tile_views() -> dict[str, np.ndarray]:
    """Normalised float32 views of the tiles, by the loader, with percentiles as the value range."""
    shards = ShardSet.open(GOLDEN / "shards" / "tiles")
    recipe = replace(RECIPES["multispectral"], size=16)
    loader = open_loader(shards, recipe, batch=6, seed=4, value_range="percentiles", threads=1)
    batch = next(iter(loader.epoch(1)))
    order = {"ids": batch.sample_ids.astype(np.float32)}
    return order | {f"view-{i}": view.numpy().copy() for i, view in enumerate(batch.views)}


def start_run(out: Path, folder: Path) -> Any:
    tree = {section: dict(values) for section, values in RUN.items()}
    tree["data"]["shards"] = (
        "tests/golden/shards/photos"  # from ROOT: the configuration is part of the checkpoint
    )
    tree["train"]["out"] = str(out)
    return load(write_yaml(folder / "run.yaml", tree))


def weights(run: Path) -> dict[str, np.ndarray]:
    state = checkpoint.load(checkpoint.list_checkpoints(run)[-1])
    return {name: value.numpy() for name, value in state["method"].items()}


def summary(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Mean and spread of each tensor, and its first value: enough to see a difference, and small."""
    return {k: np.array([v.mean(), v.std(), v.reshape(-1)[0]], np.float64) for k, v in values.items()}


# ---------------------------------------------------------------------------------------------- tests


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return json.loads((GOLDEN / "expected.json").read_text())


@pytest.mark.parametrize("name", SETS)
def test_the_same_images_become_the_same_shards(name, tmp_path):
    if name == "tiles":
        needs.module("rasterio")
    to_shards(name, GOLDEN / "sources", tmp_path / "shards")
    assert tar_digests(tmp_path / "shards") == tar_digests(GOLDEN / "shards" / name) != {}
    old, new = (ShardSet.open(folder) for folder in (GOLDEN / "shards" / name, tmp_path / "shards"))
    for column in ("labels", "widths", "heights", "sizes", "channels"):
        np.testing.assert_array_equal(getattr(new, column), getattr(old, column))
    assert [bytes(new.read(i)) for i in range(len(new))] == [bytes(old.read(i)) for i in range(len(old))]
    assert (new.manifest.classes, new.manifest.statistics) == (old.manifest.classes, old.manifest.statistics)


def test_digests_of_the_shards_are_those_that_were_written(expected):
    assert {name: tar_digests(GOLDEN / "shards" / name) for name in SETS} == expected["shards"]


def test_order(expected):
    assert orders() == expected["order"]


def test_draws_of_every_preset():
    wanted = np.load(GOLDEN / "draws.npz")
    found = all_draws()
    assert set(wanted.files) <= set(found)
    for name in wanted.files:
        # Every field of then is there with its type; one that is new since asks for nothing.
        ours_of, theirs_of = found[name].dtype, wanted[name].dtype
        assert ours_of.names[: len(theirs_of.names)] == theirs_of.names
        assert all(not found[name][field].any() for field in ours_of.names[len(theirs_of.names) :])
        for field in theirs_of.names:
            assert ours_of[field] == theirs_of[field]
            ours, theirs = found[name][field], wanted[name][field]
            if ours.dtype.kind == "f":
                np.testing.assert_allclose(ours, theirs, rtol=1e-6)
            else:
                np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("engine", ["fused", "reference"])
def test_views(engine):
    wanted = np.load(GOLDEN / f"views-{engine}.npz")
    found = views(engine)
    assert sorted(found) == sorted(wanted.files)
    for name in wanted.files:
        # Another processor or version of Pillow may round another way: one level, and hardly anywhere.
        error = np.abs(found[name].astype(int) - wanted[name])
        assert error.mean() < 0.05, name
        assert (error > 1).mean() < 0.005, name


def test_views_of_many_channels():
    wanted = np.load(GOLDEN / "views-tiles.npz")
    for name, view in tile_views().items():
        np.testing.assert_allclose(view, wanted[name], atol=1e-5)


def test_an_old_checkpoint_is_resumed_to_the_same_end(tmp_path, monkeypatch):
    """From step 4 of 6: weights, optimiser, order and draws are those of the run that was not stopped."""
    monkeypatch.chdir(ROOT)
    run = tmp_path / "run"
    shutil.copytree(GOLDEN / "run", run)
    try:
        resolved = start_run(run, tmp_path)
        train(resolved, resume=True)
    finally:
        distributed.cleanup()
    wanted, found = np.load(GOLDEN / "weights.npz"), summary(weights(run))
    assert sorted(found) == sorted(wanted.files)
    for name in wanted.files:
        np.testing.assert_allclose(found[name], wanted[name], rtol=2e-3, atol=2e-4, err_msg=name)
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    wanted_rows = json.loads((GOLDEN / "expected.json").read_text())["losses"]
    found_rows = [row["loss"] for row in steps if "loss" in row]
    np.testing.assert_allclose(found_rows, wanted_rows, rtol=2e-3)


def _write() -> None:
    assert not GOLDEN.exists(), "tests/golden is there already"
    make_sources(GOLDEN / "sources")
    for name in SETS:
        to_shards(name, GOLDEN / "sources", GOLDEN / "shards" / name)
    np.savez_compressed(GOLDEN / "draws.npz", **all_draws())
    for engine in ("fused", "reference"):
        np.savez_compressed(GOLDEN / f"views-{engine}.npz", **views(engine))
    np.savez_compressed(GOLDEN / "views-tiles.npz", **tile_views())
    run = GOLDEN / "run"
    with tempfile.TemporaryDirectory() as folder:
        train(start_run(run.relative_to(ROOT), Path(folder)))
    lines = (run / "metrics.jsonl").read_text().splitlines()
    losses = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
    np.savez_compressed(GOLDEN / "weights.npz", **summary(weights(run)))
    # As if stopped after step 4.
    checkpoint.list_checkpoints(run)[-1].unlink()
    (run / "metrics.jsonl").write_text(
        "".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= 4)
    )
    digests = {name: tar_digests(GOLDEN / "shards" / name) for name in SETS}
    facts = {"shards": digests, "order": orders(), "losses": losses}
    (GOLDEN / "expected.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    _write()
