"""A method's name as a flag and in YAML: its own defaults, and what a configuration of another method keeps."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest

from fastssl.core.optimizers import OptimConfig
from fastssl.methods import METHODS, Method, MethodDefaults
from fastssl.pretraining.packaged_configs import packaged
from fastssl.pretraining.run_config import Resolved, from_tree, load, load_config
from pipelines.augment.recipe import RECIPES


@dataclass(frozen=True)
class OtherConfig:
    """Settings of another method."""

    margin: float = 0.5
    """Shares no name with MoCo v3's."""


OPTIM = {
    "vit": OptimConfig(lr=2e-4, betas=(0.8, 0.9), warmup_epochs=3),
    "cnn": OptimConfig(name="lars", lr=0.4, momentum=0.8, warmup_epochs=7),
}


class Other(Method):
    """A method with defaults of its own."""

    Config = OtherConfig

    @classmethod
    def defaults(cls, family):
        return MethodDefaults("byol", OPTIM[family], {"stop_grad_conv1": family == "cnn"})


@pytest.fixture(autouse=True)
def _other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "other", Other)


def quietly(path: Path | str | None, *flags: str) -> Resolved:
    """Load, and fail where anything is warned of."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load(path, list(flags))


def test_a_method_is_named_alike_in_files_and_flags(tmp_path: Path) -> None:
    (tmp_path / "short.yaml").write_text("method: other\n")
    (tmp_path / "long.yaml").write_text("method: {name: other}\n")
    (tmp_path / "none.yaml").write_text("train: {}\n")
    found = [
        quietly(tmp_path / "short.yaml"),
        quietly(tmp_path / "long.yaml"),
        quietly(tmp_path / "short.yaml", "--method", "other"),
        quietly(tmp_path / "none.yaml", "--method=other"),
        quietly(None, "--method", "other"),
        quietly(None, "--method.name", "other"),
        load_config(overrides={"method": "other"}),
    ]
    for one in found:
        assert one == found[0]
        assert (one.method_name, one.config.method) == ("other", OtherConfig())
        assert (one.config.recipe, one.config.optim) == (RECIPES["byol"], OPTIM["cnn"])
        assert from_tree(one.tree()) == one


def test_defaults_follow_the_backbone_wherever_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "vit.yaml").write_text("model: {backbone: moco_vit_small}\nmethod: other\n")
    for vit in (
        quietly(tmp_path / "vit.yaml"),
        quietly(None, "--method", "other", "--model.backbone", "vit_tiny_patch16_224"),
    ):
        assert (vit.config.optim, vit.config.model.stop_grad_conv1) == (OPTIM["vit"], False)
    cnn = quietly(tmp_path / "vit.yaml", "--model.backbone", "resnet18")
    assert (cnn.config.optim, cnn.config.model.stop_grad_conv1) == (OPTIM["cnn"], True)


def test_what_files_and_flags_say_stays_over_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "some.yaml").write_text(
        "method: {name: other, margin: 2}\noptim: {lr: 0.1}\nrecipe: {preset: dino, size: 64}\n"
    )
    found = quietly(tmp_path / "some.yaml", "--optim.warmup-epochs", "1").config
    assert (found.method.margin, found.optim.lr, found.optim.warmup_epochs) == (2, 0.1, 1)
    assert (found.optim.name, found.optim.momentum) == ("lars", 0.8)
    assert (found.recipe.local_views, found.recipe.size) == (8, 64)


def test_over_a_configuration_of_another_method_only_what_was_chosen_for_that_one_goes() -> None:
    theirs = load("laptop").config
    with pytest.warns(UserWarning, match="is made for moco_v3") as told:
        found = load("laptop", ["--method", "other", "--optim.lr", "0.2"])
    assert [str(w.message) for w in told] == [
        "'laptop' is made for moco_v3: other has its own defaults in place of the file's recipe moco_v3_resnet, section method, "
        "section optim."
    ]
    cfg = found.config
    assert (found.method_name, cfg.method) == ("other", OtherConfig())
    assert (cfg.optim.name, cfg.optim.lr, cfg.optim.warmup_epochs) == ("lars", 0.2, 7)
    assert cfg.recipe.interpolation == RECIPES["byol"].interpolation != theirs.recipe.interpolation
    # The file's own changes of its recipe are those of its data.
    assert (cfg.recipe.size, cfg.recipe.blur_sigma) == (theirs.recipe.size, theirs.recipe.blur_sigma)
    assert (cfg.train, cfg.knn, cfg.data) == (theirs.train, theirs.knn, theirs.data)
    assert cfg.model.backbone == theirs.model.backbone


def test_a_recipe_for_the_data_stays_with_another_method() -> None:
    with pytest.warns(UserWarning, match="in place of the file's section method, section optim"):
        found = load("satellite_resnet50", ["--method", "other"])
    assert found.config.recipe == load("satellite_resnet50").config.recipe
    with pytest.warns(UserWarning, match="the file's recipe moco_v3_resnet, section method"):
        named = load("laptop", ["--method", "other", "--recipe", "satellite"])
    assert named.config.recipe.quarter_turns


@pytest.mark.parametrize("name", [name for name in packaged() if load(name).method_name == "moco_v3"])
def test_the_file_s_own_method_changes_nothing(name: str) -> None:
    assert quietly(name, "--method", "moco_v3") == quietly(name)


def test_a_file_that_names_no_method_keeps_its_optimizer(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("optim: {name: sgd, lr: 0.05}\nrecipe: moco_v3_resnet\n")
    found = quietly(tmp_path / "c.yaml", "--method", "other").config
    assert (found.optim.name, found.optim.lr) == ("sgd", 0.05)
    assert found.recipe == RECIPES["moco_v3_resnet"]
