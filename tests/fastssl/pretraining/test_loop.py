"""What a run does and leaves behind."""

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fastssl.core import checkpoint
from fastssl.core.distributed import Dist, cleanup
from fastssl.core.meters import ProgressDisplay
from fastssl.core.schedules import lr_at
from fastssl.methods import MoCoV3
from fastssl.models.backbones import build_backbone
from fastssl.pretraining import build, method_trainer
from fastssl.pretraining.build import compile_blocks, use_bf16
from fastssl.pretraining.run import train
from fastssl.pretraining.run_config import load
from fastssl.pretraining.train_config import TrainConfig
from pipelines.loading.loader import Loader
from shards.dataset.order import epoch_order
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError
from tests.fastssl.runs import BATCH, STEPS, TINY_VIT, TOTAL, differences, newest, resolve, rows
from tests.gloo import _free_port, run_ranks
from tests.needs import HANGS_S

# Views that differ by a small crop only: telling them apart is easy.
EASY = {
    "recipe": {
        "crop_scale": [0.8, 1.0],
        "hflip_p": 0.0,
        "jitter_p": 0.0,
        "gray_p": 0.0,
        "blur_p": 0.0,
        "solarize_p": 0.0,
    },
    "method": {"momentum": 0.9},
    "train": {"epochs": 8, "batch": 20, "log_every": 3, "save_every_steps": 0, "save_every": 100},
    "knn": {"every": 0},
}


def _ce_norm(shards: Path, run: Path, *changes: dict) -> list[float]:
    train(resolve(shards, run, EASY, *changes))
    return [row["ce_norm"] for row in rows(run) if "ce_norm" in row]


def test_the_loss_falls_only_where_something_is_learned(shards: Path, tmp_path: Path) -> None:
    learned = _ce_norm(shards, tmp_path / "learned", {"optim": {"lr": 1.0}})
    idle = _ce_norm(shards, tmp_path / "idle", {"optim": {"lr": 1e-9, "weight_decay": 0.0}})
    assert learned[-1] < 0.6 * learned[0]
    assert idle[-1] > 0.9 * idle[0]


def test_metrics_hold_the_promised_fields(finished: Path) -> None:
    steps = [row for row in rows(finished) if "loss" in row]
    fields = {
        "step",
        "epoch",
        "lr",
        "loss",
        "ce",
        "ce_norm",
        "acc",
        "feature_std",
        "grad_norm",
        "teacher_distance",
        "stand_ins",
        "images_per_s",
        "data_wait",
        "teacher_momentum",
        "peak_memory_bytes",
    }
    assert {frozenset(row) for row in steps} == {frozenset(fields)}
    # Every second step, and the last one.
    assert [row["step"] for row in steps] == [*range(2, TOTAL, 2), TOTAL]
    for row in steps:
        assert row["epoch"] == pytest.approx(row["step"] / STEPS, abs=1e-4)
        rate = lr_at(
            row["step"] - 1, base_lr=0.06 * BATCH / 256, steps_per_epoch=STEPS, epochs=3, warmup_epochs=1
        )
        assert row["lr"] == pytest.approx(rate, rel=1e-5)
        assert row["loss"] == pytest.approx(4 * 0.2 * row["ce"], rel=1e-5)
        assert row["ce_norm"] == pytest.approx(row["ce"] / np.log(BATCH), rel=1e-5)
        assert 0 <= row["acc"] <= 1
        assert 0 < row["feature_std"] <= 1
        assert row["grad_norm"] > 0
        assert 0 < row["teacher_distance"] < 1
        assert row["stand_ins"] == 0
        assert row["images_per_s"] > 0
        assert 0 <= row["data_wait"] <= 1


