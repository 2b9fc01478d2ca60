"""`fastssl bench`: its reports on a CPU. How fast anything is, is no matter of a test."""

import json
import math
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastssl import config
from fastssl.bench import command, loader, parts, peers, report, step
from fastssl.bench.report import Row
from fastssl.bench.work import Source, Work
from fastssl.methods.parts import ema_update
from pipelines.recipe import Recipe, get_recipe
from shards.convert import convert
from shards.errors import UserError
from shards.read import ShardSet
from tests.fastssl.tiny import Plain, make_method
from tests.pictures import photo

TINY = ["--size", "16", "--batch", "4", "--threads", "1", "--repeats", "1", "--seconds", "0.02"]
STEP = [
    "--model.backbone",
    "resnet10_w32",
    "--recipe.size",
    "16",
    "--method.hidden_dim",
    "8",
    "--method.dim",
    "4",
]
STEP += ["--train.batch", "4", "--train.device", "cpu", "--steps", "2", "--repeats", "2"]


@pytest.fixture(scope="module")
def shard_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of nine JPEG pictures."""
    root = tmp_path_factory.mktemp("bench")
    (root / "pictures").mkdir()
    for i in range(9):
        photo(40 + i, 32, seed=i).save(root / "pictures" / f"{i}.jpg")
    convert(root / "pictures", root / "shards", workers=0)
    return root / "shards"


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    (tmp_path / "run.yaml").write_text("train:\n  precision: fp32\n")
    return str(tmp_path / "run.yaml")


def loader_report(shard_folder: Path, tmp_path: Path, *flags: str) -> dict:
    path = tmp_path / "loader.json"
    assert command.run(["loader", str(shard_folder), *TINY, *flags, "--json", str(path)]) == 0
    return json.loads(path.read_text())


def check_row(row: dict) -> None:
    low, high = row["spread"]
    assert 0 < low <= row["images_per_s"] <= high
    assert row["error"] is None
    assert row["cpu_cores"] >= 0


# -------------------------------------------------------------------------------------------------------- loader


def test_loader_alone_needs_no_peer(shard_folder, tmp_path, capsys):
    report = loader_report(shard_folder, tmp_path, "--peers", "none")
    assert [row["name"] for row in report["rows"]] == ["read", "decode", "fused", "reference"]
    assert [row["fidelity"] for row in report["rows"]] == [None, None, "exact", "exact"]
    for row in report["rows"]:
        check_row(row)
        assert row["ratio"] is None
    assert report["kind"] == "loader"
    assert report["versions"]["torch"] == torch.__version__.split("+")[0]
    assert set(report["versions"]) >= {"torchvision", "dali", "kornia", "numba", "pillow"}
    assert report["machine"]["cpu"]
    assert report["machine"]["cores"] >= 1
    assert report["settings"]["page_cache"] == "warm"
    assert report["settings"]["recipe"]["size"] == 16
    shown = capsys.readouterr().out
    assert "fused" in shown
    assert "9 images" in shown


@pytest.mark.slow
def test_all_peers_run_on_the_same_images(shard_folder, tmp_path):
    pytest.importorskip("nvidia.dali")
    pytest.importorskip("kornia")
    rows = {row["name"]: row for row in loader_report(shard_folder, tmp_path)["rows"]}
    assert set(rows) == {"read", "decode", "fused", "reference", *peers.PEERS}
    for row in rows.values():
        check_row(row)
    base = rows["moco-v3"]["images_per_s"]
    for name in ("fused", "reference", "moco-v3", "torchvision-v2", "dali", "kornia"):
        assert rows[name]["ratio"] == pytest.approx(rows[name]["images_per_s"] / base)
        assert rows[name]["ratio_to"] == "moco-v3"
    assert rows["dali-decode"]["ratio"] is None
    assert {name for name, row in rows.items() if row["fidelity"] == "exact"} == {
        "fused",
        "reference",
        "moco-v3",
    }
    for name in ("torchvision-v2", "dali", "kornia"):
        assert rows[name]["fidelity"] == "approximate"
        assert rows[name]["note"]


def test_a_peer_that_is_not_installed_is_listed_with_the_reason(shard_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "kornia.augmentation", None)
    monkeypatch.setitem(sys.modules, "nvidia.dali.pipeline", None)
    rows = {
        r["name"]: r for r in loader_report(shard_folder, tmp_path, "--peers", "kornia, dali-decode")["rows"]
    }
    for name, module in (("kornia", "kornia.augmentation"), ("dali-decode", "nvidia.dali")):
        assert rows[name]["images_per_s"] is None
        assert rows[name]["spread"] is None
        assert rows[name]["error"].startswith("not installed: ")
        assert module in rows[name]["error"]
    check_row(rows["fused"])
    assert "kornia could not be measured: not installed" in capsys.readouterr().out


def test_a_peer_that_fails_is_listed_and_a_fault_of_ours_is_raised():
    def broken(work):
        yield 4
        raise ArithmeticError("the first line\nthe reason")

    work = SimpleNamespace(threads=1)
    row = Row("x")
    row.add(5.0, 1.0)
    loader.measure(Source("x", "exact", broken), work, 0.01, row, is_peer=True)
    assert row.error == "ArithmeticError: the first line the reason"
    assert row.rates == []
    with pytest.raises(ArithmeticError):
        loader.measure(Source("x", "exact", broken), work, 0.01, Row("x"), is_peer=False)


def test_peers_without_the_operation_refuse_the_recipe(shard_folder, tmp_path):
    pytest.importorskip("kornia")
    rows = loader_report(shard_folder, tmp_path, "--peers", "kornia", "--recipe", "satellite")["rows"]
    assert "quarter turns or noise" in rows[-1]["error"]


@pytest.mark.parametrize(
    "recipe", [get_recipe("moco_v3"), get_recipe("satellite")], ids=["moco_v3", "satellite"]
)
@pytest.mark.parametrize("views", [peers.PILViews, peers.TensorViews])
def test_data_sets_of_peers_make_normalised_views(shard_folder, recipe, views):
    small = Recipe(**{**vars(recipe), "size": 20})
    made = views(ShardSet.open(shard_folder), small)[3]
    assert [view.shape for view in made] == [(3, 20, 20)] * 2
    mean, std = torch.tensor(small.mean)[:, None, None], torch.tensor(small.std)[:, None, None]
    for view in made:
        pixels = view * std + mean
        assert view.dtype == torch.float32
        assert pixels.min() >= -1e-5
        assert pixels.max() <= 1 + 1e-5
        assert pixels.std() > 0.01


@pytest.mark.parametrize("views", [peers.PILViews, peers.TensorViews])
def test_data_sets_of_peers_reach_worker_processes(shard_folder, views):
    made = views(ShardSet.open(shard_folder), Recipe(size=20))
    again = pickle.loads(pickle.dumps(made))
    assert [view.shape for view in again[3]] == [(3, 20, 20)] * 2


def test_every_epoch_has_the_same_images_in_another_order():
    work = Work(None, None, np.array([2, 3, 5, 7, 11, 13]), 3, 1)  # type: ignore[arg-type]
    batches = work.batches()
    epochs = [np.concatenate([next(batches)[1], next(batches)[1]]) for _ in range(2)]
    assert [sorted(e.tolist()) for e in epochs] == [[2, 3, 5, 7, 11, 13]] * 2
    assert epochs[0].tolist() != epochs[1].tolist()
    assert next(batches)[0] == 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--peers", "korni"], "Did you mean 'kornia'"),
        (["--batch", "10"], "9 images of"),
        (["--seconds", "0"], "--seconds is 0"),
        (["--repeats", "0"], "--repeats is 0"),
        (["--recipe", "moco"], "no recipe called 'moco'"),
        (["--json", "no/such/x.json"], "no folder 'no/such'"),
    ],
)
def test_loader_names_mistakes(shard_folder, flags, words):
    with pytest.raises(UserError, match=words):
        command.run(["loader", str(shard_folder), *flags])


def test_unknown_subcommand_and_help(capsys):
    with pytest.raises(UserError, match="Did you mean 'loader'"):
        command.run(["loadr"])
    assert command.run(["--help"]) == 0
    assert command.run(["step", "--help"]) == 0
    assert "bench step CONFIG" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------- step


def test_step_report(shard_folder, tmp_path, config_file, capsys):
    path = tmp_path / "step.json"
    assert (
        command.run(["step", config_file, *STEP, "--data.shards", str(shard_folder), "--json", str(path)])
        == 0
    )
    report = json.loads(path.read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == [
        "student forward + backward",
        "teacher forward",
        "optimiser + EMA",
        "full step",
        "EMA",
        "EMA as a Python loop",
        "loader",
        "end to end",
        "plain eager step",
    ]
    for row in rows.values():
        check_row(row)
        assert 0 < row["ms_median"] <= row["ms_p95"]
    for ours, other in (("full step", "plain eager step"), ("EMA", "EMA as a Python loop")):
        assert rows[ours]["ratio"] == pytest.approx(rows[ours]["images_per_s"] / rows[other]["images_per_s"])
        assert rows[ours]["ratio_to"] == other
    assert report["kind"] == "step"
    assert report["settings"]["config"]["train"]["batch"] == 4
    assert report["settings"]["forward_flops"] > 0
    assert report["mfu"] is None
    assert report["peak_memory_bytes"] is None
    assert "is the bottleneck" in report["conclusion"]
    shown = " ".join(capsys.readouterr().out.split())
    assert report["conclusion"] in shown


def test_step_needs_no_shards(config_file, capsys):
    assert command.run(["step", config_file, *STEP]) == 0
    assert "Give --data.shards to learn" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--steps", "2"], "Give the configuration file first"),
        (["none.yaml"], "no configuration file 'none.yaml'"),
        (["CONFIG", "--steps", "0"], "--steps is 0"),
        (["CONFIG", "--train.bach", "4"], "Did you mean 'train.batch'"),
        (["CONFIG", "--json", "no/such/x.json"], "no folder 'no/such'"),
    ],
)
def test_step_names_mistakes(config_file, argv, words):
    with pytest.raises(UserError, match=words):
        command.run(["step", *(config_file if token == "CONFIG" else token for token in argv)])


def test_step_refuses_several_processes(config_file, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="without torchrun"):
        command.run(["step", config_file])


def fake(device: str, **rates: float) -> tuple:
    """(trainee, rows) with these rates and an update that takes a tenth of the step."""
    rows = {name.replace("_", " "): Row(name, rates=[rate]) for name, rate in rates.items()}
    rows[parts.FULL].more = {"ms_median": 10.0}
    rows[parts.UPDATE] = Row(parts.UPDATE, more={"ms_median": 1.0})
    trainee = parts.Trainee(make_method(Plain()), None, torch.device(device), True, True, 1)  # type: ignore[arg-type]
    return trainee, rows


def test_conclusion_names_the_slower_side_and_a_switch(config_file):
    trainee, rows = fake("cuda", full_step=3000.0, loader=1000.0, end_to_end=900.0)
    resolved = config.load(config_file, ["--data.engine", "reference"])
    assert step.conclusion(resolved, trainee, rows) == (
        "The loader is the bottleneck (1,000 images/s, the step makes 3,000); together 900, 90% of what these two allow. "
        "Try --data.engine fused."
    )
    trainee, rows = fake("cpu", full_step=1000.0, loader=1000.0 * 3, end_to_end=375.0)
    resolved = config.load(config_file, ["--train.compile", "True"])
    # Sharing the cores, 1 ms and 1/3 ms an image allow 750 images/s.
    assert "The step is the bottleneck (1,000 images/s, the loader makes 3,000); together 375, 50% of" in (
        step.conclusion(resolved, trainee, rows)
    )
    assert "--train.compile True" in step.step_advice(
        config.load(config_file), fake("cuda", full_step=1.0)[0], rows
    )


def test_mfu_counts_eight_forwards():
    # 1000 images/s x 8 x 12.3625 GFLOP = 98.9 TFLOP/s, a tenth of 989.
    assert parts.utilisation(1000, 12_362_500_000, "NVIDIA H100 80GB HBM3") == pytest.approx(0.1)
    assert parts.utilisation(1000, 12_362_500_000, "another GPU") is None
    assert parts.utilisation(1000, 12_362_500_000, None) is None


def test_forward_flops_of_linear_layers():
    # Backbone 48 -> 6, projector 6 -> 7 -> 7 -> 5, predictor 5 -> 7 -> 5; a multiply-add is two operations.
    method = make_method(Plain())
    expected = 2 * (48 * 6 + 6 * 7 + 7 * 7 + 7 * 5 + 5 * 7 + 7 * 5)
    assert parts.forward_flops(method, torch.randn(2, 3, 4, 4)) == expected


def test_ema_loop_does_what_ours_does():
    pairs = parts.ema_pairs(make_method(Plain()))
    for _, student in pairs:
        student.data += torch.randn_like(student)
    copies = [teacher.detach().clone() for teacher, _ in pairs]
    ema_update(copies, [student for _, student in pairs], 0.9)
    parts.ema_loop(pairs, 0.9)
    for (teacher, _), copy in zip(pairs, copies, strict=True):
        torch.testing.assert_close(teacher.detach(), copy)


# -------------------------------------------------------------------------------------------------------- report


def test_row_has_the_median_and_the_ratio():
    row, other = Row("a", rates=[4.0, 1.0, 2.0], cores=[1.0, 1.0, 2.0]), Row("b", rates=[8.0])
    row.compare(other)
    plain = row.as_json()
    assert (plain["images_per_s"], plain["spread"], plain["ratio"], plain["ratio_to"]) == (
        2,
        [1, 4],
        0.25,
        "b",
    )
    assert plain["cpu_cores"] == 1
    assert plain["core_ms_per_image"] == 1000  # of 250, 1000 and 1000
    row.compare(Row("c", error="no"))
    assert row.ratio_to == "b"


@pytest.mark.parametrize(
    ("rate", "text"), [(3.14159, "3.14"), (31.4159, "31.4"), (3141.59, "3,142"), (31415.9, "31k")]
)
def test_brief(rate, text):
    assert report.brief(rate) == text


def test_stopwatch_counts_this_process():
    watch = report.Stopwatch()
    while watch.wall_s() < 0.1:
        math.sqrt(2)
    assert 0 < watch.cores() < 64


def test_failed_write_is_told(tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        report.write_report(str(tmp_path), "loader", {}, {}, [])
