"""External parts of a method: frozen, in no checkpoint, and the same ones where a run continues."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastssl import load_backbone
from fastssl.core import checkpoint
from fastssl.methods import METHODS, MoCoV3, StepOutput
from fastssl.methods.method_weights import (
    digest,
    external_digests,
    freeze_external,
    load_own_weights,
    own_weights,
)
from fastssl.pretraining.run import train
from shards.errors import UserError
from tests.fastssl.runs import TOTAL, assert_same_end, newest, resolve
from tests.fastssl.tiny import SMALL, Plain, make_method

GUIDED = {"method": {"name": "guided"}, "train": {"keep_last": 9, "epochs": 2}, "knn": {"every": 0}}


class Guided(MoCoV3):
    """MoCo v3 that also draws the features towards those of a frozen network, whose weights depend on `seed` alone."""

    external = ("guide",)
    seed = 0

    def __init__(self, backbone: nn.Module, cfg) -> None:
        super().__init__(backbone, cfg)
        width = int(backbone.num_features)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.guide = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width))

    def loss(self, features: list[Tensor], targets, first: int = 0) -> StepOutput:
        output = super().loss(features, targets, first)
        with torch.no_grad():
            wanted = self.guide(features[0])
        return output._replace(loss=output.loss + 0.1 * nn.functional.mse_loss(features[0], wanted))


@pytest.fixture(autouse=True)
def guided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "guided", Guided)


def make(seed: int = 0) -> Guided:
    """A small method whose guide depends on `seed`; all other weights are always the same."""
    backbone = make_method(Plain()).backbone
    torch.manual_seed(1)
    made = type("Seeded", (Guided,), {"seed": seed})(backbone, SMALL)
    freeze_external(made)
    return made


def test_external_parts_are_frozen_whatever_the_mode():
    method = make()
    assert not any(p.requires_grad for p in method.guide.parameters())
    assert all(p.requires_grad for p in method.backbone.parameters())
    assert method.training
    assert not any(module.training for module in method.guide.modules())
    for mode in (True, False, True):
        assert method.train(mode) is method
        assert (method.training, method.projector.training) == (mode, mode)
        assert not any(module.training for module in method.guide.modules())


def test_a_checkpoint_holds_all_but_the_external_parts():
    method = make()
    weights, whole = own_weights(method), method.state_dict()
    assert set(whole) - set(weights) == {f"guide.{name}" for name in method.guide.state_dict()} != set()
    assert list(own_weights(make_method(Plain()))) == list(make_method(Plain()).state_dict())
    assert external_digests(make_method(Plain())) == {}


def test_a_part_that_is_evaluated_cannot_be_external():
    method = make()
    for external in ("backbone", "guide"):
        method.__class__.evaluated = "guide.0" if external == "guide" else "backbone"
        method.__class__.external = (external,)
        with pytest.raises(AssertionError, match="is evaluated: checkpoints must hold it"):
            freeze_external(method)


def test_a_digest_is_of_names_types_shapes_and_bytes_alone():
    def part(dtype: torch.dtype = torch.float32, **changes: Tensor) -> nn.Module:
        module = nn.Module()
        given = {
            "a": torch.arange(24.0).reshape(1, 2, 3, 4),
            "n": torch.tensor(3),
            "flag": torch.tensor(True),
        }
        for name, value in {**given, **changes}.items():
            module.register_buffer(name, value.to(dtype) if value.is_floating_point() else value)
        return module

    same = digest(part())
    assert re.fullmatch("[0-9a-f]{64}", same)
    values = torch.arange(24.0)
    last = values.reshape(1, 2, 3, 4).contiguous(memory_format=torch.channels_last)
    assert digest(part(a=last)) == same
    others = [
        part(torch.bfloat16),
        part(a=values.reshape(1, 2, 4, 3)),
        part(a=values.reshape(1, 2, 3, 4).nextafter(torch.tensor(99.0))),
        part(n=torch.tensor(4)),
        part(n=torch.tensor(3, dtype=torch.int32)),
        part(more=torch.zeros(0)),
    ]
    assert len({same, *map(digest, others)}) == len(others) + 1
    # The order in which a module registers its parts does not count.
    one, other = nn.Module(), nn.Module()
    for module, names in ((one, "ab"), (other, "ba")):
        for name in names:
            module.register_buffer(name, torch.full((2,), float(ord(name))))
    assert digest(one) == digest(other)


def test_weights_are_loaded_beside_the_same_external_parts():
    method, other = make(), make()
    state = {"method": own_weights(method), "external": external_digests(method)}
    with torch.no_grad():
        other.backbone.body[1].weight.zero_()
    load_own_weights(other, state, external_digests(other), "a.pt")
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in method.state_dict().items())


def test_other_external_parts_are_refused_with_both_digests():
    there, here = make(seed=0), make(seed=1)
    state = {"method": own_weights(there), "external": external_digests(there)}
    digests = external_digests(here)
    message = (
        f"'a.pt' was made with other weights of 'guide' than this run has: sha256 {state['external']['guide'][:12]} there and "
        f"{digests['guide'][:12]} here. Give the file that the run began with, or start a new run with another --train.out."
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        load_own_weights(here, state, digests, "a.pt")


def test_a_checkpoint_with_more_or_fewer_external_parts_is_refused():
    guided, plain = make(), make_method(Plain())
    old = {"method": guided.state_dict()}
    with pytest.raises(UserError, match=r"'a.pt' holds no digest of 'guide'"):
        load_own_weights(guided, old, external_digests(guided), "a.pt")
    state = {"method": own_weights(guided), "external": external_digests(guided)}
    with pytest.raises(
        UserError, match=r"made with 'guide' \(sha256 [0-9a-f]{12}\), which this run's method does"
    ):
        load_own_weights(plain, state, {}, "a.pt")


def test_all_other_weights_must_match():
    method = make()
    weights = dict(own_weights(method))
    del weights["projector.0.weight"]
    state = {"method": weights, "external": external_digests(method)}
    with pytest.raises(UserError, match=r"projector.0.weight is missing"):
        load_own_weights(method, state, external_digests(method), "a.pt")


# ---------------------------------------------------------------- a run


def test_a_run_with_an_external_part_resumes_and_its_backbone_loads(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    train(resolve(shards, tmp_path / "whole", GUIDED))
    state = newest(tmp_path / "whole")
    assert state["step"] == TOTAL * 2 // 3
    assert not [name for name in state["method"] if name.startswith("guide.")]
    expected = make_guide(256)
    # Frozen, statistics of its BatchNorm included.
    assert state["external"] == {"guide": digest(expected)}
    assert load_backbone(tmp_path / "whole").contract.method == "guided"

    train(resolve(shards, tmp_path / "cut", GUIDED))
    for path in checkpoint.list_checkpoints(tmp_path / "cut")[1:]:
        path.unlink()
    train(resolve(shards, tmp_path / "cut", GUIDED), resume=True)
    assert_same_end(tmp_path / "cut", tmp_path / "whole")

    monkeypatch.setattr(Guided, "seed", 1)
    for path in checkpoint.list_checkpoints(tmp_path / "cut")[1:]:
        path.unlink()
    [left] = checkpoint.list_checkpoints(tmp_path / "cut")
    here = digest(make_guide(256, seed=1))
    with pytest.raises(
        UserError,
        match=rf"{left.name}' was made with other weights of 'guide' .* {state['external']['guide'][:12]} there and {here[:12]} here",
    ):
        train(resolve(shards, tmp_path / "cut", GUIDED), resume=True)


def make_guide(width: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width))
