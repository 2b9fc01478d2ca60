"""MoCo v3 fact by fact: heads, loss, views, mistakes."""

import contextlib
import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastssl.methods import METHODS, MoCoV3, StepOutput, ViewPlan, get_method
from fastssl.methods.collapse import feature_std
from fastssl.methods.losses import info_nce
from fastssl.methods.moco_v3 import Keys, build_heads
from fastssl.methods.moco_v3 import MoCoV3Config as Config
from fastssl.models.backbones import build_backbone
from fastssl.models.batch_norm import depends_on_batch
from fastssl.models.model_config import ModelConfig
from shards.errors import UserError
from tests.fastssl.tiny import SMALL, Normed, Plain, make_method, make_views

# Heads


def _describe(head: nn.Sequential) -> list[tuple]:
    rows = []
    for layer in head:
        if isinstance(layer, nn.Linear):
            rows.append(("linear", layer.in_features, layer.out_features, layer.bias is not None))
        elif isinstance(layer, nn.BatchNorm1d):
            rows.append(("norm", layer.num_features, layer.affine))
        else:
            rows.append((type(layer).__name__.lower(),))
    return rows


def _hidden(num_in: int) -> list[tuple]:
    return [("linear", num_in, 4096, False), ("norm", 4096, True), ("relu",)]


def test_vit_heads() -> None:
    projector, predictor = build_heads(Plain(), Config(head="vit"))
    last = [("linear", 4096, 256, False), ("norm", 256, False)]
    assert _describe(projector) == _hidden(6) + _hidden(4096) + last
    assert _describe(predictor) == _hidden(256) + last


def test_resnet_heads() -> None:
    projector, predictor = build_heads(Plain(), Config(head="resnet"))
    assert _describe(projector) == [*_hidden(6), ("linear", 4096, 256, False), ("norm", 256, False)]
    assert _describe(predictor) == [*_hidden(256), ("linear", 4096, 256, False)]  # and no last norm


def test_linear_layers_start_as_pytorch_starts_them() -> None:
    torch.manual_seed(0)
    first = build_heads(Plain(), Config(head="vit"))[0][3]
    assert isinstance(first, nn.Linear)
    bound = 1 / math.sqrt(4096)  # Kaiming-uniform with a = sqrt(5)
    assert 0.99 * bound < first.weight.abs().max() <= bound
    assert first.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("resnet10_w32", "resnet"),
        ("resnet18", "resnet"),
        ("moco_vit_small", "vit"),
        ("moco_vit_conv_small", "vit"),  # a ViT, in spite of the BatchNorm in its stem
        ("vit_tiny_patch16_224", "vit"),
        ("convnext_atto", "vit"),
    ],
)
def test_auto_chooses_the_head_for_the_backbone(name: str, kind: str) -> None:
    backbone = build_backbone(ModelConfig(backbone=name), 32)
    auto, chosen = (build_heads(backbone, Config(dim=4, hidden_dim=4, head=h)) for h in ("auto", kind))
    assert [_describe(head) for head in auto] == [_describe(head) for head in chosen]


def test_parts_have_readable_names_and_published_indices() -> None:
    vit = make_method(Plain(), Config(dim=5, hidden_dim=7, head="vit"))
    keys = vit.state_dict().keys()
    assert {key.split(".")[0] for key in keys} == {
        "backbone",
        "projector",
        "predictor",
        "teacher_backbone",
        "teacher_projector",
    }
    weights = {key for key in keys if key.startswith("projector") and key.endswith("weight")}
    assert weights == {f"projector.{i}.weight" for i in (0, 1, 3, 4, 6)}  # 7 has buffers only
    resnet = make_method(Plain(), Config(dim=5, hidden_dim=7, head="resnet"))
    indices = {key.split(".")[1] for key in resnet.state_dict() if key.startswith("predictor")}
    assert indices == {"0", "1", "3"}


# Loss


def _numpy_contrast(q: np.ndarray, k: np.ndarray, tau: float) -> tuple[float, float]:
    """Mean cross-entropy and accuracy of (N, D) queries against (N, D) keys, row by row."""
    ces, hits = [], []
    for n, row in enumerate(q):
        cosines = [row @ key / np.linalg.norm(row) / np.linalg.norm(key) for key in k]
        logits = np.array(cosines) / tau
        ces.append(-logits[n] + np.log(np.exp(logits).sum()))
        hits.append(float(logits.argmax() == n))
    return float(np.mean(ces)), float(np.mean(hits))


