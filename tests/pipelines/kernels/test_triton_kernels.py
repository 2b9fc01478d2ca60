"""The Triton kernels: under Triton's interpreter, and through its compiler for GPUs that need not be there."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.kernels import batched_views, torch_kernels

triton = pytest.importorskip("triton")


def test_the_interpreted_kernels_give_what_torch_gives():
    """Runs `interpreted_kernels.py`."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "tests/pipelines/kernels/interpreted_kernels.py",
        ],
        cwd=Path(__file__).parents[3],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    if "only 0-dimensional arrays can be converted" in done.stdout:
        pytest.skip(f"the interpreter of Triton {triton.__version__} does not know NumPy {np.__version__}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_chunks_cover_all_views_and_keep_the_limit():
    from pipelines.kernels.triton_kernels import chunks

    heights = np.array([10, 20, 30, 500, 1, 1, 1], dtype=np.int32)
    cut = chunks(heights, row_bytes=3, limit=3 * 60)
    assert cut == [(0, 3, 60), (3, 4, 500), (4, 7, 3)]
    assert chunks(heights, row_bytes=3, limit=10**6) == [(0, 7, 563)]


def test_without_triton_a_warning_and_torchs_functions(monkeypatch):
    def no_compiler(*_):
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(batched_views, "on_device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(batched_views, "self_test", no_compiler)
    batched_views.choose_kernels.cache_clear()
    with pytest.warns(UserWarning, match="Failed to find C compiler"):
        assert batched_views.choose_kernels(torch.device("cuda")) is torch_kernels
    monkeypatch.setattr(batched_views, "self_test", lambda *_: 3.0)
    batched_views.choose_kernels.cache_clear()
    with pytest.warns(UserWarning, match=r"3\.00 levels off"):
        assert batched_views.choose_kernels(torch.device("cuda")) is torch_kernels
    batched_views.choose_kernels.cache_clear()
    assert batched_views.choose_kernels(torch.device("cpu")) is torch_kernels


BYTES, LONGS, INTS, FLOATS, WORDS, BOOLS = "*u8", "*i64", "*i32", "*fp32", "*u64", "*i1"
COLOUR = [BYTES, LONGS, FLOATS, INTS, BOOLS, "i32"]
KERNELS = {
    "_crop_x": ([BYTES, LONGS, BYTES, "i32"], {"COLUMNS": 256, "ROWS": 8, "CUBIC": True}),
    "_crop_y": ([BYTES, LONGS, BYTES, "i32"], {"COLUMNS": 256, "ROWS": 8, "CUBIC": True}),
    "_luma_before_contrast": (COLOUR, {"BLOCK": 1024}),
    "_colour": (COLOUR, {"BLOCK": 1024}),
    "_box": ([BYTES, BYTES, LONGS, LONGS, LONGS, "i32"], {"ALONG_X": True, "BLOCK": 1024}),
    "_finish": (
        [BYTES, "*bf16", BOOLS, INTS, FLOATS, WORDS, FLOATS, FLOATS, FLOATS, "i32"],
        {"CHANNELS_LAST": True, "BLOCK": 1024},
    ),
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_compile_for_gpus(name):
    """To machine code for Hopper; no multiply-add may be fused, which would round another way than PIL."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pipelines.kernels import triton_kernels

    kernel, (types, constants) = getattr(triton_kernels, name), KERNELS[name]
    signature = dict(zip(kernel.arg_names, types, strict=False)) | dict.fromkeys(constants, "constexpr")
    assert list(signature) == kernel.arg_names
    source = ASTSource(
        kernel, signature, {(kernel.arg_names.index(key),): value for key, value in constants.items()}
    )
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False})
    assert "fma.rn" not in made.asm["ptx"]
    assert len(made.asm["cubin"]) > 1000
