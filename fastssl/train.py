"""The pretraining loop: set up, then step, teacher, log, save; readable from top to bottom."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastssl import checkpoint, distributed
from fastssl.build import (
    build_method,
    compile_blocks,
    compute_dtype,
    follow_shards,
    freeze_unused,
    prepare_backend,
    spread,
)
from fastssl.eval.online import OnlineKNN
from fastssl.fit import choose_micro_batch
from fastssl.interrupt import StopRequest
from fastssl.meters import Meters, MetricsLog, Screen
from fastssl.optim import build_optimizer, match_layout, scaled_lr, set_lr
from fastssl.same_run import check_same_run, data_set_of
from fastssl.schedules import lr_at, progress_at
from fastssl.step import Step, chunks, steady_statistics, tell_chunks
from pipelines.loader import Loader, open_loader
from shards.errors import UserError
from shards.files import atomic_write, remove_unfinished
from shards.hashing import hash_key

if TYPE_CHECKING:
    from fastssl.config import Resolved


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
    ranks = distributed.setup(train.device, timeout_s=1800)
    device, run = ranks.device, Path(train.out)
    if not cfg.data.shards:
        raise UserError(
            "No shards to train on: give --data.shards DIR, the folder that `fastssl shard` made."
        )
    shards = cfg.data.open()
    resolved = follow_shards(resolved, shards)
    cfg = resolved.config
    open_stream = partial(
        open_loader,
        shards,
        cfg.recipe,
        batch=train.batch,
        seed=train.seed,
        rank=ranks.rank,
        world=ranks.world,
        **cfg.data.options(),
        device=device,
    )
    loader = open_stream()
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
    dtype, share = compute_dtype(train.precision, device), train.batch // ranks.world
    optimizer = build_optimizer(method.parameters(), cfg.optim)
    view_shape = (cfg.model.channels, cfg.recipe.size, cfg.recipe.size)
    micro_batch = choose_micro_batch(train.micro_batch, method, resolved, ranks, dtype, view_shape)
    num_chunks = len(chunks(share, micro_batch))
    if num_chunks > 1:  # the device never holds more than a chunk of it
        loader = open_stream(on_host=True)
    steady_statistics(method, num_chunks, train.exact_heads)
    freeze_unused(method, view_shape, ranks)
    if train.compile:
        compile_blocks(method, device)
    stepper = Step(
        method,
        spread(method, ranks),
        optimizer,
        device,
        dtype,
        micro_batch=micro_batch,
        exact_heads=train.exact_heads,
        clip_grad=train.clip_grad,
    )
    meters, start = Meters(), 0
    if state is not None:
        # Settings such as weight_decay are this run's; those in the checkpoint would silently undo a change of them.
        own_groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": own_groups})
        match_layout(optimizer)
        if state.get("scaler"):
            stepper.scaler.load_state_dict(state["scaler"])
        meters.restore(state["meters"], device)
        torch.set_rng_state(state["rng"])
        start = state["step"]
    del state
    if cfg.knn.every and ranks.world > 1 and not cfg.knn.max_samples and ranks.is_main:
        warnings.warn(
            "knn.max_samples is 0 (all): every process waits while the first one tests.", stacklevel=2
        )
    online = (
        OnlineKNN(cfg.knn, cfg.recipe, shards, device, dtype == torch.bfloat16, cfg.data.threads)
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
    _greet(screen, resolved, loader, dtype, start, total)
    if num_chunks > 1:
        screen.say(tell_chunks(method, share, num_chunks, train.exact_heads))

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
                "scaler": stepper.scaler.state_dict(),
                "meters": meters.state(),
                "rng": torch.get_rng_state(),
            }
            with meters.paused():
                checkpoint.save(checkpoint.checkpoint_path(run, step), state, train.keep)

    # ---------------------------------------------------------------------------------------------- loop
    began = time.perf_counter()
    step, saved, timed = start, start, 0
    unusable = torch.zeros(
        (), dtype=torch.bool, device=device
    )  # looked at where a line is logged: no step waits for it
    first_epoch = start // steps
    if online and log and start and start % steps == 0 and "knn_accuracy" not in log.last:
        first_epoch -= 1  # it was saved and then stopped before its test: nothing is left of it but that
    stop, stop_of_any = StopRequest(), distributed.LargestOverRanks()
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
                draws = _draws(train.seed, step, ranks.rank) if cfg.model.drop_path else None
                metrics = stepper.gradients(batch.views, draws)
                step, timed = step + 1, timed + 1
                progress = progress_at(step, steps_per_epoch=steps, epochs=train.epochs)
                unusable |= stepper.update(method.teacher_momentum(progress))

                meters.add(metrics, wait_s)
                screen.step(step)
                if step % train.log_every == 0 or step == total:
                    values = meters.read(train.batch, timed)
                    timed = 0
                    if not torch.isfinite(torch.tensor(values["loss"])):
                        raise _diverged(f"The loss is {values['loss']} at step {step}", resolved)
                    if bool(unusable):
                        raise _diverged(f"The gradient was not finite in a step up to {step}", resolved)
                    screen.log(step, epoch, train.epochs, values)
                    if log:
                        lr = optimizer.param_groups[0]["lr"]
                        log.write({"step": step, "epoch": round(step / steps, 4), "lr": lr, **values})
                stopping = stop_of_any.poll(step, stop.signal)
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
    dtype: torch.dtype,
    start: int,
    total: int,
) -> None:
    cfg = resolved.config
    name = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    screen.say(
        f"{resolved.method_name} {cfg.model.backbone} on {len(loader.shards):,} images at {cfg.recipe.size} px: batch "
        f"{loader.batch} on {loader.world} x {loader.device}, {name}, {cfg.train.epochs} epochs of "
        f"{loader.steps_per_epoch} steps"
    )
    if loader.note:
        screen.say(loader.note)
    if start:
        screen.say(f"resuming after step {start} of {total}")


def _draws(seed: int, step: int, rank: int) -> Callable[[int], None]:
    """Seeds random depths by chunk: a function of the step, another on each rank, so that there is nothing to save."""

    def draw(chunk: int) -> None:
        parts = (seed, step, rank, chunk) if chunk else (seed, step, rank)
        torch.manual_seed(int(hash_key(*parts)) >> 1)

    return draw


def _finish(path: Path, step: int, seconds: float, images: int, signal: int) -> Summary:
    distributed.barrier()  # no rank leaves while another may still wait for it
    return Summary(step, seconds, images / max(seconds, 1e-9), path, signal)
