"""`load_backbone`: the backbone of a run, of an old checkpoint and of another branch, with its contract."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch.testing import assert_close

from fastssl import load_backbone
from fastssl.commands.evaluate_checkpoint import evaluate_knn
from fastssl.core import checkpoint
from fastssl.methods import METHODS, MoCoV3
from fastssl.methods.method_weights import load_own_weights, own_weights
from fastssl.methods.moco_v3 import MoCoV3Config
from fastssl.models.backbones import build_backbone
from fastssl.models.contract import Contract, TrainingData
from fastssl.models.moco_vit import heads_entries
from fastssl.models.model_config import ModelConfig
from fastssl.pretraining.build import build_method
from fastssl.pretraining.run import train
from fastssl.pretraining.run_config import from_tree
from pipelines.augment.recipe import IMAGENET_MEAN, IMAGENET_STD
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError
from tests.fastssl.runs import NUM_IMAGES, TINY_VIT, TOTAL, newest, resolve, rows

GOLDEN = Path(__file__).parents[2] / "golden" / "run"
VIEWS = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def branch(state: dict[str, Any], name: str = "backbone") -> torch.nn.Module:
    """The branch of the method itself, which a run would continue with, in evaluation mode."""
    method, _ = build_method(from_tree(state["config"]), torch.device("cpu"))
    load_own_weights(method, {"method": state["method"]}, {}, "here")
    return method.eval().get_submodule(name)


@torch.no_grad()
def assert_same(one: torch.nn.Module, other: torch.nn.Module, views: torch.Tensor = VIEWS) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    features = one(views)
    torch.testing.assert_close(features, other(views), rtol=1e-4, atol=1e-5)
    assert features.std() > 0


def edited(state: dict[str, Any], path: Path, **entries: Any) -> Path:
    """A checkpoint with other entries; None leaves one out."""
    torch.save({k: v for k, v in {**state, **entries}.items() if v is not None}, path)
    return path


def test_the_contract_of_a_run(finished: Path, shards: Path):
    contract = load_backbone(finished).contract
    assert contract == Contract(
        backbone="resnet10_w32",
        num_features=256,
        channels=3,
        size=16,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        value_low=(),
        value_high=(),
        eval_crop=0.875,
        interpolation="bilinear",
        patch_size=None,
        num_heads=None,
        method="moco_v3",
        evaluated="backbone",
        step=TOTAL,
        data=TrainingData(
            NUM_IMAGES,
            ShardSet.open(shards).manifest.options_sha256,
            source=ShardSet.open(shards).manifest.source,
        ),
        channel_names=("red", "green", "blue"),
        dtypes=("uint8",),
    )
    stored = newest(finished)["contract"]
    assert stored == json.loads(json.dumps(stored)) == contract.to_json()


def test_features_are_those_of_the_methods_own_backbone(finished: Path):
    backbone = load_backbone(finished)
    assert_same(backbone, branch(newest(finished)))
    assert not backbone.training
    assert not any(p.requires_grad for p in backbone.parameters())
    torch.testing.assert_close(backbone(VIEWS)[:1], backbone(VIEWS[:1]))  # no statistics of the batch


def test_loading_draws_no_random_number_of_the_callers(finished: Path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_backbone(finished)
    assert torch.equal(torch.rand(3), expected)


def test_a_source_is_a_run_a_folder_or_a_file(finished: Path):
    steps = checkpoint.list_checkpoints(finished)
    for source in (finished, str(finished), finished / "checkpoints", steps[-1]):
        assert load_backbone(source, device="cpu").contract.step == TOTAL
    older = load_backbone(steps[-2])
    assert older.contract.step < TOTAL
    assert_same(older, branch(checkpoint.load(steps[-2])))


def test_the_best_weights_have_their_contract(finished: Path):
    path = finished / "checkpoints" / "best.pt"
    state, best = checkpoint.load(path), load_backbone(path)
    assert best.contract.step == state["step"]
    assert best.contract.data == load_backbone(finished).contract.data
    assert_same(best, branch(state))


def test_a_vits_patch_heads_and_split(shards: Path, tmp_path: Path):
    model = {"model": {"backbone": "moco_vit_small", "patch_size": 8, "stop_grad_conv1": True}}
    train(
        resolve(
            shards, tmp_path / "run", TINY_VIT, model, {"model": {"stem_stride": 4}}, {"train": {"epochs": 1}}
        )
    )
    vit = load_backbone(tmp_path / "run")
    found = vit.contract
    assert (found.patch_size, found.num_heads, found.num_features, found.size) == (8, 12, 384, 32)
    assert_same(vit, branch(newest(tmp_path / "run")), torch.randn(2, 3, 32, 32))
    assert "heads      12" in found.describe()


def test_weights_with_unusual_heads_do_not_load_into_a_vit_with_others() -> None:
    """timm's ViT-S has 6 heads of the same shapes: MoCo v3's weights loaded into it, strictly, and computed something else."""
    moco = build_backbone(ModelConfig(backbone="moco_vit_small"), 32)
    method = MoCoV3(moco, MoCoV3Config(dim=4, hidden_dim=8))
    saved = own_weights(method)
    weights = {k.removeprefix("backbone."): v for k, v in saved.items() if k.startswith("backbone.")}
    theirs = timm.create_model("vit_small_patch16_224", num_classes=0, img_size=32)
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "num_heads"'):
        theirs.load_state_dict(weights)
    # As docs/python.md shows it.
    heads = int(weights.pop("num_heads"))
    assert heads == 12
    right = timm.create_model("vit_small_patch16_224", num_classes=0, img_size=32, num_heads=heads)
    right.load_state_dict(weights)
    images = torch.randn(2, 3, 32, 32)
    assert_close(right.eval()(images), moco.eval()(images))
    # Older checkpoints do not have the entry, and load as before.
    for state in (saved, method.state_dict()):
        again = MoCoV3(
            build_backbone(ModelConfig(backbone="moco_vit_small"), 32), MoCoV3Config(dim=4, hidden_dim=8)
        )
        load_own_weights(again, {"method": dict(state)}, {}, "here")
        assert torch.equal(again.backbone.blocks[0].attn.qkv.weight, moco.blocks[0].attn.qkv.weight)
    base = build_backbone(ModelConfig(backbone="moco_vit_base"), 32)
    assert heads_entries(base) == {}


def test_an_old_checkpoint_tells_what_it_holds():
    [path] = checkpoint.list_checkpoints(GOLDEN)
    state = checkpoint.load(path)
    assert not {"contract", "external"} & set(state)
    backbone = load_backbone(GOLDEN)
    found = backbone.contract
    assert (found.backbone, found.channels, found.size, found.num_features) == (
        "test_efficientnet",
        3,
        16,
        256,
    )
    assert (found.mean, found.std, found.method, found.step) == (IMAGENET_MEAN, IMAGENET_STD, "moco_v3", 4)
    assert (found.evaluated, found.channel_names, found.dtypes) == ("backbone", None, None)
    assert found.data == TrainingData(14, state["shards"]["options_sha256"])
    assert_same(backbone, branch(state))


def test_a_former_name_of_a_setting_is_known_and_one_of_the_future_is_told(finished: Path, tmp_path: Path):
    state = newest(finished)

    def with_setting(name: str) -> Path:
        model = {**state["config"]["model"], name: False}
        return edited(state, tmp_path / f"{name}.pt", config={**state["config"], "model": model})

    assert_same(load_backbone(with_setting("grad_checkpointing")), load_backbone(finished))
    with pytest.raises(
        UserError, match=r"was made with model.registers, which this fastssl does not know: up"
    ):
        load_backbone(with_setting("registers"))


# ---------------------------------------------------------------- the evaluated branch


class TeacherEvaluated(MoCoV3):
    """MoCo v3 whose result is the teacher's backbone."""

    evaluated = "teacher_backbone"