def test_the_run_folder_holds_its_configuration(shards: Path, finished: Path) -> None:
    # With what auto meant for the order of these shards.
    expected = resolve(shards, finished, {"data": {"order": "global"}})
    assert load(finished / "config.yaml") == expected
    assert newest(finished)["config"] == expected.tree()


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"save_every_steps": 0}, [14, 21]),
        ({"save_every_steps": 0, "keep_last": 0}, [7, 14, 21]),
        ({"save_every_steps": 0, "save_every": 2, "keep_last": 0}, [14, 21]),
        ({"save_every_steps": 5, "save_every": 100, "keep_last": 0}, [5, 10, 15, 20, 21]),
        ({"save_every_steps": 0, "save_every": 100, "keep_last": 1}, [21]),
        ({"save_every_steps": 5, "save_every": 100, "keep_last": 1, "keep_every": 1}, [7, 14, 21]),
        ({"save_every_steps": 2, "save_every": 100, "keep_last": 2, "keep_every": 2}, [14, 20, 21]),
    ],
)
def test_checkpoints_come_as_often_as_asked(
    settings: dict, steps: list, shards: Path, tmp_path: Path
) -> None:
    summary = train(resolve(shards, tmp_path / "run", {"train": settings, "knn": {"every": 0}}))
    found = checkpoint.list_checkpoints(tmp_path / "run")
    assert found == [checkpoint.checkpoint_path(tmp_path / "run", step) for step in steps]
    assert (summary.steps, summary.checkpoint, summary.interrupted) == (TOTAL, found[-1], 0)


def test_a_warm_up_longer_than_the_run_is_told(shards: Path, tmp_path: Path) -> None:
    changes = {"optim": {"warmup_epochs": 40}, "train": {"epochs": 1}, "knn": {"every": 0}}
    with pytest.warns(
        UserWarning, match="warm-up of 40 epochs is longer than the run of 1: the learning rate rises"
    ):
        train(resolve(shards, tmp_path / "run", changes))
    assert rows(tmp_path / "run")[-2]["lr"] == pytest.approx(
        0.06 * BATCH / 256 * (STEPS - 1) / STEPS, rel=1e-5
    )


# ---------------------------------------------------------------- switches


def _weights(run: Path) -> dict[str, torch.Tensor]:
    return newest(run)["method"]


def test_checkpointed_activations_change_no_weight(shards: Path, tmp_path: Path) -> None:
    short = {"train": {"epochs": 1}}
    for kind in ("none", "blocks", "selective"):
        train(resolve(shards, tmp_path / kind, TINY_VIT, short, {"train": {"checkpointing": kind}}))
        assert differences(_weights(tmp_path / "none"), _weights(tmp_path / kind)) == []


