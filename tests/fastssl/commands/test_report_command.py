import json

import pytest
from PIL import Image

from fastssl.commands.report_command import PANELS, draw, read_metrics, run
from shards.errors import UserError


def write(run, rows, tail=""):
    run.mkdir()
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return str(run)


def test_one_panel_per_metric_and_runs_of_different_length(tmp_path):
    rows = [
        {"step": i, "epoch": i / 5, "ce_norm": 1 / i, "acc": i / 20, "images_per_s": 9.0}
        for i in range(1, 11)
    ]
    a = write(tmp_path / "a", [*rows, {"step": 10, "epoch": 2, "knn_accuracy": 0.5}])
    b = write(tmp_path / "b", rows[:3])
    with (
        Image.open(draw((a, b), tmp_path / "two.png")) as both,
        Image.open(draw((b,), tmp_path / "one.png")) as one,
    ):
        assert both.format == "PNG"
        assert both.height > one.height  # four panels take two lines, three take one
        assert len(set(both.convert("L").tobytes())) > 20
    assert set(PANELS) >= {"ce_norm", "acc", "feature_std", "knn_accuracy"}


def test_a_half_written_line_is_left_out(tmp_path):
    run = write(tmp_path / "a", [{"step": 1, "epoch": 1.0, "acc": 0.1}], tail='{"step": 2, "ep')
    assert [row["step"] for row in read_metrics(run)] == [1]


def test_no_run_and_no_rows_are_clear_errors(tmp_path):
    with pytest.raises(UserError, match=r"has no metrics\.jsonl"):
        read_metrics(tmp_path)
    with pytest.raises(UserError, match="is empty"):
        read_metrics(write(tmp_path / "a", []))


def test_a_missing_folder_is_told_before_drawing(tmp_path):
    with pytest.raises(UserError, match=r"no folder '.*/none' for --out '.*/none/r\.png': make it first"):
        run([str(tmp_path / "no-run"), "--out", str(tmp_path / "none" / "r.png")])
