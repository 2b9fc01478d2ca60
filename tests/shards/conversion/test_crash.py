"""A conversion that is killed, runs out of disk or is interrupted ends with the same bytes when run again."""

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shards.conversion.convert import OnProgress, convert
from shards.errors import UserError
from shards.format import layout
from tests.pictures import fingerprints

ROOT = Path(__file__).parents[3]
NUM_IMAGES = 48
PER_SHARD = 4

# Slowed down, so that it can be caught at work on a fast machine too.
SLOW = """
import sys, time
from shards.conversion import convert
from shards.conversion import shard_maker as make
prove = make.prove
def slowly(*args, **options):
    time.sleep(0.02)
    return prove(*args, **options)
make.prove = slowly
convert.convert(sys.argv[1], sys.argv[2], samples_per_shard=int(sys.argv[3]), workers=0)
"""
IN_PROCESSES = """
import sys
from shards.conversion.convert import convert
if __name__ == "__main__":
    convert(sys.argv[1], sys.argv[2], samples_per_shard=int(sys.argv[3]), workers=2)
"""


@pytest.fixture
def source(make_folder) -> Path:
    folder = make_folder(NUM_IMAGES)
    (folder / "ant" / "bad.jpg").write_bytes(b"text")
    return folder


@pytest.fixture
def wanted(source: Path, tmp_path: Path) -> dict[str, str]:
    convert(source, tmp_path / "wanted", samples_per_shard=PER_SHARD)
    return fingerprints(tmp_path / "wanted")


def start(program: str, source: Path, dest: Path, tmp_path: Path) -> subprocess.Popen:
    script = tmp_path / "program.py"
    script.write_text(program)
    command = [sys.executable, str(script), str(source), str(dest), str(PER_SHARD)]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)


def wait_for_shards(process: subprocess.Popen, dest: Path, num_shards: int) -> None:
    while len(list((dest / layout.ROWS).glob("*.parquet"))) < num_shards:
        assert process.poll() is None, "the converter ended before it could be killed"
        time.sleep(0.002)


@pytest.mark.parametrize("num_shards", [0, 1, 5, 12])
def test_killed_at_any_point_the_same_command_ends_with_the_same_bytes(
    source: Path, wanted: dict[str, str], tmp_path: Path, num_shards: int
):
    dest = tmp_path / "out"
    process = start(SLOW, source, dest, tmp_path)
    if num_shards:
        wait_for_shards(process, dest, num_shards)
    else:
        while not (dest / layout.LOCK).exists():
            time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (dest / layout.MANIFEST).exists()
    kept = {path: path.stat().st_mtime_ns for path in (dest / layout.ROWS).glob("*.parquet")}

    first_progress = []
    convert(
        source,
        dest,
        samples_per_shard=PER_SHARD,
        report=OnProgress(lambda done, *_: first_progress.append(done)),
    )
    assert fingerprints(dest) == wanted
    assert min(first_progress) >= PER_SHARD * (len(kept) - 1)


