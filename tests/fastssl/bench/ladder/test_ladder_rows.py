"""The rows of `fastssl bench CONFIG`: which are measured, what happens to one that fails, the peers' steps, the loader's stream."""

import json
import re
from pathlib import Path

import pytest
import torch

from fastssl.bench import bench_command, hardware
from fastssl.bench.guard import Guard
from fastssl.bench.ladder import data_rungs, ladder_rows, step_peers, step_rungs, verdict
from fastssl.bench.ladder.verdict import Switches, judge
from fastssl.bench.report import Row
from fastssl.bench.step_timer import StepTimer
from fastssl.pretraining import run_config
from pipelines.loading import loader as loader_module
from shards.errors import UserError
from tests.fastssl.runs import LADDER_STEP as STEP

GPU = Switches(on_gpu=True, threads=16, cores=16)


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    (tmp_path / "run.yaml").write_text("train:\n  precision: fp32\n")
    return str(tmp_path / "run.yaml")


def climb(resolved: run_config.Resolved, timer: StepTimer, save=lambda ladder: None) -> ladder_rows.Ladder:
    guard, top = Guard(timer.device, "it does not fit"), hardware.Peak(1.0, 1.0, "measured")
    return ladder_rows.Ladder(resolved, step_rungs.build(resolved, timer.device), timer, guard, top, save)


def test_ratio_of_the_compiled_step(config_file, monkeypatch):
    resolved = run_config.load(config_file, list(STEP[:-4]))
    device = torch.device("cpu")
    from rich.console import Console

    calls = []
    monkeypatch.setattr(ladder_rows, "has_compiler", lambda device: True)
    monkeypatch.setattr(ladder_rows, "compile_blocks", lambda method, device: calls.append(1) or True)
    timer = StepTimer(device, 4, 1, 1, Console(quiet=True))
    found = climb(resolved, timer)
    assert calls == []
    found.measure(["full", "compile"])
    assert calls == [1]
    assert found.rows[ladder_rows.COMPILED].ratio_to == verdict.FULL
    assert not found.compiled
    compiled = run_config.load(config_file, [*STEP[:-4], "--train.compile", "True"])
    found = climb(compiled, timer)
    assert calls == [1, 1]
    found.measure(["full", "compile"])
    assert found.rows[verdict.FULL].ratio_to == ladder_rows.EAGER
    assert found.compiled


def timer_of(steps: int = 1, device: str = "cpu") -> StepTimer:
    from rich.console import Console

    return StepTimer(torch.device(device), 4, steps, 1, Console(quiet=True))


def test_a_row_that_fails_is_told_and_the_others_go_on(config_file, monkeypatch, capsys):
    resolved = run_config.load(config_file, list(STEP[:-4]))
    kept: list[list[str]] = []
    made = climb(resolved, timer_of(), lambda ladder: kept.append(list(ladder.rows)))

    def fail(views):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    monkeypatch.setattr(made.trainee.method, "teacher_features", fail)
    made.measure(["full", "parts", "ema"])
    failed = {name for name, row in made.rows.items() if row.failure}
    assert failed == {verdict.FULL, verdict.STUDENT, verdict.TEACHER}
    for name in failed:
        assert made.rows[name].error.startswith("it does not fit (OutOfMemoryError: CUDA out of memory")
    assert made.rows["EMA"].rates
    assert made.rows[verdict.UPDATE].rates
    assert kept[0] == [verdict.FULL]
    assert len(kept) == 6
    assert "in fail" in capsys.readouterr().err
    rates = {name: row.images_per_s for name, row in made.rows.items()}
    assert judge(rates, GPU).sentence == (
        "The bottleneck is not known, because 'full step, synthetic' was not measured."
    )


def test_a_lost_gpu_is_told_in_all_further_rows_and_none_is_tried(monkeypatch):
    broken = RuntimeError("CUDA error: an illegal memory access was encountered")
    guard, tried = Guard("cuda", "no memory"), []

    def lost(device):
        raise broken

    def fault():
        raise broken

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    first, second = Row("a"), Row("b")
    assert guard.run([first], fault) is None
    assert guard.run([second], lambda: tried.append(1)) is None
    assert tried == []
    assert first.error == "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert second.error.startswith(
        "not tried: after 'a' the device no longer works in this process (RuntimeError"
    )
    assert (first.failure, second.failure) == (True, True)


def test_what_cannot_run_here_is_no_failure():
    row = Row("a")

    def absent():
        raise UserError("it is not here.")

    assert Guard("cpu", "").run([row], absent) is None
    assert (row.error, row.failure) == ("it is not here.", False)


def test_a_lack_of_memory_in_cublas_is_one():
    row = Row("a")

    def fail():
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    Guard("cpu", "no memory").run([row], fail)
    assert row.error.startswith("no memory (RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED")


