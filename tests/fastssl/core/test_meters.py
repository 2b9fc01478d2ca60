"""Means, rates, rows of metrics.jsonl and the lines people see."""

import builtins
import errno
import io
import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.text import Text

from fastssl.core import meters
from fastssl.core.distributed import Dist, alone
from fastssl.core.meters import Meters, MetricsLog, ProgressDisplay
from shards.errors import UserError
from tests.gloo import run_ranks

VALUES = {
    "loss": 1.5,
    "ce_norm": 0.5,
    "acc": 0.25,
    "feature_std": 0.6,
    "images_per_s": 1234.5,
    "data_wait": 0.02,
}


def test_means_start_anew_after_each_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 104.0, 104.0, 106.0, 106.0])
    monkeypatch.setattr(meters.time, "perf_counter", lambda: next(clock))
    found = Meters()
    for loss, wait_s in ((1.0, 0.5), (2.0, 0.0), (6.0, 0.5)):
        found.add({"loss": torch.tensor(loss)}, wait_s)
    # 3 steps of 8 images in 4 s, of which 1 s was spent waiting.
    assert found.read(8, 3) == {"loss": 3.0, "images_per_s": 6.0, "data_wait": 0.25, "stand_ins": 0}
    found.add({"loss": torch.tensor(5.0)}, 9.0)
    assert found.read(8, 1) == {"loss": 5.0, "images_per_s": 4.0, "data_wait": 1.0, "stand_ins": 0}


def test_steps_that_were_not_applied_are_left_out_of_the_means() -> None:
    found = Meters()
    for loss, applied, replaced in ((1.0, True, 0), (float("nan"), False, 2), (4.0, True, 1)):
        found.add({"loss": torch.tensor(loss)}, 0.0, torch.tensor(applied), replaced)
    again = Meters()
    again.restore(found.state(), torch.device("cpu"))
    for read in (found.read(1, 3), again.read(1, 3)):
        assert (read["loss"], read["stand_ins"]) == (2.5, 3)
    found.add({"loss": torch.tensor(float("nan"))}, 0.0, torch.tensor(False))
    assert "loss" not in found.read(1, 1)


def _rank_means(here: Dist) -> list[dict]:
    """Rows with a save within the first window, and of a run that goes on from it on rank 0 alone."""
    found, rows = Meters(), []
    for step in range(4):
        found.add({"loss": torch.tensor(float(step + 10 * here.rank))}, 0.0, torch.tensor(True), here.rank)
        if step == 0:
            state = found.state()
            if here.is_main:
                with alone():
                    rows.append(_on_from(state))
        if step % 2:
            rows.append({k: v for k, v in found.read(1, 1).items() if k in ("loss", "stand_ins")})
    return rows


def _on_from(state: dict) -> dict:
    again = Meters()
    again.restore(state, torch.device("cpu"))
    return {k: v for k, v in again.read(1, 1).items() if k in ("loss", "stand_ins")}


def test_means_and_counts_are_of_all_ranks_and_go_on_on_any_number_of_them() -> None:
    first, second = run_ranks(_rank_means)
    assert second == [{"loss": 5.5, "stand_ins": 2}, {"loss": 7.5, "stand_ins": 2}]
    assert first == [{"loss": 5.0, "stand_ins": 1}, *second]


def test_added_values_are_kept_though_the_tensor_changes() -> None:
    found, loss = Meters(), torch.tensor(1.0)
    found.add({"loss": loss}, 0.0)
    loss += 100
    found.add({"loss": loss}, 0.0)
    assert found.read(1, 2)["loss"] == 51.0


def test_a_restored_mean_is_the_same() -> None:
    one, other = Meters(), Meters()
    values = [torch.tensor(0.1), torch.tensor(0.7), torch.tensor(0.3)]
    for value in values:
        one.add({"loss": value}, 0.0)
    for value in values[:2]:
        other.add({"loss": value}, 0.0)
    again = Meters()
    again.restore(other.state(), torch.device("cpu"))
    again.add({"loss": values[2]}, 0.0)
    assert again.read(1, 1)["loss"] == one.read(1, 3)["loss"]


