from pathlib import Path

from shards.cpus import available_cpus, cpu_cores


def test_as_many_workers_as_the_quota_allows(tmp_path: Path):
    assert available_cpus(tmp_path) == cpu_cores()
    for quota, expected in (("max", cpu_cores()), ("20000", 1), ("100000", 1), ("100000000", cpu_cores())):
        (tmp_path / "cpu.max").write_text(f"{quota} 100000\n")
        assert available_cpus(tmp_path) == expected
