"""DINO in steps: in chunks, on two ranks, frozen at first, skipped where not finite, and in runs that stop and continue."""

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastssl.commands.evaluate_checkpoint import evaluate_knn
from fastssl.core.distributed import Dist
from fastssl.core.optimizers import OptimConfig, build_optimizer, set_lr, set_schedules, trained_groups
from fastssl.core.schedules import Clock
from fastssl.methods.dino import DINO, DINOConfig, DINOHead
from fastssl.models.activation_checkpointing import checkpoint_blocks
from fastssl.models.backbones import build_backbone
from fastssl.models.model_config import ModelConfig
from fastssl.models.pretrained import load_backbone
from fastssl.models.stochastic_depth import step_keys
from fastssl.pretraining.build import build_method, spread
from fastssl.pretraining.run import train
from fastssl.pretraining.run_config import Resolved, load
from fastssl.pretraining.step import DDPWrapper, Step, StepOptions
from pipelines.loading.loader import Loader
from shards.errors import UserError
from tests.fastssl.methods.test_dino import SMALL, make_dino, make_views
from tests.fastssl.pretraining.test_resume import resume_after_crashes
from tests.fastssl.pretraining.test_step import CPU, in_float64, largest_difference, take_steps
from tests.fastssl.runs import STEPS, assert_same_end, newest, rows, tiny, write_yaml
from tests.gloo import run_ranks
from tests.needs import module

# Beyond the first epoch, so that nothing is frozen.
LATER = Clock(6, 8, 2)


def step_of(method: DINO, model: torch.nn.Module | None = None, **options: Any) -> Step:
    optimizer = build_optimizer(method.param_groups(), OptimConfig(name="sgd", lr=0.1, weight_decay=0.01))
    return Step(method, model or DDPWrapper(method), optimizer, CPU, options=StepOptions(**options))


