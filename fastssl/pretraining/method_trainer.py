"""The trainer of pretraining: a method, its optimizer and meters, built from a configuration, saved in a checkpoint."""

from __future__ import annotations

import os
import shlex
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastssl.core import distributed
from fastssl.core.distributed import Dist, gather_keys
from fastssl.core.nonfinite import NonFiniteMonitor, is_finite, rank_me
from fastssl.core.optimizers import (
    build_optimizer,
    learning_rate,
    set_schedules,
    trained_groups,
)
from fastssl.core.peak_memory import peak_memory
from fastssl.core.schedules import Clock
from fastssl.methods.method_weights import external_digests, load_own_weights, own_weights
from fastssl.models.contract import DataFacts, make_contract
from fastssl.models.grouped_batch_norm import average_statistics
from fastssl.models.stochastic_depth import step_keys
from fastssl.pretraining.build import (
    build_method,
    check_groups,
    compile_blocks,
    compute_dtype,
    freeze_unused,
    prepare_backend,
    spread,
)
from fastssl.pretraining.estimate import StepEstimate, estimate_step
from fastssl.pretraining.idle_settings import tell_idle
from fastssl.pretraining.micro_batch import choose_micro_batch, trial_step
from fastssl.pretraining.replay import capture
from fastssl.pretraining.resume_rules import check_same_run
from fastssl.pretraining.step import (
    Step,
    StepOptions,
    caches_gradients,
    chunks,
    steady_statistics,
    tell_chunks,
)
from fastssl.training.resume import check_length, data_set_of, restore_optimizer
from fastssl.training.trainer import Trainer
from pipelines.loading.loader import Batch, Loader
from pipelines.loading.slots import view_shapes
from pipelines.streaming.machine_memory import free_memory
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError
from shards.units import plural

if TYPE_CHECKING:
    from fastssl.pretraining.run_config import Resolved, RunConfig


