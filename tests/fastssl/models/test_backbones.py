"""The backbones: MoCo v3's ViTs fact by fact, ResNets, timm by name, and the guard against a wrong head
count."""

import json
import math
import subprocess
import sys
from typing import Literal

import pytest
import torch
import torchvision
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fastssl.models.backbones import build_backbone
from fastssl.models.moco_vit import MOCO_VITS, position_table
from fastssl.models.model_config import ModelConfig, architecture, check_architecture
from fastssl.models.stochastic_depth import KeyedDropPath
from shards.errors import UserError


@pytest.fixture(scope="module")
def vit_small() -> VisionTransformer:
    torch.manual_seed(0)
    return _vit("moco_vit_small")


@pytest.fixture(scope="module")
def vit_conv_small() -> VisionTransformer:
    torch.manual_seed(0)
    return _vit("moco_vit_conv_small")


def _vit(name: str, image_size: int = 32) -> VisionTransformer:
    backbone = build_backbone(ModelConfig(backbone=name), image_size)
    assert isinstance(backbone, VisionTransformer)
    return backbone


@pytest.mark.parametrize(
    ("name", "dim", "depth"),
    [
        ("moco_vit_small", 384, 12),
        ("moco_vit_base", 768, 12),
        ("moco_vit_conv_small", 384, 11),
        ("moco_vit_conv_base", 768, 11),
    ],
)
def test_shapes_of_the_family(name: str, dim: int, depth: int) -> None:
    shape, vit = MOCO_VITS[name], _vit(name, 224)
    assert vit.num_features == dim
    assert len(vit.blocks) == depth
    for block in vit.blocks:
        assert block.attn.num_heads == 12
        assert block.attn.qkv.weight.shape == (3 * dim, dim)
        assert block.attn.qkv.bias is not None
        assert block.mlp.fc1.weight.shape == (4 * dim, dim)
    norms = [module for module in vit.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 2 * depth + 1
    assert {norm.eps for norm in norms} == {1e-6}
    assert vit.pos_embed.shape == (1, 1 + 14 * 14, dim)
    if not shape.conv_stem:
        # Patch embedding 768 d + d, class token d, 197 positions, the last norm 2 d: a stock ViT's count.
        count = sum(p.numel() for p in vit.parameters())
        assert count == 12 * (12 * dim**2 + 13 * dim) + 769 * dim + dim + 197 * dim + 2 * dim


def test_the_feature_is_the_class_token_after_the_last_norm(vit_small: VisionTransformer) -> None:
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        features = vit_small(images)
        assert features.shape == (2, vit_small.num_features)
        assert torch.equal(features, vit_small.forward_features(images)[:, 0])


def test_state_dict_keys_follow_the_published_layout(vit_small: VisionTransformer) -> None:
    block_keys = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
    modules = ["patch_embed.proj", *(f"blocks.{i}.{key}" for i in range(12) for key in block_keys), "norm"]
    expected = {"cls_token", "pos_embed", *(f"{m}.{end}" for m in modules for end in ("weight", "bias"))}
    assert set(vit_small.state_dict()) == expected


def test_position_table_in_numbers() -> None:
    # dim 8 gives omega = 10000^0, 10000^(-1/2) = 1, 0.01; rows are the class token, then (w, h) = 00 01 10
    # 11.
    zero = [0.0, 0.0, 1.0, 1.0]
    one = [math.sin(1), math.sin(0.01), math.cos(1), math.cos(0.01)]
    expected = torch.tensor([[0.0] * 8, zero + zero, zero + one, one + zero, one + one])
    torch.testing.assert_close(position_table(2, 2, 8), expected[None])


def test_the_first_columns_change_slowly_along_the_raster_order() -> None:
    # MAE's table has it the other way round: there the first half of the columns changes from patch to patch.
    patches = position_table(14, 14, 384)[0, 1:].reshape(14, 14, 384)
    assert torch.equal(patches[:, :, :192], patches[:, :1, :192].expand(14, 14, 192))
    assert torch.equal(patches[:, :, 192:], patches[:1, :, 192:].expand(14, 14, 192))
    assert not torch.equal(patches[0, 0, 192:], patches[0, 1, 192:])
    # The 3rd frequency at row 5 and column 9: 10000^(-2/96) = 0.825404...
    omega = 10000 ** (-2 / 96)
    four = [math.sin(5 * omega), math.cos(5 * omega), math.sin(9 * omega), math.cos(9 * omega)]
    torch.testing.assert_close(patches[5, 9, [2, 98, 194, 290]], torch.tensor(four))


def test_positions_are_a_frozen_parameter_of_the_state_dict(vit_small: VisionTransformer) -> None:
    assert isinstance(vit_small.pos_embed, nn.Parameter)
    assert not vit_small.pos_embed.requires_grad
    assert torch.equal(vit_small.state_dict()["pos_embed"], position_table(2, 2, 384))


def _assert_uniform(weight: Tensor, bound: float) -> None:
    assert weight.abs().max() <= bound
    assert weight.abs().max() > 0.99 * bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert abs(weight.mean().item()) < 0.02 * bound


def test_initial_values(vit_small: VisionTransformer) -> None:
    block = vit_small.blocks[7]
    _assert_uniform(block.attn.qkv.weight, math.sqrt(6 / (384 + 384)))  # not 384 + 3 * 384
    _assert_uniform(block.attn.proj.weight, math.sqrt(6 / (384 + 384)))
    _assert_uniform(block.mlp.fc1.weight, math.sqrt(6 / (384 + 1536)))
    _assert_uniform(block.mlp.fc2.weight, math.sqrt(6 / (384 + 1536)))
    _assert_uniform(vit_small.patch_embed.proj.weight, math.sqrt(6 / (3 * 16 * 16 + 384)))
    for module in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2, vit_small.patch_embed.proj):
        assert not module.bias.any()
    assert vit_small.cls_token.std().item() == pytest.approx(1e-6, rel=0.2)
    assert torch.equal(vit_small.norm.weight, torch.ones(384))


