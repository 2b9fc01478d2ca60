"""`fastssl doctor`: each check on made-up facts, the gathering of real ones, and the command."""

import dataclasses
import json
from pathlib import Path

import pytest

from fastssl.doctor import checks, facts, faults, host
from fastssl.doctor.facts import DataSet, Facts, Gpu

GB = 10**9
H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 80 * GB, 79 * GB, numa_node=0)
GOOD = Facts(
    packages={
        "torch": "2.14.1",
        "torchvision": "0.29.1",
        "timm": "1.0.31",
        "numba": "0.68.1",
        "pyarrow": "26.0",
        "pillow": "13.0.0",
        "triton": "3.8.0",
        "nvidia-dali-cuda120": "2.4.0",
        "nvidia-nvimgcodec-cu12": "0.9.1.3",
    },
    requirements={"torchvision": ["numpy", "torch==2.14.1", "pillow!=8.3.*,>=5.3.0"]},
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
    now_s=1_795_000_000.0,
    newest_package_s=1_794_000_000.0,
    data=DataSet(
        "d", num_samples=9, num_shards=3, bytes=900, table_rows=9, max_pixels=9, written_s=1_794_000_000.0
    ),
)


def judged(check, **changes):
    """What `check` says of the good facts with some changes: (level, everything said)."""
    findings = list(check(dataclasses.replace(GOOD, **changes)))
    return [(f.level, f"{f.check}: {f.found} -> {f.way_out}") for f in findings]


def packages(**changes):
    return {"packages": {**GOOD.packages, **{k.replace("_", "-"): v for k, v in changes.items()}}}


def test_a_good_machine_has_nothing_to_look_at():
    findings = checks.examine(GOOD)
    assert {f.level for f in findings} == {"ok"}
    assert not any(f.way_out for f in findings)
    # One line a check; a machine with one memory node has no line on NUMA, and known faults are told only where there are some.
    assert len(findings) == len(checks.CHECKS) - 2


