import json

import pytest
from PIL import Image

from fastssl.cli import main
from fastssl.demo.demo_command import PRETRAIN_S, choose_epochs


@pytest.mark.slow
def test_the_demo_runs_from_drawing_to_numbers_and_again(tmp_path, capsys):
    out = tmp_path / "demo"
    flags = ["demo", "--out", str(out), "--tiles", "20", "--epochs", "2", "--size", "32"]
    assert main(flags) == 0
    text = capsys.readouterr().out
    for part in (
        "Draw 120 synthetic aerial tiles",
        "Convert",
        "Look at the views",
        "Pretrain",
        "kNN accuracy",
        "raw pixels",
    ):
        assert part in text
    with Image.open(out / "views.png") as sheet:
        assert sheet.width > 500
    report = json.loads((out / "knn.json").read_text())
    assert report["classes"] == ["fields", "roads", "roofs", "solar", "water"]
    assert [row["features"].split(",")[-1].strip() for row in report["rows"]] == [
        "pretrained 2 steps",
        "untrained",
        "raw pixels",
    ]
    for row in report["rows"]:
        assert all(0 <= share <= 1 for share in row["accuracy"].values())

    # Run again it finds everything done, and the same numbers.
    (out / "knn.json").unlink()
    assert main(flags) == 0
    assert json.loads((out / "knn.json").read_text()) == report


def test_too_few_tiles_is_a_clear_error(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path / "demo"), "--tiles", "5"]) == 2
    assert "--tiles is 5: use at least 20" in capsys.readouterr().err


@pytest.mark.parametrize(("epoch_s", "epochs"), [(4.0, 30), (6.0, 30), (6.1, 15), (12.1, 8), (100.0, 8)])
def test_the_demo_takes_the_longest_run_that_fits(epoch_s: float, epochs: int) -> None:
    assert PRETRAIN_S == 180
    assert choose_epochs(epoch_s) == epochs
