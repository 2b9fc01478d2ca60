"""The patch embedding as a product: the convolution's values, parameters and gradients."""

import pytest
import torch
import torch.nn.functional as F

from fastssl.models.backbones import build_backbone
from fastssl.models.model_config import ModelConfig
from fastssl.models.patch_product import PatchProduct, multiply_patches


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("patch", [(4, 4), (2, 8)])
def test_a_product_is_the_convolution(patch: tuple[int, int], layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    images = torch.randn(3, 5, 16, 24, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    weight = torch.randn(7, 5, *patch, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)
    expected = F.conv2d(images, weight, bias, stride=patch)
    found = multiply_patches(images, weight, bias)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    pull = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (images, weight, bias), pull)
    for one, other in zip(torch.autograd.grad(found, (images, weight, bias), pull), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_plain_patch_embeddings_become_products_with_the_names_that_they_had() -> None:
    plain = build_backbone(ModelConfig(backbone="moco_vit_small"), 32)
    assert isinstance(plain.get_submodule("patch_embed.proj"), PatchProduct)
    assert "patch_embed.proj.weight" in plain.state_dict()
    stem = build_backbone(ModelConfig(backbone="moco_vit_conv_small"), 32)
    assert not any(isinstance(module, PatchProduct) for module in stem.modules())


@pytest.mark.gpu
def test_on_a_gpu_the_product_is_taken() -> None:
    torch.manual_seed(0)
    backbone = build_backbone(ModelConfig(backbone="moco_vit_small"), 64).cuda()
    conv = backbone.get_submodule("patch_embed.proj")
    images = torch.randn(4, 3, 64, 64, device="cuda")
    with torch.backends.cudnn.flags(allow_tf32=False):
        expected = F.conv2d(images, conv.weight, conv.bias, stride=16)  # pyright: ignore[reportArgumentType, reportCallIssue]
        torch.testing.assert_close(conv(images), expected, rtol=1e-4, atol=1e-4)