def test_rows_of_one_name_only_are_measured_and_written(config_file, shards, tmp_path, capsys):
    path = tmp_path / "ladder.json"
    argv = [config_file, *STEP, "--data.shards", str(shards), "--json", str(path)]
    assert bench_command.run([*argv, "--rows", "end,full,end_decode"]) == 0
    rows = {row["name"]: row for row in json.loads(path.read_text())["rows"]}
    gpu = ["loader, decoded on the GPU", "end to end, decoded on the GPU"]
    assert list(rows) == [verdict.LOADER, verdict.FULL, verdict.END_TO_END, *gpu]
    for name in gpu:
        assert " gpu needs " in rows[name]["error"]  # a GPU, or the package
        assert not rows[name]["failure"]
    assert rows[verdict.END_TO_END]["contention"] == pytest.approx(
        rows[verdict.END_TO_END]["step_ms"] / rows[verdict.FULL]["ms_p50"]
    )
    with pytest.raises(UserError, match="no row called 'fulll'"):
        bench_command.run([*argv, "--rows", "fulll"])
    with pytest.raises(UserError, match=r"--rows end,data needs images: give --data\.shards"):
        bench_command.run([config_file, *STEP, "--rows", "data,full,end"])


def test_the_loader_of_the_ladder_is_one_stream(config_file, shards, monkeypatch):
    """Not one an epoch, at whose start the pipeline is empty."""
    opened = []
    stream = loader_module.stream

    def counted(*args):
        opened.append(1)
        return stream(*args)

    monkeypatch.setattr(loader_module, "stream", counted)
    resolved = run_config.load(config_file, [*STEP[:-4], "--train.batch", "20", "--data.shards", str(shards)])
    views = data_rungs.loader_views(resolved, torch.device("cpu"), in_chunks=False)
    first = [next(views)[0].clone() for _ in range(8)]  # 60 images: three batches an epoch
    views.close()
    assert opened == [1]
    assert not any(torch.equal(first[0], view) for view in first[1:])
    with pytest.raises(StopIteration):
        next(views)


def test_a_missing_decoder_is_told_before_the_shards_are_opened(config_file, monkeypatch):
    monkeypatch.setattr(data_rungs, "is_there", lambda module: False)
    resolved = run_config.load(config_file, [*STEP[:-4], "--data.shards", "no/such"])
    with pytest.raises(UserError, match="needs the package nvidia-nvimgcodec-cu12, which is not installed"):
        data_rungs.loader_views(
            resolved, torch.device("cuda"), in_chunks=False, changes=ladder_rows.ENDINGS["end_decode"].changes
        )


def test_gpu_variants_are_measured_where_they_can_run_and_differ(config_file):
    plain = run_config.load(config_file, ["--data.shards", "x"])
    on_gpu = run_config.load(config_file, ["--data.shards", "x", "--data.augment-on", "gpu"])
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert ladder_rows.usual_groups(plain, gpu) == list(ladder_rows.GROUPS)
    assert set(ladder_rows.ENDINGS) & set(ladder_rows.usual_groups(plain, cpu)) == {"end"}
    assert "end_gpu" not in ladder_rows.usual_groups(on_gpu, gpu)
    assert "end_decode" in ladder_rows.usual_groups(on_gpu, gpu)
    without = run_config.load(config_file, [])
    assert not ladder_rows.WITH_SHARDS & set(ladder_rows.usual_groups(without, gpu))


@pytest.mark.parametrize(
    "changes", [["--optim.name", "lars", "--optim.lr", "0.6"], ["--optim.name", "adamw"]]
)
def test_the_loop_of_moco_v3_updates_as_ours_does(config_file, changes):
    """Its own step differs from the trainer's in speed only: the same weights after two steps at a rate that is not 0."""
    resolved = run_config.load(config_file, [*STEP[:-4], *changes, "--train.seed", "3"])
    cpu, found = torch.device("cpu"), []
    for start in ({"implementation": "loop"}, {}):
        method, optimizer, _, _ = step_peers.start(resolved, cpu, 4, **start)
        step_peers.set_lr(optimizer, 0.5)
        generator = torch.Generator().manual_seed(0)
        for _ in range(2):
            for p in optimizer.param_groups[0]["params"]:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
        found.append([p.detach().clone() for p in method.parameters()])
    torch.testing.assert_close(found[0], found[1])


def test_moco_v3_s_kind_of_step_has_explicit_attention_and_a_loop(config_file, monkeypatch):
    seen = []

    def start(resolved, device, batch, implementation="auto"):
        seen.append((resolved.config.model.attention, implementation, resolved.config.train.channels_last))
        raise NotImplementedError

    monkeypatch.setattr(step_peers, "start", start)
    argv = ["--model.attention", "explicit", "--optim.implementation", "foreach"]
    resolved = run_config.load(config_file, [*STEP[:-4], *argv])
    for step in (step_peers.moco_v3_step, step_peers.todays_step):
        with pytest.raises(NotImplementedError):
            step(resolved, torch.device("cpu"), 4)
    assert seen == [("explicit", "loop", False), ("sdpa", "auto", False)]


def test_ctrl_c_keeps_the_rows_so_far(config_file, tmp_path, monkeypatch, capsys):
    """The first rung is printed and written, the file is marked, and the verdict says what it can."""
    monkeypatch.setattr(ladder_rows, "step_rows", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    path = tmp_path / "ladder.json"
    assert bench_command.run([config_file, *STEP, "--rows", "full,parts", "--json", str(path)]) == 130
    out = capsys.readouterr().out
    assert re.search(r"^full step, synthetic: [\d.,k]+ images/s\nStopped\.", out, re.MULTILINE)
    assert "The step makes " in out
    found = json.loads(path.read_text())
    assert found["incomplete"] is True
    assert [row["name"] for row in found["rows"]] == [verdict.FULL]