def test_rows_keep_six_significant_digits(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    log.write({"step": 12345678, "lr": 1.23456789e-7, "loss": 1234.56789, "acc": 0.0})
    [row] = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert row == {"step": 12345678, "lr": 1.23457e-7, "loss": 1234.57, "acc": 0.0}


def test_a_resumed_log_is_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = [{"step": step, "loss": 0.5} for step in (2, 4, 4, 6, 8)]
    text = "".join(json.dumps(row) + "\n" for row in whole)
    path.write_text(text + '{"step": 9, "lo')  # killed while it wrote
    log = MetricsLog(path, 6)
    assert log.last == whole[3]
    log.write({"step": 8, "loss": 0.25})
    assert list(map(json.loads, path.read_text().splitlines())) == [*whole[:4], {"step": 8, "loss": 0.25}]


def test_a_log_anew_has_no_rows(tmp_path: Path) -> None:
    """Not even that of step 0, which a run that was killed before its first checkpoint writes again."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "knn_accuracy": 0.3}\n{"step": 2, "loss": 1}\n[]\n{"loss": 1}\n')
    assert MetricsLog(path, 0).last == {}
    assert path.read_text() == ""


def test_the_untrained_network_is_not_the_best_so_far(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    log.write({"step": 0, "knn_accuracy": 0.9})
    log.write({"step": 2, "knn_accuracy": 0.3})
    assert log.highest["knn_accuracy"] == 0.3
    assert MetricsLog(tmp_path / "metrics.jsonl", 2).highest["knn_accuracy"] == 0.3


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)

    def refuse(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(builtins, "open", refuse)
    with pytest.raises(
        UserError, match=r"metrics.jsonl' cannot be written \(No space left on device\).*--resume"
    ):
        log.write({"step": 1})


def test_without_a_terminal_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(meters.time, "perf_counter", lambda: now[0])
    with ProgressDisplay(100, 0, show=True) as screen:
        for step, at in ((1, 1.0), (2, 19.0), (3, 20.0), (4, 40.0), (5, 41.0), (100, 42.0)):
            now[0] = at
            screen.step(step)
            screen.log(step, 0, 4, VALUES)
    lines = capsys.readouterr().out.splitlines()
    tail = "loss 1.500  ce/lnN 0.500  acc 25%  std 0.60  1,234 img/s  wait 2%"
    # 99 steps of 1 s, 96 of 10 s; the last step has its line although the one before was 2 s ago.
    ends = {1: "  2 min left", 4: "  16 min left", 100: ""}
    assert lines == [f"epoch 1/4  step {step}/100  {tail}{left}" for step, left in ends.items()]


def test_a_resumed_run_s_time_left_counts_its_own_steps(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(meters.time, "perf_counter", lambda: now[0])
    with ProgressDisplay(100, 90, show=True) as screen:
        now[0] = 1004.0
        screen.log(92, 3, 4, VALUES)
    assert capsys.readouterr().out.endswith("  16 s left\n")


@pytest.mark.parametrize("columns", [80, 120])
def test_the_bar_fits_with_its_longest_values(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The share of chance, which the README explains, and images/s are in it at any width."""
    seconds = itertools.count()
    screen = Console(
        file=io.StringIO(), width=columns, force_terminal=True, get_time=lambda: next(seconds) / 1000
    )
    monkeypatch.setattr(meters, "Console", lambda **_: screen)
    longest = {"loss": 12.345, "ce_norm": 1.012, "acc": 1.0, "feature_std": 0.98}
    display = ProgressDisplay(300_000, 123_000, show=True)
    # Not entered: a live bar's thread would take from the clock.
    for step in range(123_001, 123_457):
        seconds = itertools.count(1000 * (step - 123_000))
        display.step(step)
    display.log(123_456, 99, 300, longest | {"images_per_s": 12_345.0, "data_wait": 0.99})
    with screen.capture() as shown:
        screen.print(display._bar.get_renderable())
    [line] = Text.from_ansi(shown.get().rstrip("\n")).plain.splitlines()
    words = ["epoch 100/300", "123456/300000", "ce/lnN 1.012", "acc 100%", "12,345 img/s"]
    words += ["loss 12.345", "std 0.98", "wait 99%"] if columns == 120 else []
    assert [word for word in words if word not in line] == []
    # A step takes a second, so two days are left.
    assert re.search(r" 4[89]:\d\d:\d\d ", line)
    assert len(line) <= columns


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressDisplay(100, 0, show=False) as screen:
        screen.say("hello")
        screen.step(1)
        screen.log(1, 0, 4, VALUES)
    assert capsys.readouterr().out == ""


def test_pauses_count_neither_as_work_nor_as_waiting(monkeypatch):
    """Ten steps of 8 images in 2 s, with 5 s of testing between them: 40 images/s, and half of the 2 s was waiting."""
    now = [100.0]
    monkeypatch.setattr("fastssl.core.meters.time.perf_counter", lambda: now[0])
    meters = Meters()
    for _ in range(10):
        meters.add({"loss": torch.tensor(1.0)}, wait_s=0.1)
        now[0] += 0.2
    with meters.paused():
        now[0] += 5.0
    values = meters.read(images_per_step=8, steps_timed=10)
    assert values["images_per_s"] == pytest.approx(40)
    assert values["data_wait"] == pytest.approx(0.5)