def test_the_branch_that_the_method_names_is_evaluated_and_loaded(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(METHODS, "teacher_evaluated", TeacherEvaluated)
    run = tmp_path / "run"
    train(resolve(shards, run, {"method": {"name": "teacher_evaluated"}, "train": {"epochs": 2}}))
    state = newest(run)
    assert state["contract"]["evaluated"] == "teacher_backbone"
    backbone = load_backbone(run)
    assert_same(backbone, branch(state, "teacher_backbone"))
    student = state["method"]["backbone.conv1.weight"]
    assert not torch.equal(backbone.get_parameter("conv1.weight"), student)
    [*_, last] = (row for row in rows(run) if "knn_accuracy" in row)
    report = evaluate_knn(run, shards, ks=(5,), baselines=False, device="cpu")
    assert report["rows"][0]["accuracy"][5] == pytest.approx(last["knn_accuracy"], abs=1e-6)
    # The method is not needed to use what it has learned.
    monkeypatch.delitem(METHODS, "teacher_evaluated")
    assert_same(load_backbone(run), backbone)


def test_online_evaluation_sees_the_evaluated_branch(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A teacher that never moves stays at what the untrained network reaches."""

    class Still(TeacherEvaluated):
        def __init__(self, backbone, cfg):
            super().__init__(backbone, cfg)
            self.train()

        def update_teacher(self, momentum):
            pass

        def train(self, mode=True):
            super().train(mode)
            self.teacher_backbone.eval()  # its statistics stay, too
            return self

    monkeypatch.setitem(METHODS, "still", Still)
    train(resolve(shards, tmp_path / "run", {"method": {"name": "still"}, "train": {"epochs": 2}}))
    found = [row["knn_accuracy"] for row in rows(tmp_path / "run") if "knn_accuracy" in row]
    assert len(found) == 3
    # Online evaluation leaves the branch in the mode that it found.
    assert found == [found[0]] * 3


# ---------------------------------------------------------------- what is refused


def test_what_is_no_checkpoint_is_told(finished: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "empty", tmp_path / "nowhere", tmp_path / "nowhere.pt"):
        with pytest.raises(
            UserError, match=r"There is no checkpoint at .*: give a \.pt file, or the folder of a"
        ):
            load_backbone(source)
    (tmp_path / "text.pt").write_text("no weights")
    with pytest.raises(UserError, match=r"text.pt' is no checkpoint: give a .pt file that fastssl saved"):
        load_backbone(tmp_path / "text.pt")
    torch.save({"w": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other.pt' is no checkpoint of fastssl"):
        load_backbone(tmp_path / "other.pt")
    path = edited(newest(finished), tmp_path / "cut.pt", architecture=None)
    with pytest.raises(UserError, match=r"cut.pt' holds no backbone: it lacks the entry 'architecture'"):
        load_backbone(path)


def test_weights_of_another_architecture_or_branch_are_told(finished: Path, tmp_path: Path):
    state = newest(finished)
    other = {**state["architecture"], "num_heads": 6}
    with pytest.raises(UserError, match="another architecture: num_heads is 6 there and None here"):
        load_backbone(edited(state, tmp_path / "heads.pt", architecture=other))
    contract = {**state["contract"], "evaluated": "teacher"}
    with pytest.raises(UserError, match=r"branch.pt' do not fit this model: conv1.weight is missing"):
        load_backbone(edited(state, tmp_path / "branch.pt", contract=contract))


def test_a_device_that_is_not_there_is_told(finished: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="cuda, but PyTorch finds no CUDA device"):
        load_backbone(finished, device="cuda")
    assert next(load_backbone(finished, device="auto").parameters()).device.type == "cpu"
