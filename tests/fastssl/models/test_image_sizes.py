"""Backbones that take images of several sizes, as multi-crop recipes make them."""

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from fastssl.models.backbones import build_backbone
from fastssl.models.moco_vit import position_table
from fastssl.models.model_config import ModelConfig, architecture
from fastssl.pretraining.build import build_method
from fastssl.pretraining.run_config import load
from shards.errors import UserError

# Those that take other sizes by a switch of timm's, by themselves (XCiT), and without any table of positions.
TAKERS = (
    "moco_vit_small",
    "moco_vit_conv_small",
    "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "vit_wee_patch16_reg1_gap_256",
    "eva02_tiny_patch14_224",
    "swin_tiny_patch4_window7_224",
    "xcit_nano_12_p16_224",
    "resnet10_w32",
    "convnext_atto",
)


def _build(name: str, size: int, others: tuple[int, ...] = ()) -> nn.Module:
    torch.manual_seed(0)
    return build_backbone(ModelConfig(backbone=name), size, others)


@pytest.mark.parametrize("name", TAKERS)
def test_other_sizes_change_neither_weights_nor_what_the_first_size_gives(name: str) -> None:
    unit = 28 if "patch14" in name else 32
    size, other = 2 * unit, unit
    alone, both = _build(name, size), _build(name, size, (other,))
    assert architecture(alone, ModelConfig(backbone=name)) == architecture(both, ModelConfig(backbone=name))
    ours, theirs = both.state_dict(), alone.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert both.training
    images = torch.rand(2, 3, size, size)
    found = []
    for model in (alone, both):
        # Some have stochastic depth by default.
        torch.manual_seed(1)
        found.append(model(images))
    first, second = found
    assert torch.equal(first, second)
    first.square().sum().backward()
    second.square().sum().backward()
    for (key, p), q in zip(both.named_parameters(), alone.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), key
        assert p.grad is None or q.grad is None or torch.equal(p.grad, q.grad), key
    with torch.no_grad():
        assert torch.equal(alone.eval()(images), both.eval()(images))
        small = both(torch.rand(3, 3, other, other))
    assert small.shape == (3, both.num_features)
    assert small.isfinite().all()


@pytest.mark.parametrize("name", ["moco_vit_small", "moco_vit_conv_small", "vit_tiny_patch16_224"])
def test_without_being_asked_a_vit_refuses_another_size(name: str) -> None:
    with pytest.raises(
        (UserError, AssertionError), match=r"built for images of \(64, 64\)|doesn't match model"
    ):
        _build(name, 64)(torch.rand(1, 3, 32, 32))


def test_the_position_table_is_resampled_for_the_other_grid() -> None:
    vit = _build("moco_vit_small", 64, (96,)).eval()
    assert isinstance(vit, VisionTransformer)
    images = torch.rand(2, 3, 96, 96)
    seen = []
    vit.blocks[0].register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad():
        vit(images)
        grid = position_table(4, 4, 384)[:, 1:].reshape(1, 4, 4, 384).permute(0, 3, 1, 2)
        table = F.interpolate(grid, size=(6, 6), mode="bicubic", antialias=True)
        patches = vit.patch_embed.proj(images) + table
    torch.testing.assert_close(seen[0][:, 1:], patches.flatten(2).transpose(1, 2))
    # The class token has no place.
    assert torch.equal(seen[0][:, 0], vit.cls_token[:, 0].expand(2, -1))


def test_a_learned_table_learns_from_both_sizes() -> None:
    vit = _build("vit_tiny_patch16_224", 64, (32,))
    vit(torch.rand(2, 3, 32, 32)).square().sum().backward()
    grad = vit.get_parameter("pos_embed").grad
    assert grad is not None
    # Each of the 16 places lies in a small view, whose 4 patches cover the whole grid.
    assert (grad[0, 1:].abs().sum(dim=1) > 0).all()


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "levit_128s", "hiera_tiny_224"])
def test_a_backbone_of_one_size_is_refused_for_two(name: str) -> None:
    with torch.device("meta"):
        build_backbone(ModelConfig(backbone=name), 224)
        with pytest.raises(UserError, match=rf"{name} takes images of 224 pixels but not of 96 beside them"):
            build_backbone(ModelConfig(backbone=name), 224, (96,))


@pytest.mark.parametrize("name", ["moco_vit_small", "vit_tiny_patch16_224"])
def test_patches_must_divide_every_size(name: str) -> None:
    with pytest.raises(
        UserError, match=r"The image size 100 is no multiple of the patch size 16: use .* 96 or"
    ):
        _build(name, 224, (100,))


def test_a_run_builds_its_backbone_for_the_views_of_its_recipe() -> None:
    flags = ["--model.backbone", "vit_tiny_patch16_224", "--recipe", "dino", "--recipe.local-views", "2"]
    flags += ["--recipe.size", "64", "--recipe.local-size", "32"]
    cfg = load(None, flags).config
    sides = [cfg.recipe.side(view) for view in range(cfg.recipe.total_views)]
    assert sides == [64, 64, 32, 32]
    with pytest.raises(UserError, match="MoCo v3 compares 2 global views but the recipe makes 2 local ones"):
        # The backbone is built first, and takes both sizes.
        build_method(load(None, flags), torch.device("cpu"))
    with pytest.raises(UserError, match="The image size 40 is no multiple"):
        build_method(load(None, [*flags, "--recipe.local-size", "40"]), torch.device("cpu"))