def gradients(
    method: DINO, views: list[Tensor], keys: np.ndarray | None = None, **options: Any
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Gradients and metrics of one batch, on a copy of the method."""
    method = copy.deepcopy(method)
    metrics = step_of(method, **options).gradients(views, LATER, keys)
    grads = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    return grads, {name: value.item() for name, value in metrics.items()}


def vit(drop_path: float = 0.0) -> DINO:
    torch.manual_seed(0)
    model = ModelConfig(backbone="test_vit", drop_path=drop_path, stop_grad_conv1=False)
    method = DINO(build_backbone(model, 32, (16,)), DINOConfig(out_dim=32, hidden_dim=24, bottleneck_dim=8))
    method.plan = method.plan_views(2, 2)
    return method


def vit_views(num: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.rand(num, 3, side, side, generator=generator) for side in (32, 32, 16, 16)]


# Chunks


@pytest.mark.parametrize(("size", "num_chunks"), [(14, 1), (5, 3), (2, 7)])
@pytest.mark.parametrize("exact_heads", [False, True])
def test_chunks_give_the_gradient_of_the_batch(
    size: int, num_chunks: int, exact_heads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_float64(monkeypatch)
    method, views = make_dino().double(), [view.double() for view in make_views(14)]
    whole, told = gradients(method, views)
    calls: list[int] = []
    count = copy.deepcopy(method)
    count.teacher_backbone.register_forward_hook(lambda _m, args, _out: calls.append(len(args[0])))
    step_of(count, micro_batch=size, exact_heads=exact_heads).gradients(views, LATER)
    assert len(calls) == num_chunks
    parts, told_parts = gradients(method, views, micro_batch=size, exact_heads=exact_heads)
    assert {name for name, p in method.named_parameters() if p.requires_grad} == whole.keys()
    assert largest_difference(parts, whole) < 1e-10
    assert told_parts == pytest.approx(told, rel=1e-10)


@pytest.mark.parametrize("size", [5, 2])
@pytest.mark.parametrize("exact_heads", [False, True])
def test_chunks_of_a_vit_in_float32(size: int, exact_heads: bool) -> None:
    method, views = vit(drop_path=0.3), vit_views(14)
    keys = step_keys(0, 3, np.arange(14))
    whole, _ = gradients(method, views, keys)
    parts, _ = gradients(method, views, keys, micro_batch=size, exact_heads=exact_heads)
    assert largest_difference(parts, whole) < 1e-4
    norm, difference = (
        math.sqrt(sum(float(g.double().square().sum()) for g in grads))
        for grads in (whole.values(), [parts[n] - whole[n] for n in whole])
    )
    assert difference < 1e-5 * norm
    other, _ = gradients(method, views, step_keys(0, 4, np.arange(14)), micro_batch=size)
    assert largest_difference(other, whole) > 1e-2


def test_the_last_layer_sees_a_chunk_at_a_time() -> None:
    method, sizes = make_dino(), []
    method.teacher_head.last_layer.register_forward_hook(lambda _m, args, _out: sizes.append(args[0].shape))
    step_of(method, micro_batch=5).gradients(make_views(14), LATER)
    # The mean of the batch, then both global views of chunks of 4, 5 and 5 images.
    assert [tuple(size) for size in sizes] == [(5,), *[(4, 5)] * 2, *[(5, 5)] * 4]


@pytest.mark.parametrize("kind", ["blocks", "selective"])
def test_activation_checkpointing_changes_nothing(kind: Any) -> None:
    method, views, keys = vit(drop_path=0.3), vit_views(4), step_keys(0, 3, np.arange(4))
    whole, _ = gradients(method, views, keys)
    again = vit(drop_path=0.3)
    checkpoint_blocks(again.backbone, kind, "test_vit")
    step_of(again).gradients(views, LATER, keys)
    found = {name: p.grad for name, p in again.named_parameters() if p.grad is not None}
    assert largest_difference(found, whole) < 1e-5


# The first epochs, and steps that are not finite


def test_the_last_layer_is_frozen_in_the_first_epoch_only() -> None:
    method = make_dino()
    step = step_of(method)
    for number, frozen in ((0, True), (3, True), (4, False), (5, False)):
        before = copy.deepcopy(method.head.state_dict())
        step.gradients(make_views(seed=number), Clock(number, 8, 4))
        assert method.head.last_layer.weight.grad is not None
        step.update(0.9)
        assert torch.equal(method.head.last_layer.weight, before["last_layer.weight"]) == frozen
        assert not torch.equal(method.head.mlp[0].weight, before["mlp.0.weight"])
        assert method.head.last_layer.weight.requires_grad


@pytest.mark.parametrize("policy", ["skip", "stop"])
@pytest.mark.parametrize("view", [0, 1, 4])
@pytest.mark.parametrize("micro_batch", [0, 2])
def test_a_batch_that_is_not_finite_leaves_the_centre(policy: Any, view: int, micro_batch: int) -> None:
    method = make_dino()
    step = step_of(method, nonfinite=policy, micro_batch=micro_batch)
    step.gradients(make_views(), LATER)
    start = method.center.clone()
    assert not step.update(0.5)
    assert not torch.equal(method.center, start)
    before = copy.deepcopy(method.state_dict())
    spoiled = make_views(seed=2)
    # A view of the teacher, and one that only the student sees.
    spoiled[view][3, 1, 2, 2] = math.nan
    step.gradients(spoiled, LATER)
    assert step.update(0.5)
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())
    step.gradients(make_views(seed=3), LATER)
    assert bool(step.update(0.5)) == (policy == "stop")
    assert torch.equal(method.center, before["center"]) == (policy == "stop")


# A loop of one's own


def lightly_head(ours: DINOHead, cfg: DINOConfig) -> nn.Module:
    """lightly's head with the weights of ours, in float64."""
    theirs = module("lightly.models.modules.heads").DINOProjectionHead(
        6, cfg.hidden_dim, cfg.bottleneck_dim, cfg.out_dim
    )
    state = {
        name.replace("mlp.", "layers."): value for name, value in ours.mlp.state_dict(prefix="mlp.").items()
    }
    lengths = torch.ones(cfg.out_dim, 1)
    theirs.load_state_dict(
        {**state, "last_layer.weight_v": ours.last_layer.weight, "last_layer.weight_g": lengths}
    )
    return theirs.double()


def cosine(start: float, end: float, step: int, total: int) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * step / total)) / 2


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_twelve_steps_equal_a_plain_loop_around_lightly_s_head_and_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Schedules, groups, clipping, the frozen layer, centre and teacher in the order of the authors' loop."""
    in_float64(monkeypatch)
    # lightly holds the temperature in float32, where this one is exact.
    changes = {"teacher_temperature": 0.0625, "warmup_teacher_epochs": 0}
    method = make_dino(dataclasses.replace(SMALL, **changes)).double()
    total, per_epoch = 12, 4
    views_of = [[view.double() for view in make_views(seed=s)] for s in range(total)]
    student = nn.Sequential(copy.deepcopy(method.backbone), lightly_head(method.head, method.cfg))
    teacher = nn.Sequential(
        copy.deepcopy(method.teacher_backbone), lightly_head(method.teacher_head, method.cfg)
    ).requires_grad_(False)
    criterion = module("lightly.loss").DINOLoss(output_dim=SMALL.out_dim).double()
    criterion.center.copy_(method.center)
    trained = [p for p in student.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1]}, {"params": [p for p in trained if p.ndim == 1]}]
    theirs = torch.optim.AdamW(groups)

    optim = OptimConfig(lr=0.01, final_lr=1e-4, weight_decay=0.04, final_weight_decay=0.4, warmup_epochs=0)
    ours = trained_groups(method.param_groups())
    step = Step(method, DDPWrapper(method), build_optimizer(ours, optim), CPU)
    clipped = 0
    for number, views in enumerate(views_of):
        clock = Clock(number, total, per_epoch)
        set_schedules(step.optimizer, ours, clock, optim, 256)
        metrics = step.gradients(views, clock)
        step.update(method.teacher_momentum(clock))

        for group, decay in zip(theirs.param_groups, (cosine(0.04, 0.4, number, total), 0.0), strict=True):
            group["lr"], group["weight_decay"] = cosine(0.01, 1e-4, number, total), decay
        loss = criterion(
            [teacher(view) for view in views[:2]], [student(view) for view in views], teacher_temp=0.0625
        )
        theirs.zero_grad()
        loss.backward()
        for p in trained:
            assert p.grad is not None
            norm = p.grad.norm()
            clipped += int(norm > 3)
            p.grad.mul_(min(1.0, 3 / (float(norm) + 1e-6)))
        student[1].freeze_last_layer = 1
        student[1].cancel_last_layer_gradients(number // per_epoch)
        theirs.step()
        momentum = cosine(0.996, 1.0, number, total)
        with torch.no_grad():
            for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
                old.mul_(momentum).add_(new, alpha=1 - momentum)
        assert metrics["loss"].item() == pytest.approx(loss.item(), rel=1e-9), number
    assert 0 < clipped < total * len(trained)
    for networks, names in ((student, ("backbone", "head")), (teacher, ("teacher_backbone", "teacher_head"))):
        own = [p for name in names for p in method.get_submodule(name).parameters()]
        others = [p for name, p in networks.named_parameters() if not name.endswith("weight_g")]
        for one, other in zip(own, others, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(method.center, criterion.center.flatten(), rtol=1e-8, atol=1e-10)


# Ranks


def _train(method: DINO, step: Step, views_of: list[list[Tensor]]) -> dict:
    """Two steps, the last layer frozen in the first."""
    set_lr(step.optimizer, 0.1)
    return take_steps(method, step, views_of)


def _rank_steps(here: Dist, exact_heads: bool) -> dict:
    method = make_dino()
    mine = slice(here.rank * 5, here.rank * 5 + 5)
    model = spread(method, here)
    assert isinstance(model, DistributedDataParallel)
    step = step_of(method, model, micro_batch=3, exact_heads=exact_heads)
    return _train(method, step, [[view[mine] for view in make_views(10, seed=s)] for s in range(2)])


@pytest.mark.parametrize("exact_heads", [False, True])
def test_two_ranks_in_chunks_equal_one_process(exact_heads: bool) -> None:
    found = run_ranks(_rank_steps, exact_heads)
    method = make_dino()
    expected = _train(method, step_of(method), [make_views(10, seed=s) for s in range(2)])
    for rank in found:
        for step in range(2):
            assert largest_difference(rank["grads"][step], expected["grads"][step]) < 1e-4
            for name in ("loss", "ce", "ce_norm", "acc", "teacher_entropy", "kl"):
                assert rank["metrics"][step][name] == pytest.approx(expected["metrics"][step][name], rel=1e-4)
        for name, value in expected["state"].items():
            torch.testing.assert_close(rank["state"][name], value, msg=name)
            # The centre too.
            assert torch.equal(rank["state"][name], found[0]["state"][name]), name


# Runs


TINY_DINO: dict[str, Any] = {
    "recipe": {"preset": "dino", "size": 32, "local_size": 16, "local_views": 6},
    "model": {"backbone": "test_vit", "stem_stride": 4, "drop_path": 0.1},
    "optim": {"name": "adamw", "lr": 5e-3, "weight_decay": 0.04, "final_weight_decay": 0.4},
    "train": {"epochs": 2},
}


def tiny_dino(shards: Path, out: Path, *changes: dict[str, Any]) -> Resolved:
    tree = tiny(shards, out, TINY_DINO, *changes)
    tree["method"] = {"name": "dino", "out_dim": 64, "hidden_dim": 32, "bottleneck_dim": 16}
    out.parent.mkdir(parents=True, exist_ok=True)
    return load(write_yaml(out.parent / f"{out.name}.yaml", tree))


def test_a_run_learns_stops_resumes_with_the_same_bits_and_is_evaluated(shards: Path, tmp_path: Path) -> None:
    expected = tmp_path / "expected"
    resolved = tiny_dino(shards, expected)
    train(resolved)
    state, logged = newest(expected), rows(expected)
    untrained, _ = build_method(resolved, CPU)
    start = untrained.state_dict()
    assert not torch.equal(state["method"]["center"], start["center"])
    for name in ("backbone", "head", "teacher_backbone", "teacher_head"):
        weights = [n for n in start if n.startswith(f"{name}.") and n.endswith("weight")]
        assert weights
        assert all(not torch.equal(start[n], state["method"][n]) for n in weights), name
    told = [row for row in logged if "kl" in row]
    assert told
    assert all(row["ce_norm"] > 0 and row["kl"] > 0 and 0 < row["teacher_entropy"] <= 1 for row in told)
    assert told[0]["teacher_momentum"] == pytest.approx(0.996, abs=1e-3)
    assert sum("knn_accuracy" in row for row in logged) == 3
    # Once in the first epoch, when the last layer has no state of the optimizer yet, and once in the second.
    resume_after_crashes(tiny_dino(shards, tmp_path / "run"), (4, STEPS + 3))
    assert_same_end(tmp_path / "run", expected)
    teacher = load_backbone(expected).state_dict()
    assert all(torch.equal(value, state["method"][f"teacher_backbone.{n}"]) for n, value in teacher.items())
    report = evaluate_knn(expected, shards, ks=(5,), device="cpu")
    assert len(report["rows"]) == 3
    assert all(0 <= row["accuracy"][5] <= 1 for row in report["rows"])


def test_a_run_in_chunks_with_recomputation_ends_where_the_whole_batch_does(
    shards: Path, tmp_path: Path
) -> None:
    train(tiny_dino(shards, tmp_path / "whole"))
    for options in ({"checkpointing": "blocks"}, {"exact_heads": True}):
        run = tmp_path / next(iter(options))
        train(tiny_dino(shards, run, {"train": {"micro_batch": 3, **options}}))
        for one, other in zip(rows(run), rows(tmp_path / "whole"), strict=True):
            for name in {"loss", "kl", "feature_std"} & one.keys():
                assert one[name] == pytest.approx(other[name], rel=2e-3), name


def test_a_run_skips_a_batch_that_is_not_finite(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps_of = Loader.steps

    def spoiled(self: Loader, start: int, stop: int):
        for number, batch in enumerate(steps_of(self, start, stop), start=start + 1):
            if number == 5:
                batch.views[0][3, 1, 2, 2] = float("nan")
            yield batch

    monkeypatch.setattr(Loader, "steps", spoiled)
    with pytest.warns(UserWarning, match=r"The loss was nan at step 5: skipped"):
        train(tiny_dino(shards, tmp_path / "run", {"train": {"nonfinite": "skip"}, "knn": {"every": 0}}))
    state = newest(tmp_path / "run")
    assert state["step"] == 2 * STEPS
    assert all(bool(t.isfinite().all()) for t in state["method"].values())


def test_a_convolutional_network_trains_with_local_views(shards: Path, tmp_path: Path) -> None:
    model = {"model": {"backbone": "resnet10_w32", "stem_stride": 2, "drop_path": 0.0}}
    optim = {"optim": {"name": "sgd", "lr": 0.03, "final_weight_decay": -1}, "train": {"epochs": 1}}
    train(tiny_dino(shards, tmp_path / "run", model, optim))
    assert all(math.isfinite(row["loss"]) for row in rows(tmp_path / "run") if "loss" in row)


def test_a_recipe_with_one_view_is_refused_before_training(shards: Path, tmp_path: Path) -> None:
    resolved = tiny_dino(
        shards,
        tmp_path / "run",
        {"recipe": {"num_views": 1, "local_views": 0, "blur_p": 0.5, "solarize_p": 0.0}},
    )
    with pytest.raises(UserError, match="DINO compares the global views of an image"):
        train(resolved)
