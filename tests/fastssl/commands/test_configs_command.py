"""`fastssl configs`: the list at 80 columns, and copies that never replace a file."""

from pathlib import Path

import pytest

from fastssl.cli import main
from fastssl.commands.configs_command import short_name, summary
from fastssl.pretraining.packaged_configs import packaged
from fastssl.pretraining.run_config import load
from pipelines.augment.recipe import RECIPES


def test_the_list_fits_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["name", "model", "recipe", "batch", "machine"]
    # A configuration a line, whole.
    for name, line in zip(packaged(), lines[1:], strict=False):
        model, *rest = summary(packaged()[name])
        assert line.split() == [name, short_name(model), *" ".join(rest).split()]
        assert rest[2]


def test_names_of_timm_s_vits_are_shown_short() -> None:
    assert short_name("vit_small_patch16_224") == "vit_small/16"
    assert short_name("deit3_base_patch16_384") == "deit3_base/16"
    assert [short_name(name) for name in ("resnet50", "moco_vit_small")] == ["resnet50", "moco_vit_small"]


@pytest.mark.parametrize("name", packaged())
def test_a_row_says_what_the_configuration_resolves_to(name: str) -> None:
    model, recipe, batch, _ = summary(packaged()[name])
    cfg = load(name).config
    assert (model, int(batch)) == (cfg.model.backbone, cfg.train.batch)
    assert recipe in RECIPES
    assert load(None, ["--recipe", recipe]).config.recipe.crop_scale == RECIPES[recipe].crop_scale
    assert f"preset: {recipe}\n" in packaged()[name].read_text()


def test_a_copy_is_the_file_and_never_replaces_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], told
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for argv, out in (
        (["laptop"], "laptop.yaml"),
        (["laptop.yaml", "mine.yaml"], "mine.yaml"),
        (["laptop", "folder"], "folder/laptop.yaml"),
    ):
        assert main(["configs", *argv]) == 0
        assert capsys.readouterr().out == f"{out}\nnext: fastssl pretrain {out} --data.shards SHARDS\n"
        assert Path(out).read_bytes() == packaged()["laptop"].read_bytes()
        Path(out).write_text("mine")
        assert told("configs", *argv) == f"'{out}' exists and is not overwritten: name another file."
        assert Path(out).read_text() == "mine"
    assert told("configs", "lapto") == "There is no configuration called 'lapto'. Did you mean 'laptop'?"
    assert told("configs", "laptop", "none/x.yaml").startswith("There is no folder 'none' for FILE")
