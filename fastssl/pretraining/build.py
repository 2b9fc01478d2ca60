"""Build the method that is trained: on its device, in its memory format, compiled, under DDP."""

from __future__ import annotations

import dataclasses
import inspect
import os
import shutil
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from fastssl.core import distributed
from fastssl.methods import Method, get_method
from fastssl.methods.method_weights import freeze_external
from fastssl.models.activation_checkpointing import checkpoint_blocks
from fastssl.models.backbones import build_backbone
from fastssl.models.batch_norm import frozen_statistics
from fastssl.models.grouped_batch_norm import GroupedBatchNorm, deal_groups, group_batch_norm
from fastssl.models.model_config import ModelConfig, architecture
from fastssl.pretraining.step import DDPWrapper, depends_on_chunk
from pipelines.augment.channels import fit_recipe
from pipelines.kernels.view_params import Form
from pipelines.streaming.shard_downloads import resolve_order
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError

if TYPE_CHECKING:
    from fastssl.pretraining.run_config import Resolved, RunConfig
    from fastssl.pretraining.train_config import TrainConfig


# A compiled block has a graph for each mode (training or not, with gradients or without), for each size of views, and for stochastic
# depth or none: 11 with all of them. Beyond its limit, which is 8 by default, the compiler runs the rest uncompiled.
MAX_GRAPHS = 32


def prepare_backend(device: torch.device) -> None:
    """Let cuDNN choose its algorithms by timing them: every step has the same shapes, so this pays off from the second step on."""
    torch.backends.cudnn.benchmark = device.type == "cuda"


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype of autocast: as asked or, for auto, the one that the hardware multiplies fast.

    auto takes bf16 where the hardware has it, fp16 on GPUs that have only fp16 (before Ampere), and float32 on other CPUs.
    """
    if precision != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def use_bf16(precision: str, device: torch.device) -> bool:
    """Return whether `compute_dtype` is bf16."""
    return compute_dtype(precision, device) == torch.bfloat16


def view_form(train: TrainConfig, device: torch.device) -> Form:
    """Return dtype and memory layout of views that are made on a GPU: the step's own, so that it need not cast them."""
    return Form(compute_dtype(train.precision, device), train.channels_last)


def follow_shards(resolved: Resolved, shards: ShardSet) -> Resolved:
    """Return the configuration with model.channels, data.order and the recipe's mean, std and value range taken from a data set.

    So the order of the samples is part of the run, wherever the shards lie when it is continued.

    Raises:
        UserError: see `pipelines.augment.channels.fit_recipe`; or model.channels was set to another number.
    """
    cfg = resolved.config
    recipe = fit_recipe(cfg.recipe, shards, cfg.data.value_range)
    channels = len(recipe.mean)
    if cfg.model.channels not in (ModelConfig.channels, channels):
        raise UserError(
            f"model.channels is {cfg.model.channels}, but the images of '{shards.folder}' make views of {channels}: leave it out."
        )
    model = dataclasses.replace(cfg.model, channels=channels)
    data = dataclasses.replace(cfg.data, order=resolve_order(shards, cfg.data.order))
    return dataclasses.replace(
        resolved, config=dataclasses.replace(cfg, recipe=recipe, model=model, data=data)
    )


def build_method(resolved: Resolved, device: torch.device) -> tuple[Method, dict[str, Any]]:
    """Return the method with the initial weights of the run's seed, on the device, and the architecture of its backbone.

    Raises:
        UserError: an unknown name, sizes that do not fit, or a number of channels that the engines do not make.
    """
    cfg = resolved.config
    if cfg.model.channels != len(cfg.recipe.mean):
        raise UserError(
            f"model.channels is {cfg.model.channels}, but the recipe makes views of {len(cfg.recipe.mean)} channels: leave it out, it "
            "follows the shards."
        )
    torch.manual_seed(cfg.train.seed)
    sides = {cfg.recipe.side(view) for view in range(cfg.recipe.total_views)}
    backbone = build_backbone(cfg.model, cfg.recipe.size, sorted(sides - {cfg.recipe.size}))
    shape = architecture(backbone, cfg.model)
    method = get_method(resolved.method_name)(backbone, cfg.method)
    method.check_batch(cfg.train.batch)
    method.plan = method.plan_views(cfg.recipe.num_views, cfg.recipe.local_views)
    freeze_external(method)
    if cfg.model.bn_group:
        group_batch_norm(method, cfg.model.bn_group)
        student = (method.backbone, *method.heads())
        if cfg.model.bn_shuffle and not deal_groups(method, cfg.model.bn_shuffle, but=student):
            raise UserError(
                f"model.bn_shuffle is {cfg.model.bn_shuffle}, but {resolved.method_name} has no teacher with BatchNorm: leave it out."
            )
    # The teacher keeps no activations, so it has nothing to recompute.
    checkpoint_blocks(backbone, cfg.train.checkpointing, cfg.model.backbone)
    if cfg.train.channels_last:
        method = method.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return method.to(device), shape


