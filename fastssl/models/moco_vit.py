"""MoCo v3's vision transformers, built on timm (arXiv 2104.02057; conv stems: Xiao et al., arXiv 2106.14881).

They have 12 heads, ViT-S too, a fixed position table, and a frozen or convolutional patch embedding.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from shards.errors import UserError


@dataclass(frozen=True)
class ViTShape:
    """The size of one of MoCo v3's ViTs."""

    dim: int
    depth: int
    num_heads: int
    conv_stem: bool = False


# Width of a head in all of timm's plain ViTs.
TIMM_HEAD = 64
# ViT-S has 12 heads, where timm and DeiT have 6; ViT-L is in the paper only. A conv stem replaces one block: depth 11.
MOCO_VITS = {
    "moco_vit_small": ViTShape(dim=384, depth=12, num_heads=12),
    "moco_vit_base": ViTShape(dim=768, depth=12, num_heads=12),
    "moco_vit_large": ViTShape(dim=1024, depth=24, num_heads=16),
    "moco_vit_conv_small": ViTShape(dim=384, depth=11, num_heads=12, conv_stem=True),
    "moco_vit_conv_base": ViTShape(dim=768, depth=11, num_heads=12, conv_stem=True),
}


def check_patches(image_size: int, patch_size: int) -> None:
    """Raise UserError when `patch_size` does not divide `image_size` (both in pixels)."""
    if image_size % patch_size:
        smaller = image_size // patch_size * patch_size
        near = f"{smaller} or {smaller + patch_size}" if smaller else f"{patch_size}"
        raise UserError(
            f"The image size {image_size} is no multiple of the patch size {patch_size}: "
            f"use images of {near} pixels, or another patch size."
        )


def build_moco_vit(
    shape: ViTShape,
    *,
    image_size: int,
    patch_size: int,
    channels: int,
    drop_path: float,
    other_sizes: Sequence[int] = (),
) -> VisionTransformer:
    """Return a ViT of `shape` with MoCo v3's initialisation: (N, C, H, W) -> its class token (N, shape.dim).

    For images of other sizes the fixed table of `image_size` is resampled as timm resamples learned ones (bicubic with antialias),
    so that a place in the image has about the same position whatever the number of patches.

    Raises:
        UserError: `patch_size` does not divide `image_size` or another size, or is no power of two for a conv stem.
    """
    for side in (image_size, *other_sizes):
        check_patches(side, patch_size)
    vit = VisionTransformer(
        img_size=image_size,
        patch_size=patch_size,
        in_chans=channels,
        num_classes=0,
        global_pool="token",
        embed_dim=shape.dim,
        depth=shape.depth,
        num_heads=shape.num_heads,
        mlp_ratio=4.0,
        qkv_bias=True,
        drop_path_rate=drop_path,
        weight_init="skip",
        dynamic_img_size=bool(other_sizes),
        norm_layer=partial(nn.LayerNorm, eps=1e-6),  # pyright: ignore[reportArgumentType]
        embed_layer=ConvStem if shape.conv_stem else PatchEmbed,
    )
    init_moco_vit(vit)
    if shape.dim != TIMM_HEAD * shape.num_heads:
        vit.unusual_heads = shape.num_heads  # pyright: ignore[reportArgumentType]
    return vit


def heads_entries(module: nn.Module) -> dict[str, Tensor]:
    """Return entries `num_heads`, int64 scalars, for the saved weights of those ViTs in a module that need their heads said.

    MoCo v3's ViT-S has 12 heads and timm's 6, of the same shapes of weights: loaded into that one they would compute something else
    without a word. With the entry a strict load fails, and the entry says what to build: `num_heads=12`.
    """
    found = {name: getattr(part, "unusual_heads", None) for name, part in module.named_modules()}
    return {
        f"{name}.num_heads".lstrip("."): torch.tensor(heads)
        for name, heads in found.items()
        if heads is not None
    }


