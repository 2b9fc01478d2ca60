"""`fastssl bench`: its reports on a CPU. How fast anything is, is no matter of a test."""

import json
import math
import pickle
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastssl.bench import bench_command, report
from fastssl.bench.guard import Guard, exit_code
from fastssl.bench.loaders import bench_loader, peers
from fastssl.bench.loaders.work import MeasuredLoader, Work
from fastssl.bench.report import Row
from pipelines.augment.recipe import Recipe, get_recipe
from shards.conversion.convert import convert
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError
from tests import needs
from tests.pictures import photo

TINY = ["--size", "16", "--batch", "4", "--threads", "1", "--repeats", "1", "--seconds", "0.02"]


@pytest.fixture(scope="module")
def shard_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of nine JPEG pictures."""
    root = tmp_path_factory.mktemp("bench")
    (root / "pictures").mkdir()
    for i in range(9):
        photo(40 + i, 32, seed=i).save(root / "pictures" / f"{i}.jpg")
    convert(root / "pictures", root / "shards", workers=0)
    return root / "shards"


def loader_rows(shard_folder: Path, tmp_path: Path, *flags: str) -> dict[str, dict]:
    """The rows of a report by name, in their order."""
    path = tmp_path / "loader.json"
    assert bench_command.run(["loader", str(shard_folder), *TINY, *flags, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())
    assert isinstance(rows, list)
    return {row["name"]: row for row in rows}


def check_row(row: dict) -> None:
    low, high = row["spread"]
    assert 0 < low <= row["images_per_s"] <= high
    assert row["error"] is None
    assert row["cpu_cores"] >= 0


# -------------------------------------------------------------------------------------------------------- loader


def test_loader_shows_how_engines_scale(shard_folder, tmp_path, monkeypatch):
    """Each row of another number of threads is measured with that number."""
    seen = []
    batches = bench_loader.EngineSetup.batches

    def counted(way, work):
        seen.append(work.threads)
        return batches(way, work)

    monkeypatch.setattr(bench_loader.EngineSetup, "batches", counted)
    flags = ("--peers", "none", "--engines", "fused", "--threads", "3", "--scaling")
    rows = loader_rows(shard_folder, tmp_path, *flags)
    assert list(rows) == ["read", "decode", "fused (1)", "fused (2)", "fused"]
    assert seen[-3:] == [1, 2, 3]
    assert all(row["fidelity"] == "exact" and row["images_per_s"] > 0 for row in list(rows.values())[2:])


def test_loader_alone_needs_no_peer(shard_folder, tmp_path, capsys):
    rows = loader_rows(shard_folder, tmp_path, "--peers", "none", "--engines", "fused,reference")
    assert list(rows) == ["read", "decode", "fused", "reference"]
    assert [row["fidelity"] for row in rows.values()] == [None, None, "exact", "exact"]
    for row in rows.values():
        check_row(row)
        assert row["ratio"] is None
        assert row["versions"]["torch"] == torch.__version__.split("+")[0]
        assert set(row["versions"]) >= {"torchvision", "dali", "kornia", "numba", "pillow", "lightly"}
        assert row["machine"]["cpu"]
        assert row["machine"]["cores"] >= 1
        assert row["settings"]["page_cache"] == "warm"
        assert row["settings"]["recipe"]["size"] == 16
        assert row["peak_memory_bytes"] > 10**7
    assert "0.00 gray levels from the reference" in rows["reference"]["note"]
    shown = capsys.readouterr().out
    assert "fused" in shown
    assert "9 images" in shown


def test_every_engine_is_measured(shard_folder, tmp_path):
    needs.module("nvidia.dali")
    needs.module("kornia")
    rows = loader_rows(shard_folder, tmp_path, "--peers", "none", "--engines", "dali,kornia")
    assert list(rows) == ["read", "decode", "dali", "kornia"]
    for name in ("dali", "kornia"):
        check_row(rows[name])
        assert rows[name]["fidelity"] in ("exact", "close", "approximate")
        assert "gray levels from the reference" in rows[name]["note"]


@pytest.mark.slow
def test_all_peers_run_on_the_same_images(shard_folder, tmp_path):
    needs.module("nvidia.dali")
    needs.module("kornia")
    # The other two are those of moco-v3 in other wrappings, and cost the start of their workers.
    names = [name for name in peers.PEERS if name not in ("lightly", "webdataset")]
    rows = loader_rows(shard_folder, tmp_path, "--peers", ",".join(names), "--engines", "fused")
    assert set(rows) == {"read", "decode", "fused", *names}
    assert rows["ffcv"]["error"]
    measured = {name: row for name, row in rows.items() if name != "ffcv"}
    for row in measured.values():
        check_row(row)
    base = rows["moco-v3"]["images_per_s"]
    for name, row in measured.items():
        if name in ("read", "decode", "dali-decode"):
            assert row["ratio"] is None
        else:
            assert row["ratio"] == pytest.approx(row["images_per_s"] / base)
            assert row["ratio_to"] == "moco-v3"
            assert row["note"]


def test_a_peer_that_is_not_installed_is_listed_with_the_reason(shard_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "kornia.augmentation", None)
    monkeypatch.setitem(sys.modules, "nvidia.dali.pipeline", None)
    flags = ["--peers", "kornia-modules, dali-decode, ffcv", "--engines", "fused"]
    rows = loader_rows(shard_folder, tmp_path, *flags)
    assert "not installed" in rows["ffcv"]["error"] or "beton" in rows["ffcv"]["error"]
    for name, module in (("kornia-modules", "kornia.augmentation"), ("dali-decode", "nvidia.dali")):
        assert rows[name]["images_per_s"] is None
        assert rows[name]["spread"] is None
        assert rows[name]["error"].startswith("not installed: ")
        assert module in rows[name]["error"]
    check_row(rows["fused"])
    assert "kornia-modules is not installed" in capsys.readouterr().out


@pytest.mark.parametrize("is_peer", [True, False])
def test_a_loader_that_fails_is_listed_as_a_failure(is_peer, capsys):
    def broken(work):
        yield 4
        raise ArithmeticError("the first line\nthe reason")

    work = SimpleNamespace(threads=1, refuse_local_views_and_erasing=lambda name: None)
    row = Row("x")
    row.add(5.0, 1.0)
    bench_loader.measure(
        MeasuredLoader("x", "exact", broken), work, 0.01, row, Guard("cpu", ""), is_peer=is_peer
    )
    assert row.error == "ArithmeticError: the first line the reason"
    assert (row.rates, row.failure, exit_code([Row("y"), row])) == ([], True, 1)
    assert "in broken" in capsys.readouterr().err


def test_the_others_are_measured_and_written_where_an_engine_of_ours_fails(
    shard_folder, tmp_path, monkeypatch, capsys
):
    batches = bench_loader.EngineSetup.batches

    def broken(way, work):
        if way.engine == "fused" and work.batch == 4:  # not while views are compared
            raise MemoryError("no more")
        return batches(way, work)

    monkeypatch.setattr(bench_loader.EngineSetup, "batches", broken)
    path = tmp_path / "loader.json"
    flags = ["--peers", "none", "--engines", "fused,reference", "--json", str(path)]
    assert bench_command.run(["loader", str(shard_folder), *TINY, *flags]) == 1
    rows = {row["name"]: row for row in json.loads(path.read_text())}
    assert rows["fused"]["error"] == (
        "batches of 4 do not fit in the memory: lower --batch, or --threads (MemoryError: no more)"
    )
    assert rows["fused"]["failure"]
    for name in ("read", "decode", "reference"):
        check_row(rows[name])
    assert f"fused failed: {rows['fused']['error']}" in capsys.readouterr().out.splitlines()


def test_an_engine_whose_views_cannot_be_compared_is_not_timed(shard_folder, tmp_path, monkeypatch):
    def broken(way, work):
        raise ArithmeticError("what")

    monkeypatch.setattr(bench_loader, "measured_fidelity", broken)
    path = tmp_path / "loader.json"
    flags = ["--peers", "none", "--engines", "fused", "--json", str(path)]
    assert bench_command.run(["loader", str(shard_folder), *TINY, *flags]) == 1
    *_, fused = json.loads(path.read_text())
    assert (fused["name"], fused["images_per_s"], fused["error"]) == ("fused", None, "ArithmeticError: what")


def test_what_a_gpu_could_do_are_rows_of_their_own_and_say_why_they_failed(
    shard_folder, tmp_path, monkeypatch
):
    """With a CPU in the place of the GPU, on which no views are made."""
    monkeypatch.setattr(bench_loader, "has_gpu", lambda: True)
    monkeypatch.setattr(bench_loader, "GPU", "cpu")
    rows = loader_rows(shard_folder, tmp_path, "--peers", "none", "--engines", "fused,reference")
    own = ["fused", "fused to GPU", "fused on GPU", "fused all on GPU", "reference", "reference to GPU"]
    assert list(rows) == ["read", "decode", *own]
    for name in ("fused on GPU", "fused all on GPU"):
        assert rows[name]["images_per_s"] is None
        assert "needs another --data.engine than reference, and a GPU to train on" in rows[name]["error"]
        assert rows[name]["fidelity"] is None
    for name in ("fused", "fused to GPU", "reference to GPU"):
        check_row(rows[name])
        assert rows[name]["fidelity"] == "exact"


def test_peers_without_the_operation_refuse_the_recipe(shard_folder, tmp_path):
    needs.module("kornia")
    flags = ["--peers", "kornia-modules", "--engines", "none"]
    rows = loader_rows(shard_folder, tmp_path, *flags, "--recipe", "satellite")
    assert "quarter turns or noise" in rows["kornia-modules"]["error"]
    rows = loader_rows(shard_folder, tmp_path, *flags, "--recipe", "byol")
    assert "bicubic crops" in rows["kornia-modules"]["error"]


def test_webdataset_and_lightly_make_the_views(shard_folder):
    needs.module("lightly")
    shards = ShardSet.open(shard_folder)
    recipe = Recipe(size=20)
    made = peers.LightlyViews(shards, recipe)[3]
    assert [view.shape for view in made] == [(3, 20, 20)] * 2
    work = Work(shards, recipe, np.arange(9), 4, 1)
    batches = peers.PEERS["webdataset"].open(work)
    assert [next(batches), next(batches)] == [4, 4]
    batches.close()


def test_peak_memory_sees_what_was_taken_in_between():
    with report.PeakMemory() as before:
        pass
    with report.PeakMemory() as memory:
        taken = np.ones(30_000_000)
        time.sleep(0.3)
        del taken
    assert memory.most_bytes > before.most_bytes + 150_000_000


@pytest.mark.parametrize(
    "recipe", [get_recipe("moco_v3"), get_recipe("satellite")], ids=["moco_v3", "satellite"]
)
@pytest.mark.parametrize("views", [peers.PILViews, peers.TensorViews])
def test_data_sets_of_peers_make_normalised_views(shard_folder, recipe, views):
    small = Recipe(**{**vars(recipe), "size": 20})
    made = views(ShardSet.open(shard_folder), small)[3]
    assert [view.shape for view in made] == [(3, 20, 20)] * 2
    mean, std = torch.tensor(small.mean)[:, None, None], torch.tensor(small.std)[:, None, None]
    for view in made:
        pixels = view * std + mean
        assert view.dtype == torch.float32
        assert pixels.min() >= -1e-5
        assert pixels.max() <= 1 + 1e-5
        assert pixels.std() > 0.01


@pytest.mark.parametrize("views", [peers.PILViews, peers.TensorViews])
def test_data_sets_of_peers_reach_worker_processes(shard_folder, views):
    made = views(ShardSet.open(shard_folder), Recipe(size=20))
    again = pickle.loads(pickle.dumps(made))
    assert [view.shape for view in again[3]] == [(3, 20, 20)] * 2


def test_every_epoch_has_the_same_images_in_another_order():
    work = Work(None, None, np.array([2, 3, 5, 7, 11, 13]), 3, 1)  # type: ignore[arg-type]
    batches = work.batches()
    epochs = [np.concatenate([next(batches)[1], next(batches)[1]]) for _ in range(2)]
    assert [sorted(e.tolist()) for e in epochs] == [[2, 3, 5, 7, 11, 13]] * 2
    assert epochs[0].tolist() != epochs[1].tolist()
    assert next(batches)[0] == 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--peers", "kornia-module"], "Did you mean 'kornia-modules'"),
        (["--engines", "korni"], "no engine called 'korni'. Did you mean 'kornia'"),
        (["--batch", "10"], "9 images of"),
        (["--seconds", "0"], "--seconds is 0"),
        (["--repeats", "0"], "--repeats is 0"),
        (["--recipe", "moco"], "no recipe called 'moco'"),
        (["--json", "no/such/x.json"], "no folder 'no/such'"),
    ],
)
def test_loader_names_mistakes(shard_folder, flags, words):
    with pytest.raises(UserError, match=words):
        bench_command.run(["loader", str(shard_folder), *flags])


def test_unknown_subcommand_and_help(capsys):
    with pytest.raises(UserError, match="Did you mean 'loader'"):
        bench_command.run(["loadr"])
    assert bench_command.run(["--help"]) == 0
    assert bench_command.run(["run.yaml", "--help"]) == 0
    assert "usage: fastssl bench CONFIG [--data.shards SHARDS]" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------- report


def test_row_has_the_median_and_the_ratio():
    row, other = Row("a", rates=[4.0, 1.0, 2.0], cores=[1.0, 1.0, 2.0]), Row("b", rates=[8.0])
    row.compare(other)
    plain = row.as_json()
    assert (plain["images_per_s"], plain["spread"], plain["ratio"], plain["ratio_to"]) == (
        2,
        [1, 4],
        0.25,
        "b",
    )
    assert plain["cpu_cores"] == 1
    assert plain["core_ms_per_image"] == 1000  # of 250, 1000 and 1000
    row.compare(Row("c", error="no"))
    assert row.ratio_to == "b"


@pytest.mark.parametrize(
    ("rate", "text"), [(3.14159, "3.14"), (31.4159, "31.4"), (3141.59, "3,142"), (31415.9, "31k")]
)
def test_brief(rate, text):
    assert report.brief(rate) == text


def test_stopwatch_counts_this_process():
    watch = report.Stopwatch()
    while watch.wall_s() < 0.1:
        math.sqrt(2)
    assert 0 < watch.cores() < 64


WORK = "import math, time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: math.sqrt(2)"


def test_stopwatch_counts_processes_of_processes():
    """As the workers of a conversion are: the children of a process that imports for all of them."""
    watch = report.Stopwatch()
    code = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {WORK!r}])\nprint('done', flush=True)\nsys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"done\n"
        assert watch.cores() * watch.wall_s() >= 0.25  # while the process between them runs on
        process.communicate()
    assert watch.cores() * watch.wall_s() >= 0.25


def test_failed_write_is_told(tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        report.write_report(str(tmp_path), "loader", {}, {}, [])
