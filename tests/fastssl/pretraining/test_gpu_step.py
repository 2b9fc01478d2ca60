"""What only a CUDA device shows of a step: that the host never waits, what memory it takes, and what fits."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fastssl.core.optimizers import build_optimizer
from fastssl.methods import MoCoV3
from fastssl.models.stochastic_depth import step_keys
from fastssl.pretraining.build import build_method
from fastssl.pretraining.micro_batch import TrialStep, find_micro_batch
from fastssl.pretraining.run_config import load
from fastssl.pretraining.step import DDPWrapper, Step, StepOptions
from pipelines.augment.recipe import Recipe
from pipelines.kernels.torch_kernels import Form
from pipelines.loading.chunk_slot import BlankViews
from shards.dataset.shard_set import ShardSet
from tests.fastssl.pretraining.test_step import gradients, largest_difference, without_norms
from tests.fastssl.tiny import Plain, make_method, make_views

pytestmark = pytest.mark.gpu

SIZE, BATCH = 64, 64
FLAGS = ["--recipe.size", str(SIZE), "--method.hidden-dim", "64", "--train.batch", str(BATCH)]


def build(backbone: str, dtype: torch.dtype, *flags: str, **options) -> tuple[MoCoV3, Step]:
    device = torch.device("cuda")
    resolved = load(None, [*FLAGS, "--model.backbone", backbone, *flags])
    method, _ = build_method(resolved, device)
    optimizer = build_optimizer(method.parameters(), resolved.config.optim)
    return method, Step(method, DDPWrapper(method), optimizer, device, dtype, StepOptions(**options))


def pinned_views(size: int = SIZE) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(BATCH, 3, size, size, generator=generator).pin_memory() for _ in range(2)]


@pytest.mark.parametrize("backbone", ["resnet10_w32", "vit_tiny_patch16_224"])
@pytest.mark.parametrize("checkpointing", ["none", "blocks", "selective"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options", [{}, {"micro_batch": 16}, {"micro_batch": 16, "exact_heads": True}], ids=str
)
def test_a_step_never_waits_for_the_device(backbone, checkpointing, dtype, options):
    flags = [
        "--train.checkpointing",
        checkpointing,
        "--method.queue",
        str(2 * BATCH),
        "--model.drop-path",
        "0.1",
    ]
    _, step = build(backbone, dtype, *flags, clip_grad=1.0, **options)
    views = pinned_views()
    for number in range(4):
        torch.cuda.set_sync_debug_mode("error" if number > 1 else "default")
        try:
            step.gradients(views, keys=step_keys(0, number, np.arange(BATCH)))
            step.update(0.99)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lars_never_waits_either(dtype):
    _, step = build("resnet10_w32", dtype, "--optim.name", "lars")
    views = pinned_views()
    for number in range(4):
        torch.cuda.set_sync_debug_mode("error" if number > 1 else "default")
        try:
            step.gradients(views)
            step.update(0.99)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def peak_bytes(**options) -> int:
    _, step = build("resnet18", torch.bfloat16, **options)
    # Large enough for activations to outweigh weights, gradients and the optimizer's averages, which chunks leave as they are.
    views = pinned_views(3 * SIZE)
    step.gradients(views)
    step.update(0.99)
    torch.cuda.reset_peak_memory_stats()
    step.gradients(views)
    step.update(0.99)
    return torch.cuda.max_memory_allocated()


def test_chunks_take_less_memory():
    whole, by_chunk, exact = (
        peak_bytes(),
        peak_bytes(micro_batch=8),
        peak_bytes(micro_batch=8, exact_heads=True),
    )
    assert by_chunk < 0.8 * whole
    assert exact < 0.8 * whole


def test_gradients_in_chunks_equal_the_cpu_s():
    method = without_norms(make_method(Plain()))
    expected, _ = gradients(method, make_views(10))
    method.to("cuda")
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
    step = Step(
        method, DDPWrapper(method), optimizer, torch.device("cuda"), options=StepOptions(micro_batch=3)
    )
    with torch.backends.cudnn.flags(allow_tf32=False):
        step.gradients([view.pin_memory() for view in make_views(10)])
    found = {name: p.grad.cpu() for name, p in method.named_parameters() if p.grad is not None}
    assert largest_difference(found, expected) < 1e-3


def test_auto_finds_less_than_the_batch_where_memory_is_short():
    def find() -> int:
        resolved = load(None, [*FLAGS, "--model.backbone", "resnet18"])
        method, _ = build_method(resolved, torch.device("cuda"))
        shapes = ((3, SIZE, SIZE),) * 2
        trial = TrialStep(resolved.config.optim, torch.device("cuda"), torch.bfloat16, shapes, BATCH)
        return find_micro_batch(method, trial)

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    assert find() == BATCH
    total = torch.cuda.get_device_properties(0).total_memory
    limit = 0.7 * torch.cuda.max_memory_reserved()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(limit / total)
    try:
        assert 2 <= find() < BATCH
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def lazy_views(shards: Path, dtype: torch.dtype) -> BlankViews:
    data = ShardSet.open(shards)
    ids = np.arange(BATCH) % len(data)
    return BlankViews(data, Recipe(size=SIZE), ids, torch.device("cuda"), form=Form(dtype))


@pytest.mark.parametrize("options", [{"micro_batch": 16}, {"micro_batch": 16, "exact_heads": True}], ids=str)
def test_a_step_never_waits_where_views_are_made_chunk_by_chunk(options, shards):
    _, step = build("resnet10_w32", torch.bfloat16, **options)
    views = lazy_views(shards, torch.bfloat16)
    for number in range(4):
        torch.cuda.set_sync_debug_mode("error" if number > 1 else "default")
        try:
            step.gradients(views, keys=step_keys(0, number, np.arange(BATCH)))
            step.update(0.99)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_chunks_made_ahead_give_the_gradient_of_those_made_before(shards):
    """Lazy views are made on another stream while the step computes: an order that is only mostly right shows here."""
    found = []
    for lazy in (True, False):
        torch.manual_seed(0)
        method, step = build("resnet10_w32", torch.float32, micro_batch=8)
        views = lazy_views(shards, torch.float32)
        for _ in range(3):
            step.optimizer.zero_grad()
            step.gradients(views if lazy else [view.clone() for view in views])
        found.append({name: p.grad.cpu() for name, p in method.named_parameters() if p.grad is not None})
    assert largest_difference(*found) < 1e-3
