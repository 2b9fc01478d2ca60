"""SimCLR through the trainer and the commands: a method without a teacher."""

import json
import warnings
from pathlib import Path

import pytest
import yaml

from fastssl.cli import main
from fastssl.commands.evaluate_checkpoint import evaluate_knn
from fastssl.pretraining.packaged_configs import packaged
from fastssl.pretraining.run import train
from pipelines.augment.recipe import RECIPES
from tests.fastssl.pretraining.test_resume import resume_after_crashes
from tests.fastssl.runs import (
    LADDER_STEP,
    NUM_IMAGES,
    STEPS,
    TOTAL,
    assert_same_end,
    newest,
    resolve,
    rows,
    tiny,
    write_yaml,
)

SIMCLR = {
    "recipe": {"preset": "simclr"},
    "method": {"name": "simclr", "temperature": 0.2},
    "optim": {"name": "lars", "lr": 0.3, "weight_decay": 1e-6},
}


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run in chunks that was never stopped."""
    folder = tmp_path_factory.mktemp("simclr") / "run"
    train(resolve(shards, folder, SIMCLR, {"train": {"micro_batch": 3}}))
    return folder


def test_a_stopped_run_ends_with_the_same_bits(run: Path, shards: Path, tmp_path: Path) -> None:
    resume_after_crashes(
        resolve(shards, tmp_path / "run", SIMCLR, {"train": {"micro_batch": 3}}), (4, STEPS + 3)
    )
    assert_same_end(tmp_path / "run", run)


def test_the_log_knows_no_teacher(run: Path) -> None:
    steps = [row for row in rows(run) if "loss" in row]
    assert steps[-1]["step"] == TOTAL
    for row in steps:
        assert {"loss", "ce", "ce_norm", "acc", "feature_std", "grad_norm"} < row.keys()
        assert not [name for name in row if "teacher" in name]
        assert 0 <= row["acc"] <= 1
        assert row["loss"] == pytest.approx(row["ce"])
    assert {key.split(".")[0] for key in newest(run)["method"]} == {"backbone", "projector"}


def test_what_it_saved_is_evaluated(run: Path, shards: Path) -> None:
    report = evaluate_knn(run, shards, ks=(1, 5), device="cpu")
    names = [row["features"] for row in report["rows"]]
    assert names[0] == f"resnet10_w32, pretrained {TOTAL} steps"
    [*_, last] = (row for row in rows(run) if "knn_accuracy" in row)
    assert report["rows"][0]["accuracy"][5] == pytest.approx(last["knn_accuracy"], abs=1e-6)
    assert report["queries"] == f"leave one out of {NUM_IMAGES} samples"


def test_another_length_tells_of_the_learning_rate_alone(shards: Path, tmp_path: Path) -> None:
    train(resolve(shards, tmp_path / "run", SIMCLR, {"train": {"epochs": 1}}))
    with pytest.warns(UserWarning, match=r"train\.epochs was 1 so far.* \(with 1 epoch: [\d.e-]+\)\.$"):
        train(resolve(shards, tmp_path / "run", SIMCLR, {"train": {"epochs": 2}}), resume=True)


SMALL = (
    *("--recipe.size", "16", "--train.batch", "20", "--train.epochs", "1", "--train.device", "cpu"),
    *("--train.precision", "fp32", "--optim.warmup-epochs", "0"),
)


def test_a_name_is_enough_without_a_configuration(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    argv = ["--method", "simclr", "--data.shards", str(shards), "--train.out", str(out), *SMALL]
    with warnings.catch_warnings():
        # As outside of pytest, which makes errors of them.
        warnings.simplefilter("default")
        assert main(["pretrain", *argv]) == 0
    said = capsys.readouterr()
    assert "simclr resnet10_w32 on 60 images at 16 px" in said.out
    assert said.err.startswith("fastssl: note: 'laptop' is made for moco_v3: simclr has its own defaults")
    found = yaml.safe_load((out / "config.yaml").read_text())
    assert found["method"] == {"name": "simclr", "dim": 128, "hidden_dim": 0, "temperature": 0.1}
    assert (found["optim"]["name"], found["optim"]["lr"]) == ("lars", 0.3)
    assert found["recipe"]["brightness"] == RECIPES["simclr"].brightness
    # What the run wrote is a configuration like any other, and continues it.
    assert main(["pretrain", str(out / "config.yaml"), "--resume"]) == 0
    assert "already complete" in capsys.readouterr().out


def test_a_name_is_enough_in_a_file(shards: Path, tmp_path: Path) -> None:
    tree = tiny(shards, tmp_path / "run") | {"method": "simclr"}
    config = write_yaml(tmp_path / "tiny.yaml", tree)
    assert main(["pretrain", str(config), *SMALL]) == 0
    assert "projector.4.bias" in newest(tmp_path / "run")["method"]


def test_the_ladder_measures_a_step_without_a_teacher(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "ladder.json"
    config = tmp_path / "simclr.yaml"
    config.write_text(packaged()["simclr_resnet50"].read_text())
    flags = [*LADDER_STEP, "--train.compile", "false", "--rows", "full,parts", "--json", str(out)]
    assert main(["bench", str(config), *flags]) == 0
    assert "teacher forward was not measured: simclr has no teacher" in capsys.readouterr().out
    measured = {row["name"]: row["images_per_s"] for row in json.loads(out.read_text())["rows"]}
    assert {name for name, rate in measured.items() if rate} == {
        "student forward + backward",
        "EMA + optimiser",
        "full step, synthetic",
    }