@pytest.mark.parametrize(
    ("check", "changes", "level", "words"),
    [
        (checks.check_torch, packages(torchvision="0.28.0"), "bad", "torchvision==0.29.*"),
        (checks.check_torch, packages(torchvision=None), "bad", "install both"),
        (checks.check_torch, {"import_fault": "RuntimeError: operator nms"}, "bad", "operator nms"),
        (checks.check_torch, packages(torch="3.0.0"), "ok", "torch 3.0.0"),
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
            "warn",
            "--gpus all",
        ),
        (checks.check_driver, {"driver_cuda": (12, 8)}, "bad", "install a torch for CUDA 12"),
        (checks.check_driver, {"torch_cuda": "13.2"}, "warn", "minor version"),
        (checks.check_gpus, {"gpus": (), "visible_devices": ""}, "bad", "unset it"),
        (checks.check_gpus, {"gpus": (), "cuda_fault": "out of luck"}, "bad", "out of luck"),
        (checks.check_gpus, {"torch_archs": ("sm_80", "sm_120")}, "bad", "is sm_90"),
        (checks.check_gpus, {"gpus": (dataclasses.replace(H100, free_bytes=9 * GB),)}, "warn", "nvidia-smi"),
        (
            checks.check_gpus,
            {"gpus": (dataclasses.replace(H100, throttled="heat"),)},
            "warn",
            "held down: heat",
        ),
        (
            checks.check_gpus,
            {"gpus": (dataclasses.replace(H100, capability=(7, 5)),), "torch_archs": ()},
            "warn",
            "no bf16",
        ),
        (
            checks.check_gpus,
            {"gpus": (dataclasses.replace(H100, capability=(12, 0)),)},
            "warn",
            "LichtFeld-Studio/pull/1924",
        ),
        (checks.check_compiler, {"c_compiler": None}, "warn", "apt-get install gcc"),
        (checks.check_compiler, {"gpus": (), "cpp_compiler": None}, "warn", "apt-get install g++"),
        (checks.check_compiler, packages(triton=None), "warn", "no Triton"),
        (checks.check_compiler, {"python_headers": False}, "warn", "python3.11-dev"),
        (host.check_shared_memory, {"shm_bytes": 64 * 2**20}, "warn", "--shm-size"),
        (host.check_open_files, {"open_files": (256, 500)}, "bad", "515 are needed"),
        (host.check_open_files, {"open_files": (1024, 4000)}, "warn", "ulimit -Hn"),
        (host.check_open_files, {"open_files": (1024, -1)}, "ok", "no limit"),
        (host.check_disks, {"disks": {"runs": GB // 2}}, "bad", "500.0 MB free in 'runs'"),
        (host.check_disks, {"disks": {"runs": 10 * GB}}, "warn", "--train.out"),
        (host.check_cores, {"cpu_quota": 4.0}, "warn", "OMP_NUM_THREADS=4"),
        (host.check_cores, {"cpus": 2}, "warn", "2 cores for 1 GPUs"),
        (host.check_memory, {"memory_bytes": 2 * GB}, "warn", "train.batch"),
        (
            host.check_memory,
            {"memory_bytes": 4 * GB, "data": DataSet("d", bytes=9 * GB)},
            "warn",
            "do not fit",
        ),
        (host.check_numa, {"numa_nodes": 2, "process_node": 1}, "warn", "numactl --cpunodebind 0"),
        (host.check_numa, {"numa_nodes": 2, "process_node": 0}, "ok", "GPUs on 0"),
        (host.check_clock, {"now_s": 1_700_000_000.0}, "bad", "packages were installed at 2026-11"),
        (host.check_data, {"data": DataSet("d", fault="no folder")}, "bad", "no folder"),
        (
            host.check_data,
            {"data": DataSet("d", num_samples=9, table_rows=8)},
            "bad",
            "8 rows, the manifest 9",
        ),
        (host.check_data, {"data": DataSet("d", wrong=("a", "b", "c", "d"))}, "bad", "a, b, c and 1 more"),
        (host.check_data, {"data": DataSet("d", no_index=("a.idx",))}, "warn", "a.idx"),
        (host.check_data, {"data": DataSet("d", max_pixels=10**8)}, "warn", "100 million pixels"),
    ],
)
def test_each_check_sees_its_fault(check, changes, level, words):
    said = judged(check, **changes)
    assert any(found == level and words in text for found, text in said), said
    if level != "ok":
        assert all(" -> " in text and not text.endswith("-> ") for found, text in said if found != "ok")


def test_requirements_between_packages_are_checked():
    [(level, text), _] = judged(checks.check_requirements, **packages(torch="2.13.0"))
    assert level == "bad"
    assert "torchvision 0.29.1 wants torch ==2.14.1, found 2.13.0" in text
    assert judged(checks.check_requirements, requirements={"timm": ['torch<1; extra == "old"']})[0][0] == "ok"
    assert "missing: timm" in judged(checks.check_requirements, **packages(timm=None))[0][1]


def test_known_faults_go_by_the_release_without_its_build_number():
    assert [f.source for f in faults.faults_of("nvidia-nvimgcodec-cu12", "0.9.0.20")] == [
        "https://github.com/NVIDIA/nvImageCodec/issues/55"
    ]
    assert faults.faults_of("nvidia-nvimgcodec-cu13", "0.9.1.7") == []
    assert faults.faults_of("nvidia-dali-cuda130", "2.4.0") == []
    assert [f.level for f in faults.faults_of("nvidia-dali-cuda120", "2.1.1")] == ["warn", "warn", "bad"]
    assert faults.faults_of("nvidia-dali-tf-plugin-cuda120", "1.0.0") == []
    assert faults.faults_of("kornia", "not a version") == []
    [(level, text)] = judged(checks.check_known_faults, **packages(nvidia_nvimgcodec_cu12="0.9.0.20"))
    assert level == "warn"
    assert "region" in text
    for fault in faults.FAULTS:
        assert fault.source.startswith("https://github.com/")


def test_code_for_a_gpu():
    assert checks.runs_on(("sm_90",), (9, 0))
    assert checks.runs_on(("sm_80",), (8, 6))
    assert not checks.runs_on(("sm_86",), (8, 0))
    assert not checks.runs_on(("sm_80",), (9, 0))
    assert checks.runs_on(("compute_80",), (9, 0))
    assert checks.runs_on(("sm_90a",), (9, 0))
    assert not checks.runs_on(("sm_120",), (10, 0))


# ------------------------------------------------------------------------------------------------------ gathering


def test_lists_of_cores():
    assert facts.numbers("0-3,8\n") == {0, 1, 2, 3, 8}
    assert facts.numbers("") == set()


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
    [data] = [f for f in report["findings"] if f["check"] == "shards"]
    assert data["level"] == "ok"
    assert "60 images in 3 shards" in data["found"]
    assert "60 images" in " ".join(capsys.readouterr().out.split())


def test_damaged_shards_make_the_exit_code_1(shards, tmp_path, capsys):
    import shutil

    from fastssl.doctor.doctor_command import run

    copy = tmp_path / "shards"
    shutil.copytree(shards, copy)
    tar = next(Path(copy).glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:-512])
    assert facts.look_at(str(copy)).wrong == (tar.name,)
    assert run([str(copy)]) == 1
    assert f"another size: {tar.name}" in " ".join(capsys.readouterr().out.split())
    assert "no folder" in facts.look_at(str(tmp_path / "none")).fault
