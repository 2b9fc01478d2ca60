"""The pretraining loop: set up, then step, teacher, log, save; readable from top to bottom."""

from __future__ import annotations

import time
import warnings
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from fastssl import checkpoint, distributed
from fastssl.build import build_method, compile_blocks, prepare_backend, spread, use_bf16
from fastssl.eval.online import OnlineKNN
from fastssl.interrupt import StopRequest
from fastssl.meters import Meters, MetricsLog, Screen
from fastssl.optim import build_optimizer, match_layout, scaled_lr, set_lr
from fastssl.same_run import check_same_run, data_set_of
from fastssl.schedules import lr_at, progress_at
from pipelines.loader import Loader, open_loader
from shards.errors import UserError
from shards.files import atomic_write, remove_unfinished
from shards.hashing import hash_key
from shards.read import ShardSet

if TYPE_CHECKING:
    from fastssl.config import Resolved


@dataclass(frozen=True)
class TrainConfig:
    """How long, how large, where, and with which of the speed switches."""

    out: str = "runs/pretrain"
    """Folder of this run: configuration, metrics.jsonl, checkpoints."""
    epochs: int = 100
    """Passes over the shards."""
    batch: int = 256
    """Images per step over all processes."""
    seed: int = 0
    """Decides weights, order and augmentation."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """bf16 computes under autocast (weights and loss stay float32); auto uses it where the hardware has it."""
    channels_last: bool = True
    """Keep convolutions' tensors in the layout that tensor cores and oneDNN want; no effect on ViTs."""
    compile: bool = False
    """torch.compile the backbones, block by block; falls back, with a warning, where there is no compiler."""
    clip_grad: float = 0.0
    """Largest norm of the gradient; 0 does not clip."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""
    save_every: int = 1
    """Epochs between two checkpoints; the last step is always saved."""
    save_every_steps: int = 0
    """Steps between two checkpoints within an epoch; 0 saves at ends of epochs only."""
    keep: int = 2
    """Newest checkpoints that are kept; 0 keeps all."""

    def __post_init__(self) -> None:
        for name, least in (
            ("epochs", 1),
            ("batch", 2),
            ("seed", 0),
            ("log_every", 1),
            ("save_every", 1),
            ("clip_grad", 0),
        ):
            if getattr(self, name) < least:
                raise UserError(f"train.{name} is {getattr(self, name)}, but it must be at least {least}.")
        for name in ("save_every_steps", "keep"):
            if getattr(self, name) < 0:
                raise UserError(f"train.{name} is {getattr(self, name)}, but it must not be negative.")


@dataclass(frozen=True)
class Summary:
    """What a finished or interrupted run came to."""

    steps: int
    seconds: float
    images_per_s: float
    checkpoint: Path
    interrupted: int = 0
    """Number of the signal that stopped the run, 0 where it ran to its end."""


def pretrain(resolved: Resolved, *, resume: bool = False) -> Summary:
    """Run, or continue, the pretraining that a configuration describes.

    Order, draws, schedules and initial weights are functions of the configuration, and a checkpoint holds everything else, so a
    resumed run on a CPU ends with the same bits as one that was never stopped.

    Raises:
        UserError: shards missing or too few, a batch that does not divide by the ranks, a run folder in use without `resume`, a
            checkpoint of another architecture or data set, a non-finite loss, a full disk.
    """
    # ---------------------------------------------------------------------------------------------- set up
    cfg, train = resolved.config, resolved.config.train
    ranks = distributed.setup(None if train.device == "auto" else train.device, timeout_s=1800)
    device, run = ranks.device, Path(train.out)
    if not cfg.data.shards:
        raise UserError(
            "No shards to train on: give --data.shards DIR, the folder that `fastssl shard` made."
        )
    shards = ShardSet.open(cfg.data.shards)
    loader = open_loader(
        shards,
        cfg.recipe,
        batch=train.batch,
        seed=train.seed,
        rank=ranks.rank,
        world=ranks.world,
        engine=cfg.data.engine,
        threads=cfg.data.threads,
        device=device,
    )
    found = checkpoint.list_checkpoints(run)
    if found and not resume:
        raise UserError(
            f"'{run}' already holds a run ({found[-1].name}): add --resume to continue it, or choose another --train.out."
        )
    state = checkpoint.load(found[-1]) if found else None

    prepare_backend(device)
    method, shape = build_method(resolved, device)
    if state is not None:
        check_same_run(state, resolved, shards, shape, str(found[-1]))
        checkpoint.load_weights(method, state["method"], str(found[-1]))
    bf16 = use_bf16(train.precision, device)
    if train.compile:
        compile_blocks(method, device)
    model = spread(method, ranks)
    optimizer = build_optimizer(method.parameters(), cfg.optim)
    meters, start = Meters(), 0
    if state is not None:
        # Settings such as weight_decay are this run's; those in the checkpoint would silently undo a change of them.
        own_groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": own_groups})
        match_layout(optimizer)
        meters.restore(state["meters"], device)
        torch.set_rng_state(state["rng"])
        start = state["step"]
    del state
    if cfg.knn.every and ranks.world > 1 and not cfg.knn.max_samples and ranks.is_main:
        warnings.warn(
            "knn.max_samples is 0 (all): every process waits while the first one tests.", stacklevel=2
        )
    online = (
        OnlineKNN(cfg.knn, cfg.recipe, shards, device, bf16, cfg.data.threads)
        if cfg.knn.every and ranks.is_main
        else None
    )

    steps, total = loader.steps_per_epoch, loader.steps_per_epoch * train.epochs
    peak_lr = scaled_lr(cfg.optim, train.batch)
    warmup = min(cfg.optim.warmup_epochs, train.epochs)
    if warmup != cfg.optim.warmup_epochs:
        warnings.warn(
            f"The warm-up of {cfg.optim.warmup_epochs:g} epochs is longer than the run: all of it warms up.",
            stacklevel=2,
        )
    screen = Screen(total, start, show=ranks.is_main)
    log = _open_run_folder(run, resolved, start) if ranks.is_main else None
    _greet(screen, resolved, loader, device, bf16, start, total)

    def save(step: int) -> None:
        # Every rank looks, at the same weights: all of them leave, or none. A checkpoint is worth having only if it can go on.
        if not all(bool(p.isfinite().all()) for p in method.parameters()):
            raise _diverged(f"The weights are no longer finite at step {step}", resolved)
        if ranks.is_main:
            state = {
                "step": step,
                "config": resolved.tree(),
                "architecture": shape,
                "shards": data_set_of(shards),
                "method": method.state_dict(),
                "optimizer": optimizer.state_dict(),
                "meters": meters.state(),
                "rng": torch.get_rng_state(),
            }
            with meters.paused():
                checkpoint.save(checkpoint.checkpoint_path(run, step), state, train.keep)

    # ---------------------------------------------------------------------------------------------- loop
    began = time.perf_counter()
    step, saved, timed = start, start, 0
    first_epoch = start // steps
    if online and log and start and start % steps == 0 and "knn_accuracy" not in log.last:
        first_epoch -= 1  # it was saved and then stopped before its test: nothing is left of it but that
    stop = StopRequest()
    # One stream for the whole run: the next epoch's first batches are made while this one's last are trained on.
    batches = loader.steps(start, total)
    with screen, stop, closing(batches):
        for epoch in range(first_epoch, train.epochs):
            while step < (epoch + 1) * steps:
                waiting = time.perf_counter()
                batch = next(batches)
                wait_s = time.perf_counter() - waiting

                set_lr(
                    optimizer,
                    lr_at(
                        step,
                        base_lr=peak_lr,
                        steps_per_epoch=steps,
                        epochs=train.epochs,
                        warmup_epochs=warmup,
                    ),
                )
                if cfg.model.drop_path:
                    # The blocks to skip are a function of the step as well, another on each rank, and so need no saving.
                    torch.manual_seed(int(hash_key(train.seed, step, ranks.rank)) >> 1)
                with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
                    output = model(batch.views)
                output.loss.backward()
                if train.clip_grad:
                    nn.utils.clip_grad_norm_(method.parameters(), train.clip_grad)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                step, timed = step + 1, timed + 1
                method.update_teacher(
                    method.teacher_momentum(progress_at(step, steps_per_epoch=steps, epochs=train.epochs))
                )

                meters.add(output.metrics, wait_s)
                screen.step(step)
                if step % train.log_every == 0 or step == total:
                    values = meters.read(train.batch, timed)
                    timed = 0
                    if not torch.isfinite(torch.tensor(values["loss"])):
                        raise _diverged(f"The loss is {values['loss']} at step {step}", resolved)
                    screen.log(step, epoch, train.epochs, values)
                    if log:
                        lr = optimizer.param_groups[0]["lr"]
                        log.write({"step": step, "epoch": round(step / steps, 4), "lr": lr, **values})
                stopping = (
                    _any_rank(stop.signal, device) if ranks.world == 1 or step % train.log_every == 0 else 0
                )
                if stopping or (train.save_every_steps and step % train.save_every_steps == 0):
                    save(step)
                    saved = step
                if stopping:
                    seconds = time.perf_counter() - began
                    path = checkpoint.checkpoint_path(run, step)
                    return _finish(path, step, seconds, (step - start) * train.batch, stopping)
            last = epoch + 1 == train.epochs
            if online and (last or (epoch + 1) % cfg.knn.every == 0):
                with meters.paused():
                    accuracy = online.test(method.backbone)
                screen.say(
                    f"epoch {epoch + 1}/{train.epochs}  kNN accuracy {accuracy:.1%} (k = {online.k}, {online.what})"
                )
                if log:
                    log.write({"step": step, "epoch": epoch + 1, "knn_accuracy": accuracy})
            if saved != step and (last or (epoch + 1) % train.save_every == 0):
                save(step)
                saved = step
    return _finish(
        checkpoint.checkpoint_path(run, step),
        step,
        time.perf_counter() - began,
        (step - start) * train.batch,
        0,
    )


def _open_run_folder(run: Path, resolved: Resolved, start: int) -> MetricsLog:
    try:
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        for folder in (run, run / "checkpoints"):
            remove_unfinished(folder)
        atomic_write(run / "config.yaml", resolved.to_yaml().encode())
        return MetricsLog(run / "metrics.jsonl", start)
    except OSError as error:
        raise UserError(
            f"The run folder '{run}' cannot be written ({error.strerror}): choose another --train.out."
        ) from error


def _diverged(what: str, resolved: Resolved) -> UserError:
    return UserError(
        f"{what}: lower --optim.lr (now {resolved.config.optim.lr:g}) or set --train.clip_grad. "
        f"'{resolved.config.train.out}' keeps the checkpoints from before."
    )


def _greet(
    screen: Screen,
    resolved: Resolved,
    loader: Loader,
    device: torch.device,
    bf16: bool,
    start: int,
    total: int,
) -> None:
    cfg = resolved.config
    screen.say(
        f"{resolved.method_name} {cfg.model.backbone} on {loader.shards.num_samples:,} images at {cfg.recipe.size} px: batch "
        f"{loader.batch} on {loader.world} x {device}, {'bf16' if bf16 else 'fp32'}, {cfg.train.epochs} epochs of "
        f"{loader.steps_per_epoch} steps"
    )
    if start:
        screen.say(f"resuming after step {start} of {total}")


def _any_rank(signal: int, device: torch.device) -> int:
    """The signal that any rank was sent: ranks must leave the loop at the same step. Waits for the device where there are several."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return signal
    seen = torch.tensor(signal, device=device)
    torch.distributed.all_reduce(seen, torch.distributed.ReduceOp.MAX)
    return int(seen)


def _finish(path: Path, step: int, seconds: float, images: int, signal: int) -> Summary:
    distributed.barrier()  # no rank leaves while another may still wait for it
    return Summary(step, seconds, images / max(seconds, 1e-9), path, signal)
