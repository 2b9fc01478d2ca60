"""`fastssl eval knn`: what stands in the report, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl.cli import main
from fastssl.commands.evaluate_checkpoint import evaluate_knn
from fastssl.core import checkpoint
from fastssl.evaluation.features import backbone_encoder, extract, labelled_ids, pixel_encoder
from fastssl.evaluation.knn import classify
from fastssl.models.backbones import build_backbone
from pipelines.augment.recipe import Recipe
from shards.conversion.convert import convert
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError
from tests.fastssl.runs import NUM_IMAGES, TOTAL, newest, resolve, rows

KS = (1, 5, 20)


@pytest.fixture(scope="module")
def report(finished: Path, shards: Path) -> dict:
    return evaluate_knn(finished, shards, ks=KS, device="cpu")


def test_a_report_holds_the_checkpoint_beside_its_baselines(report: dict, finished: Path) -> None:
    assert report["checkpoint"] == str(checkpoint.checkpoint_path(finished, TOTAL))
    assert report["step"] == TOTAL
    assert report["queries"] == f"leave one out of {NUM_IMAGES} samples"
    assert report["classes"] == ["blue", "green", "red"]
    names = [row["features"] for row in report["rows"]]
    assert names == [f"resnet10_w32, pretrained {TOTAL} steps", "resnet10_w32, untrained", "raw pixels"]
    for row in report["rows"]:
        assert tuple(row["accuracy"]) == KS
        assert row["per_class_k"] == 20
        assert sum(row["per_class"].values()) / 3 == pytest.approx(row["accuracy"][20])  # 20 of each class


def test_the_report_agrees_with_the_test_during_training(report: dict, finished: Path) -> None:
    [*_, last] = (row for row in rows(finished) if "knn_accuracy" in row)
    assert report["rows"][0]["accuracy"][5] == pytest.approx(last["knn_accuracy"], abs=1e-6)


def test_the_untrained_baseline_is_what_the_run_started_from(
    report: dict, finished: Path, shards: Path
) -> None:
    cfg = resolve(shards, finished.parent / "again").config
    data, ids = ShardSet.open(shards), np.arange(NUM_IMAGES)
    accuracy = {}
    for seed in (cfg.train.seed, cfg.train.seed + 1):
        torch.manual_seed(seed)
        fresh = build_backbone(cfg.model, cfg.recipe.size)
        features = extract(data, cfg.recipe, ids, backbone_encoder(fresh, "cpu", bf16=False))
        labels = torch.from_numpy(data.labels)
        accuracy[seed] = classify(features, labels, num_classes=3, ks=KS).accuracy
    assert report["rows"][1]["accuracy"] == accuracy[0]
    assert report["rows"][1]["accuracy"] != accuracy[1]


def test_baselines_may_be_left_out_and_samples_limited(finished: Path, shards: Path) -> None:
    found = evaluate_knn(finished, shards, ks=(100,), max_samples=21, baselines=False, device="cpu")
    assert found["queries"] == "leave one out of 21 samples"
    assert [tuple(row["accuracy"]) for row in found["rows"]] == [(20,)]


def test_queries_of_their_own(finished: Path, shards: Path) -> None:
    told = []
    found = evaluate_knn(
        finished,
        shards,
        shards,
        ks=(1,),
        baselines=False,
        device="cpu",
        progress=lambda what, done, total: told.append((what, done, total)),
    )
    assert found["queries"] == f"{NUM_IMAGES} test samples, {NUM_IMAGES} vote"
    assert found["rows"][0]["accuracy"] == {1: 1.0}
    assert told == [(f"resnet10_w32, pretrained {TOTAL} steps", NUM_IMAGES, NUM_IMAGES)] * 2


def test_the_command_prints_tables_and_writes_json(
    report: dict, finished: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "knn.json"
    flags = ["--shards", str(shards), "--ks", "1", "5", "20", "--json", str(path), "--device", "cpu"]
    assert main(["eval", "knn", str(finished), *flags]) == 0
    printed = capsys.readouterr().out
    for text in ("leave one out of 60 samples", "k = 20", "untrained", "raw pixels", "By class", "green"):
        assert text in printed
    expected = json.loads(json.dumps(report))
    assert json.loads(path.read_text()) == expected


def test_several_folders_vote_together(
    report: dict, finished: Path, shards: Path, tmp_path: Path, told, capsys: pytest.CaptureFixture[str]
) -> None:
    other, path = tmp_path / "other", tmp_path / "knn.json"
    shutil.copytree(shards, other)
    flags = ["--ks", "1", "--json", str(path), "--baselines", "False", "--device", "cpu"]
    assert main(["eval", "knn", str(finished), "--shards", str(shards), str(other), *flags]) == 0
    found = json.loads(path.read_text())
    assert found["queries"] == f"leave one out of {2 * NUM_IMAGES} samples"
    assert found["classes"] == report["classes"]
    # The nearest neighbour of each is its copy.
    assert found["rows"][0]["accuracy"] == {"1": 1.0}
    assert told("eval", "knn", finished, "--shards").startswith("--shards names no folder")


def _edited(finished: Path, path: Path, section: str, **values) -> Path:
    state = newest(finished)
    state[section] = {**state[section], **values}
    torch.save(state, path)
    return path


def test_a_checkpoint_of_another_architecture_is_refused(
    finished: Path, shards: Path, tmp_path: Path
) -> None:
    path = _edited(finished, tmp_path / "other.pt", "architecture", name="resnet50", num_features=2048)
    with pytest.raises(
        UserError,
        match=r"weights in .*other.pt belong to another architecture: name is resnet50 there and resnet10_w32 here; "
        "num_features is 2048 there and 256 here",
    ):
        evaluate_knn(path, shards)


def test_weights_of_another_shape_are_refused(finished: Path, shards: Path, tmp_path: Path) -> None:
    wrong = {"backbone.conv1.weight": torch.zeros(1)}
    path = _edited(finished, tmp_path / "cut.pt", "method", **wrong)
    with pytest.raises(UserError, match=r"conv1.weight is \(1,\) there and \(64, 3, 3, 3\) here"):
        evaluate_knn(path, shards)


def test_shards_that_cannot_be_tested_on(
    finished: Path, photos: Path, shards: Path, unlabelled_shards: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"unlabelled' has 0 labelled samples, .* sub-folders are classes"):
        evaluate_knn(finished, unlabelled_shards)
    for shade in ("red", "gold"):
        (tmp_path / "two" / shade).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (20, 20), shade).save(tmp_path / "two" / shade / f"{i}.png")
    convert(tmp_path / "two", tmp_path / "two-shards", workers=0)
    with pytest.raises(UserError, match=r"has 1 class that .* does not have \('gold'\): classes are matched"):
        evaluate_knn(finished, shards, tmp_path / "two-shards")


def test_a_test_set_may_lack_a_class(finished: Path, photos: Path, shards: Path, tmp_path: Path) -> None:
    """As a small one does whose images were chosen at random: classes are matched by name."""
    for shade in ("red", "green"):
        shutil.copytree(photos / shade, tmp_path / "two" / shade)
    convert(tmp_path / "two", tmp_path / "two-shards", workers=0)
    report = evaluate_knn(finished, shards, tmp_path / "two-shards", ks=(1,), baselines=False, device="cpu")
    assert report["classes"] == ["blue", "green", "red"]
    # Each query votes for itself.
    assert report["rows"][0]["per_class"] == {"blue": None, "green": 1.0, "red": 1.0}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "Give the test and what to test: fastssl eval knn CHECKPOINT --shards LABELLED"),
        (["kn"], "There is no test 'kn'. Did you mean 'knn'?"),
        (["knn", "nowhere", "--shards", "x"], "There is no checkpoint at 'nowhere'"),
    ],
)
def test_what_the_command_refuses(argv: list, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", *argv]) == 2
    assert message in capsys.readouterr().err


def test_a_gpu_that_is_not_there_is_told(
    finished: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["eval", "knn", str(finished), "--shards", str(shards), "--device", "cuda"]) == 2
    assert "cuda, but PyTorch finds no CUDA device" in capsys.readouterr().err


def test_impossible_limits_are_refused(finished: Path, shards: Path) -> None:
    with pytest.raises(UserError, match="max_samples is -1"):
        evaluate_knn(finished, shards, max_samples=-1)
    with pytest.raises(UserError, match="neighbours of at least 1"):
        evaluate_knn(finished, shards, ks=(0,))


# ---------------------------------------------------------------- features


def test_labelled_ids_are_ascending_fixed_and_limited(shards: Path, unlabelled_shards: Path) -> None:
    data = ShardSet.open(shards)
    assert labelled_ids(data).tolist() == list(range(NUM_IMAGES))
    some = labelled_ids(data, 10)
    assert len(set(some.tolist())) == 10
    assert some.tolist() == sorted(some.tolist()) == labelled_ids(data, 10).tolist()
    assert labelled_ids(ShardSet.open(unlabelled_shards)).tolist() == []
    data.labels = np.where(np.arange(NUM_IMAGES) % 3 == 0, data.labels, -1)
    assert labelled_ids(data).tolist() == list(range(0, NUM_IMAGES, 3))


def test_a_batch_size_changes_no_feature(shards: Path) -> None:
    data, recipe, ids = ShardSet.open(shards), Recipe(size=16), np.array([50, 3, 3, 17, 0])
    encode = pixel_encoder(recipe)
    whole = extract(data, recipe, ids, encode)
    assert whole.shape == (5, 3 * 16 * 16)
    assert whole.dtype == torch.float32
    assert torch.equal(extract(data, recipe, ids, encode, batch=2, threads=2), whole)
    assert torch.equal(whole[1], whole[2])


def test_raw_pixels_are_means_over_areas_in_0_to_1() -> None:
    recipe = Recipe(size=64)
    pixels = torch.rand(2, 3, 64, 64)
    mean, std = (torch.tensor(x)[:, None, None] for x in (recipe.mean, recipe.std))
    found = pixel_encoder(recipe)((pixels - mean) / std)
    expected = pixels.reshape(2, 3, 32, 2, 32, 2).mean(dim=(3, 5)).flatten(1)
    torch.testing.assert_close(found, expected)


def test_encoding_leaves_the_backbone_in_training(finished: Path, shards: Path) -> None:
    cfg = resolve(shards, finished.parent / "again").config
    backbone = build_backbone(cfg.model, 16)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    encode = backbone_encoder(backbone, "cpu", bf16=False)
    views = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(encode(views)[:1], encode(views[:1]))  # no statistics of the batch
    assert backbone.training
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
