"""Backbones by name: MoCo v3's ViTs, a narrow ResNet for small data, and every timm model."""

import difflib
import warnings
from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.layers.patch_embed import PatchEmbed
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fastssl.models.moco_vit import MOCO_VITS, build_moco_vit, check_patches
from fastssl.models.model_config import ModelConfig
from fastssl.models.patch_product import embed_by_product
from fastssl.models.stochastic_depth import key_stochastic_depth
from shards.errors import UserError, nearest

RESNET10_W32 = "resnet10_w32"
# What timm's models raise for an image that does not fit them.
_SIZE_ERRORS = (AssertionError, RuntimeError, ValueError, IndexError, ZeroDivisionError)


def build_backbone(cfg: ModelConfig, image_size: int, other_sizes: Sequence[int] = ()) -> nn.Module:
    """Return the backbone of `cfg` with fresh weights, for square images of `image_size` pixels and those of `other_sizes`.

    It maps float images (N, cfg.channels, image_size, image_size) to features (N, backbone.num_features). Other sizes, such as that of
    local views, change neither its weights nor what it computes at `image_size`: a ViT's position table, whose grid is that of
    `image_size`, is resampled for their grids (bicubic with antialias; DINO, arXiv 2104.14294, does so without antialias).

    Raises:
        UserError: an unknown name, an image size that the patches do not divide or that the backbone cannot take, or a setting that it
            cannot follow.
    """
    if cfg.backbone in MOCO_VITS:
        backbone: nn.Module = build_moco_vit(
            MOCO_VITS[cfg.backbone],
            image_size=image_size,
            other_sizes=other_sizes,
            patch_size=cfg.patch_size,
            channels=cfg.channels,
            drop_path=cfg.drop_path,
        )
    else:
        if cfg.patch_size != ModelConfig.patch_size:
            warnings.warn(
                f"model.patch_size {cfg.patch_size} has no effect on {cfg.backbone}: "
                "it is for the moco_vit family.",
                stacklevel=3,
            )
        backbone = _build_other(cfg, image_size, other_sizes)
    if cfg.stem_stride != 4:
        _shrink_stem(backbone, cfg)
    if cfg.backbone not in MOCO_VITS:
        _check_size(backbone, cfg, image_size)
    if cfg.stop_grad_conv1:
        _freeze_patch_embedding(backbone)
    for module in backbone.modules():
        if isinstance(getattr(module, "fused_attn", None), bool):  # as timm's attention layers call it
            module.fused_attn = cfg.attention == "sdpa"  # pyright: ignore[reportArgumentType]
    if cfg.attention != "sdpa" and not any(hasattr(m, "fused_attn") for m in backbone.modules()):
        warnings.warn(
            f"model.attention has no effect on {cfg.backbone}: it has no attention of timm's.", stacklevel=2
        )
    key_stochastic_depth(backbone)
    embed_by_product(backbone)
    if cfg.residual == "autocast":
        _narrow_residual_stream(backbone, cfg.backbone)
    return backbone


def _narrow_residual_stream(backbone: nn.Module, name: str) -> None:
    """Keep the residual stream of a timm ViT in autocast's precision; warn where the backbone is no ViT.

    Adding the float32 position table to bf16 patches gives float32, and each block adds to that. The stream is cast where it enters
    the first block, and behind each block, since a block with LayerScale multiplies by float32 again.
    """
    if not isinstance(backbone, VisionTransformer):
        warnings.warn(f"model.residual has no effect on {name}: it is for ViTs.", stacklevel=4)
        return
    for part in (backbone.norm_pre, *backbone.blocks):
        part.register_forward_hook(_to_autocast)
    # What leaves the stream is float32 as ever: GPUs' layer_norm computes in that anyway, CPUs' in the precision it is given.
    backbone.norm.register_forward_pre_hook(_to_float32)


def _to_autocast(module: nn.Module, args: Any, stream: Tensor) -> Tensor:
    """Cast the output to autocast's precision; a forward hook. Outside of autocast nothing changes."""
    kind = stream.device.type
    return stream.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else stream


def _to_float32(module: nn.Module, args: tuple[Tensor]) -> Tensor:
    """Cast the input to float32; a forward pre-hook."""
    return args[0].float()


def _build_other(cfg: ModelConfig, image_size: int, other_sizes: Sequence[int]) -> nn.Module:
    """Return resnet10_w32 or a timm model; timm initialises ResNet blocks as the identity, as MoCo v3 does."""
    if cfg.backbone == RESNET10_W32:
        return ResNet(
            BasicBlock,  # pyright: ignore[reportArgumentType]
            (1, 1, 1, 1),
            num_classes=0,
            in_chans=cfg.channels,
            channels=(32, 64, 128, 256),
            drop_path_rate=cfg.drop_path,
        )
    if not timm.is_model(cfg.backbone):
        raise _unknown(cfg.backbone)
    plain_name, _, tag = cfg.backbone.partition(".")
    if tag:
        raise UserError(
            f"{cfg.backbone} names pretrained weights ({tag}), but pretraining starts from scratch: "
            f"use {plain_name}."
        )
    options: dict[str, Any] = {"drop_path_rate": cfg.drop_path} if cfg.drop_path else {}
    defaults = timm.get_pretrained_cfg(cfg.backbone)
    if defaults is not None and defaults.fixed_input_size:
        options["img_size"] = image_size
        if other_sizes:
            options["dynamic_img_size"] = True
    try:
        backbone = _timm_model(cfg, options)
    except _SIZE_ERRORS as error:
        if "img_size" not in options:
            raise
        raise _wrong_size(cfg, image_size, error) from error
    # A few models (MobileNetV3, for one) pool into a wider layer than the one timm calls num_features.
    backbone.num_features = getattr(backbone, "head_hidden_size", backbone.num_features)
    patch_embed = getattr(backbone, "patch_embed", None)
    if isinstance(patch_embed, PatchEmbed):
        for side in (image_size, *other_sizes):
            check_patches(side, int(patch_embed.patch_size[0]))
    _check_other_sizes(backbone, cfg, image_size, other_sizes)
    return backbone


