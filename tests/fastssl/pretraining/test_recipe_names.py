"""A recipe's name means the same in YAML, as a flag of pretrain and of preview, and to a run that is resumed."""

import warnings
from pathlib import Path

import pytest

from fastssl.commands import preview_command
from fastssl.pretraining import resume_rules
from fastssl.pretraining.packaged_configs import packaged
from fastssl.pretraining.run_config import load, load_config
from fastssl.training.resume import data_set_of
from pipelines.augment.recipe import RECIPES, Recipe
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError


def of_preview(monkeypatch: pytest.MonkeyPatch, *flags: str) -> Recipe:
    """The recipe whose views `fastssl preview` draws."""
    from pipelines.previews import preview_sheets
    from shards.splits import split_table

    seen: list[Recipe] = []
    monkeypatch.setattr(split_table, "open_split", lambda *_: [])
    monkeypatch.setattr(preview_sheets, "contact_sheet", lambda shards, recipe, *_, **__: seen.append(recipe))
    assert preview_command.run(["shards", *flags]) == 0
    return seen[0]


@pytest.mark.parametrize("name", RECIPES)
def test_a_name_is_the_same_everywhere(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "short.yaml").write_text(f"recipe: {name}\n")
    (tmp_path / "long.yaml").write_text(f"recipe: {{preset: {name}}}\n")
    monkeypatch.chdir(tmp_path)
    found = [
        load("short.yaml").config.recipe,
        load("long.yaml").config.recipe,
        load(None, ["--recipe", name]).config.recipe,
        load_config(overrides={"recipe": name}).config.recipe,
        of_preview(monkeypatch, "--recipe", name),
    ]
    assert found == [RECIPES[name]] * 5


@pytest.mark.parametrize("config", ["laptop", "fashion_mnist"])
def test_preview_shows_what_pretrain_sees(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for flags in ([], ["--recipe", "satellite"], ["--recipe", "dino", "--recipe.crop-scale", "0.3", "0.9"]):
        expected = load(config, flags).config.recipe
        assert of_preview(monkeypatch, "--config", config, *flags) == expected
    assert load(config, ["--recipe", "satellite"]).config.recipe.quarter_turns


def test_a_configuration_lends_its_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load("fashion_mnist").config.recipe
    assert expected != Recipe()
    copy = tmp_path / "copy.yaml"
    copy.write_text(packaged()["fashion_mnist"].read_text())
    for name in ("fashion_mnist", str(copy)):
        assert load(None, ["--recipe", name]).config.recipe == expected
        assert of_preview(monkeypatch, "--recipe", name) == expected


def test_no_preset_has_the_name_of_a_configuration() -> None:
    assert set(RECIPES) & set(packaged()) == set()


def test_a_preset_that_would_change_nothing_is_refused(tmp_path: Path) -> None:
    whole = tmp_path / "config.yaml"
    whole.write_text(load("laptop", ["--recipe", "satellite"]).to_yaml())
    with pytest.raises(
        UserError, match=r"itself sets all that --recipe byol would change \(recipe\.interpolation\)"
    ):
        load(whole, ["--recipe", "byol"])
    # It says what the file says, or only a part of it is in the file.
    (tmp_path / "part.yaml").write_text("recipe: {size: 64, hue: 0.3}\n")
    assert load(tmp_path / "part.yaml", ["--recipe", "satellite"]).config.recipe.vflip_p == 0.5
    whole.write_text(load(None, ["--recipe", "satellite"]).to_yaml())
    assert load(whole, ["--recipe", "satellite"]).config.recipe == RECIPES["satellite"]


def test_a_run_goes_on_with_the_same_recipe_however_it_is_written(shards: Path, tmp_path: Path) -> None:
    data = ShardSet.open(shards)
    file = tmp_path / "run.yaml"

    def resumed(before: str, now: str, *flags: str) -> None:
        file.write_text(before)
        state = {"config": load(file).tree(), "architecture": {}, "shards": data_set_of(data)}
        file.write_text(now)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            resume_rules.check_same_run(state, load(file, list(flags)), data, {}, "step.pt")

    written_out = load(None, ["--recipe", "satellite"]).to_yaml()
    for now, flags in (
        ("recipe: satellite", []),
        ("recipe: {preset: satellite}", []),
        ("", ["--recipe", "satellite"]),
        ("recipe: moco_v2", ["--recipe", "satellite"]),
        (written_out, []),
    ):
        resumed("recipe: satellite", now, *flags)
        resumed(written_out, now, *flags)
    for before, now in (
        ("recipe: satellite", ""),
        ("recipe: {preset: satellite, hue: 0.1}", "recipe: satellite"),
    ):
        with pytest.raises(
            UserError, match=r"was made with recipe\.\w+ = .* and this run has .*: use the same"
        ):
            resumed(before, now)
