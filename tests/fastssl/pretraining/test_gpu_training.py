"""What only a CUDA device shows: training, the loader's copies and the benchmark on it, against the CPU."""

import json
from pathlib import Path

import pytest
import torch

from fastssl.bench import bench_command
from fastssl.methods import get_method
from fastssl.models.backbones import build_backbone
from fastssl.pretraining import run_config
from fastssl.pretraining.run import train
from pipelines.augment.recipe import Recipe
from pipelines.loading.loader import open_loader
from shards.dataset.shard_set import ShardSet
from tests.fastssl.tiny import Normed, Plain, make_method, make_views
from tests.pictures import photo_shards

pytestmark = pytest.mark.gpu

SMALL = [
    "--model.backbone",
    "resnet10_w32",
    "--recipe.size",
    "32",
    "--method.hidden_dim",
    "64",
    "--method.dim",
    "32",
]
SMALL += ["--train.batch", "8", "--train.device", "cuda", "--knn.every", "0"]


@pytest.fixture(scope="module")
def shard_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 16 JPEG pictures."""
    return photo_shards(tmp_path_factory.mktemp("gpu"), 16, 60, 48)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.filterwarnings("ignore:.*TensorFloat32.*:UserWarning")
@pytest.mark.filterwarnings("ignore:The warm-up of:UserWarning")
@pytest.mark.parametrize("augment_on", ["cpu", "gpu"])
@pytest.mark.parametrize("compiled", [False, True])
def test_two_steps_with_bf16_and_channels_last(shard_folder, tmp_path, compiled, augment_on):
    flags = ["--data.shards", str(shard_folder), "--train.out", str(tmp_path / "run"), "--train.epochs", "1"]
    flags += ["--train.precision", "bf16", "--train.channels_last", "True", "--train.compile", str(compiled)]
    flags += ["--data.augment_on", augment_on]
    summary = train(run_config.load(None, [*SMALL, *flags, "--train.log_every", "1"]))
    assert summary.steps == 2
    assert summary.checkpoint.exists()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 2
    assert all(0 < loss < 10 for loss in losses)


@pytest.mark.parametrize("backbone", [Plain, Normed])
def test_fp32_loss_and_gradients_equal_the_cpus(backbone):
    results = []
    for device in ("cpu", "cuda"):
        method = make_method(backbone()).to(device)
        with torch.backends.cudnn.flags(allow_tf32=False):
            loss = method([view.to(device) for view in make_views()]).loss
            loss.backward()
        grads = [p.grad.cpu() for p in method.parameters() if p.grad is not None]
        results.append((loss.item(), grads))
    (loss_cpu, grads_cpu), (loss_gpu, grads_gpu) = results
    assert loss_gpu == pytest.approx(loss_cpu, rel=1e-4)
    for ours, theirs in zip(grads_gpu, grads_cpu, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_bf16_loss_is_near_float32s():
    resolved = run_config.load(None, SMALL)
    cfg = resolved.config
    torch.manual_seed(0)
    method = get_method(resolved.method_name)(build_backbone(cfg.model, cfg.recipe.size), cfg.method).to(
        "cuda"
    )
    views = [torch.randn(8, 3, 32, 32, device="cuda") for _ in range(2)]
    losses = []
    for enabled in (False, True):
        with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16, enabled=enabled):
            losses.append(method(views).loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_loader_gives_a_gpu_the_same_views(shard_folder):
    shards, recipe = ShardSet.open(shard_folder), Recipe(size=24)
    on_cpu, on_gpu = (
        open_loader(shards, recipe, batch=4, seed=1, threads=2, device=device) for device in ("cpu", "cuda")
    )
    count = 0
    for epoch in range(2):
        for a, b in zip(on_cpu.epoch(epoch), on_gpu.epoch(epoch), strict=True):
            assert a.sample_ids.tolist() == b.sample_ids.tolist()
            for expected, view in zip(a.views, b.views, strict=True):
                assert view.device.type == "cuda"
                torch.testing.assert_close(view.cpu(), expected, rtol=0, atol=0)
            count += 1
    assert count == 8


def test_views_on_a_gpu_outlive_the_next_batches(shard_folder):
    loader = open_loader(
        ShardSet.open(shard_folder), Recipe(size=24), batch=2, seed=1, threads=2, device="cuda"
    )
    kept = [(batch.views[0], batch.views[0].clone()) for batch in loader.epoch(0)]
    assert len(kept) == 8
    for view, copy in kept:
        torch.testing.assert_close(view, copy, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_the_ladder_on_a_gpu(shard_folder, tmp_path):
    (tmp_path / "run.yaml").write_text("train:\n  precision: bf16\n")
    path = tmp_path / "ladder.json"
    flags = ["--data.shards", str(shard_folder), "--steps", "2", "--repeats", "1", "--json", str(path)]
    # All but "compile": half a minute for one row.
    rows = "full,end,end_gpu,end_decode,end_one_stream,augment,parts,data,ema,plain,lightly"
    assert bench_command.run([str(tmp_path / "run.yaml"), *SMALL, *flags, "--rows", rows]) == 0
    report = json.loads(path.read_text())
    assert report["machine"]["gpu"] == torch.cuda.get_device_name()
    measured = {row["name"] for row in report["rows"] if row["error"] is None}
    assert {"end to end", "end to end, views on the GPU", "moco-v3's own kind of step"} <= measured
    for row in report["rows"]:
        if row["error"] is not None:
            assert "not installed" in row["error"]
            assert not row["failure"]
            continue
        low, high = row["spread"]
        assert 0 < low <= row["images_per_s"] <= high
        assert 0 < row["ms_p50"] <= row["ms_p95"]
        assert row["memory_bytes"] > 0


def test_views_alone_are_measured_on_a_gpu(tmp_path):
    path = tmp_path / "augment.json"
    flags = ["--batch", "8", "--size", "32", "--seconds", "0.05", "--repeats", "2", "--json", str(path)]
    assert bench_command.run(["augment", *flags]) == 0
    rows = {row["name"]: row for row in json.loads(path.read_text())}
    assert {"triton", "torch", "fused", "kornia-modules", "dali-graph", "torchvision-v2"} <= set(rows)
    for name, row in rows.items():
        if row["error"] is not None:
            assert row["error"].startswith(("not installed", "The engine '"))
            assert name not in ("triton", "torch", "fused", "torchvision-v2")
            continue
        assert 0 < row["ms_p50"] <= row["ms_p95"]
        assert row["gb_per_s"] > 0
        assert row["peak_memory_bytes"] >= 0
    assert rows["triton"]["fidelity"] == rows["torch"]["fidelity"] == "exact"
    assert rows["triton"].get("device_ms", 1) > 0  # None where the launches did not get ahead


def test_loaders_are_measured_on_a_gpu(shard_folder, tmp_path):
    path = tmp_path / "loader.json"
    flags = ["--batch", "4", "--size", "32", "--seconds", "0.05", "--repeats", "1", "--peers", "none"]
    assert bench_command.run(["loader", str(shard_folder), *flags, "--json", str(path)]) == 0
    rows = {row["name"]: row for row in json.loads(path.read_text())}
    for name in ("fused", "fused to GPU", "fused on GPU"):
        assert rows[name]["images_per_s"] > 0
        assert rows[name]["fidelity"] == "exact"
    assert {"fused all on GPU", "dali on GPU", "kornia on GPU"} <= set(rows)
