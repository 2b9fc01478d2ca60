"""Shards made on a Ray cluster. Ray runs in processes of their own: it warns and leaves threads behind."""

import builtins
import importlib.util
import os
import pickle
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from shards.commands.shard_command import run
from shards.conversion import ray_workers
from shards.conversion.convert import convert
from shards.conversion.ray_workers import ShardJob, check_node, find_probe
from shards.conversion.shard_maker import Maker
from shards.conversion.shard_plan import read_plan
from shards.errors import UserError
from shards.format import layout
from shards.images.policy import Policy
from shards.sources.image_folder import FolderSource
from shards.storage.local import LocalPlace
from shards.storage.opening import open_place
from tests.needs import HANGS_S
from tests.pictures import fingerprints

ROOT = Path(__file__).parents[3]
NUM_IMAGES = 60
PER_SHARD = 5
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")

# Two nodes of one CPU. The second hangs in the midst of its second or third shard until it is killed; the other waits for that before
# its sixth: so there always is a task to be lost.
CLUSTER = """
import os, sys, time
import ray
from ray.cluster_utils import Cluster
from shards.conversion.convert import OnProgress, convert
from shards.errors import UserError
from shards.storage.opening import open_place
from shards.sources.image_folder import FolderSource

source, dest, log, per_shard = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
driver, stuck = os.getpid(), f"{log}/stuck"

class Slow(FolderSource):
    def read(self, row):
        if os.getpid() == driver:
            return super().read(row)
        node, shard = ray.get_runtime_context().get_node_id(), row["position"] // per_shard
        os.makedirs(f"{log}/{node}", exist_ok=True)
        open(f"{log}/{node}/{shard}", "w").close()
        num_begun = len(os.listdir(f"{log}/{node}"))
        if node == self.doomed and num_begun == 3 and row["position"] % per_shard == 2:
            with open(stuck, "w") as file:
                file.write(str(shard))
            time.sleep(600)
        while node != self.doomed and num_begun > 5 and not os.path.exists(stuck):
            time.sleep(0.05)
        return super().read(row)

class Gone(FolderSource):
    def read(self, row):
        if os.getpid() == driver:
            return super().read(row)
        raise UserError("the folder is no longer there")

if __name__ == "__main__":
    cluster = Cluster()
    cluster.add_node(num_cpus=1, include_dashboard=False, object_store_memory=80 << 20)
    second = cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
    slow = Slow(open_place(source))
    slow.doomed = second.node_id
    seen = []

    def watch(*counts):
        seen.append(counts)
        if os.path.exists(stuck) and second in cluster.worker_nodes:
            cluster.remove_node(second, allow_graceful=False)
            print("killed the second node", flush=True)

    os.chdir(os.path.dirname(dest))  # DEST is relative, and the nodes work elsewhere
    address = cluster.address
    options = {"samples_per_shard": per_shard, "ray_address": address}
    convert(slow, os.path.basename(dest), report=OnProgress(watch), **options)
    assert not ray.is_initialized()
    assert second not in cluster.worker_nodes, "the second node was never killed"
    assert seen[-1] == (60, 60, 1), seen[-1]
    try:
        convert(Gone(open_place(source)), dest + "-gone", **options)
    except UserError as fault:
        print(fault, flush=True)
    cluster.shutdown()
"""


@pytest.fixture
def source(make_folder) -> Path:
    folder = make_folder(NUM_IMAGES - 1)
    (folder / "ant" / "bad.jpg").write_bytes(b"text")
    return folder