def test_the_patch_embedding_is_frozen_and_everything_else_learns(vit_small: VisionTransformer) -> None:
    vit_small.zero_grad()
    vit_small(torch.rand(2, 3, 32, 32)).square().sum().backward()
    without = {name for name, p in vit_small.named_parameters() if p.grad is None}
    assert without == {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    vit_small.zero_grad()


def test_the_patch_embedding_learns_where_asked() -> None:
    vit = build_backbone(ModelConfig(backbone="moco_vit_small", stop_grad_conv1=False), 32)
    assert {name for name, p in vit.named_parameters() if not p.requires_grad} == {"pos_embed"}


def test_stop_grad_conv1_also_serves_timm_s_own_vits_and_spares_the_rest() -> None:
    vit = build_backbone(ModelConfig(backbone="vit_tiny_patch16_224"), 32)
    resnet = build_backbone(ModelConfig(backbone="resnet18"), 32)
    frozen = {name for name, p in vit.named_parameters() if not p.requires_grad}
    assert frozen == {"patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert all(p.requires_grad for p in resnet.parameters())


@pytest.mark.parametrize(
    "name", ["swin_tiny_patch4_window7_224", "beit_base_patch16_224", "eva02_tiny_patch14_224"]
)
def test_stop_grad_conv1_serves_transformers_of_other_classes(name: str) -> None:
    """Their patch embeddings, and they themselves, are of timm's other classes: the setting did nothing there."""
    with torch.device("meta"):
        backbone = build_backbone(ModelConfig(backbone=name), 224)
        trained = build_backbone(ModelConfig(backbone=name, stop_grad_conv1=False), 224)
    frozen = {n for n, p in backbone.named_parameters() if not p.requires_grad}
    assert frozen - {n for n, p in trained.named_parameters() if not p.requires_grad} == {
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
    }


@pytest.mark.parametrize(
    ("name", "size", "told"),
    [
        (
            "inception_v4",
            32,
            r"inception_v4 does not take images of 32 pixels \(.*\): set --recipe.size to 299, for",
        ),
        (
            "crossvit_tiny_240",
            32,
            r"crossvit_tiny_240 does not take images of 32 pixels \(.*: set --recipe.size to 240",
        ),
    ],
)
def test_a_size_that_a_model_does_not_take_is_told_before_the_first_step(
    name: str, size: int, told: str
) -> None:
    with pytest.raises(UserError, match=told):
        build_backbone(ModelConfig(backbone=name), size)


def test_attention_of_a_convolutional_network_is_told_to_do_nothing() -> None:
    with pytest.warns(UserWarning, match=r"model\.attention has no effect on resnet18"):
        build_backbone(ModelConfig(backbone="resnet18", attention="explicit"), 32)


def test_conv_stem_layout(vit_conv_small: VisionTransformer) -> None:
    layers = list(vit_conv_small.patch_embed.proj)
    assert len(layers) == 13
    channels = [3, 48, 96, 192, 384]
    for step in range(4):
        conv, norm, relu = layers[3 * step : 3 * step + 3]
        assert (conv.in_channels, conv.out_channels) == (channels[step], channels[step + 1])
        assert (conv.kernel_size, conv.stride, conv.padding, conv.bias) == ((3, 3), (2, 2), (1, 1), None)
        assert isinstance(norm, nn.BatchNorm2d)
        assert isinstance(relu, nn.ReLU)
    last = layers[12]
    assert (last.in_channels, last.out_channels, last.kernel_size) == (384, 384, (1, 1))
    assert last.bias is not None
    assert {name for name, p in vit_conv_small.named_parameters() if not p.requires_grad} == {"pos_embed"}
    with torch.no_grad():
        assert vit_conv_small(torch.rand(2, 3, 32, 32)).shape == (2, 384)
        with pytest.raises(UserError, match=r"\(32, 32\) pixels but got \(48, 48\)"):
            vit_conv_small(torch.rand(2, 3, 48, 48))


@pytest.mark.parametrize("name", ["moco_vit_small", "moco_vit_conv_small"])
def test_small_patches_and_other_channel_counts(name: str) -> None:
    vit = build_backbone(ModelConfig(backbone=name, patch_size=8, channels=5), 32)
    assert isinstance(vit, VisionTransformer)
    assert vit.pos_embed.shape == (1, 17, 384)
    with torch.no_grad():
        assert vit(torch.rand(2, 5, 32, 32)).shape == (2, 384)


def test_sizes_that_the_patches_do_not_divide_are_refused() -> None:
    for name in ("moco_vit_small", "moco_vit_conv_base", "vit_tiny_patch16_224"):
        with pytest.raises(UserError, match=r"image size 100 .* patch size 16: use images of 96 or 112"):
            build_backbone(ModelConfig(backbone=name), 100)
    with pytest.raises(UserError, match="power of two: 12 is none"):
        build_backbone(ModelConfig(backbone="moco_vit_conv_small", patch_size=12), 96)


def test_resnet50_starts_its_blocks_at_zero_as_torchvision_does() -> None:
    ours = build_backbone(ModelConfig(), 64)
    theirs = torchvision.models.resnet50(zero_init_residual=True)
    expected = {name: value for name, value in theirs.state_dict().items() if not name.startswith("fc.")}
    found = ours.state_dict()
    assert {name: value.shape for name, value in found.items()} == {n: v.shape for n, v in expected.items()}
    for name in expected:
        if ".bn" in name or "downsample.1" in name:
            assert torch.equal(found[name], expected[name]), name  # gammas of bn3 are 0, the others 1
    assert not found["layer1.0.bn3.weight"].any()
    assert ours.num_features == 2048


def test_resnet10_w32() -> None:
    backbone = build_backbone(ModelConfig(backbone="resnet10_w32", channels=4), 64)
    assert backbone.num_features == 256
    assert sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in backbone.modules()) == 8
    assert not backbone.get_parameter("layer4.0.bn2.weight").any()
    assert backbone(torch.rand(2, 4, 64, 64)).shape == (2, 256)


@pytest.mark.parametrize("stride", [1, 2])
def test_small_stems_keep_resolution(stride: Literal[1, 2]) -> None:
    backbone = build_backbone(ModelConfig(backbone="resnet10_w32", stem_stride=stride), 32)
    stem = backbone.get_submodule("conv1")
    assert isinstance(stem, nn.Conv2d)
    assert (stem.kernel_size, stem.stride, stem.padding, stem.bias) == (
        (3, 3),
        (stride, stride),
        (1, 1),
        None,
    )
    sizes = []
    backbone.get_submodule("layer1").register_forward_hook(lambda _m, _i, out: sizes.append(out.shape[-1]))
    assert backbone(torch.rand(2, 3, 32, 32)).shape == (2, 256)
    assert sizes == [32 // stride]
    with pytest.raises(UserError, match="stem_stride is for ResNets"):
        build_backbone(ModelConfig(backbone="convnext_atto", stem_stride=1), 32)


def test_any_timm_name_with_its_true_feature_length() -> None:
    # MobileNetV3 pools into 1024 while timm's num_features says 576.
    for name, dim in (("mobilenetv3_small_100", 1024), ("convnext_atto", 320), ("vit_tiny_patch16_224", 192)):
        backbone = build_backbone(ModelConfig(backbone=name), 64).eval()
        assert backbone.num_features == dim
        with torch.no_grad():
            assert backbone(torch.rand(2, 3, 64, 64)).shape == (2, dim)


def test_drop_path_reaches_the_blocks_or_is_refused() -> None:
    for name in ("moco_vit_conv_small", "resnet10_w32", "resnet18"):
        backbone = build_backbone(ModelConfig(backbone=name, drop_path=0.2), 32)
        rates = [m.drop_prob for m in backbone.modules() if isinstance(m, KeyedDropPath)]
        assert max(rates) == pytest.approx(0.2)
    with pytest.raises(UserError, match="vgg11 has no stochastic depth"), torch.device("meta"):
        build_backbone(ModelConfig(backbone="vgg11", drop_path=0.1), 32)


def test_unknown_names_get_the_nearest_one() -> None:
    with pytest.raises(UserError, match=r"no backbone 'moco_vit_smal'\. Did you mean 'moco_vit_small'\?"):
        build_backbone(ModelConfig(backbone="moco_vit_smal"), 32)
    with pytest.raises(UserError, match=r"Known: .*resnet10_w32, and every model that timm.list_models"):
        build_backbone(ModelConfig(backbone="zzzzzz"), 32)
    with pytest.raises(UserError, match=r"pretrained weights \(a1_in1k\).* use resnet50\."):
        build_backbone(ModelConfig(backbone="resnet50.a1_in1k"), 32)


def test_a_patch_size_without_effect_warns() -> None:
    with pytest.warns(UserWarning, match="patch_size 8 has no effect on resnet10_w32"):
        build_backbone(ModelConfig(backbone="resnet10_w32", patch_size=8), 32)


@pytest.mark.parametrize("bad", [{"channels": 0}, {"patch_size": 0}, {"drop_path": 1.0}])
def test_impossible_settings_are_refused(bad: dict) -> None:
    with pytest.raises(UserError, match=next(iter(bad))):
        ModelConfig(**bad)


def test_a_6_head_vit_takes_12_head_weights_silently_and_the_guard_does_not(
    vit_small: VisionTransformer,
) -> None:
    cfg = ModelConfig(backbone="moco_vit_small")
    six = VisionTransformer(img_size=32, embed_dim=384, num_heads=6, num_classes=0)
    six.load_state_dict(vit_small.state_dict())  # no complaint: the shapes are the same
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert not torch.allclose(six(images), vit_small(images), atol=1e-2)
    ours = architecture(vit_small, cfg)
    check_architecture(ours, json.loads(json.dumps(ours)), "last.pt")
    with pytest.raises(UserError, match=r"last\.pt .*: num_heads is 6 there and 12 here\. Change"):
        check_architecture(ours, architecture(six, cfg), "last.pt")


def test_architecture_entries() -> None:
    heads = {name: shape.num_heads for name, shape in MOCO_VITS.items()}
    assert heads.pop("moco_vit_large") == 16
    assert set(heads.values()) == {12}
    cfg = ModelConfig(backbone="moco_vit_conv_small", patch_size=8, channels=4)
    vit = build_backbone(cfg, 64)
    resnet = build_backbone(ModelConfig(backbone="resnet18", stem_stride=1), 64)
    assert architecture(vit, cfg) == {
        "name": "moco_vit_conv_small",
        "num_features": 384,
        "num_heads": 12,
        "channels": 4,
        "image_size": 64,
        "patch_size": 8,
        "stem_stride": 4,
    }
    found = architecture(resnet, ModelConfig(backbone="resnet18", stem_stride=1))
    assert found["num_heads"] is found["image_size"] is found["patch_size"] is None
    with pytest.raises(UserError) as caught:
        check_architecture({"name": "resnet50", "channels": 3}, {"name": "resnet18", "width": 64}, "x.pt")
    for part in (
        "name is resnet18 there",
        "channels is missing there and 3 here",
        "width is 64 there and missing",
    ):
        assert part in str(caught.value)


def test_importing_the_settings_imports_no_timm() -> None:
    code = "import sys, fastssl.models.model_config, fastssl.methods, fastssl.core.optimizers; sys.exit('timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
