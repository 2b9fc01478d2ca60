import json
import math

import pytest
from PIL import Image

from fastssl.commands.report_command import PANELS, curves, draw, read_metrics, run
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


def panels(figure):
    """The axes that show a metric, by the first line of their titles."""
    return {axis.get_title().split("\n")[0]: axis for axis in figure.axes if axis.axison}


def legend(axis):
    return [text.get_text() for text in axis.get_legend().get_texts()]


def knn_rows(*accuracies, chance=0.25):
    rows = [{"step": 10 * i, "epoch": i, "knn_accuracy": a} for i, a in enumerate(accuracies)]
    return [{**rows[0], "knn_chance": chance}, *rows[1:]]


def test_accuracies_stand_in_per_cent_above_chance_and_the_untrained_network():
    figure = curves({"runs/a": knn_rows(0.4, 0.405, 0.41)})
    axis = panels(figure)["kNN accuracy"]
    assert legend(axis) == ["last 41.0 %", "chance 25.0 %", "untrained 40.0 %"]
    flat = [set(line.get_ydata()) for line in axis.get_lines() if len(set(line.get_ydata())) == 1]
    assert flat == [{0.25}, {0.4}]
    # A gain of one point looks like one: the axis starts at 0, and tells per cent.
    assert axis.get_ylim()[0] == 0
    assert axis.get_ylim()[1] == pytest.approx(0.41 * 1.08)
    assert axis.yaxis.get_major_formatter()(0.4) == "40 %"
    assert axis.get_xlim() == (0, 2)


def test_small_values_do_not_fill_their_axis():
    rows = [{"step": i, "epoch": i, "data_wait": 0.001 * i, "ce_norm": 0.2, "loss": 2.0} for i in (1, 2)]
    tops = {name: axis.get_ylim() for name, axis in panels(curves({"a": rows})).items()}
    assert tops["waiting for data"] == (0, 0.2)
    assert tops["cross-entropy / ln N"] == (0, 1.1)
    assert tops["loss"] == (0, pytest.approx(2 * 1.08))


def test_chance_of_the_contrastive_accuracy_is_one_of_the_keys():
    rows = [{"step": 1, "epoch": 1, "ce": 0.5 * math.log(64), "ce_norm": 0.5, "acc": 0.5}]
    # The six digits of a log give the same line.
    other = [{**rows[0], "ce": 0.345678 * math.log(64), "ce_norm": 0.345679}]
    assert legend(panels(curves({"a": rows, "b": other}))["contrastive accuracy"])[2:] == ["chance 1.6 %"]
    axes = panels(curves({"a": rows}))
    assert legend(axes["contrastive accuracy"]) == ["last 50.0 %", "chance 1.6 %"]
    assert axes["contrastive accuracy"].get_lines()[1].get_ydata()[0] == pytest.approx(1 / 64)
    assert legend(axes["cross-entropy / ln N"]) == ["last 0.5", "chance 1"]


def test_runs_that_coincide_stay_visible_and_are_named():
    one, other = knn_rows(0.4, 0.5), knn_rows(0.3, 0.6)
    figure = curves({"runs/a": one, "runs/b": one, "old/b": other})
    lines = [
        line for line in panels(figure)["kNN accuracy"].get_lines() if line.get_label().startswith("last")
    ]
    below, above = lines[0], lines[1]
    assert list(below.get_ydata()) == list(above.get_ydata())
    assert below.get_linewidth() > above.get_linewidth()
    assert below.get_markersize() > above.get_markersize()
    assert below.get_linestyle() == "-"
    assert above.get_linestyle() == "--"
    # Runs that start alike share a line to compare with, in gray; another has its own, in its colour.
    levels = {
        line.get_label(): line.get_color()
        for line in panels(figure)["kNN accuracy"].get_lines()
        if not line.get_label().startswith("last")
    }
    assert levels == {"chance 25.0 %": "0.35", "untrained 40.0 %": "0.35", "untrained 30.0 %": "C2"}
    # Two folders have the name b.
    assert [text.get_text() for text in figure.texts] == ["Runs a, runs/b, old/b"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "a: epoch 1, step 10",
        "runs/b: epoch 1, step 10",
        "old/b: epoch 1, step 10",
    ]


def test_a_run_without_step_0_has_no_line_to_compare_with():
    axis = panels(curves({"a": [{"step": 3, "epoch": 1, "knn_accuracy": 0.5}]}))["kNN accuracy"]
    assert legend(axis) == ["last 50.0 %"]


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