@torch.no_grad()
def init_moco_vit(vit: VisionTransformer) -> None:
    """Set MoCo v3's initial values: Xavier-uniform linears, zero biases, a tiny class token, the position table.

    The bound of a uniform weight is sqrt(6 / (fan_in + fan_out)). Queries, keys and values count as three
    matrices, so the fused qkv weight (3d, d) is drawn with d + d. A plain patch embedding is drawn like the
    linear layer it is, with fan_in = channels * patch * patch. A conv stem keeps PyTorch's defaults.
    """
    for name, module in vit.named_modules():
        if isinstance(module, nn.Linear):
            num_out, num_in = module.weight.shape
            if name.endswith("attn.qkv"):
                num_out //= 3
            _xavier_uniform(module, num_in, num_out)
    patch = vit.patch_embed.proj
    if isinstance(patch, nn.Conv2d):
        _xavier_uniform(patch, patch.weight[0].numel(), patch.out_channels)
    assert vit.cls_token is not None
    nn.init.normal_(vit.cls_token, std=1e-6)
    height, width = vit.patch_embed.grid_size
    table = position_table(height, width, vit.embed_dim)
    # A parameter, though never trained, so that it is in the state dict as in the published checkpoints.
    vit.pos_embed = nn.Parameter(table, requires_grad=False)


def _xavier_uniform(module: nn.Linear | nn.Conv2d, num_in: int, num_out: int) -> None:
    bound = math.sqrt(6 / (num_in + num_out))
    nn.init.uniform_(module.weight, -bound, bound)
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def position_table(height: int, width: int, dim: int) -> Tensor:
    """Return fixed 2-D sine-cosine positions, (1, 1 + height * width, dim) float32; the class token's row is zero.

    With omega_i = 10000^(-i / (dim / 4)), the columns are [sin w, cos w, sin h, cos h] of omega times the
    coordinate. As in MoCo v3, "w" changes slowly along the raster order of the patches and "h" fast, the
    reverse of MAE's table: patch n has w = n // height and h = n % height. Weights trained with one table are
    wrong with the other.
    """
    assert dim % 4 == 0
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    w, h = torch.meshgrid(
        torch.arange(width, dtype=torch.float64), torch.arange(height, dtype=torch.float64), indexing="ij"
    )
    w_angles, h_angles = w.reshape(-1, 1) * omega, h.reshape(-1, 1) * omega
    rows = torch.cat([w_angles.sin(), w_angles.cos(), h_angles.sin(), h_angles.cos()], dim=1)
    return torch.cat([torch.zeros(1, dim, dtype=torch.float64), rows])[None].float()


class ConvStem(nn.Module):
    """Patch embedding by 3x3 stride-2 convolutions with BatchNorm and ReLU, then a 1x1 convolution.

    (N, C, H, W) -> (N, patches, dim), or with `output_fmt` "NHWC" (N, H / patch, W / patch, dim). A patch size of 16 takes four, with
    dim/8, dim/4, dim/2 and dim channels; 2^n takes n. timm calls it with the arguments of its own PatchEmbed.
    """

    def __init__(
        self,
        img_size: int,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        bias: bool = True,
        strict_img_size: bool = True,
        output_fmt: str | None = None,
        dynamic_img_pad: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        assert not dynamic_img_pad
        assert output_fmt in (None, "NHWC")
        self.strict_img_size, self.flatten = strict_img_size, output_fmt is None
        num_steps = int(math.log2(patch_size))
        if patch_size < 2 or 2**num_steps != patch_size:
            raise UserError(
                f"A conv stem halves the image again and again, so its patch size must be a power of two: "
                f"{patch_size} is none, use {2 ** max(num_steps, 1)}."
            )
        self.img_size, self.patch_size = (img_size, img_size), (patch_size, patch_size)
        self.grid_size = (img_size // patch_size, img_size // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        layers: list[nn.Module] = []
        num_in = in_chans
        for step in range(num_steps):
            num_out = embed_dim // 2 ** (num_steps - 1 - step)
            conv = nn.Conv2d(num_in, num_out, 3, stride=2, padding=1, bias=False, device=device, dtype=dtype)
            layers += [conv, nn.BatchNorm2d(num_out, device=device, dtype=dtype), nn.ReLU(inplace=True)]
            num_in = num_out
        layers.append(nn.Conv2d(num_in, embed_dim, 1, bias=bias, device=device, dtype=dtype))
        self.proj = nn.Sequential(*layers)

    def feat_ratio(self) -> int:
        """Pixels per patch side, which timm asks for."""
        return self.patch_size[0]

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if self.strict_img_size and (height, width) != self.img_size:
            raise UserError(
                f"The model was built for images of {self.img_size} pixels but got {(height, width)}."
            )
        patches = self.proj(images)
        return patches.flatten(2).transpose(1, 2) if self.flatten else patches.permute(0, 2, 3, 1)