def test_killed_with_worker_processes(source: Path, wanted: dict[str, str], tmp_path: Path):
    dest = tmp_path / "out"
    process = start(IN_PROCESSES, source, dest, tmp_path)
    wait_for_shards(process, dest, 1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    convert(source, dest, samples_per_shard=PER_SHARD)
    assert fingerprints(dest) == wanted


def test_a_full_disk_keeps_what_is_whole(
    source: Path, wanted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    dest = tmp_path / "out"
    flush = os.fsync

    def attempt() -> str | None:
        try:
            convert(source, dest, samples_per_shard=PER_SHARD)
        except UserError as fault:
            return str(fault)

    for free in range(3, 90, 7):
        left = free

        def fail_later(descriptor: int):
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            flush(descriptor)

        monkeypatch.setattr(os, "fsync", fail_later)
        before = fingerprints(dest) if dest.exists() else {}
        fault = attempt()
        if fault is None:
            break
        assert "The disk is full" in fault
        after = fingerprints(dest)
        assert not [name for name in after if name.endswith(".fastssl-tmp")]
        assert {name: after.get(name) for name in before} == before
    assert free > 3
    assert fingerprints(dest) == wanted


def test_an_interrupt_stops_the_workers_and_keeps_what_is_finished(
    source: Path, wanted: dict[str, str], tmp_path: Path
):
    dest = tmp_path / "out"

    def interrupt(done: int, total: int, quarantined: int):
        if done >= 2 * PER_SHARD:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, dest, samples_per_shard=PER_SHARD, workers=2, report=OnProgress(interrupt))
    assert not list(dest.glob(".*.fastssl-tmp"))
    assert list((dest / layout.ROWS).glob("*.parquet"))
    convert(source, dest, samples_per_shard=PER_SHARD)
    assert fingerprints(dest) == wanted


def test_errors_of_workers_arrive(source: Path, tmp_path: Path):
    dest = tmp_path / "out"

    def lose_folder(done: int, total: int, quarantined: int):
        if source.exists():
            source.rename(tmp_path / "away")

    with pytest.raises(UserError, match="is no longer there"):
        convert(source, dest, samples_per_shard=2, workers=1, report=OnProgress(lose_folder))


def test_a_worker_killed_from_outside_is_reported(source: Path, tmp_path: Path):
    def kill(done: int, total: int, quarantined: int):
        for worker in multiprocessing.active_children():
            worker.kill()

    with pytest.raises(UserError, match=r"stopped from outside \(exit code -9\).*fewer workers"):
        convert(source, tmp_path / "out", samples_per_shard=2, workers=1, report=OnProgress(kill))


@pytest.mark.parametrize("damage", ["missing", "cut", "index", "table", "before rows were removed"])
def test_a_damaged_data_set_is_mended(source: Path, wanted: dict[str, str], tmp_path: Path, damage: str):
    dest = tmp_path / "wanted"
    tar = dest / layout.shard_name(3)
    if damage == "missing":
        tar.unlink()
    elif damage == "cut":
        tar.write_bytes(tar.read_bytes()[:-1])
    elif damage == "index":
        (dest / layout.index_name(3)).unlink()
    elif damage == "table":
        (dest / layout.TABLE).unlink()
    else:
        (dest / layout.ROWS).mkdir()
        (dest / layout.ROWS / layout.rows_name(0)).write_bytes(b"")
    convert(source, dest, samples_per_shard=PER_SHARD)
    assert fingerprints(dest) == wanted


def test_a_shard_whose_images_changed_cannot_be_mended(source: Path, wanted: dict[str, str], tmp_path: Path):
    dest = tmp_path / "wanted"
    (dest / layout.shard_name(0)).unlink()
    for path in source.rglob("*.jpg"):
        path.write_bytes(b"z" * path.stat().st_size)
    with pytest.raises(UserError, match=r"shard-000000\.tar' was missing.*have changed since"):
        convert(source, dest, samples_per_shard=PER_SHARD)
    assert not (dest / layout.shard_name(0)).exists()


@pytest.mark.parametrize("guarded", [False, True])
def test_workers_do_not_run_the_script_that_starts_them(source: Path, tmp_path: Path, wanted, guarded: bool):
    """Python's own processes import the script again, which would start a conversion in each worker."""
    guard = 'if __name__ == "__main__":\n    ' if guarded else ""
    program = f"""
import sys
from shards import convert
print("the script runs")
{guard}convert(sys.argv[1], sys.argv[2], samples_per_shard=int(sys.argv[3]), workers=2)
"""
    script = tmp_path / "program.py"
    script.write_text(program)
    done = subprocess.run(
        [sys.executable, str(script), str(source), str(tmp_path / "out"), str(PER_SHARD)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout.count("the script runs")) == (0, 1), done.stderr
    assert fingerprints(tmp_path / "out") == wanted
