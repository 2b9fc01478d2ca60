"""Configurations are found by name, from any folder; the laptop's fits a laptop."""

from pathlib import Path

import pytest
import torch

from fastssl.models.backbones import build_backbone
from fastssl.pretraining.packaged_configs import DEFAULT_CONFIG, find_config, is_config, packaged
from fastssl.pretraining.run_config import load
from shards.errors import UserError

FOLDER = Path(__file__).parents[3] / "configs"


def test_the_packaged_ones_are_those_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert {name: file.read_text() for name, file in packaged().items()} == {
        path.stem: path.read_text() for path in FOLDER.glob("*.yaml")
    }
    for name in packaged():
        assert load(name) == load(FOLDER / f"{name}.yaml")


def test_a_file_comes_before_a_name_and_a_folder_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("laptop").mkdir()
    assert find_config("laptop").read_text() == (FOLDER / "laptop.yaml").read_text()
    Path("fashion_mnist").write_text("train: {epochs: 3}")
    assert load("fashion_mnist").config.train.epochs == 3
    assert find_config("a/laptop") == Path("a/laptop")
    with pytest.raises(
        UserError, match=r"no configuration called 'latpop'\. Did you mean 'laptop'\? `fastssl configs`"
    ):
        load("latpop")


@pytest.mark.parametrize(
    ("word", "expected"),
    [("laptop", True), ("x.yaml", True), ("x.yml", True), ("loader", False), ("", False)],
)
def test_which_words_are_configurations(word: str, expected: bool) -> None:
    assert is_config(word) == expected


def test_the_default_fits_a_laptop() -> None:
    cfg = load(DEFAULT_CONFIG).config
    assert cfg.recipe.size <= 96
    # No bf16 is asked for, no compiler is needed, and one batch is a small part of 2,000 tiles.
    assert (cfg.train.precision, cfg.train.device, cfg.train.compile) == ("auto", "auto", False)
    assert cfg.train.batch <= 2000 // 10
    # The work of 105 images/s in the demo, 64 px through the same model: tens of minutes for 2,000 tiles.
    backbone = build_backbone(cfg.model, cfg.recipe.size)
    assert sum(p.numel() for p in backbone.parameters()) < 5e6
    assert backbone(torch.zeros(2, 3, cfg.recipe.size, cfg.recipe.size)).shape[0] == 2
    minutes = cfg.train.epochs * 2000 / 105 * (cfg.recipe.size / 64) ** 2 / 60
    assert 10 < minutes < 30
