"""Activation checkpointing: blocks that keep few activations for the backward pass and compute the others again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from fastssl.models.batch_norm import frozen_statistics
from fastssl.models.stochastic_depth import same_depths
from shards.errors import UserError

# Where timm's models hold the parts they repeat.
CONTAINERS = ("blocks", "stages", "layers", "layer1", "layer2", "layer3", "layer4")


def repeated_blocks(backbone: nn.Module) -> list[nn.Module]:
    """Return the repeated blocks of a backbone (transformer or residual blocks) in order; empty where it has none."""
    found: list[nn.Module] = []

    def visit(part: object) -> None:
        if isinstance(part, nn.Sequential | nn.ModuleList):
            for child in part:
                visit(child)
        elif isinstance(blocks := getattr(part, "blocks", None), nn.Sequential | nn.ModuleList):
            # A stage: what comes before its blocks is small.
            visit(blocks)
        elif isinstance(part, nn.Module) and next(part.parameters(), None) is not None:
            found.append(part)

    for name in CONTAINERS:
        if isinstance(container := getattr(backbone, name, None), nn.Sequential | nn.ModuleList):
            visit(container)
    return found


def checkpoint_blocks(backbone: nn.Module, kind: Literal["none", "blocks", "selective"], name: str) -> None:
    """Make each block of `backbone`, called `name` in messages, recompute its activations in the backward pass, in place.

    "blocks" keeps only the inputs of the blocks: the least memory, for another forward pass of the backbone. "selective" also keeps
    the results of matrix products, convolutions and attention, which are most of the work, and recomputes norms and activations
    (torchtitan's policy). Gradients, stochastic depth and BatchNorm's running statistics are as without checkpointing. The
    recomputation is part of a block's forward, so `compile_blocks` afterwards compiles it, too.

    Raises:
        UserError: the backbone has no blocks.
    """
    if kind == "none":
        return
    blocks = repeated_blocks(backbone)
    if not blocks:
        raise UserError(
            f"{name} has no blocks whose activations could be recomputed: set train.checkpointing to none."
        )
    for block in blocks:
        if kind == "selective":  # what is kept must not be overwritten
            for module in block.modules():
                if getattr(module, "inplace", False):
                    module.inplace = False  # pyright: ignore[reportArgumentType]
        block.forward = partial(_recomputed, block, block.forward, kind, _is_random(block))


def _recomputed(
    block: nn.Module, forward: Callable[..., Any], kind: str, is_random: bool, *args: Any, **kwargs: Any
) -> Any:
    """Run `forward` of `block`, under checkpointing where there will be a backward pass."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": is_random}
    if torch.compiler.is_compiling():
        # The compiler supports selective contexts only, and updates running statistics once by itself.
        if kind == "selective":
            options["context_fn"] = partial(create_selective_checkpoint_contexts, expensive_operations())
    else:
        options["context_fn"] = partial(_contexts, block, kind)
    return checkpoint(forward, *args, **options, **kwargs)


def _contexts(block: nn.Module, kind: str) -> tuple[Any, Any]:
    """Return the contexts of the first forward and of the recomputation."""
    again = _both(same_depths(block), frozen_statistics(block))
    if kind != "selective":
        return contextlib.nullcontext(), again
    first, cached = create_selective_checkpoint_contexts(expensive_operations())
    return first, _both(cached, again)


@contextlib.contextmanager
def _both(one: Any, other: Any) -> Iterator[None]:
    with one, other:
        yield


def expensive_operations() -> list[Any]:
    """Return the operations whose results "selective" keeps."""
    aten = torch.ops.aten
    return [
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten.baddbmm.default,
        aten.convolution.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_fused_attention_overrideable.default,
    ]


def _is_random(module: nn.Module) -> bool:
    """Return whether a training forward draws random numbers: stochastic depth or dropout, whose rates are floats."""
    rates = (getattr(m, name, None) for m in module.modules() for name in ("drop_prob", "p"))
    return any(isinstance(rate, float) and rate > 0 for rate in rates)
