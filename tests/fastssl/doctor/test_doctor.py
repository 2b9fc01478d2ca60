"""`fastssl doctor`: each check on made-up facts, the gathering of real ones, and the command."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from fastssl.doctor import checks, facts
from fastssl.doctor.facts import DataSet, Facts, Gpu

GB = 10**9
H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 80 * GB, 79 * GB)
GOOD = Facts(
    packages={
        "torch": "2.14.1",
        "torchvision": "0.29.1",
        "triton": "3.8.0",
        "nvidia-dali-cuda120": "2.4.0",
        "nvidia-nvimgcodec-cu12": "0.9.1.3",
    },
    torch_cuda="13.0",
    torch_archs=("sm_80", "sm_90", "sm_120"),
    driver="580.95",
    driver_cuda=(13, 0),
    num_gpu_files=1,
    gpus=(H100,),
    c_compiler="gcc",
    cpp_compiler="g++",
    shm_bytes=8 * GB,
    open_files=(1024, 65536),
    disks={"runs": 500 * GB},
    cpus=16,
    memory_bytes=128 * GB,
    kernel_cache="pipelines/kernels/__pycache__",
    data=DataSet("d", num_samples=9, num_shards=3, bytes=900),
)


def judged(check, **changes):
    """What `check` says of the good facts with some changes: (level, everything said)."""
    findings = list(check(dataclasses.replace(GOOD, **changes)))
    return [(f.level, f"{f.check}: {f.found} -> {f.way_out}") for f in findings]


def without(package):
    return {"packages": {name: version for name, version in GOOD.packages.items() if name != package}}


def test_a_good_machine_has_nothing_to_look_at():
    findings = checks.examine(GOOD)
    assert {f.level for f in findings} == {"ok"}
    assert not any(f.way_out for f in findings)
    assert len(findings) == len(checks.CHECKS)  # one line a check


def test_a_machine_without_a_gpu_needs_no_gpu_library():
    packages = {"torch": "2.14.1", "torchvision": "0.29.1"}
    machine = dataclasses.replace(
        GOOD, packages=packages, driver=None, driver_cuda=None, num_gpu_files=0, gpus=(), c_compiler=None
    )
    findings = checks.examine(machine)
    assert [f for f in findings if f.level != "ok" or f.way_out] == []
    assert not any("fail" in f.found for f in findings)


def test_a_torch_that_cannot_be_imported_says_nothing_about_its_build():
    broken = dataclasses.replace(GOOD, import_error="RuntimeError: operator nms", torch_cuda=None, gpus=())
    lines = {f.check: f.level for f in checks.examine(broken)}
    assert lines["torch"] == "bad"
    assert "driver" not in lines
    assert "GPU" not in lines


@pytest.mark.parametrize(
    ("check", "changes", "level", "words"),
    [
        (checks.check_torch, {"import_error": "RuntimeError: operator nms"}, "bad", "operator nms"),
        (checks.check_driver, {"torch_cuda": None}, "bad", "without CUDA"),
        (
            checks.check_driver,
            {"torch_cuda": None, "driver": None, "driver_cuda": None, "num_gpu_files": 0},
            "ok",
            "on the CPU",
        ),
        (
            checks.check_driver,
            {"driver": None, "driver_cuda": None, "num_gpu_files": 0},
            "ok",
            "--gpus all",
        ),
        (
            checks.check_kernel_cache,
            {"kernel_cache": "/tmp/k", "kernel_cache_lasts": False},
            "warn",
            "'/tmp/k' -> set NUMBA_CACHE_DIR",
        ),
        (
            checks.check_kernel_cache,
            {"kernel_cache": "", "kernel_cache_lasts": False},
            "warn",
            "each start compiles the kernels -> set NUMBA_CACHE_DIR",
        ),
        (
            checks.check_kernel_cache,
            {"numba_error": "ImportError: llvmlite"},
            "bad",
            "llvmlite -> pip install numba",
        ),
        (checks.check_rasters, {}, "ok", "rasterio: not installed; for GeoTIFF scenes: pip install rasterio"),
        (checks.check_rasters, {"packages": {"rasterio": "1.4.4"}}, "ok", "rasterio: 1.4.4"),
        (checks.check_driver, {"driver_cuda": (12, 8)}, "bad", "install a torch for CUDA 12"),
        (checks.check_driver, {"torch_cuda": "13.2"}, "warn", "minor version"),
        (checks.check_gpus, {"gpus": (), "visible_devices": ""}, "bad", "unset it"),
        (checks.check_gpus, {"gpus": (), "cuda_error": "out of luck"}, "bad", "out of luck"),
        (checks.check_gpus, {"torch_archs": ("sm_80", "sm_120")}, "bad", "is sm_90"),
        (checks.check_gpus, {"gpus": (dataclasses.replace(H100, free_bytes=9 * GB),)}, "warn", "nvidia-smi"),
        (
            checks.check_gpus,
            {"gpus": (dataclasses.replace(H100, capability=(12, 0)),)},
            "warn",
            "LichtFeld-Studio/pull/1924",
        ),
        (checks.check_compiler, {"c_compiler": None}, "warn", "apt-get install gcc"),
        (checks.check_compiler, {"gpus": (), "cpp_compiler": None}, "warn", "apt-get install g++"),
        (checks.check_compiler, without("triton"), "warn", "no Triton"),
        (checks.check_compiler, {"python_headers": False}, "warn", f"python3.{sys.version_info[1]}-dev"),
        (checks.check_shared_memory, {"shm_bytes": 64 * 2**20}, "warn", "--shm-size"),
        (checks.check_open_files, {"open_files": (256, 500)}, "bad", "515 are needed"),
        (checks.check_open_files, {"open_files": (1024, 4000)}, "warn", "ulimit -Hn"),
        (checks.check_open_files, {"open_files": (1024, -1)}, "ok", "no limit"),
        (checks.check_disks, {"disks": {"runs": GB // 2}}, "bad", "500.0 MB free in 'runs'"),
        (checks.check_disks, {"disks": {"runs": 10 * GB}}, "warn", "--train.out"),
        (checks.check_cores, {"cpu_quota": 4.0}, "warn", "OMP_NUM_THREADS=4"),
        (checks.check_cores, {"cpus": 2}, "warn", "2 cores for 1 GPUs"),
        (checks.check_memory, {"memory_bytes": 2 * GB}, "warn", "train.batch"),
        (
            checks.check_memory,
            {"memory_bytes": 4 * GB, "data": DataSet("d", bytes=9 * GB)},
            "warn",
            "do not fit",
        ),
        (checks.check_data, {"data": DataSet("d", error="no folder")}, "bad", "no folder"),
    ],
)
def test_each_check_sees_its_fault(check, changes, level, words):
    said = judged(check, **changes)
    assert any(found == level and words in text for found, text in said), said
    if level != "ok":
        assert all(" -> " in text and not text.endswith("-> ") for found, text in said if found != "ok")


def test_code_for_a_gpu():
    assert checks.runs_on(("sm_90",), (9, 0))
    assert checks.runs_on(("sm_80",), (8, 6))
    assert not checks.runs_on(("sm_86",), (8, 0))
    assert not checks.runs_on(("sm_80",), (9, 0))
    assert checks.runs_on(("compute_80",), (9, 0))
    assert checks.runs_on(("sm_90a",), (9, 0))
    assert not checks.runs_on(("sm_120",), (10, 0))


# ------------------------------------------------------------------------------------------------------ gathering


def test_command_on_this_machine(shards, tmp_path, capsys):
    from fastssl.cli import main

    path = tmp_path / "doctor.json"
    code = main(["doctor", str(shards), "--out", str(tmp_path), "--json", str(path)])
    report = json.loads(path.read_text())
    levels = {f["level"] for f in report["findings"]}
    assert code == ("bad" in levels)
    names = [f["check"] for f in report["findings"]]
    assert names[0] == "torch"
    assert report["findings"][0]["level"] == "ok"
    assert report["facts"]["memory_bytes"] > 10**8
    assert report["facts"]["packages"]["torch"]
    [cache] = [f for f in report["findings"] if f["check"] == "kernel cache"]
    assert (cache["level"], Path(cache["found"]).is_dir()) == ("ok", True)
    [data] = [f for f in report["findings"] if f["check"] == "shards"]
    assert data["level"] == "ok"
    assert "60 images in 3 shards" in data["found"]
    assert "60 images" in " ".join(capsys.readouterr().out.split())


def test_memory_is_the_control_groups_where_that_is_less(monkeypatch):
    monkeypatch.setattr(facts, "memory_limit", lambda: 12345)
    assert facts.gather().memory_bytes == 12345


def test_damaged_shards_make_the_exit_code_1(shards, tmp_path, capsys):
    import shutil

    from fastssl.doctor.doctor_command import run

    copy = tmp_path / "shards"
    shutil.copytree(shards, copy)
    tar = next(Path(copy).glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:-512])
    size = tar.stat().st_size
    assert (
        f"{tar.name}' has {size:,} bytes and should have {size + 512:,}"
        in facts.open_data_set(str(copy)).error
    )
    assert run([str(copy)]) == 1
    shown = "".join(capsys.readouterr().out.split())
    assert f"{tar.name}'has{size:,}bytesandshouldhave{size + 512:,}" in shown
    assert "no folder" in facts.open_data_set(str(tmp_path / "none")).error
