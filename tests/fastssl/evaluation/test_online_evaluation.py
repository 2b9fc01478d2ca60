"""What a run evaluates while it trains, and that this changes none of its bits."""

import shutil
from pathlib import Path

import pytest
import torch

from fastssl.evaluation.knn import KNNConfig
from fastssl.evaluation.online_evaluation import OnlineEvaluation
from fastssl.methods import MoCoV3
from fastssl.models.backbones import build_backbone
from fastssl.pretraining.run import train
from pipelines.augment.recipe import RECIPES
from shards.conversion.convert import convert
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError
from tests.fastssl.runs import NUM_IMAGES, STEPS, TINY_VIT, TOTAL, differences, newest, resolve, rows


def test_online_knn_rows_stand_before_the_first_step_and_at_the_ends_of_epochs(finished: Path) -> None:
    tests = [row for row in rows(finished) if "knn_accuracy" in row]
    assert [(row["step"], row["epoch"]) for row in tests] == [(0, 0), (STEPS, 1), (2 * STEPS, 2), (TOTAL, 3)]
    assert rows(finished)[0]["step"] == 0
    # Three classes of 20 pictures each.
    assert [row.get("knn_chance") for row in tests] == [pytest.approx(1 / 3, abs=1e-6), None, None, None]
    # A share of 60 queries.
    assert all(0 <= row["knn_accuracy"] <= 1 for row in tests)
    assert all(
        row["knn_accuracy"] * NUM_IMAGES == pytest.approx(round(row["knn_accuracy"] * NUM_IMAGES), abs=1e-3)
        for row in tests
    )
    assert all(0 <= row["linear_accuracy"] <= 1 for row in tests)


def test_online_knn_comes_every_few_epochs_and_at_the_end(shards: Path, tmp_path: Path) -> None:
    train(resolve(shards, tmp_path / "run", {"knn": {"every": 2}}))
    assert [row["epoch"] for row in rows(tmp_path / "run") if "knn_accuracy" in row] == [0, 2, 3]


def test_the_untrained_network_is_evaluated_and_the_run_keeps_its_bits(shards: Path, tmp_path: Path) -> None:
    """Random depths would show it if the evaluation took a random number, BatchNorm if it left the training mode."""
    for model in ({}, TINY_VIT):
        ends = []
        for every in (0, 1):
            run = tmp_path / f"{len(model)} {every}"
            resolved = resolve(shards, run, model, {"train": {"epochs": 1}, "knn": {"every": every, "k": 5}})
            train(resolved)
            ends.append(newest(run))
        for part in ("method", "optimizer", "rng", "meters"):
            assert differences(ends[0][part], ends[1][part], part) == []
        torch.manual_seed(0)
        untrained = MoCoV3(
            build_backbone(resolved.config.model, resolved.config.recipe.size), resolved.config.method
        )
        online = OnlineEvaluation(
            resolved.config.knn,
            resolved.config.recipe,
            ShardSet.open(shards),
            torch.device("cpu"),
            bf16=False,
        )
        expected = online.evaluate(untrained.backbone)["knn_accuracy"]
        assert rows(run)[0]["knn_accuracy"] == pytest.approx(expected, abs=1e-6)


def test_chance_is_the_share_of_the_voters_largest_class(photos: Path, tmp_path: Path) -> None:
    """Also where another class is the largest among those that are classified."""
    for name, counts in (("voters", (3, 1)), ("asked", (1, 4))):
        for shade, count in zip(("red", "green"), counts, strict=True):
            (tmp_path / name / shade).mkdir(parents=True)
            for path in sorted((photos / shade).iterdir())[:count]:
                shutil.copy(path, tmp_path / name / shade)
        convert(tmp_path / name, tmp_path / f"{name}-shards", workers=0)
    voters, asked = (ShardSet.open(tmp_path / f"{name}-shards") for name in ("voters", "asked"))
    recipe, cpu = RECIPES["eval"], torch.device("cpu")
    assert OnlineEvaluation(KNNConfig(every=1), recipe, voters, cpu, bf16=False).chance == 3 / 4
    cfg = KNNConfig(every=1, test_shards=str(asked.folder))
    assert OnlineEvaluation(cfg, recipe, voters, cpu, bf16=False).chance == 1 / 5


def test_online_knn_on_shards_of_their_own(shards: Path, unlabelled_shards: Path, tmp_path: Path) -> None:
    on_itself = {
        "knn": {"every": 1, "shards": str(shards), "test_shards": str(shards), "k": 1},
        "train": {"epochs": 1},
    }
    train(resolve(unlabelled_shards, tmp_path / "run", on_itself))
    # Each query's nearest neighbour is itself.
    assert [row["knn_accuracy"] for row in rows(tmp_path / "run") if "knn_accuracy" in row] == [1.0, 1.0]
    for section in ({}, {"test_shards": str(unlabelled_shards), "shards": str(shards)}):
        with pytest.raises(UserError, match=r"0 labelled samples, but kNN needs at least 2.*--knn.every 0"):
            train(resolve(unlabelled_shards, tmp_path / "none", {"knn": {"every": 1, **section}}))


@pytest.fixture(scope="module")
def uneven(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 pictures: 54 of one class, 6 of another."""
    folder = tmp_path_factory.mktemp("uneven")
    for i, path in enumerate(sorted(photos.glob("*/*"), key=lambda path: path.name)):
        (folder / "pictures" / "ab"[i % 10 == 0]).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / "pictures" / "ab"[i % 10 == 0])
    convert(folder / "pictures", folder / "shards", workers=0)
    return folder / "shards"


@pytest.mark.filterwarnings("ignore:optim.lr was", "ignore:train.epochs was")
def test_a_run_that_diverges_within_an_epoch_is_not_measured_and_keeps_its_best_weights(
    uneven: Path, tmp_path: Path
) -> None:
    """The vote of NaN is for class 0, the larger one here: 90 % at once."""
    run = tmp_path / "run"
    knn = {"every": 1, "k": 1, "linear": False}
    settings = {"batch": 20, "log_every": 10, "save_every_steps": 0}
    train(resolve(uneven, run, {"knn": knn, "train": {**settings, "epochs": 1}}))
    best, before = (run / "checkpoints/best.pt").read_bytes(), rows(run)
    diverging = {"optim": {"lr": 1e20}, "knn": knn, "train": {**settings, "epochs": 3}}
    with pytest.raises(UserError, match=r"loss was \w+ at step [56].*--optim\.lr"):
        train(resolve(uneven, run, diverging), resume=True)
    assert (run / "checkpoints/best.pt").read_bytes() == best
    assert all(set(row) == {"step", "epoch"} for row in rows(run) if row["step"] > 3)
    assert [row for row in rows(run) if "knn_accuracy" in row] == [
        row for row in before if "knn_accuracy" in row
    ]


def test_features_that_are_not_finite_give_no_accuracy_and_the_run_goes_on(uneven: Path) -> None:
    """Finite weights can give them too, such as large ones where bad steps are skipped."""
    shards, cpu = ShardSet.open(uneven), torch.device("cpu")
    recipe = RECIPES["eval"]
    online = OnlineEvaluation(KNNConfig(every=1, k=1), recipe, shards, cpu, bf16=False)
    for value in (float("nan"), float("inf"), 1e30):

        class Diverged(torch.nn.Module):
            def forward(self, images: torch.Tensor, value: float = value) -> torch.Tensor:
                return images.new_full((len(images), 4), value)

        with pytest.warns(UserWarning, match="60 evaluated images are not finite: no accuracy"):
            assert online.evaluate(Diverged()) == {}
