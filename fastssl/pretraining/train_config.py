"""The section `train` of a pretraining run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastssl.training.loop_config import LoopConfig
from shards.errors import UserError, check_least


@dataclass(frozen=True)
class TrainConfig(LoopConfig):
    """Length, batch, device, precision, speed switches, logging and checkpoints of a run."""

    out: str = "runs/pretrain"
    """Folder of the run: configuration, metrics.jsonl, checkpoints."""
    batch: int = 256
    """Images a step, over all processes."""
    micro_batch: int | Literal["auto"] = 0
    """Images that a process has on its device at a time, each against the keys of the whole batch. 0: its whole share of the batch;
    auto: the largest part that fits in the GPU's memory. The host holds 3 batches of float32 views or, with data.augment_on gpu, of
    decoded images with room for a quarter more; the GPU then makes each chunk's views when the step needs them."""
    exact_heads: bool = False
    """With micro_batch: run the student's heads on the whole batch too, at the cost of another forward of its backbone. Exact for
    backbones without BatchNorm."""
    seed: int = 0
    """Seed of the initial weights, the order and the augmentation."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """bf16 and fp16 compute under autocast (weights and loss stay float32), fp16 with a scaled loss. auto: bf16 where the hardware
    has it, fp16 on older GPUs, fp32 on other CPUs."""
    channels_last: bool = True
    """Keep the tensors of convolutions in the layout that tensor cores and oneDNN prefer; no effect on ViTs."""
    compile: bool = False
    """Compile the backbones with torch.compile, block by block; without a compiler, warn and run uncompiled."""
    checkpointing: Literal["none", "blocks", "selective"] = "none"
    """Activation checkpointing of the student: recompute activations in the backward pass to save memory. blocks: keep the inputs of
    blocks only, for the least memory and a third more work. selective: keep the results of matrix products, convolutions and
    attention, for little more work."""
    clip_grad: float = 0.0
    """Clip the gradient to this norm; 0: no clipping."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """What to do at a loss or gradient that is not finite. stop: end the run; skip: leave weights, optimizer and teacher as they were
    before the step, and continue. Both write the batch to a file for `fastssl replay`."""
    max_skipped: int = 20
    """Number of steps that may be skipped in a run; one more stops it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, "train.", batch=2, seed=0, clip_grad=0)
        if self.seed >= 2**63:
            raise UserError(f"train.seed is {self.seed}, but it must be less than 2^63 = {2**63}.")
        if self.micro_batch != "auto" and (self.micro_batch < 0 or self.micro_batch == 1):
            raise UserError(
                f"train.micro_batch is {self.micro_batch}, but it must be 0 (the whole batch), auto, or at least 2."
            )
        if self.exact_heads and self.micro_batch == 0:
            raise UserError(
                "train.exact_heads is for batches in chunks, but train.micro_batch is 0: set --train.micro-batch, or leave it False."
            )
        if self.max_skipped < 0:
            raise UserError(f"train.max_skipped is {self.max_skipped}, but it must not be negative.")
