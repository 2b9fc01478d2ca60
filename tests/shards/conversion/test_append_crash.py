"""An append that is killed at any step leaves the old set or the new one, and the same command finishes it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq

from shards import ShardSet, SplitRule, convert, inspect, open_split, split, verify
from shards.format import layout
from tests.pictures import fingerprints
from tests.shards.growing import begin, images

ROOT = Path(__file__).parents[3]

# Each line names a copy of the folder and the step at which a fork that appends to it is killed.
FORKS = """
import os, signal, sys
import pyarrow as pa
from shards.conversion import convert, shard_maker
from shards.commands import shard_command
from shards.format import checksums, columns, equal_hashes

pa.set_cpu_count(1)

def append(dest, kill_at):
    steps = 0
    def stepping(function):
        def run(*args, **options):
            nonlocal steps
            steps += 1
            if steps == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)
        return run
    os.fsync, os.replace = stepping(lambda descriptor: None), stepping(os.replace)
    shard_maker.prove = stepping(shard_maker.prove)
    convert.convert(sys.argv[1], dest, append=True, workers=0, dedupe="drop", samples_per_shard=5)
    return steps

for line in sys.stdin:
    dest, kill_at = line.rsplit(" ", 1)
    child = os.fork()
    if child == 0:
        steps = append(dest, int(kill_at))
        os._exit(steps)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def check_given_up(killed: Path, tmp_path: Path, begun: Path, shards: ShardSet) -> int:
    """Delete the plan of a killed append, as is advised, in a copy; whether the table held its rows already.

    The old set is read then, and another append goes as it would have without the first.
    """
    dest, rest = tmp_path / "given-up", {f"{layout.LOCK}-splits"}
    shutil.copytree(killed, dest)
    (dest / "plan-001.parquet").unlink(missing_ok=True)
    held = pq.read_metadata(dest / layout.TABLE).num_rows > 14
    again = ShardSet.open(dest)
    assert [again.read(i) for i in range(len(again))] == [shards.read(i) for i in range(14)]
    assert inspect(dest).manifest.num_samples == 14
    for finding in verify(dest).findings:
        assert finding.harmless or "is none of this conversion's shards" in finding.what, finding
    if held:
        images(tmp_path / "third", range(40, 44), "dog")
        shutil.copytree(tmp_path / "old", tmp_path / "straight", dirs_exist_ok=True)
        for folder in (dest, tmp_path / "straight"):
            convert(tmp_path / "third", folder, append=True, workers=0, dedupe="drop", samples_per_shard=5)
        wanted = fingerprints(tmp_path / "straight")
        assert {n: s for n, s in fingerprints(dest).items() if n not in rest} == wanted
        assert verify(dest).findings == []
        shutil.rmtree(tmp_path / "straight")
    shutil.rmtree(dest)
    return held


def test_killed_at_any_step_the_old_or_the_new_set_is_read_and_the_same_command_finishes(
    tmp_path: Path,
):
    begun = begin(tmp_path / "begun")
    convert(begun / "first", tmp_path / "old", samples_per_shard=5, workers=0, dedupe="drop")
    shutil.copytree(tmp_path / "old", tmp_path / "whole")
    program = subprocess.Popen(
        [sys.executable, "-c", FORKS, str(begun / "second")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert program.stdin
    assert program.stdout

    def forked(dest: Path, kill_at: int) -> int:
        assert program.stdin
        assert program.stdout
        program.stdin.write(f"{dest} {kill_at}\n")
        program.stdin.flush()
        return int(program.stdout.readline())

    with program:
        num_steps = forked(tmp_path / "whole", 0)
        wanted = fingerprints(tmp_path / "whole")
        sets = {14: ShardSet.open(tmp_path / "old"), 23: ShardSet.open(tmp_path / "whole")}
        seen, between, given_up = set(), 0, 0
        assert 40 < num_steps < 120
        # The last steps write table, checksums and manifest.
        for kill_at in (*range(1, num_steps - 12, 4), *range(num_steps - 12, num_steps + 1)):
            dest = tmp_path / f"at-{kill_at}"
            shutil.copytree(tmp_path / "old", dest)
            assert forked(dest, kill_at) == -9
            shards = ShardSet.open(dest)
            seen.add(len(shards))
            told = sets[len(shards)]
            assert [shards.read(i) for i in range(len(shards))] == [told.read(i) for i in range(len(told))]
            assert shards.labels.tolist() == told.labels.tolist()
            assert inspect(dest).manifest.num_samples == len(shards) == len(inspect(dest).widths)
            split(dest, SplitRule(val=0.5), "half")
            assert sum(len(open_split(dest, f"half/{name}")) for name in ("train", "val")) == len(shards)
            verdict = verify(dest)
            assert not verdict.damaged, verdict.findings
            between += pq.read_metadata(dest / layout.TABLE).num_rows > len(shards)
            (dest / layout.SPLITS).unlink()
            if len(shards) == 14:
                given_up += check_given_up(dest, tmp_path, begun, shards)
            convert(begun / "second", dest, append=True, workers=0, dedupe="drop", samples_per_shard=5)
            assert {n: s for n, s in fingerprints(dest).items() if n != f"{layout.LOCK}-splits"} == wanted
            shutil.rmtree(dest)
        assert seen == {14, 23}
        assert between >= 2
        assert given_up >= 2
        program.stdin.close()
