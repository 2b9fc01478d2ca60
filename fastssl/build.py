"""The model made ready to train: built from a configuration, on its device, in its memory format, compiled, spread over processes."""

from __future__ import annotations

import inspect
import os
import shutil
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastssl import distributed
from fastssl.methods import MoCoV3, get_method
from fastssl.methods.parts import depends_on_batch
from fastssl.models import architecture, build_backbone
from shards.errors import UserError

if TYPE_CHECKING:
    from fastssl.config import Resolved


def choose_device(name: str) -> torch.device:
    """The device called auto (a GPU where there is one), cpu or cuda; UserError where cuda is asked for and there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("The device is set to cuda, but PyTorch finds no CUDA device: use cpu or auto.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def prepare_backend(device: torch.device) -> None:
    """Let cuDNN time its algorithms: every step has the same shapes, so the choice pays off from the second step on."""
    torch.backends.cudnn.benchmark = device.type == "cuda"


def use_bf16(precision: str, device: torch.device) -> bool:
    """Whether to compute in bf16: as asked, or, for auto, where the hardware multiplies it faster than float32."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def build_method(resolved: Resolved, device: torch.device) -> tuple[MoCoV3, dict[str, Any]]:
    """The method with the initial weights of the run's seed, on the device, and its backbone's architecture.

    Raises:
        UserError: an unknown name, sizes that do not fit, or a number of channels that the engines do not make.
    """
    cfg = resolved.config
    if cfg.model.channels != 3:
        raise UserError(
            f"model.channels is {cfg.model.channels}, but views have 3 channels (grey images are repeated): leave it at 3."
        )
    torch.manual_seed(cfg.train.seed)
    backbone = build_backbone(cfg.model, cfg.recipe.size)
    if cfg.model.grad_checkpointing and depends_on_batch(backbone):
        warnings.warn(
            "model.grad_checkpointing runs BatchNorm's forward twice a step, so its running statistics follow faster than usual.",
            stacklevel=2,
        )
    shape = architecture(backbone, cfg.model)
    method = get_method(resolved.method_name)(backbone, cfg.method)
    if cfg.train.channels_last:
        method = method.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return method.to(device), shape


def has_compiler(device: torch.device) -> bool:
    """Whether torch.compile finds what it needs: a C++ compiler for a CPU, a C compiler (for Triton) for a GPU."""
    on_cpu = device.type == "cpu"
    names = ("g++", "c++", "clang++") if on_cpu else ("gcc", "cc", "clang")
    return bool(os.environ.get("CXX" if on_cpu else "CC")) or any(shutil.which(name) for name in names)


def compile_blocks(method: nn.Module, device: torch.device) -> bool:
    """Compile student and teacher backbones in place: per block where there are blocks, so that equal ones share one graph.

    State dicts keep their keys. Returns False, with a warning, where there is no compiler.
    """
    if not has_compiler(device):
        what, package = ("C++ compiler", "g++") if device.type == "cpu" else ("C compiler", "gcc")
        warnings.warn(
            f"train.compile needs a {what} and there is none (Debian: {package}): running uncompiled.",
            stacklevel=2,
        )
        return False
    for backbone in (method.get_submodule("backbone"), method.get_submodule("teacher_backbone")):
        blocks = getattr(backbone, "blocks", None)
        for part in blocks if isinstance(blocks, nn.Sequential | nn.ModuleList) else [backbone]:
            part.compile()
    return True


def spread(method: nn.Module, ranks: distributed.Dist) -> nn.Module:
    """The method under DDP where there is more than one process; on GPUs BatchNorm then spans them, as the paper's does."""
    if ranks.world == 1:
        return method
    on_gpu = ranks.device.type == "cuda"
    if on_gpu:
        convert_batch_norm(method)
    elif ranks.is_main and depends_on_batch(method):
        warnings.warn(
            "PyTorch has no SyncBatchNorm on CPUs: BatchNorm sees each process's share of the batch only.",
            stacklevel=2,
        )
    # Each process keeps its own BatchNorm buffers (equal ones under SyncBatchNorm); torch 2.14 renamed the switch.
    known = inspect.signature(DistributedDataParallel).parameters
    switch = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {switch: False, "device_ids": [ranks.local_rank] if on_gpu else None}
    return DistributedDataParallel(method, **options)


def convert_batch_norm(method: nn.Module) -> None:
    """Make every BatchNorm of the method's parts a SyncBatchNorm, in place; the state dict keeps its keys.

    timm's conversion, not PyTorch's: that one drops the activation which timm's BatchNormAct2d holds.
    """
    from timm.layers.norm_act import convert_sync_batchnorm

    for name, child in method.named_children():
        setattr(method, name, convert_sync_batchnorm(child))
