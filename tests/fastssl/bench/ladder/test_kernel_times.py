"""The device's time by kind of kernel: names of real kernels, and a step whose work is known."""

import pytest
import torch
from rich.console import Console

from fastssl.bench.ladder.kernel_times import kind_of, profiled_row, told
from fastssl.bench.step_timer import StepTimer


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NNT", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix products"),
        ("aten::addmm", "matrix products"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc", "convolutions"),
        ("cudnn::engines_precompiled::nchwToNhwcKernel<float>", "convolutions"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7", "attention"),
        ("triton_poi_fused__to_copy_add_mul_native_layer_norm_3", "compiled elementwise"),
        ("triton_per_fused_add_native_layer_norm_native_layer_norm_backward_8", "compiled reductions"),
        (
            "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<TensorListMetadata<4>>",
            "optimizer, EMA",
        ),
        ("void cudnn::bn_fw_tr_1C11_kernel_NCHW<__nv_bfloat16>", "normalization"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>", "elementwise"),
        ("something_new", "other"),
    ],
)
def test_kinds_of_real_kernels(kernel: str, kind: str) -> None:
    assert kind_of(kernel) == kind


def test_the_products_of_a_step_are_found_and_counted() -> None:
    a = torch.randn(512, 512)

    def step() -> None:
        torch.mm(a, a)
        torch.mm(a, a)

    row = profiled_row(
        "profiled", step, StepTimer(torch.device("cpu"), 8, 1, 1, Console(quiet=True)), steps=4
    )
    products = [kernel for kernel in row.more["kernels"] if kernel[0] == "aten::mm"]
    assert products[0][1] == 2
    assert row.more["kinds_ms"]["matrix products"] == pytest.approx(products[0][2])
    assert row.more["device_ms"] == pytest.approx(sum(row.more["kinds_ms"].values()))
    assert row.images_per_s
    assert "matrix products" in told(row)
