"""The benchmark ladder's way of going on after a failure."""

import sys

from tests import gpu_check


def test_a_failing_job_is_listed_and_does_not_stop_the_next(capfd):
    failed = gpu_check.run_jobs([["--version"], ["bench", "nothing"], ["bench", "--help"]])
    assert failed == ["fastssl bench nothing (exit code 2)"]
    out, err = capfd.readouterr()
    assert out.startswith("\n$ fastssl --version\nfastssl ")
    assert "usage: fastssl bench CONFIG" in out.partition("$ fastssl bench --help")[2]
    assert err.startswith("fastssl: There is no 'fastssl bench nothing'")


def test_a_job_that_a_signal_ends_is_listed(monkeypatch, tmp_path):
    fault = tmp_path / "python"
    fault.write_text("#!/bin/sh\nkill -SEGV $$\n")
    fault.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fault))
    assert gpu_check.run_jobs([["demo"]]) == ["fastssl demo (signal 11)"]