def run_script(text: str, folder: Path, *args: object, timeout_s: float = 60) -> str:
    """What a program printed, which must succeed; without a cluster of the user's own in its surroundings."""
    script = folder / "program.py"
    script.write_text(text)
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {"PYTHONPATH": str(ROOT), "RAY_raylet_start_wait_time_s": "120", "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, str(script), *map(str, args)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    return done.stdout


@needs_ray
@pytest.mark.slow
def test_a_cluster_that_loses_a_node_makes_the_same_bytes(source: Path, tmp_path: Path):
    convert(source, tmp_path / "wanted", samples_per_shard=PER_SHARD, workers=0)
    log = tmp_path / "log"
    out = run_script(CLUSTER, tmp_path, source, tmp_path / "out", log, PER_SHARD, timeout_s=HANGS_S)
    assert "killed the second node" in out
    assert fingerprints(tmp_path / "out") == fingerprints(tmp_path / "wanted")
    lost = (log / "stuck").read_text()
    assert len(list(log.glob(f"*/{lost}"))) == 2, "begun on both nodes"
    assert re.search(
        r"^on node .*can be read where the command was given, but not here \(the folder is no longer there",
        out,
        re.M,
    )


def test_without_ray_the_extra_is_named(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    known = builtins.__import__

    def refuse(name: str, *args, **kwargs):
        if name == "ray":
            raise ImportError("No module named 'ray'")
        return known(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UserError, match=r"pip install ray\.$"):
        run([str(source), str(tmp_path / "out"), "--engine", "ray"])
    assert not (tmp_path / "out").exists()


@needs_ray
def test_no_cluster_says_how_to_start_one(source: Path, tmp_path: Path):
    with socket.socket() as taken:  # bound and not listening: nobody else takes the port meanwhile
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        arguments = [str(source), str(tmp_path / "out"), "--engine", "ray", "--ray-address", address]
        text = f"""
from shards.commands.shard_command import run
from shards.errors import UserError
try:
    run({arguments})
except UserError as fault:
    print(fault)
"""
        out = run_script(text, tmp_path)
    assert out.startswith(f"No Ray cluster at --ray-address {address} (")
    assert "Start one with `ray start --head`" in out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("address", ["nonsense", "ray://host:10001", "host:port", "host:99999", ":6379"])
def test_an_address_that_is_none(address: str):
    with pytest.raises(UserError, match=f"--ray-address '?{address}"):
        ray_workers._check_answers(address)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--ray-address", "host:1"], "--ray-address host:1 goes with --engine ray"),
        (["--engine", "ray", "--workers", "0"], "--workers 0 means this process"),
    ],
)
def test_options_that_contradict(source: Path, tmp_path: Path, more: list[str], message: str):
    with pytest.raises(UserError, match=message):
        run([str(source), str(tmp_path / "out"), *more])


@pytest.fixture
def job(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ShardJob:
    monkeypatch.setattr(ray_workers, "_reached", set())
    dest = tmp_path / "out"
    convert(source, dest, samples_per_shard=PER_SHARD, workers=0)
    plan = read_plan(open_place(dest))
    maker = Maker(FolderSource(open_place(source)), open_place(dest), plan, Policy(), {})
    return ShardJob(maker, find_probe(maker, range(plan.num_shards)))


def test_a_node_that_sees_all_is_asked_once(job: ShardJob, source: Path, tmp_path: Path):
    check_node(job)
    source.rename(tmp_path / "away")
    check_node(job)


def test_a_node_without_the_plan(job: ShardJob, tmp_path: Path):
    (tmp_path / "out" / layout.PLAN).unlink()
    with pytest.raises(UserError, match=r"plan\.parquet' here.*the same path"):
        check_node(job)


def test_a_node_with_the_plan_of_another_conversion(job: ShardJob, source: Path, tmp_path: Path):
    convert(source, tmp_path / "other", samples_per_shard=7, workers=0)
    (tmp_path / "other" / layout.PLAN).replace(tmp_path / "out" / layout.PLAN)
    with pytest.raises(UserError, match=r"another conversion's"):
        check_node(job)


@pytest.mark.parametrize("folder_there", [True, False])
def test_a_node_without_the_source(job: ShardJob, source: Path, tmp_path: Path, folder_there: bool):
    assert job.probe is not None
    source.rename(tmp_path / "away")
    if folder_there:  # a disk that is not mounted leaves an empty folder
        source.mkdir()
    with pytest.raises(
        UserError, match=rf"'{job.probe['source']}' of SOURCE 'photos'.*not here.*the same path"
    ):
        check_node(job)


def test_what_keeps_a_task_from_its_shard_names_the_node(job: ShardJob, source: Path, tmp_path: Path):
    source.rename(tmp_path / "away")
    kind, text = ray_workers.make_shard(job, None, 0)
    assert kind == "user error"
    assert text.startswith(f"on node {ray_workers.node_name()}: '")


def test_a_source_without_one_good_image_has_no_probe(job: ShardJob, source: Path):
    for path in source.rglob("*.*"):
        path.unlink()
    assert find_probe(job.maker, range(3)) is None


def test_a_pickled_place_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    place = pickle.loads(pickle.dumps(LocalPlace("photos")))
    monkeypatch.chdir("/")
    place.make()
    assert (tmp_path / "photos").is_dir()