@pytest.mark.parametrize("backbone", [Plain, Normed])
@pytest.mark.parametrize("tau", [0.2, 1.0])
def test_the_loss_against_its_formula(backbone: type[Plain], tau: float) -> None:
    method = make_method(backbone(), Config(dim=5, hidden_dim=7, temperature=tau))
    views = make_views()
    reference = copy.deepcopy(method)
    with torch.no_grad():
        q1, q2 = (
            reference.predictor(reference.projector(reference.backbone(view))).double().numpy()
            for view in views
        )
        k1, k2 = (
            reference.teacher_projector(reference.teacher_backbone(view)).double().numpy() for view in views
        )
    ce1, acc1 = _numpy_contrast(q1, k2, tau)
    ce2, acc2 = _numpy_contrast(q2, k1, tau)
    output = method(views)
    assert output.loss.item() == pytest.approx(2 * tau * (ce1 + ce2), rel=1e-5)  # a sum, times 2 tau
    metrics = {name: value.item() for name, value in output.metrics.items()}
    assert metrics["loss"] == output.loss.item()
    assert metrics["ce"] == pytest.approx((ce1 + ce2) / 2, rel=1e-5)
    assert metrics["ce_norm"] == pytest.approx((ce1 + ce2) / 2 / math.log(6), rel=1e-5)
    assert metrics["acc"] == pytest.approx((acc1 + acc2) / 2)
    assert set(metrics) == {"loss", "ce", "ce_norm", "acc", "feature_std"}
    assert not any(value.requires_grad or value.ndim for value in output.metrics.values())


def _loss_of(q: Tensor, k: Tensor, tau: float) -> float:
    """The loss when both directions see the same queries and keys."""
    method = MoCoV3(Plain(), Config(dim=q.shape[1], hidden_dim=2, temperature=tau))
    return method._output(q, q, Keys(k, k, len(k)), torch.rand(len(q), 3)).loss.item()


@pytest.mark.parametrize(
    ("num", "tau", "chance", "floor"),
    [(4096, 1.0, 33.27, 29.27), (256, 1.0, 22.18, 18.21), (256, 0.2, 4.44, 0.80)],
)
def test_the_scale_of_the_loss(num: int, tau: float, chance: float, floor: float) -> None:
    same = torch.ones(num, 2)
    assert _loss_of(same, same, tau) == pytest.approx(chance, abs=0.006)
    assert _loss_of(same, same, tau) == pytest.approx(4 * tau * math.log(num), rel=1e-5)
    # The floor with negatives at cosine 0. For 4096 keys in 2 dimensions only the formula is affordable.
    exact = 4 * tau * math.log(1 + (num - 1) * math.exp(-1 / tau))
    assert exact == pytest.approx(floor, abs=0.006)
    if num == 256:
        assert _loss_of(torch.eye(num), torch.eye(num), tau) == pytest.approx(exact, rel=1e-5)


def test_a_later_rank_s_targets_are_shifted() -> None:
    keys = torch.eye(6)
    assert info_nce(keys[2:4], keys, 0.2, first_target=2).accuracy == 1
    assert info_nce(keys[2:4], keys, 0.2, first_target=0).accuracy == 0


def test_keys_carry_no_gradient_and_queries_do() -> None:
    q, k = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    method = MoCoV3(Plain(), SMALL)
    method._output(q, q, method._gather([k, k]), torch.rand(4, 3)).loss.backward()
    assert q.grad is not None
    assert k.grad is None


def test_the_student_learns_and_the_teacher_does_not() -> None:
    method = make_method(Normed())
    method(make_views()).loss.backward()
    for name, p in method.named_parameters():
        assert (p.grad is None) == name.startswith("teacher"), name
        assert p.requires_grad != name.startswith("teacher"), name


def test_the_output_is_a_tuple_so_that_ddp_finds_its_tensors() -> None:
    output = make_method(Plain())(make_views())
    assert isinstance(output, StepOutput)
    assert isinstance(output, tuple)


