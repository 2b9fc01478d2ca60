"""The settings of the training loop; see `fastssl.pretraining.loop`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shards.errors import UserError, check_least


@dataclass(frozen=True)
class TrainConfig:
    """How long, how large, where, and with which of the speed switches."""

    out: str = "runs/pretrain"
    """Folder of this run: configuration, metrics.jsonl, checkpoints."""
    epochs: int = 100
    """Passes over the shards."""
    batch: int = 256
    """Images per step over all processes."""
    micro_batch: int | Literal["auto"] = 0
    """Images that a process has on its device at a time, each against the keys of the whole batch; 0 takes all of its share of the
    batch at once, auto the largest part that fits in the GPU's memory. The host holds 3 batches: of float32 views, or, with
    data.augment_on gpu, of decoded images and room for a quarter more, and the GPU makes each chunk's views when the step asks."""
    exact_heads: bool = False
    """With micro_batch: let the student's heads see the whole batch as well, at the cost of another forward of its backbone. Exact
    for backbones without BatchNorm."""
    seed: int = 0
    """Decides weights, order and augmentation."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """bf16 and fp16 compute under autocast (weights and loss stay float32), fp16 with a scaled loss. auto takes bf16 where the
    hardware has it, fp16 on older GPUs, fp32 on other CPUs."""
    channels_last: bool = True
    """Keep convolutions' tensors in the layout that tensor cores and oneDNN want; no effect on ViTs."""
    compile: bool = False
    """torch.compile the backbones, block by block; falls back, with a warning, where there is no compiler."""
    checkpointing: Literal["none", "blocks", "selective"] = "none"
    """What the student computes again in the backward pass instead of keeping it. blocks: all but the blocks' inputs, a third more
    work for the least memory. selective: all but the results of matrix products, convolutions and attention, little more work."""
    clip_grad: float = 0.0
    """Largest norm of the gradient; 0 does not clip."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""
    save_every: int = 1
    """Epochs between two checkpoints; the last step is always saved."""
    save_every_steps: int = 0
    """Steps between two checkpoints within an epoch; 0 saves at ends of epochs only."""
    keep_last: int = 2
    """Newest checkpoints that are kept; 0 keeps all. With knn.every the best weights so far are in checkpoints/best.pt besides."""
    keep_every: int = 0
    """Epochs between two checkpoints that are saved and kept for good; 0 keeps none for good."""

    nonfinite: Literal["stop", "skip"] = "stop"
    """What a loss or gradient that is not finite does: stop ends the run; skip leaves weights, optimiser and teacher as they were
    before that step and goes on. Either writes the batch to a file for `fastssl replay`."""
    max_skipped: int = 20
    """Steps of the run that may be skipped; one more stops it."""

    def __post_init__(self) -> None:
        check_least(self, "train.", epochs=1, batch=2, seed=0, log_every=1, save_every=1, clip_grad=0)
        if self.micro_batch != "auto" and (self.micro_batch < 0 or self.micro_batch == 1):
            raise UserError(
                f"train.micro_batch is {self.micro_batch}, but it must be 0 (the whole batch), auto, or at least 2."
            )
        if self.exact_heads and self.micro_batch == 0:
            raise UserError(
                "train.exact_heads is for batches in chunks, and train.micro_batch is 0: set --train.micro-batch, or leave it False."
            )
        for name in ("save_every_steps", "keep_last", "keep_every", "max_skipped"):
            if getattr(self, name) < 0:
                raise UserError(f"train.{name} is {getattr(self, name)}, but it must not be negative.")
