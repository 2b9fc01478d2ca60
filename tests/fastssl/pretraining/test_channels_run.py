"""A run on satellite tiles of many bands, from shards to kNN."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fastssl import load_backbone
from fastssl.commands.evaluate_checkpoint import evaluate_knn
from fastssl.core import checkpoint
from fastssl.pretraining.build import build_method, follow_shards
from fastssl.pretraining.run import train
from shards.conversion.convert import convert
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError
from shards.images.pixels import write_npy
from tests.fastssl.runs import resolve, rows
from tests.pipelines.augment.test_channels import bands

BANDS = {"recipe": {"preset": "multispectral", "size": 16}, "data": {"value_range": "percentiles"}}
SHORT = {"train": {"epochs": 1, "save_every_steps": 0}, "knn": {"every": 1, "k": 3}}


@pytest.fixture(scope="module", params=[4, 13])
def tiles(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """24 tiles of 16 bits in two classes."""
    root: Path = tmp_path_factory.mktemp("tiles")
    for i in range(24):
        path = root / "source" / "ab"[i % 2] / f"{i}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(write_npy(bands(request.param, "uint16", 24, 20, seed=i)))
    convert(root / "source", root / "shards", workers=0)
    return ShardSet.open(root / "shards")


def test_a_run_follows_the_bands_of_its_shards(tiles: ShardSet, shards: Path, tmp_path: Path) -> None:
    channels = int(tiles.channels[0])
    resolved = resolve(tiles.folder, tmp_path / "run", BANDS, SHORT)
    summary = train(resolved)
    assert summary.steps == 3
    assert all(np.isfinite(row["loss"]) for row in rows(tmp_path / "run") if "loss" in row)
    state = checkpoint.load(summary.checkpoint)
    assert state["architecture"]["channels"] == channels
    recipe = state["config"]["recipe"]
    assert [len(recipe[name]) for name in ("mean", "std", "value_low", "value_high")] == [channels] * 4
    contract = load_backbone(tmp_path / "run").contract
    assert (contract.channels, contract.dtypes, contract.channel_names) == (channels, ("uint16",), None)
    assert contract.data.num_samples == len(tiles)
    for name in ("mean", "std", "value_low", "value_high"):
        assert list(getattr(contract, name)) == recipe[name]
    assert state["method"]["backbone.conv1.weight"].shape[1] == channels
    again = train(resolved, resume=True)
    assert again.steps == 3
    assert again.images_per_s == 0
    report = evaluate_knn(str(tmp_path / "run"), str(tiles.folder), ks=(3,), device="cpu")
    assert report["queries"] == "leave one out of 24 samples"
    with pytest.raises(
        UserError, match=rf"was trained on {channels} channels, and the images of .* views of 3"
    ):
        evaluate_knn(str(tmp_path / "run"), shards, device="cpu")


def test_another_number_of_channels_and_colours_are_refused_before_the_run(
    tiles: ShardSet, tmp_path: Path
) -> None:
    channels = int(tiles.channels[0])
    with pytest.raises(UserError, match=f"model.channels is 7, but the images .* make views of {channels}"):
        train(resolve(tiles.folder, tmp_path / "a", BANDS, {"model": {"channels": 7}}))
    with pytest.raises(UserError, match=r"need red, green and blue: set --recipe.saturation 0"):
        train(resolve(tiles.folder, tmp_path / "b", {"recipe": {"preset": "satellite", "size": 16}}))
    assert not (tmp_path / "a").exists()
    resolved = follow_shards(resolve(tiles.folder, tmp_path / "c", BANDS), tiles)
    method, shape = build_method(resolved, torch.device("cpu"))
    assert shape["channels"] == channels
    assert method(2 * [torch.rand(2, channels, 16, 16)]).loss.isfinite()
