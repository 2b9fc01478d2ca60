"""The settings of the training loop; see `fastssl.pretraining.loop`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shards.errors import UserError, check_least


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch, device, precision, speed switches, logging and checkpoints of a run."""

    out: str = "runs/pretrain"
    """Folder of the run: configuration, metrics.jsonl, checkpoints."""
    epochs: int = 100
    """Passes over the shards."""
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
    log_every: int = 10
    """Log metrics to metrics.jsonl every N steps."""
    save_every: int = 1
    """Save a checkpoint every N epochs; the last step is always saved."""
    save_every_steps: int = 0
    """Save a checkpoint every N steps too; 0: at ends of epochs only."""
    keep_last: int = 2
    """Number of newest checkpoints to keep; 0: all. With knn.every the best weights so far are also in checkpoints/best.pt."""
    keep_every: int = 0
    """Save every N-th epoch's checkpoint and keep it permanently; 0: none."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """What to do at a loss or gradient that is not finite. stop: end the run; skip: leave weights, optimizer and teacher as they were
    before the step, and continue. Both write the batch to a file for `fastssl replay`."""
    max_skipped: int = 20
    """Number of steps that may be skipped in a run; one more stops it."""

    def __post_init__(self) -> None:
        check_least(self, "train.", epochs=1, batch=2, seed=0, log_every=1, save_every=1, clip_grad=0)
        if not self.out.strip():
            raise UserError(
                "train.out is empty, such as from a variable that is not set: name the run's folder."
            )
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
        for name in ("save_every_steps", "keep_last", "keep_every", "max_skipped"):
            if getattr(self, name) < 0:
                raise UserError(f"train.{name} is {getattr(self, name)}, but it must not be negative.")
