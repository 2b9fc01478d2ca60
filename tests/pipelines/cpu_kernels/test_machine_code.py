"""That the compiler turns the hot loops of the CPU's kernels into packed arithmetic, on processors with and without AVX-512.

A loop that it does not vectorise is right and several times slower, which no other test shows.
"""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests.needs import HANGS_S

ROOT = Path(__file__).parents[3]
AVX2 = "+avx2,+fma,+bmi,+bmi2,+lzcnt,+popcnt,+f16c,+movbe"
AVX512 = f"{AVX2},+avx512f,+avx512bw,+avx512dq,+avx512vl,+avx512cd"
# For each kernel the arithmetic without which its innermost loop is not the one meant.
KERNELS = {
    "colour.adjust_brightness": "mulps",
    "colour.adjust_contrast": "mulps",
    "colour.adjust_saturation": "mulps",
    "colour.adjust_hue": "divps",
    "colour.to_gray": "pmul",
    "colour.solarize": "psub|pxor|pandn",
    "colour._box_rows": "pmulld",
    "colour.finish": "mulps|fmadd",
    "crop._sum_lines": "pmulld",
    "float_views.adjust_brightness": "mulps",
}
# Compiles each kernel without its cache, which holds code for this machine, and prints what stands in its innermost loops.
SHOW = """
import json, re, sys
import numba
import numpy as np
from numba import types
from pipelines.augment.draws import DRAW
from pipelines.cpu_kernels import colour, crop, float_views

bytes3, floats3 = types.Array(types.uint8, 3, "C"), types.Array(types.float32, 3, "C")
flat, floats = types.Array(types.uint8, 1, "C"), types.Array(types.float32, 1, "C")
of_lines = (flat, types.intp, types.intp, types.intp, types.intp, types.Array(types.int32, 1, "C"), types.Array(types.int32, 2, "C"),
            types.intp, types.Array(types.int32, 1, "C"), flat)
takes = {
    "colour.to_gray": (bytes3,), "colour.solarize": (bytes3,), "crop._sum_lines": of_lines,
    "colour._box_rows": (flat, flat, types.intp, types.int32, types.uint32, types.uint32),
    "colour.finish": (bytes3, numba.from_dtype(DRAW), types.float32, floats, floats, floats, floats, floats3),
    "float_views.adjust_brightness": (floats3, types.float32),
}
found = {}
for name in json.loads(sys.argv[1]):
    module, kernel = name.split(".")
    function = numba.njit(nogil=True)(getattr(globals()[module], kernel).py_func)
    function.compile(takes.get(name, (bytes3, types.float32)))
    lines = [line.strip() for line in function.inspect_asm(function.signatures[0]).splitlines()]
    labels = {line[:-1]: number for number, line in enumerate(lines) if line.endswith(":")}
    jumps = [(labels[line.split()[-1]], number) for number, line in enumerate(lines)
             if re.match(r"j[a-z]+\\s", line) and labels.get(line.split()[-1], len(lines)) < number]
    innermost = [(a, b) for a, b in jumps if not any((c, d) != (a, b) and a <= c and d <= b for c, d in jumps)]
    found[name] = [[line for line in lines[a:b] if line.startswith("v")] for a, b in innermost]
print(json.dumps(found))
"""


@pytest.fixture(scope="module", params=["haswell", "skylake-avx512"])
def loops(request: pytest.FixtureRequest) -> dict[str, list[list[str]]]:
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the instructions are those of x86")
    features = AVX2 if request.param == "haswell" else AVX512
    target = {"NUMBA_CPU_NAME": request.param, "NUMBA_CPU_FEATURES": features, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", SHOW, json.dumps(list(KERNELS))],
        env=os.environ | target,
        capture_output=True,
        text=True,
        timeout=HANGS_S,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", KERNELS)
def test_an_innermost_loop_computes_with_whole_vectors(loops: dict[str, list[list[str]]], name: str) -> None:
    wanted = KERNELS[name].split("|")
    packed = [
        line
        for loop in loops[name]
        for line in loop
        if any(part in line.split()[0] for part in wanted) and ("%ymm" in line or "%zmm" in line)
    ]
    assert packed, f"no {KERNELS[name]} of 256 bits or more in the innermost loops of {name}"
