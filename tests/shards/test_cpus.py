from pathlib import Path

from shards.cpus import available_cpus, cpu_cores, cpu_quota


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


def test_as_many_workers_as_the_quota_allows(tmp_path: Path):
    assert available_cpus(tmp_path) == cpu_cores()
    for quota, expected in (("max", cpu_cores()), ("20000", 1), ("100000", 1), ("100000000", cpu_cores())):
        (tmp_path / "cpu.max").write_text(f"{quota} 100000\n")
        assert available_cpus(tmp_path) == expected
