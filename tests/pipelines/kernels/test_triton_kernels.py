"""The Triton kernels: under Triton's interpreter, and through its compiler for GPUs that need not be there."""

import contextlib
import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.kernels import kernel_choice, torch_kernels
from tests import needs

triton = needs.module("triton")
ROOT = Path(__file__).parents[3]
OVERLAY = ROOT / ".venv" / "interpreter"  # a NumPy that Triton's interpreter knows: `make interpreter`


def interpreter_path() -> str:
    """What comes first on PYTHONPATH where Triton's interpreter runs; skips, or fails, where it cannot run."""
    if np.lib.NumpyVersion(np.__version__) < "2.4.0":
        return str(ROOT)
    if not (OVERLAY / "numpy").is_dir():
        needs.lacking(
            f"the interpreter of Triton {triton.__version__} does not know NumPy {np.__version__}: `make interpreter`, or pip install "
            "--no-deps --target .venv/interpreter 'numpy==2.3.5', makes this test run"
        )
    return f"{OVERLAY}{os.pathsep}{ROOT}"


def test_the_interpreted_kernels_give_what_torch_gives():
    """Runs `interpreted_kernels.py`."""
    how = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": interpreter_path()}
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
        cwd=ROOT,
        env=os.environ | how,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.parametrize("asked", ["CI", "FASTSSL_TEST_ALL", ""])
def test_without_its_numpy_the_interpreted_test_is_not_skipped_silently(monkeypatch, tmp_path, asked):
    for name in ("CI", "FASTSSL_TEST_ALL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(np, "__version__", "2.5.2")
    monkeypatch.setitem(globals(), "OVERLAY", tmp_path)
    monkeypatch.setattr(sys, "platform", "linux")
    if asked:
        monkeypatch.setenv(asked, "true" if asked == "CI" else "1")
    expected = pytest.fail.Exception if asked else pytest.skip.Exception
    with pytest.raises(expected, match="make interpreter"):
        interpreter_path()
    with pytest.raises(expected, match="no module_that_is_not"):
        needs.module("module_that_is_not")
    (tmp_path / "numpy").mkdir()
    assert interpreter_path().split(os.pathsep)[0] == str(tmp_path)


def test_chunks_cover_all_views_and_keep_the_limit():
    from pipelines.kernels.triton_crop import chunks

    heights = np.array([10, 20, 30, 500, 1, 1, 1], dtype=np.int32)
    cut = chunks(heights, row_bytes=3, limit=3 * 60)
    assert cut == [(0, 3, 60), (3, 4, 500), (4, 7, 3)]
    assert chunks(heights, row_bytes=3, limit=10**6) == [(0, 7, 563)]


def test_without_triton_a_warning_and_torchs_functions(monkeypatch):
    def no_compiler(*_):
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(kernel_choice, "on_device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(kernel_choice, "difference", no_compiler)
    kernel_choice.choose_kernels.cache_clear()
    with pytest.warns(UserWarning, match="Failed to find C compiler"):
        assert kernel_choice.choose_kernels(torch.device("cuda")) is torch_kernels
    monkeypatch.setattr(kernel_choice, "difference", lambda *_: 3.0)
    kernel_choice.choose_kernels.cache_clear()
    with pytest.warns(UserWarning, match=r"3\.00 levels off"):
        assert kernel_choice.choose_kernels(torch.device("cuda")) is torch_kernels
    kernel_choice.choose_kernels.cache_clear()
    assert kernel_choice.choose_kernels(torch.device("cpu")) is torch_kernels


def test_floats_are_tried_where_there_are_any(monkeypatch):
    monkeypatch.setattr(kernel_choice, "on_device", lambda device: contextlib.nullcontext())
    tried = []

    def difference(kernels, device, trial):
        tried.append(trial)
        return 0.0 if trial is kernel_choice.EIGHT_BIT else float("nan")

    monkeypatch.setattr(kernel_choice, "difference", difference)
    kernel_choice.choose_kernels.cache_clear()
    assert kernel_choice.choose_kernels(torch.device("cuda")) is not torch_kernels
    assert tried == [kernel_choice.EIGHT_BIT]
    with pytest.warns(UserWarning, match=r"on 16-bit RGB images they are nan levels off"):
        assert kernel_choice.choose_kernels(torch.device("cuda"), True) is torch_kernels
    assert tried == [kernel_choice.EIGHT_BIT, kernel_choice.EIGHT_BIT, *kernel_choice.IN_FLOATS]
    kernel_choice.choose_kernels.cache_clear()


LONGS, INTS, FLOATS, WORDS, BOOLS = "*i64", "*i32", "*fp32", "*u64", "*i1"
BLOCK = {"BLOCK": 1024}


def kernel_forms(image: str, view: str, channels: int) -> dict[str, tuple[list[str], dict]]:
    """Types of the arguments and constants of each kernel, for images and views of these types."""
    levels = [] if view == "*u8" else [FLOATS, FLOATS]
    none = {} if levels else {"gain": None, "offset": None}
    planes = {"CHANNELS": channels}
    crop = planes | {"COLUMNS": 256, "ROWS": 4, "CUBIC": True}
    colour = [view, LONGS, FLOATS, INTS, BOOLS, "i32"]
    drawn = [BOOLS, INTS, FLOATS, WORDS, FLOATS, FLOATS, FLOATS]
    return {
        "triton_crop._crop_x": ([image, LONGS, *levels, view, "i32"], none | crop),
        "triton_crop._crop_y": ([view, LONGS, view, "i32"], crop),
        "triton_colour._gray_before_contrast": (colour, planes | BLOCK),
        "triton_colour._colour": (colour, planes | BLOCK),
        "triton_kernels._box": (
            [view, view, LONGS, LONGS, LONGS, "i32"],
            planes | {"ALONG_X": True} | BLOCK,
        ),
        "triton_kernels._finish": ([view, "*bf16", *drawn, "i32"], planes | {"CHANNELS_LAST": True} | BLOCK),
    }


FORMS = [
    (name, *form)
    for kind in (("*u8", "*u8", 3), ("*u16", "*fp32", 3), ("*fp32", "*fp32", 13), ("*u8", "*fp32", 4))
    for name, form in kernel_forms(*kind).items()
]


@pytest.mark.parametrize(("name", "types", "constants"), FORMS, ids=str)
def test_kernels_compile_for_gpus(name, types, constants):
    """To machine code for Hopper; no multiply-add may be fused, which would round another way than PIL."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, kernel_name = name.split(".")
    kernel = getattr(importlib.import_module(f"pipelines.kernels.{module}"), kernel_name)
    given = iter(types)
    signature = {arg: "constexpr" if arg in constants else next(given) for arg in kernel.arg_names}
    assert not list(given)
    source = ASTSource(
        kernel, signature, {(kernel.arg_names.index(key),): value for key, value in constants.items()}
    )
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False})
    assert "fma.rn" not in made.asm["ptx"]
    assert len(made.asm["cubin"]) > 1000