def _timm_model(cfg: ModelConfig, options: dict[str, Any]) -> nn.Module:
    try:
        return timm.create_model(
            cfg.backbone, pretrained=False, num_classes=0, in_chans=cfg.channels, **options
        )
    except TypeError as error:
        if "dynamic_img_size" in str(error):
            # Either it takes images of any size without being told (XCiT), or of one size only.
            return _timm_model(cfg, {k: v for k, v in options.items() if k != "dynamic_img_size"})
        if "drop_path_rate" not in str(error):
            raise
        raise UserError(f"{cfg.backbone} has no stochastic depth: set model.drop_path to 0.") from error


@torch.no_grad()
def _check_size(backbone: nn.Module, cfg: ModelConfig, image_size: int) -> None:
    """Raise UserError where an image of `image_size` does not go through the backbone, which would fail in the first step only."""
    try:
        _try_size(backbone, cfg, image_size)
    except _SIZE_ERRORS as error:
        raise _wrong_size(cfg, image_size, error) from error


def _try_size(backbone: nn.Module, cfg: ModelConfig, side: int) -> None:
    """Let an image of this size go through the backbone; what a model of timm raises for a wrong one is among `_SIZE_ERRORS`."""
    backbone.eval()
    state = {
        name: value.to("meta") for name, value in (*backbone.named_parameters(), *backbone.named_buffers())
    }
    image = torch.zeros(1, cfg.channels, side, side, device="meta")
    try:
        # Shapes alone, without computing anything.
        torch.func.functional_call(backbone, state, (image,))
    except Exception:
        # What cannot be done without values is no reason to refuse.
        backbone(torch.zeros_like(image, device="cpu"))
    backbone.train()


def _wrong_size(cfg: ModelConfig, image_size: int, error: Exception) -> UserError:
    reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    own = timm.get_pretrained_cfg(cfg.backbone)
    side = f" to {own.input_size[-1]}, for which it is made" if own is not None else ""
    return UserError(
        f"{cfg.backbone} does not take images of {image_size} pixels ({reason}): set --recipe.size{side}, or choose a backbone that "
        "takes any size, such as resnet50."
    )


@torch.no_grad()
def _check_other_sizes(
    backbone: nn.Module, cfg: ModelConfig, image_size: int, other_sizes: Sequence[int]
) -> None:
    """Raise UserError where an image of another size does not go through the backbone; no table says which models take them."""
    for side in other_sizes:
        try:
            _try_size(backbone, cfg, side)
        except _SIZE_ERRORS as error:
            raise UserError(
                f"{cfg.backbone} takes images of {image_size} pixels but not of {side} beside them ({error}): set "
                "--recipe.local-views 0, or choose a backbone that takes any size, such as vit_small_patch16_224 or resnet50."
            ) from error


def _unknown(name: str) -> UserError:
    """Return the error for an unknown backbone, without timm's thousand names."""
    ours = [*MOCO_VITS, RESNET10_W32]
    close = difflib.get_close_matches(name, [*ours, *timm.list_models()], n=1)
    hint = nearest(name, close or ours)
    if not close:
        hint = f"{hint[:-1]}, and every model that timm.list_models() names."
    return UserError(f"There is no backbone {name!r}.{hint}")


def _shrink_stem(backbone: nn.Module, cfg: ModelConfig) -> None:
    if not isinstance(backbone, ResNet) or not isinstance(backbone.conv1, nn.Conv2d):
        raise UserError(
            f"model.stem_stride is for ResNets with a plain first convolution, and {cfg.backbone} is none: leave it at 4."
        )
    old = backbone.conv1
    backbone.conv1 = nn.Conv2d(
        old.in_channels, old.out_channels, 3, stride=cfg.stem_stride, padding=1, bias=False
    )
    nn.init.kaiming_normal_(backbone.conv1.weight, mode="fan_out", nonlinearity="relu")
    backbone.maxpool = nn.Identity()


def _freeze_patch_embedding(backbone: nn.Module) -> None:
    """Freeze the convolution that makes patches of pixels, whatever timm calls its class: ViT, BEiT, Eva, Swin have one."""
    patch_embed = getattr(backbone, "patch_embed", None)
    proj = getattr(patch_embed, "proj", None)
    # Behind a backbone, as in hybrids, it sees features.
    if isinstance(proj, nn.Conv2d) and not hasattr(patch_embed, "backbone"):
        proj.requires_grad_(False)