def test_clip_grad_bounds_the_step(shards: Path, tmp_path: Path) -> None:
    """Plain SGD moves all weights together by at most rate x norm, so by the sum of rates x limit over the run."""
    plain = {
        "optim": {"momentum": 0.0, "weight_decay": 0.0, "lr": 3.2, "warmup_epochs": 0},
        "train": {"epochs": 1},
        "knn": {"every": 0},
    }
    limit = 1e-3
    moved = {}
    for clip in (0.0, limit):
        run = tmp_path / f"clip {clip}"
        resolved = resolve(shards, run, plain, {"train": {"clip_grad": clip}})
        train(resolved)
        torch.manual_seed(0)
        start = MoCoV3(build_backbone(resolved.config.model, 16), resolved.config.method)
        after = _weights(run)
        trained = [name for name, p in start.named_parameters() if p.requires_grad]
        own = dict(start.named_parameters())
        moved[clip] = torch.stack([(after[n] - own[n]).detach().norm() for n in trained]).norm().item()
    rates = [lr_at(s, base_lr=0.1, steps_per_epoch=STEPS, epochs=1, warmup_epochs=0) for s in range(STEPS)]
    assert 0 < moved[limit] <= limit * sum(rates) * 1.01
    assert moved[0.0] > 10 * moved[limit]


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "default"
)  # the compiler hides warnings of its own, which as errors would stop it
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU needs g++")
def test_compiled_backbones_train_alike(shards: Path, tmp_path: Path) -> None:
    short = {"model": {"drop_path": 0.0}, "train": {"epochs": 1, "checkpointing": "none"}}
    for name, on in (("eager", False), ("compiled", True)):
        train(resolve(shards, tmp_path / name, TINY_VIT, short, {"train": {"compile": on}}))
    eager, compiled = _weights(tmp_path / "eager"), _weights(tmp_path / "compiled")
    assert list(eager) == list(compiled)
    losses = [
        [row["loss"] for row in rows(tmp_path / name) if "loss" in row] for name in ("eager", "compiled")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_without_a_compiler_the_run_goes_on_uncompiled(
    shards: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.warns(UserWarning, match=r"needs a C\+\+ compiler and there is none.*running uncompiled"):
        train(resolve(shards, tmp_path / "run", {"train": {"compile": True}}))
    assert differences(_weights(tmp_path / "run"), _weights(finished)) == []


def test_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks where there are blocks, else the backbone; student and teacher; and the heads never."""
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/" + name)
    asked: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: asked.append(self))
    vit = MoCoV3(
        build_backbone(resolve("", Path("/tmp/none"), TINY_VIT).config.model, 32), MoCoV3.Config(hidden_dim=8)
    )
    assert compile_blocks(vit, torch.device("cpu"))
    blocks = [vit.get_submodule(f"{name}.blocks") for name in ("backbone", "teacher_backbone")]
    assert asked == [block for part in blocks for block in part.children()]


def test_precision_is_taken_as_asked_or_from_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert use_bf16("bf16", cpu)
    assert not use_bf16("fp32", cpu)
    for wide, tiles in ((False, False), (True, False), (False, True)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda wide=wide: wide)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda tiles=tiles: tiles)
        assert use_bf16("auto", cpu) is (wide or tiles)


# ---------------------------------------------------------------- faults


def _spoil(monkeypatch: pytest.MonkeyPatch, at: int, what: str) -> None:
    """From step `at` on the loss, only its gradient, or only a weight after the step, is not finite."""
    update = MoCoV3.update_teacher
    forward = MoCoV3.forward
    count = 0

    def spoiled_forward(self, *args):
        nonlocal count
        count += 1
        output = forward(self, *args)
        if what == "loss" and count >= at:
            bad = output.loss * float("nan")
            return output._replace(loss=bad, metrics={**output.metrics, "loss": bad.detach()})
        if what == "gradient" and count == at:
            output.loss.register_hook(lambda gradient: gradient * float("inf"))
        return output

    def spoiled_update(self, momentum):
        if what == "weight" and count >= at:
            next(self.backbone.parameters()).data[0] = float("inf")
        update(self, momentum)

    monkeypatch.setattr(MoCoV3, "forward", spoiled_forward)
    monkeypatch.setattr(MoCoV3, "update_teacher", spoiled_update)
    # Its trial steps would count.
    monkeypatch.setattr(method_trainer, "estimate_step", lambda method, trial: None)


@pytest.mark.parametrize(
    ("what", "at", "message"),
    [
        (
            "loss",
            6,
            r"The loss was nan at step 6, replay it with `fastssl replay .*000006.pt`: lower --optim.lr \(now 0.06\) or set",
        ),
        # A save, but no row; a row, but no save.
        ("loss", 9, "The loss was nan at step 9, replay it"),
        ("loss", 7, "The loss was nan at step 7, replay it"),
        ("gradient", 4, "The gradient was not finite at step 4, replay it"),
        ("weight", 9, "The weights are no longer finite at step 9: lower --optim.lr"),
    ],
)
def test_a_run_that_diverges_stops_and_keeps_good_checkpoints_only(
    what: str, at: int, message: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _spoil(monkeypatch, at, what)
    with pytest.raises(UserError, match=message):
        train(resolve(shards, tmp_path / "run"))
    state = newest(tmp_path / "run")
    assert state["step"] < at
    assert all(bool(t.isfinite().all()) for t in state["method"].values())


def test_a_stop_request_ends_the_run_after_its_step(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    move = ProgressDisplay.step

    def move_and_interrupt(self: ProgressDisplay, step: int) -> None:
        move(self, step)
        if step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(ProgressDisplay, "step", move_and_interrupt)
    before = signal.getsignal(signal.SIGINT)
    summary = train(resolve(shards, tmp_path / "run"))
    assert (summary.steps, summary.interrupted) == (5, signal.SIGINT)
    assert newest(tmp_path / "run")["step"] == 5
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 0}, "train.epochs is 0, but it must be at least 1"),
        ({"batch": 1}, "train.batch is 1, but it must be at least 2"),
        ({"seed": -1}, "train.seed is -1, but it must be at least 0"),
        ({"micro_batch": 1}, "train.micro_batch is 1, but it must be 0 .*, auto, or at least 2"),
        ({"exact_heads": True}, "train.exact_heads is for batches in chunks, but train.micro_batch is 0"),
        ({"keep_last": -1}, "train.keep_last is -1, but it must not be negative"),
        ({"save_every_steps": -5}, "train.save_every_steps is -5, but it must not be negative"),
    ],
)
def test_impossible_settings_are_refused(values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainConfig(**values)


# ---------------------------------------------------------------- several processes


def _train_rank(here: Dist, port: int, shards: str, out: str) -> dict:
    """A rank of a run, as torchrun starts it; its own run folder shows whether it writes."""
    cleanup()  # pretrain joins the group itself
    os.environ["MASTER_PORT"] = str(port)
    made: list[MoCoV3] = []
    ids: list[list[int]] = []
    get_method, steps_of = build.get_method, Loader.steps

    class Kept(MoCoV3):
        def __init__(self, *args) -> None:
            super().__init__(*args)
            made.append(self)

    def seen(self: Loader, start: int, stop: int):
        for batch in steps_of(self, start, stop):
            ids.append(batch.sample_ids.tolist())
            yield batch

    build.get_method = lambda name: Kept
    Loader.steps = seen
    try:
        changes = {"optim": {"warmup_epochs": 0}, "train": {"epochs": 2}}
        summary = train(resolve(shards, Path(out) / f"of rank {here.rank}", changes))
    finally:
        build.get_method, Loader.steps = get_method, steps_of
    return {
        "ids": ids,
        "steps": summary.steps,
        "parameters": {name: p.detach().clone() for name, p in made[0].named_parameters()},
    }


@pytest.mark.slow
def test_two_processes_train_one_model(shards: Path, tmp_path: Path) -> None:
    first, second = run_ranks(_train_rank, _free_port(), str(shards), str(tmp_path), timeout_s=HANGS_S)
    assert first["steps"] == second["steps"] == 2 * STEPS
    # The same weights on both, which are the saved ones, and other than at the start.
    assert differences(first["parameters"], second["parameters"]) == []
    saved = newest(tmp_path / "of rank 0")["method"]
    assert differences(first["parameters"], {name: saved[name] for name in first["parameters"]}) == []
    # Laid end to end, what the two saw is the order of a single process.
    order = [
        epoch_order(ShardSet.open(shards).num_samples, seed=0, epoch=e)[: STEPS * BATCH] for e in range(2)
    ]
    both = [a + b for a, b in zip(first["ids"], second["ids"], strict=True)]
    assert both == np.concatenate(order).reshape(-1, BATCH).tolist()
    # Only the first writes.
    assert (tmp_path / "of rank 0" / "metrics.jsonl").exists()
    assert not (tmp_path / "of rank 1").exists()
    assert [row["step"] for row in rows(tmp_path / "of rank 0")] == [0, 2, 4, 6, 7, 7, 8, 10, 12, 14, 14, 14]
