"""`fastssl bench CONFIG`: the verdict on made-up ladders, what is counted, and the command at tiny size."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastssl.bench import bench_command, hardware, step_timer
from fastssl.bench.ladder import data_rungs, ladder_rows, step_peers, step_rungs, verdict
from fastssl.bench.ladder.verdict import Switches, judge
from fastssl.bench.report import Row
from fastssl.methods.ema import ema_update
from fastssl.pretraining import run_config
from fastssl.pretraining.step import chunks
from pipelines.streaming.lazy_views import LazyViews, count_samples, rows_of
from shards.errors import UserError
from tests.fastssl.runs import LADDER_STEP as STEP
from tests.fastssl.tiny import Plain, make_method

GPU = Switches(on_gpu=True, threads=16, cores=16)
# Of a run beside a GPU in which nothing is lost.
EVEN = {
    verdict.READ: 50_000.0,
    verdict.DECODE: 9000.0,
    verdict.TO_DEVICE: 20_000.0,
    verdict.AUGMENT: 7000.0,
    verdict.LOADER: 6000.0,
    verdict.STUDENT: 4000.0,
    verdict.TEACHER: 12_000.0,
    verdict.UPDATE: 100_000.0,
    verdict.FULL: 3000.0,
    verdict.FULL_AUGMENT: 2950.0,
    verdict.END_TO_END: 2940.0,
}


def told(switches: Switches = GPU, contention: float | None = 1.0, **changes: float | None):
    rates = EVEN | {name.replace("_", " "): rate for name, rate in changes.items()}
    return judge(rates, switches, contention)


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    (tmp_path / "run.yaml").write_text("train:\n  precision: fp32\n")
    return str(tmp_path / "run.yaml")


# -------------------------------------------------------------------------------------------------------- verdict


def test_a_step_that_is_the_slower_side():
    assert told().sentence == (
        "The step is the bottleneck, and in it student forward + backward: no setting makes it faster as it is: use a smaller "
        "--model.backbone or --recipe.size, or more devices; the loader makes 6,000 images/s, the step 3,000, together 2,940: 98% "
        "of what they allow."
    )
    assert (told().bottleneck, told().overlap, told().contention) == (verdict.STUDENT, 0.98, 1.0)


@pytest.mark.parametrize(
    ("switches", "advice"),
    [
        ({"half": False}, "--train.precision bf16"),
        ({"half": False, "half_is_fast": False}, "no setting makes it faster"),
        ({"compiled": False}, "--train.compile True"),
        ({"compiled": False, "can_compile": False}, "no setting makes it faster"),
        ({"channels_last": False, "is_cnn": True}, "--train.channels-last True"),
        ({"channels_last": False}, "no setting makes it faster"),
        ({"checkpointing": "blocks"}, "--train.checkpointing none"),
    ],
)
def test_the_switch_for_a_slow_step(switches, advice):
    assert advice in told(Switches(on_gpu=True, threads=16, cores=16, **switches)).sentence


@pytest.mark.parametrize(
    ("switches", "other", "advice"),
    [
        ({"compiled": False}, {verdict.COMPILED: 2800.0}, "no setting makes it faster"),
        ({"compiled": False}, {verdict.COMPILED: 3300.0}, "try --train.compile True"),
        ({"compiled": True}, {verdict.EAGER: 3300.0}, "try --train.compile False, which was faster here"),
        ({"compiled": True}, {verdict.EAGER: 2800.0}, "no setting makes it faster"),
        # Not measured: docs/benchmarks.md measured a loss on a CPU.
        ({"compiled": False, "on_gpu": False}, {}, "no setting makes it faster"),
        ({"compiled": False, "on_gpu": True}, {}, "try --train.compile True"),
    ],
)
def test_compiling_is_advised_only_where_it_was_faster_or_may_be(switches, other, advice):
    given = Switches(**{"on_gpu": True, "threads": 16, "cores": 16} | switches)
    assert advice in judge(EVEN | {verdict.LOADER: 60_000.0} | other, given, 1.0).sentence


def test_a_slow_update_asks_for_a_larger_batch():
    found = judge(EVEN | {verdict.UPDATE: 10_000.0}, GPU, 1.0)  # 0.3 of a step
    assert found.bottleneck == verdict.UPDATE
    assert "--train.batch" in found.sentence


@pytest.mark.parametrize(
    ("slow", "switches", "advice"),
    [
        (verdict.READ, {}, "--data.cache ram, or a faster disk"),
        (verdict.DECODE, {}, "--short-side 256"),
        (verdict.DECODE, {"fits_in_ram": True}, "--data.cache ram, which decodes"),
        (verdict.DECODE, {"fits_in_ram": True, "cache": "ram"}, "--short-side 256"),
        (verdict.DECODE, {"can_decode": True}, "--data.augment-on gpu --data.decode gpu;"),
        (verdict.DECODE, {"can_decode": True, "decode": "gpu", "augment_on": "gpu"}, "--short-side 256"),
        (verdict.AUGMENT, {"can_decode": True}, "--data.augment-on gpu --data.decode gpu;"),
        (verdict.AUGMENT, {}, "--data.augment-on gpu;"),
        (verdict.TO_DEVICE, {}, "--data.augment-on gpu, which sends bytes"),
        (verdict.AUGMENT, {"in_chunks": True}, "--data.augment-on gpu;"),
        (verdict.AUGMENT, {"in_chunks": True, "engine": "kornia"}, "--recipe.size"),
        (verdict.AUGMENT, {"augment_on": "gpu"}, "--recipe.size"),
        (verdict.AUGMENT, {"engine": "reference"}, "--data.engine fused"),
        (verdict.AUGMENT, {"threads": 4}, "--data.threads 16"),
    ],
)
def test_the_switch_for_a_slow_loader(slow, switches, advice):
    rates = EVEN | {slow: 1200.0, verdict.LOADER: 1000.0, verdict.END_TO_END: 990.0}
    found = judge(rates, Switches(**{"on_gpu": True, "threads": 16, "cores": 16, **switches}), 1.0)
    assert found.bottleneck == slow
    assert found.sentence.startswith(f"The loader is the bottleneck, and in it {slow}: ")
    assert advice in found.sentence


def test_sides_that_compete():
    found = judge(EVEN | {verdict.END_TO_END: 2100.0}, GPU, 1.4)
    assert found.bottleneck == "contention"
    assert found.sentence.startswith(
        "Loader and step compete for the CPU cores (a step takes 1.40 times as long beside the loader):"
    )
    assert "--data.threads 12" in found.sentence
    able = Switches(on_gpu=True, can_decode=True, threads=16, cores=16)
    for cpu in (able, replace(able, augment_on="gpu")):
        told = judge(EVEN | {verdict.END_TO_END: 2100.0}, cpu, 1.4).sentence
        assert "compete for the CPU cores" in told
        assert "try --data.augment-on gpu --data.decode gpu, which leave the cores" in told
    on_gpu = Switches(on_gpu=True, augment_on="gpu", threads=16, cores=16)
    assert "compete for the GPU" in judge(EVEN | {verdict.END_TO_END: 2100.0}, on_gpu, 1.4).sentence
    # A step that takes no longer is not held up by sharing.
    assert judge(EVEN | {verdict.END_TO_END: 2100.0}, GPU, 1.05).bottleneck == verdict.STUDENT


def test_on_a_cpu_both_sides_share_the_cores():
    rates = EVEN | {verdict.FULL: 1000.0, verdict.LOADER: 3000.0, verdict.END_TO_END: 375.0}
    found = judge(rates, Switches(), 1.5)  # 1 ms and 1/3 ms an image allow 750 images/s
    assert found.overlap == 0.5
    assert found.bottleneck == verdict.STUDENT


def test_parts_that_were_not_measured_are_not_blamed():
    rates = {verdict.FULL: 3000.0, verdict.LOADER: 6000.0, verdict.END_TO_END: 2940.0}
    found = judge(rates, Switches(on_gpu=True, compiled=False, has_shards=True), 1.0)
    assert found.bottleneck == verdict.FULL
    assert found.sentence.startswith("The step is the bottleneck: try --train.compile True; the loader makes")
    found = judge(rates | {verdict.LOADER: 1000.0, verdict.END_TO_END: 990.0}, GPU, 1.0)
    assert found.sentence.startswith(
        "The loader is the bottleneck: measure its parts as well (--rows end,data);"
    )
    alone = judge({verdict.FULL: 3000.0}, Switches(on_gpu=True, has_shards=True))
    assert alone.sentence.endswith(
        "no setting makes it faster as it is: use a smaller --model.backbone or --recipe.size, or more devices. "
        "The loader was not measured beside it."
    )


def test_without_shards_it_says_what_is_missing():
    found = judge({verdict.FULL: 100.0, verdict.STUDENT: 130.0, verdict.UPDATE: 9000.0}, GPU)
    assert found.overlap is None
    assert found.sentence.endswith("Give --data.shards to learn whether the loader keeps up.")


# ----------------------------------------------------------------------------------------------- what is counted


def test_data_sheets_go_by_the_longest_name():
    assert hardware.sheet("NVIDIA H100 80GB HBM3") == hardware.Peak(989, 3.35, "data sheet")
    assert hardware.sheet("NVIDIA A10G").tflops == 70
    assert hardware.sheet("NVIDIA A100-SXM4-80GB").tb_per_s == 2.04
    assert hardware.sheet("NVIDIA L40") is None
    assert hardware.sheet("") is None


def test_a_measured_peak_is_positive():
    found = hardware.measured(torch.device("cpu"), torch.float32, side=64)
    assert found.source == "measured"
    assert found.tflops > 0
    assert found.tb_per_s > 0


def test_traffic_counts_what_operations_read_and_write():
    x, y = torch.ones(10, 10), torch.ones(10, 10)
    assert hardware.bytes_of(lambda: x + y) == 3 * 400
    assert hardware.bytes_of(lambda: x.add_(y)) == 3 * 400
    assert hardware.bytes_of(lambda: x.view(100).t()) == 0
    assert hardware.bytes_of(lambda: x @ y) == 3 * 400
    assert hardware.bytes_of(lambda: torch._foreach_lerp_([x, x], [y, y], 0.1)) == 2 * 3 * 400


def test_forward_flops_of_linear_layers():
    # Backbone 48 -> 6, projector 6 -> 7 -> 7 -> 5, predictor 5 -> 7 -> 5; a multiply-add is two operations.
    method = make_method(Plain())
    expected = 2 * (48 * 6 + 6 * 7 + 7 * 7 + 7 * 5 + 5 * 7 + 7 * 5)
    images = [torch.randn(2, 3, 4, 4)]
    found = step_rungs.forward_flops(
        images, lambda views: method.predictor(method.projector(method.backbone(views[0])))
    )
    assert found == expected


def test_traffic_of_a_step_is_linear_in_the_batch(config_file):
    resolved = run_config.load(config_file, list(STEP[:-4]))
    trainee = step_rungs.build(resolved, torch.device("cpu"))
    images = step_rungs.views(resolved, "cpu", 6)
    counted = hardware.bytes_of(lambda: trainee.step.gradients(images))
    assert trainee.traffic(6) - trainee.update_bytes == pytest.approx(counted, rel=0.02)
    trained = sum(p.numel() for p in trainee.method.parameters() if p.requires_grad)
    assert trainee.update_bytes > 4 * 7 * trained  # AdamW alone reads four and writes three floats a weight
    method = trainee.method
    one = step_rungs.forward_flops(images, lambda views: method.projector(method.backbone(views[0])))
    of_predictor = step_rungs.forward_flops(
        [torch.randn(6, method.cfg.dim)], lambda views: method.predictor(views[0])
    )
    assert trainee.teacher_flops == 2 * one
    # The logits of two images add a little.
    assert trainee.student_flops == pytest.approx(6 * (one + of_predictor), rel=1e-3)
    assert trainee.flops == trainee.student_flops + trainee.teacher_flops


def test_a_chunk_on_the_device_poses_as_the_batch():
    chunk = [torch.rand(4, 3, 2, 2), torch.rand(4, 3, 2, 2)]
    views = step_rungs.OneChunk(chunk, 10)
    assert count_samples(views) == 10
    for part in chunks(10, 4):
        made = views.rows(part)
        assert [len(view) for view in made] == [part.stop - part.start] * 2
        assert [view.data_ptr() for view in made] == [view.data_ptr() for view in chunk]


@pytest.mark.parametrize("augment_on", ["cpu", "gpu"])
def test_the_step_with_augmentation_takes_its_views_as_the_run_s_step_does(config_file, shards, augment_on):
    flags = ["--data.shards", str(shards), "--train.batch", "6", "--recipe.size", "16"]
    resolved = run_config.load(config_file, [*flags, "--data.augment-on", augment_on])
    work = data_rungs.open_work(resolved)
    made = []
    for in_chunks in (False, True):
        batches = data_rungs.resident_views(resolved, work, torch.device("cpu"), in_chunks)
        views = next(batches)
        assert isinstance(views, LazyViews) == (in_chunks and augment_on == "gpu")
        made.append([view.clone() for view in rows_of(views, slice(0, 2))])
        batches.close()
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


def test_mfu_counts_student_and_teacher():
    trainee = step_rungs.Trainee(
        None,
        None,
        None,
        torch.device("cpu"),
        torch.float32,
        4,
        4,
        74_175_000_000,
        24_725_000_000,
        1e9,
        0.0,
        8,
    )  # type: ignore[arg-type]
    rows = {
        verdict.FULL: Row(verdict.FULL, rates=[1000.0]),
        "end to end, views on the GPU": Row("end to end, views on the GPU", rates=[500.0]),
        verdict.TEACHER: Row(verdict.TEACHER, rates=[4000.0]),
    }
    rows |= {
        verdict.UPDATE: Row(verdict.UPDATE, rates=[4e12]),
        verdict.LOADER: Row(verdict.LOADER, error="no"),
    }
    for row in rows.values():
        ladder_rows.annotate(row, trainee, hardware.Peak(989, 3.0, "data sheet"))
    assert rows["end to end, views on the GPU"].more["mfu"] == pytest.approx(0.05)
    assert rows[verdict.FULL].more["mfu"] == pytest.approx(0.1)  # 1000 x 98.9 GFLOP of 989 TFLOP/s
    assert rows[verdict.TEACHER].more["mfu"] == pytest.approx(
        0.1
    )  # a quarter of the work, four times the rate
    assert rows[verdict.FULL].more["tb_per_s"] == pytest.approx(1000 * (1e9 + 2) / 1e12)
    assert rows[verdict.UPDATE].more["tb_per_s"] == pytest.approx(8.0)
    assert rows[verdict.LOADER].more == {}


def test_ema_loop_does_what_ours_does():
    pairs = step_peers.ema_pairs(make_method(Plain()))
    for _, student in pairs:
        student.data += torch.randn_like(student)
    copies = [teacher.detach().clone() for teacher, _ in pairs]
    ema_update(copies, [student for _, student in pairs], 0.9)
    step_peers.ema_loop(pairs, 0.9)
    for (teacher, _), copied in zip(pairs, copies, strict=True):
        torch.testing.assert_close(teacher.detach(), copied)


def test_percentiles():
    assert [step_timer.percentile([3.0, 1.0, 2.0, 4.0], p) for p in (0, 25, 50, 95, 100)] == [1, 1, 2, 4, 4]


# ------------------------------------------------------------------------------------------------------- command


def test_the_whole_ladder(config_file, shards, tmp_path, monkeypatch, capsys):
    # Compiling takes half a minute: see below.
    monkeypatch.setattr(ladder_rows, "has_compiler", lambda device: False)
    path = tmp_path / "ladder.json"
    assert bench_command.run([config_file, *STEP, "--data.shards", str(shards), "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == [
        *verdict.RUNGS,
        verdict.KERNELS,
        "EMA",
        "EMA as a Python loop",
        *step_peers.STEP_PEERS,
    ]
    kinds = rows.pop(verdict.KERNELS)["kinds_ms"]
    assert min(kinds["matrix products"], kinds["convolutions"]) > 0
    assert "nothing is copied" in rows.pop(verdict.TO_DEVICE)["error"]
    if importlib.util.find_spec("lightly") is None:
        assert rows.pop(step_peers.LIGHTLY)["error"].startswith("not installed: ")
    for row in rows.values():
        assert row["error"] is None
        assert row["images_per_s"] > 0
        assert 0 < row["ms_p50"] <= row["ms_p95"]
        assert row["memory_bytes"] > 0
    for name in (verdict.STUDENT, verdict.TEACHER, verdict.FULL, verdict.FULL_AUGMENT, verdict.END_TO_END):
        assert 0 < rows[name]["mfu"] < 10
    assert rows["EMA"]["ratio_to"] == "EMA as a Python loop"
    ours = rows[verdict.FULL]["images_per_s"]
    for peer in rows.keys() & set(step_peers.STEP_PEERS):
        assert rows[peer]["ours_over_this"] == pytest.approx(ours / rows[peer]["images_per_s"])
    assert found["kind"] == "ladder"
    assert found["settings"]["config"]["train"]["batch"] == 4
    assert found["peak"]["source"] == "measured"
    assert found["verdict"]["sentence"] == found["conclusion"]
    assert found["verdict"]["contention"] > 0
    assert found["conclusion"] in capsys.readouterr().out.splitlines()


def test_chunks_exact_heads_and_a_queue_run_too(config_file, capsys):
    extra = [
        "--train.micro-batch",
        "2",
        "--method.queue",
        "16",
        "--train.exact-heads",
        "True",
        "--train.precision",
        "bf16",
        "--quick",
    ]
    assert bench_command.run(["step", config_file, *STEP, *extra]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "batch 4 in chunks of 2, bfloat16, eager" in said
    assert "Give --data.shards to learn" in said


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--steps", "2"], "no benchmark 'fastssl bench --steps'"),
        (["none.yaml"], "no configuration file 'none.yaml'"),
        (["step", "--steps", "0"], "Give the configuration file first"),
        (["CONFIG", "--steps", "0"], "--steps is 0"),
        (["CONFIG", "--train.bach", "4"], "Did you mean 'train.batch'"),
        (["CONFIG", "--json", "no/such/x.json"], "no folder 'no/such'"),
    ],
)
def test_mistakes_are_named(config_file, argv, words):
    with pytest.raises(UserError, match=words):
        bench_command.run([config_file if token == "CONFIG" else token for token in argv])


def test_a_batch_beyond_the_images_is_told_before_anything_is_measured(config_file, shards):
    with pytest.raises(UserError, match="has 60 samples in use, fewer than one batch of 64"):
        bench_command.run(
            [config_file, *STEP, "--train.batch", "64", "--data.shards", str(shards), "--quick"]
        )


def test_it_refuses_several_processes(config_file, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="without torchrun"):
        bench_command.run([config_file])
