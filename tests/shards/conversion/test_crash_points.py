"""A conversion killed at points drawn at random, in a process with a file size limit, in a folder that may not be written.

Every case runs in a fork of one process that has imported everything, so that a hundred conversions take seconds.
"""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shards.conversion.convert import convert
from shards.format import layout
from tests.pictures import encoded, fingerprints, picture

ROOT = Path(__file__).parents[3]
PER_SHARD = 4
KILLS = 14

# Each line of the plan is one fork: {"source", "dest", then what is to be done}. Prints what became of each.
FORKS = """
import json, os, random, resource, signal, sys
import pyarrow as pa
from shards import convert, files, make, merge, write
from shards.errors import UserError

pa.set_cpu_count(1)

def conversion(todo):
    steps = 0
    def step():
        nonlocal steps
        steps += 1
        if steps == todo.get("kill_at"):
            os.kill(os.getpid(), signal.SIGKILL)
    def stepping(function):
        def run(*args, **options):
            step()
            result = function(*args, **options)
            step()
            return result
        return run
    # Killed is not powered off: the disk need not be waited for.
    os.fsync, os.replace = stepping(lambda descriptor: None), stepping(os.replace)
    make.prove = stepping(make.prove)
    write.header = stepping(write.header)
    if "limit_bytes" in todo:
        resource.setrlimit(resource.RLIMIT_FSIZE, (todo["limit_bytes"],) * 2)
    if todo.get("folder"):
        os.chdir(todo["folder"])
    if todo.get("user"):
        os.setgid(todo["user"])
        os.setuid(todo["user"])
    try:
        convert.convert(todo["source"], todo["dest"], samples_per_shard=4, workers=0, dedupe="drop")
    except UserError as fault:
        return str(fault)
    return steps

# Once here, so that all that is imported late is there before the first fork.
convert.convert(sys.argv[1], sys.argv[2], samples_per_shard=4, workers=0, dedupe="drop")
print(flush=True)
for line in sys.stdin:
    todo = json.loads(line)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, json.dumps(conversion(todo)).encode())
        os._exit(0)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    with open(reader, "rb") as pipe:
        told = pipe.read()
    print(json.dumps({"signal": os.WTERMSIG(status), "told": json.loads(told) if told else None}), flush=True)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("crash") / "photos"
    for i in range(18):
        path = folder / ("ant", "bee")[i % 2] / f"{i:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(i % 15), "JPEG"))
    (folder / "bad.jpg").write_bytes(b"text")
    return folder


@pytest.fixture(scope="module")
def wanted(source: Path) -> dict[str, str]:
    dest = source.parent / "wanted"
    convert(source, dest, samples_per_shard=PER_SHARD, workers=0, dedupe="drop")
    return fingerprints(dest)


@pytest.fixture(scope="module")
def forks(source: Path) -> Iterator[Callable[[list[dict[str, Any]]], list[dict[str, Any]]]]:
    command = [sys.executable, "-c", FORKS, str(source), str(source.parent / "first")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdin
        assert process.stdout
        send, receive = process.stdin, process.stdout
        assert receive.readline() == "\n"

        def run(todo: list[dict[str, Any]]) -> list[dict[str, Any]]:
            told = []
            for one in todo:
                send.write(json.dumps({"source": str(source)} | one) + "\n")
                send.flush()
                told.append(json.loads(receive.readline()))
            return told

        yield run
        send.close()


def test_killed_at_random_points_the_files_are_those_of_an_uninterrupted_run(
    forks, wanted: dict[str, str], tmp_path: Path
):
    (first,) = forks([{"dest": str(tmp_path / "whole")}])
    num_steps = first["told"]
    assert num_steps > 150
    assert fingerprints(tmp_path / "whole") == wanted
    rng = random.Random(3)
    # Also the last steps, where table, checksums and manifest are written.
    points = [*rng.sample(range(1, num_steps), KILLS - 6), *range(num_steps - 11, num_steps, 2)][:KILLS]
    todo: list[dict[str, Any]] = []
    for number, point in enumerate(points):
        dest = str(tmp_path / f"{number}")
        todo += [{"dest": dest, "kill_at": point}, {"dest": dest, "kill_at": rng.randrange(1, num_steps)}]
        todo.append({"dest": dest})
    told = forks(todo)
    for number in range(len(points)):
        killed, _, last = told[3 * number : 3 * number + 3]
        assert killed == {"signal": 9, "told": None}
        assert last["signal"] == 0
        assert fingerprints(tmp_path / f"{number}") == wanted, points[number]


def test_a_manifest_is_there_only_when_all_else_is(forks, wanted: dict[str, str], tmp_path: Path):
    (first,) = forks([{"dest": str(tmp_path / "whole")}])
    points = range(1, first["told"], 23)
    forks([{"dest": str(tmp_path / f"{point}"), "kill_at": point} for point in points])
    for point in points:
        left = fingerprints(tmp_path / f"{point}") if (tmp_path / f"{point}").exists() else {}
        if layout.MANIFEST in left:
            assert {
                name: digest for name, digest in left.items() if not name.startswith(layout.ROWS)
            } == wanted


@pytest.mark.parametrize("limit_bytes", [700, 9000, 15_000])
def test_a_file_that_grows_too_large_is_told_and_what_is_finished_stays(
    forks, wanted: dict[str, str], tmp_path: Path, limit_bytes: int
):
    dest = str(tmp_path / "out")
    limited, after = forks([{"dest": dest, "limit_bytes": limit_bytes}, {"dest": dest}])
    assert limited["signal"] == 0
    assert "became larger than its file system or this shell (ulimit -f) allows" in limited["told"]
    assert after["signal"] == 0
    assert fingerprints(tmp_path / "out") == wanted


def test_a_folder_that_may_not_be_written_is_told(
    forks, wanted: dict[str, str], source: Path, tmp_path: Path
):
    tmp_path.chmod(0o755)
    out = tmp_path / "out"
    out.mkdir()
    out.chmod(0o555)
    shutil.copytree(source, tmp_path / "photos")
    away = {"folder": str(tmp_path), "source": "photos"} | ({"user": 65534} if os.geteuid() == 0 else {})
    (refused,) = forks([away | {"dest": "out"}])
    assert refused["signal"] == 0
    assert "'out' cannot be written (Permission denied); choose another DEST" in refused["told"]
    assert list(out.iterdir()) == []
    out.chmod(0o755)
    forks([{"dest": str(out)}])
    assert fingerprints(out) == wanted
