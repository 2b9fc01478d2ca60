"""Limits of control groups: the tightest counts, whether it is the process's own group or one around it."""

from pathlib import Path

from shards.control_groups import NO_LIMIT, cpu_quota, memory_left, memory_limit

TWO = ("memory.max", "memory.current", "inactive_file")
ONE = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def group(folder: Path, limit: str, used: int, idle: int, names: tuple[str, str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {idle}\n")


def test_the_tightest_group_around_a_process_limits_its_memory(tmp_path: Path):
    group(tmp_path / "job", "1000", 700, 100, TWO)
    group(tmp_path / "job" / "step", "max", 50, 0, TWO)
    assert memory_left(tmp_path, "0::/job/step\n") == 1000 - 700 + 100
    assert memory_limit(tmp_path, "0::/job/step\n") == 1000
    assert memory_left(tmp_path, "0::/other\n") == memory_limit(tmp_path, "0::/other\n") == NO_LIMIT
    # In a container the path is one outside of it, and the group's files lie at the root.
    group(tmp_path, "600", 500, 0, TWO)
    assert memory_left(tmp_path, "0::/not/here\n") == 100
    assert memory_limit(tmp_path, "0::/not/here\n") == memory_limit(tmp_path, "") == 600
    group(tmp_path / "memory" / "job", "90", 40, 7, ONE)
    assert memory_left(tmp_path, "4:memory:/job\n3:cpuset:/\n") == 57
    assert memory_limit(tmp_path, "4:memory:/job\n3:cpuset:/\n") == 90
    assert memory_limit(tmp_path, "4:memory:/\n3:cpuset:/job\n") == 600


def test_quota_of_control_groups(tmp_path: Path):
    assert cpu_quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cpu_quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("250000 100000\n")
    assert cpu_quota(tmp_path) == 2.5
    old = tmp_path / "v1"
    (old / "cpu").mkdir(parents=True)
    (old / "cpu/cpu.cfs_period_us").write_text("100000\n")
    for quota, expected in (("-1", None), ("400000", 4.0)):
        (old / "cpu/cpu.cfs_quota_us").write_text(quota)
        assert cpu_quota(old) == expected


def test_the_tightest_group_around_a_process_limits_its_cpu_time(tmp_path: Path):
    (tmp_path / "slice" / "job").mkdir(parents=True)
    (tmp_path / "slice" / "job" / "cpu.max").write_text("max 100000\n")
    (tmp_path / "slice" / "cpu.max").write_text("150000 100000\n")
    assert cpu_quota(tmp_path, "0::/slice/job\n") == 1.5
    assert cpu_quota(tmp_path, "0::/\n") is None
    (tmp_path / "cpu" / "job").mkdir(parents=True)
    (tmp_path / "cpu" / "job" / "cpu.cfs_quota_us").write_text("50000\n")
    (tmp_path / "cpu" / "job" / "cpu.cfs_period_us").write_text("100000\n")
    assert cpu_quota(tmp_path, "7:cpu,cpuacct:/job\n0::/slice/job\n") == 0.5
