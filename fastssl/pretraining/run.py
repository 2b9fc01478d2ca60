"""`fastssl.pretrain`: run pretraining from a configuration, in Python and for the command; `loop.train` does the work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastssl.core import distributed
from fastssl.core.out_of_memory import bracketed_cause, is_out_of_memory
from fastssl.core.unfailing_output import unfailing_output
from fastssl.pretraining import loop
from fastssl.pretraining.loop import Summary
from fastssl.pretraining.run_config import Resolved, load_config
from shards.errors import UserError


def pretrain(
    config: str | Path | Resolved | None = None,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    *,
    resume: bool | str | Path = False,
) -> Summary:
    """Pretrain a backbone on shards, without labels, and return where the weights are and how long it took.

        pretrain("configs/moco_v3_vit_small.yaml", {"data.shards": "photo-shards", "train.batch": 256})
        pretrain(overrides={"data": {"shards": "photo-shards"}, "model": {"backbone": "resnet18"}}, resume=True)

    `fastssl pretrain` runs this. Under torchrun every process calls it. Ctrl-C, SIGTERM and SIGUSR1 end the run after the
    current step, with a checkpoint: `Summary.interrupted` is then the number of the signal. A terminal that is closed, or output that
    cannot be written, does not end it.

    Args:
        config: a YAML file, what `load_config` returned, or None for the defaults.
        overrides: settings that replace the file's, see `load_config`.
        resume: True: continue the run in train.out from its newest checkpoint, or start it where there is none. A checkpoint, or the
            folder of a run: continue from there in train.out, and leave the other folder untouched; see docs/training.md.

    Raises:
        UserError: settings that contradict each other, missing shards, a run folder in use, a loss that is not finite, a batch
            that does not fit in the GPU's memory, a full disk. The message names the way out.
    """
    resolved = load_config(config, overrides)
    try:
        with unfailing_output():
            return loop.train(resolved, resume=Path(resume) if isinstance(resume, str) else resume)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"A batch of {resolved.config.train.batch} over all processes does not fit in the GPU's memory"
            f"{bracketed_cause(error)}: set --train.micro-batch auto, which trains on it in chunks, or --train.checkpointing "
            "blocks, or start more processes with torchrun."
        ) from error
    finally:
        distributed.cleanup()