def test_feature_std_is_1_for_a_healthy_batch_and_0_after_collapse() -> None:
    torch.manual_seed(0)
    assert feature_std(torch.randn(4000, 64)).item() == pytest.approx(1.0, abs=0.01)
    assert feature_std(torch.randn(1, 64).expand(100, 64)).item() == pytest.approx(0, abs=1e-6)
    half_normal = feature_std(torch.randn(4000, 512).abs()).item()
    assert half_normal == pytest.approx(math.sqrt(1 - 2 / math.pi), abs=0.01)


def test_the_forward_waits_for_nothing_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    # Reading a meta tensor's value on the host raises; autocast knows no meta device.
    monkeypatch.setattr(torch, "autocast", lambda *_args, **_options: contextlib.nullcontext())
    with torch.device("meta"):
        method = MoCoV3(Normed(), SMALL)
        output = method([torch.empty(4, 3, 4, 4), torch.empty(4, 3, 4, 4)])
    assert output.loss.shape == ()
    method.update_teacher(0.9)


@pytest.mark.parametrize("backbone", [Plain, Normed])
def test_bf16_autocast_keeps_the_loss_in_float32(backbone: type[Plain]) -> None:
    method = make_method(backbone())
    expected = copy.deepcopy(method)(make_views()).loss
    seen: list[torch.dtype] = []
    method.predictor.register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = method(make_views())
    output.loss.backward()
    assert torch.bfloat16 in seen
    assert output.loss.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in output.metrics.values())
    assert output.loss.item() == pytest.approx(expected.item(), rel=0.15)
    weight = method.predictor[0].weight
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


# Views and batch statistics


def test_views_share_one_forward_only_where_that_is_exact() -> None:
    plain, normed = make_method(Plain()), make_method(Normed())
    views = make_views()
    plain(views)
    normed(views)
    assert (plain.backbone.num_calls, plain.teacher_backbone.num_calls) == (1, 1)
    assert (normed.backbone.num_calls, normed.teacher_backbone.num_calls) == (2, 2)


def test_joined_views_give_the_same_loss_without_batchnorm() -> None:
    method = make_method(Plain())
    separate = copy.deepcopy(method)
    separate._join_views = False
    torch.testing.assert_close(method(make_views()).loss, separate(make_views()).loss)


def test_joined_views_would_change_the_loss_with_batchnorm() -> None:
    method = make_method(Normed())
    joined = copy.deepcopy(method)
    joined.plan = ViewPlan(together=True)
    dark, bright = make_views()
    views = [dark * 0.1, bright * 3]
    assert abs(method(views).loss.item() - joined(views).loss.item()) > 1e-3


def test_heads_see_one_view_at_a_time() -> None:
    method = make_method(Plain())
    sizes: list[int] = []
    for head in (method.projector, method.predictor, method.teacher_projector):
        head.register_forward_hook(lambda _m, args, _out: sizes.append(len(args[0])))
    method(make_views(6))
    assert sizes == [6] * 6


def test_depends_on_batch() -> None:
    assert depends_on_batch(nn.Sequential(nn.SyncBatchNorm(3)))
    assert not depends_on_batch(nn.Sequential(nn.LayerNorm(3), nn.GroupNorm(1, 3)))


# Mistakes


def test_other_than_two_views_is_refused() -> None:
    method = make_method(Plain())
    assert method.plan_views(2, 0) == method.plan == ViewPlan((0, 1), (0, 1))
    with pytest.raises(UserError, match="2 views of each image but the recipe makes 3"):
        method.plan_views(3, 0)
    with pytest.raises(UserError, match="uses 2 views of each image, but got 3"):
        method([*make_views(), make_views()[0]])


def test_one_image_per_process_is_refused_in_training_only() -> None:
    method = make_method(Plain())
    with pytest.raises(UserError, match="1 image per process"):
        method(make_views(1))
    assert method.eval()(make_views(1)).loss.item() == 0


@pytest.mark.parametrize("bad", [{"dim": 0}, {"temperature": 0.0}, {"momentum": 1.5}])
def test_impossible_settings_are_refused(bad: dict) -> None:
    with pytest.raises(UserError, match=next(iter(bad))):
        Config(**bad)


def test_methods_by_name() -> None:
    assert METHODS["moco_v3"] is get_method("moco_v3") is MoCoV3
    assert MoCoV3.Config is Config
    with pytest.raises(UserError, match=r"no method 'moco_v2'\. Did you mean 'moco_v3'\?"):
        get_method("moco_v2")
