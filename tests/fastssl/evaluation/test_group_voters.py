"""Images of one scene do not vote for each other: they know the scene, and a poor backbone would look accurate."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl.commands.evaluate_checkpoint import evaluate_knn
from fastssl.evaluation.knn import KNNConfig
from fastssl.evaluation.online_evaluation import OnlineEvaluation
from pipelines.augment.recipe import RECIPES
from shards.conversion.convert import convert
from shards.dataset.mixed_set import MixedShardSet
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError
from shards.splits.sample_groups import sample_groups
from shards.splits.split_rules import SplitRule
from shards.splits.split_table import open_split, split
from shards.storage.opening import open_place

SCENES, TILES = 12, 4


def _scene_shards(root: Path, *, column: bool, labels: str = "ab") -> Path:
    """12 scenes of 4 tiles, each scene a shade of its own, of which every other is of class b: a tile's scene tells its class."""
    lines = ["path,label,group" if column else "path,label"]
    for scene in range(SCENES):
        for tile in range(TILES):
            name = f"scene{scene:02}_t{tile}.png"
            root.mkdir(exist_ok=True)
            shade = (20 * scene + tile, 255 - 20 * scene, 30)
            Image.new("RGB", (20, 20), shade).save(root / name)
            lines.append(f"{name},{labels[scene % len(labels)]}" + (f",s{scene}" if column else ""))
    (root / "list.csv").write_text("\n".join(lines) + "\n")
    convert(root / "list.csv", root / "shards", workers=0)
    return root / "shards"


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _scene_shards(tmp_path_factory.mktemp("scenes") / "pictures", column=True)


@pytest.fixture
def named(tmp_path: Path) -> Path:
    """The same with the scenes in the names alone."""
    return _scene_shards(tmp_path / "pictures", column=False)


def _pixels(finished: Path, *shards) -> tuple[str, float]:
    report = evaluate_knn(finished, *shards, ks=(1,), device="cpu")
    assert report["rows"][2]["features"] == "raw pixels"
    return report["queries"], report["rows"][2]["accuracy"][1]


def test_tiles_of_a_scene_do_not_vote_for_each_other(finished: Path, grouped: Path, named: Path) -> None:
    """The nearest tile of another scene has the other class, the nearest one of all is of the same scene."""
    assert _pixels(finished, named) == ("leave one out of 48 samples", 1.0)
    assert _pixels(finished, grouped) == ("leave one of 12 groups out, 48 samples", 0.0)


def test_the_rule_of_a_split_says_what_a_group_is(finished: Path, named: Path) -> None:
    split(open_place(named), SplitRule(val=0.25, group_by=r"^(scene\d+)_"))
    assert _pixels(finished, named) == ("leave one of 12 groups out, 48 samples", 0.0)
    parts = [open_split(named, part) for part in ("train", "val")]
    assert _pixels(finished, *parts)[0] == "12 test samples, 36 vote"


def test_a_split_that_tears_scenes_is_told(finished: Path, grouped: Path, tmp_path: Path) -> None:
    split(open_place(grouped), SplitRule(val=0.25, group_by="none"), "torn", overwrite=True)
    parts = [open_split(grouped, f"torn/{part}") for part in ("train", "val")]
    groups = sample_groups(parts[0])
    assert groups is not None
    shared = groups.num_shared(parts[1].ids, groups, parts[0].ids)
    assert shared
    with pytest.warns(UserWarning, match=f"{shared} of 12 test samples are of groups, such as scenes, that"):
        queries, _ = _pixels(finished, *parts)
    assert queries == f"12 test samples, 36 vote; {shared} are of groups that vote"


def test_online_knn_and_the_linear_classifier_leave_groups_out(grouped: Path, named: Path) -> None:
    recipe, cpu = RECIPES["eval"], torch.device("cpu")

    class Scenes(torch.nn.Module):
        """One feature for each scene."""

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            red = images[:, 0].mean(dim=(1, 2)) * recipe.std[0] + recipe.mean[0]
            return torch.eye(SCENES)[((red * 255 + 5) / 20).long()]

    for folder, knn, what in (
        (named, 1.0, "leave one out of 48 samples"),
        (grouped, None, "leave one of 12 groups out, 48 samples"),
    ):
        online = OnlineEvaluation(KNNConfig(every=1, k=3), recipe, ShardSet.open(folder), cpu, bf16=False)
        found = online.evaluate(Scenes())
        assert what in online.describe(found)
        # A scene's own feature tells nothing of the other scenes.
        for name in ("knn_accuracy", "linear_accuracy"):
            assert found[name] == 1.0 if knn else found[name] <= 0.5


def test_one_scene_alone_is_refused_before_the_run(grouped: Path) -> None:
    one = ShardSet.open(grouped)
    groups = sample_groups(one)
    assert groups is not None
    one = one.subset(np.flatnonzero(groups.names == groups.names[0]), "first")
    with pytest.raises(UserError, match=re.escape("All 4 labelled samples are of one group")):
        OnlineEvaluation(KNNConfig(every=1), RECIPES["eval"], one, torch.device("cpu"), bf16=False)


def test_groups_of_one_name_are_one_group_in_several_folders(
    grouped: Path, named: Path, tmp_path: Path
) -> None:
    other = _scene_shards(tmp_path / "again", column=True)
    mix = MixedShardSet([ShardSet.open(folder) for folder in (grouped, named, other)])
    groups = sample_groups(mix)
    assert groups is not None
    numbers = groups.numbers(mix.ids)
    assert len(set(numbers[:48])) == SCENES
    assert len(set(numbers[48:96])) == 48
    assert not set(numbers[48:96]) & set(numbers[:48])
    np.testing.assert_array_equal(numbers[96:], numbers[:48])
    assert sample_groups(ShardSet.open(named)) is None