class MethodTrainer(Trainer):
    """Steps a method. Schedules and draws are functions of `done`, so a checkpoint needs `state` only."""

    task = "pretrain"

    def __init__(
        self,
        resolved: Resolved,
        shards: ShardSet,
        ranks: Dist,
        steps_per_epoch: int,
        found: tuple[Path, dict[str, Any]] | None = None,
    ) -> None:
        """Build the state anew, or restore it from a checkpoint.

        Args:
            found: path and content of the checkpoint.

        Raises:
            UserError: the configuration cannot be built, the checkpoint is of a different run, or not even 2 images fit in the GPU.
        """
        cfg, train = resolved.config, resolved.config.train
        super().__init__(train.epochs, steps_per_epoch)
        self.resolved, self.shards, self.ranks = resolved, shards, ranks
        self._momentum = 0.0
        prepare_backend(ranks.device)
        check_groups(resolved.config, ranks.world)
        self.method, self.shape = build_method(resolved, ranks.device)
        self._external, self._facts = external_digests(self.method), DataFacts.of(shards)
        if found is not None:
            path, state = found
            before = check_same_run(state, resolved, shards, self.shape, str(path))
            load_own_weights(self.method, state, self._external, str(path))
        self.dtype = compute_dtype(train.precision, ranks.device)
        self.groups = trained_groups(self.method.param_groups())
        self.optimizer = build_optimizer(self.groups, cfg.optim)
        micro_batch = choose_micro_batch(train.micro_batch, self.method, resolved, ranks, self.dtype, shards)
        group = cfg.model.bn_block
        self.num_chunks = len(chunks(train.batch // ranks.world, micro_batch, group))
        self.cached = caches_gradients(self.method, train.exact_heads)
        """Whether the heads see the whole batch where it is taken in chunks."""
        steady_statistics(self.method, self.num_chunks, self.cached)
        freeze_unused(self.method, view_shapes(cfg.recipe), ranks)
        self.estimate: StepEstimate | None = None
        """What a step takes; None on a GPU, where the first steps tell it at once, and for a run that is complete."""
        if ranks.device.type == "cpu" and (found is None or found[1]["step"] < self.total):
            self.estimate = estimate_step(self.method, trial_step(resolved, ranks, self.dtype))
        if train.compile:
            compile_blocks(self.method, ranks.device)
        self.stepper = Step(
            self.method,
            spread(self.method, ranks),
            self.optimizer,
            ranks.device,
            self.dtype,
            StepOptions(micro_batch, train.exact_heads, train.clip_grad, train.nonfinite, group),
        )
        self.watch = NonFiniteMonitor(ranks.device)
        if cfg.optim.warmup_epochs > train.epochs and ranks.is_main:
            warnings.warn(
                f"The warm-up of {cfg.optim.warmup_epochs:g} epochs is longer than the run of {train.epochs}: the learning rate rises "
                "until the end.",
                stacklevel=2,
            )
        if found is not None:
            self._restore(found[1])
            check_length(self, before.train, train, str(path))
            self._tell_length(before)

    def headline(self, loader: Loader) -> str:
        cfg = self.resolved.config
        name = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[self.dtype]
        images, epochs = plural(len(loader.shards), "image"), plural(cfg.train.epochs, "epoch")
        return (
            f"{self.resolved.method_name} {cfg.model.backbone} on {images} at {cfg.recipe.size} px: batch {loader.batch} on "
            f"{loader.options.world} x {loader.options.device}, {name}, {epochs} of {plural(loader.steps_per_epoch, 'step')}"
        )

    def remarks(self) -> Iterator[str]:
        """Yield settings that do nothing, how a batch is taken in chunks, and what the rest of a run on a CPU takes; warn where that
        is more than there is."""
        yield from tell_idle(self.resolved.config, self.shards)
        share, steps = self.resolved.config.train.batch // self.ranks.world, self.total - self.done
        if self.num_chunks > 1:
            yield tell_chunks(self.method, share, self.num_chunks, self.cached)
        if self.estimate is not None and steps and self.ranks.is_main:
            yield self.estimate.describe(steps)
            processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            for doubt in self.estimate.doubts(steps, free_memory() // processes, share):
                warnings.warn(doubt, stacklevel=2)

    def step(self, batch: Batch, wait_s: float) -> None:
        cfg, clock = self.resolved.config, Clock(self.done, self.total, self.steps_per_epoch)
        set_schedules(self.optimizer, self.groups, clock, cfg.optim, cfg.train.batch)
        keys = step_keys(cfg.train.seed, self.done, batch.sample_ids)
        metrics = self.stepper.gradients(batch.views, clock, keys)
        self.done += 1
        stepper = self.stepper
        self._momentum = self.method.teacher_momentum(clock)
        bad = stepper.update(self._momentum)
        self.watch.record(self.done, bad, stepper.loss, batch.sample_ids)
        metrics["grad_norm"] = stepper.grad_norm
        self.meters.add(metrics, wait_s, stepper.applied, batch.replaced)

    def row(self, steps_timed: int) -> dict[str, float]:
        values = {"lr": self.optimizer.param_groups[0]["lr"]}
        if self.method.plan.teacher:
            values["teacher_momentum"] = self._momentum
        values |= self.meters.read(self.resolved.config.train.batch, steps_timed)
        distance = self.method.teacher_distance()
        if distance is not None:
            values["teacher_distance"] = float(distance)
        if self.resolved.config.train.nonfinite == "skip":
            values["skipped"] = self.watch.count
        return values | peak_memory(self.ranks.device)

    def end_epoch(self) -> dict[str, float]:
        """Share BatchNorm's running statistics; return RankMe of the last batch's features over all ranks."""
        average_statistics(self.method)
        return {"rank_me": rank_me(gather_keys(self.stepper.features))}

    def check(self, folder: Path, *, to_save: bool = False) -> None:
        """Check for steps since the last call that were not finite, and write the first one's batch for `fastssl replay`.

        Every rank checks, and all raise or none. With `to_save` the weights are checked too: a checkpoint must be able to continue.

        Raises:
            UserError: a step was not finite and train.nonfinite is stop, too many steps were skipped, or a weight is not finite.
        """
        train = self.resolved.config.train
        bad = self.watch.poll()
        if bad is not None:
            path = folder / f"nonfinite-step-{bad.step:09d}.pt"
            distributed.on_main(lambda: capture(path, bad, self.weights(), self.shards))
            if train.nonfinite == "stop":
                raise self._diverged(f"{bad}, replay it with `fastssl replay {shlex.quote(str(path))}`")
            if bad.skipped > train.max_skipped:
                raise self._diverged(
                    f"{bad}, and {bad.skipped} steps of the run had to be skipped, more than train.max_skipped ({train.max_skipped})"
                )
            if self.ranks.is_main:
                warnings.warn(
                    f"{bad}: skipped. Replay it with `fastssl replay {shlex.quote(str(path))}` "
                    f"({bad.skipped} skipped in this run so far).",
                    stacklevel=2,
                )
        if to_save and not is_finite(self.method):
            raise self._diverged(f"The weights are no longer finite at step {self.done}")

    def weights(self) -> dict[str, Any]:
        """Return what evaluation and export need."""
        facts = {
            "step": self.done,
            "config": self.resolved.tree(),
            "architecture": self.shape,
            "shards": data_set_of(self.shards),
        }
        return {
            **facts,
            "contract": make_contract(facts, self.method.evaluated, self._facts).to_json(),
            "method": own_weights(self.method),
            "external": self._external,
        }

    def state(self) -> dict[str, Any]:
        # Of BatchNorm in groups: every rank's own until now.
        average_statistics(self.method)
        return {
            **self.weights(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.stepper.scaler.state_dict(),
            "meters": self.meters.state(),
            "skipped": self.watch.count,
            "rng": torch.get_rng_state(),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        restore_optimizer(self.optimizer, state["optimizer"])
        if state.get("scaler"):
            self.stepper.scaler.load_state_dict(state["scaler"])
        self.meters.restore(state["meters"], self.ranks.device)
        self.watch.restore(state.get("skipped", 0))
        torch.set_rng_state(state["rng"])
        self.done = state["step"]

    def _tell_length(self, before: RunConfig) -> None:
        """Warn of another train.epochs than that of the checkpoint: schedules are those of the new length from here on."""
        old, new, done = before.train.epochs, self.resolved.config.train.epochs, self.done
        if old == new or not self.ranks.is_main:
            return
        clocks = (Clock(done, self.steps_per_epoch * epochs, self.steps_per_epoch) for epochs in (old, new))
        was, now = (
            (learning_rate(clock, cfg.optim, cfg.train.batch), self.method.teacher_momentum(clock))
            for clock, cfg in zip(clocks, (before, self.resolved.config), strict=True)
        )
        momenta = f" and teacher's momentum {now[1]:.4g} ({was[1]:.4g})" if self.method.plan.teacher else ""
        warnings.warn(
            f"train.epochs was {old} so far and is {new} from now on: step {done + 1} continues on the schedules of {new} epochs, "
            f"with learning rate {now[0]:.4g} (with {plural(old, 'epoch')}: {was[0]:.4g}){momenta}.",
            stacklevel=3,
        )

    def _diverged(self, what: str) -> UserError:
        cfg = self.resolved.config
        return UserError(
            f"{what}: lower --optim.lr (now {cfg.optim.lr:g}) or set --train.clip_grad. "
            f"'{cfg.train.out}' keeps the earlier checkpoints."
        )