def check_groups(cfg: RunConfig, world: int) -> None:
    """Raise UserError where a process's images, or those of a chunk, are not whole groups of BatchNorm."""
    block, batch, micro_batch = cfg.model.bn_block, cfg.train.batch, cfg.train.micro_batch
    if not cfg.model.bn_group:
        return
    dealt = (
        f" and model.bn_shuffle {cfg.model.bn_shuffle}, together {block} images"
        if cfg.model.bn_shuffle
        else ""
    )
    if batch % (block * world):
        near = max(1, round(batch / (block * world))) * block * world
        raise UserError(
            f"model.bn_group is {cfg.model.bn_group}{dealt}, but train.batch {batch} gives {batch / world:g} images to each of "
            f"{world} processes, not whole groups: set --train.batch {near}, or another --model.bn-group."
        )
    if micro_batch != "auto" and 0 < micro_batch < block:
        raise UserError(
            f"model.bn_group is {cfg.model.bn_group}{dealt}, but train.micro_batch {micro_batch} is smaller than a group: set "
            f"--train.micro-batch {block} or more."
        )


def has_compiler(device: torch.device) -> bool:
    """Return whether torch.compile finds its compiler: C++ for a CPU, C (for Triton) for a GPU."""
    on_cpu = device.type == "cpu"
    names = ("g++", "c++", "clang++") if on_cpu else ("gcc", "cc", "clang")
    return bool(os.environ.get("CXX" if on_cpu else "CC")) or any(shutil.which(name) for name in names)


def compile_blocks(method: Method, device: torch.device) -> bool:
    """Compile student and teacher backbones in place: block by block where there are blocks, so that equal blocks share a graph.

    State dicts keep their keys. Return False, with a warning, where there is no compiler.
    """
    if not has_compiler(device):
        what, package = ("C++ compiler", "g++") if device.type == "cpu" else ("C compiler", "gcc")
        warnings.warn(
            f"train.compile needs a {what} and there is none (Debian: {package}): running uncompiled.",
            stacklevel=2,
        )
        return False
    # Imported with the compiler: it takes a second.
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, MAX_GRAPHS)
    for backbone in method.backbones():
        blocks = getattr(backbone, "blocks", None)
        for part in blocks if isinstance(blocks, nn.Sequential | nn.ModuleList) else [backbone]:
            part.compile()
    return True


def spread(method: Method, ranks: distributed.Dist) -> nn.Module:
    """Return the method's `DDPWrapper`, under DDP with several processes; on GPUs BatchNorm spans them, as in the paper."""
    if ranks.world == 1:
        return DDPWrapper(method)
    on_gpu = ranks.device.type == "cuda"
    if on_gpu:
        convert_batch_norm(method)
    elif ranks.is_main and depends_on_chunk(method):
        warnings.warn(
            "PyTorch has no SyncBatchNorm on CPUs: BatchNorm sees each process's share of the batch only (model.bn_group N gives it "
            "groups of N images, the same on any number of processes).",
            stacklevel=2,
        )
    # Each process keeps its own BatchNorm buffers (equal ones under SyncBatchNorm); torch 2.14 renamed the switch.
    known = inspect.signature(DistributedDataParallel).parameters
    switch = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {switch: False, "device_ids": [ranks.local_rank] if on_gpu else None}
    return DistributedDataParallel(DDPWrapper(method), **options)


def freeze_unused(
    method: Method, view_shapes: Sequence[tuple[int, ...]], ranks: distributed.Dist
) -> list[str]:
    """Freeze parameters that receive no gradient (DDP would hang), warn, and return their names.

    It runs a step on two random images, or as many as a group of BatchNorm has, with views of these shapes (C, H, W). Call it on every
    rank, after the optimizer is built, so that its state has the same layout with any number of ranks, and before `spread`. At world
    1 it does nothing.
    """
    if ranks.world == 1:
        return []
    generator = torch.Generator().manual_seed(0)
    num = max((m.rows for m in method.modules() if isinstance(m, GroupedBatchNorm)), default=2)
    views = [torch.rand(num, *shape, generator=generator).to(ranks.device) for shape in view_shapes]
    with distributed.alone(), frozen_statistics(method):
        method(views).loss.backward()
    unused = {name: p for name, p in method.named_parameters() if p.requires_grad and p.grad is None}
    for parameter in method.parameters():
        parameter.grad = None
    for parameter in unused.values():
        parameter.requires_grad_(False)
    if unused and ranks.is_main:
        more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
        warnings.warn(
            f"These weights receive no gradient and stay as they are: {', '.join(list(unused)[:3])}{more}.",
            stacklevel=2,
        )
    return list(unused)


def convert_batch_norm(method: nn.Module) -> None:
    """Replace every BatchNorm of the method's modules by SyncBatchNorm, in place; the state dict keeps its keys.

    This is timm's conversion: PyTorch's drops the activation that is part of timm's BatchNormAct2d. Layers with groups stay: they need
    no other rank.
    """
    from timm.layers.norm_act import convert_sync_batchnorm

    for name, child in method.named_children():
        if isinstance(child, _BatchNorm) and not isinstance(child, GroupedBatchNorm):
            setattr(method, name, convert_sync_batchnorm(child))
        else:
            convert_batch_norm(child)
