"""`fastssl preview`: what it draws and says, and what it refuses."""

import shutil
from pathlib import Path

import pytest

from fastssl.cli import main
from pipelines.previews.sheet import Sheet


def test_preview_draws_a_preset_or_a_configuration(
    config, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--rows", "2", "--epochs", "1"]
    for recipe, size in (("moco_v3", "32"), (str(config()), "16")):
        out = tmp_path / f"{size}.png"
        more = ["--size", "32"] if recipe == "moco_v3" else []
        assert main(["preview", str(shards), "--recipe", recipe, "--out", str(out), *flags, *more]) == 0
        assert f"2 images, 1 epoch of 2 views at {size} px: {out}" in capsys.readouterr().out
        assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (
            ["--recipe", "dino", "--epochs", "1", "--recipe.local-views", "1", "--recipe.size", "32"],
            "1 epoch of 2 views at 32 px and 1 at 96 px",
        ),
        (["--ops", "--size", "32"], "2 images, each operation by itself"),
        (["--engines", "reference,fused", "--size", "32"], "2 images by reference, fused"),
        (["--samples", "3,17,5", "--no-masks", "--size", "32"], "3 images, 3 epochs of 2 views"),
    ],
)
def test_preview_shows_operations_and_engines(
    flags: list, line: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sheet.png"
    assert main(["preview", str(shards), "--rows", "2", "--out", str(out), *flags]) == 0
    assert line in capsys.readouterr().out
    assert out.read_bytes().startswith(b"\x89PNG")


def test_preview_takes_several_folders_as_pretrain_does(
    shards: Path, tmp_path: Path, told, capsys: pytest.CaptureFixture[str]
) -> None:
    other, out = tmp_path / "other", tmp_path / "sheet.png"
    shutil.copytree(shards, other)
    flags = ["--samples", "3,63", "--size", "32", "--epochs", "1", "--out", str(out)]
    assert main(["preview", str(shards), str(other), *flags]) == 0
    assert "2 images, 1 epoch of 2 views" in capsys.readouterr().out
    assert "--samples names 63, which is not among the 60" in told("preview", shards, *flags)
    assert told("preview").startswith("No shards to draw: give SHARDS")


def test_preview_names_engines_it_cannot_compare(told, shards: Path) -> None:
    assert "Did you mean 'fused'" in told("preview", shards, "--engines", "fussed,reference")
    for flags in (("--engines", "fused"), ("--engines", "fused,reference", "--ops")):
        assert told("preview", shards, *flags).startswith("--engines needs two or more names")
    told_of = told("preview", shards, "--recipe.crop-scal", "0.1")
    assert "Did you mean 'recipe.crop_scale'" in told_of


def test_preview_names_samples_that_are_none(told, shards: Path) -> None:
    assert told("preview", shards, "--samples", "3;4") == (
        "--samples is '3;4', but it must be ids separated by commas, such as 3,17."
    )
    assert "--samples names 60, which is not among the 60 samples" in told(
        "preview", shards, "--samples", "60"
    )


def test_preview_names_unknown_recipes(told, shards: Path) -> None:
    assert (
        told("preview", shards, "--recipe", "satelite")
        == "There is no recipe called 'satelite'. Did you mean 'satellite'?"
    )


@pytest.mark.parametrize(
    ("flag", "value", "least"), [("--rows", 0, 1), ("--epochs", 0, 1), ("--size", -1, 0), ("--rows", -3, 1)]
)
def test_preview_names_impossible_numbers(flag: str, value: int, least: int, told, shards: Path) -> None:
    assert told("preview", shards, flag, value) == f"{flag} is {value}, but it must be at least {least}."


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ([], "moco_v3"),
        (["--recipe", "satellite", "--recipe.hue", "0"], "satellite --recipe.hue 0"),
        (["--config", "laptop"], "laptop"),
    ],
)
def test_the_title_names_recipe_and_changes(
    flags: list, name: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    titles: list[tuple[str, str]] = []
    start = Sheet.__init__

    def started(self, title, *rest):
        titles.append(title)
        start(self, title, *rest)

    monkeypatch.setattr(Sheet, "__init__", started)
    out = str(tmp_path / "s.png")
    assert (
        main(["preview", str(shards), "--rows", "1", "--epochs", "1", "--seed", "4", "--out", out, *flags])
        == 0
    )
    about = "draws of seed 4 · views by fused · samples chosen by seed 0"
    assert titles == [(f"Recipe {name}: {shards}", about)]
