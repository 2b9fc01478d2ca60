"""`fastssl.pretrain`: run pretraining from a configuration, in Python and for the command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastssl.core import distributed
from fastssl.core.out_of_memory import bracketed_cause, is_out_of_memory
from fastssl.core.unfailing_output import unfailing_output
from fastssl.pretraining.build import follow_shards, view_form
from fastssl.pretraining.knn_evaluation import open_evaluation
from fastssl.pretraining.method_trainer import MethodTrainer
from fastssl.pretraining.run_config import Resolved, load_config
from fastssl.training import RunFolder, Summary, loop
from pipelines.loading.loader import open_loader
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
            return train(resolved, resume=Path(resume) if isinstance(resume, str) else resume)
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


def train(resolved: Resolved, *, resume: bool | Path = False) -> Summary:
    """Run, or continue, the pretraining that a configuration describes; `pretrain` is the way in.

    Order, draws, schedules and initial weights are functions of the configuration, and a checkpoint holds everything else, so a
    resumed run on a CPU ends with the same bits as one that was never stopped.

    Raises:
        UserError: shards missing or too few, a batch that does not divide by the ranks, a run folder in use without `resume` or by
            another trainer, a checkpoint of another architecture or data set, a non-finite loss, a full disk.
    """
    cfg, settings = resolved.config, resolved.config.train
    ranks = distributed.setup(settings.device, timeout_s=1800)
    if not cfg.data.shards:
        raise UserError(
            "No shards to train on: give --data.shards SHARDS, the folder that `fastssl shard` made."
        )
    if cfg.data.masks:
        raise UserError("data.masks is for segmentation, and pretraining uses no masks: leave it out.")
    shards = cfg.data.open()
    resolved = follow_shards(resolved, shards)
    cfg = resolved.config
    options = cfg.data.options(
        rank=ranks.rank,
        world=ranks.world,
        device=ranks.device,
        form=view_form(settings, ranks.device),
        reuse_memory=True,
    )
    loader = open_loader(shards, cfg.recipe, batch=settings.batch, seed=settings.seed, options=options)
    with RunFolder(cfg.train, resolved.tree(), ranks, cfg.log) as folder:
        found = folder.newest(resume)
        if resume and found is None:
            none = f"nothing to resume in '{folder.path}': the run starts at its first step"
            loader.note = "\n".join(filter(None, [loader.note, none]))
        trainer = MethodTrainer(resolved, shards, ranks, loader.steps_per_epoch, found)
        if trainer.num_chunks > 1:
            # The device never holds more than a chunk of the views.
            loader = loader.in_chunks()
        evaluation = open_evaluation(cfg, trainer.method, shards, ranks, trainer.dtype, loader)
        return loop.train(trainer, loader, folder, evaluation)
