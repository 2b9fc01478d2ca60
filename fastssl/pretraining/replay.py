"""`fastssl replay FILE`: repeat a step that was not finite, and name the module with the first value that is not."""

from __future__ import annotations

import math
import shlex
import warnings
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from shards.command_line import File, Shards, parse
from shards.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import torch

    from fastssl.core.nonfinite import BadStep
    from shards.dataset.shard_set import ShardSet

# Of one run: each file holds the run's weights.
MAX_FILES = 3
PATTERN = "nonfinite-step-*.pt"


@dataclass(frozen=True)
class Replay:
    """Repeat a step whose loss or gradient was not finite, and name the module with the first such value.

    A run writes FILE, with its weights and the batch's sample ids and draws, when such a step stops it or is skipped.
    """

    file: Annotated[File, tyro.conf.Positional]
    """A nonfinite-step-*.pt in a run's folder."""
    shards: Shards = ""
    """Folder of the run's shards, if they have moved since."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""
    precision: Literal["", "bf16", "fp16", "fp32"] = ""
    """Precision to compute in; empty: the run's, on this kind of device. A step that is finite in fp32 overflowed in 16 bits."""
    micro_batch: int = 0
    """Images at a time, if the batch does not fit; 0: as in the run."""


def run(argv: list[str]) -> int:
    """Run the command."""
    args = parse(Replay, "fastssl replay", argv)
    for line in replay(args):
        print(line)
    return 0


def capture(path: Path, bad: BadStep, weights: dict[str, Any], shards: ShardSet) -> None:
    """Write the file that `replay` reads; where it cannot be written, warn and return. `weights`: those of the trainer."""
    import torch

    from fastssl.core import checkpoint

    if len(list(path.parent.glob(PATTERN))) >= MAX_FILES:
        return
    batch = {
        "bad_step": bad.step,
        "loss": bad.loss,
        "sample_ids": torch.from_numpy(bad.sample_ids),
        "draws": _draws(weights["config"], bad.step, bad.sample_ids, shards),
        "rng": torch.get_rng_state(),
    }
    try:
        checkpoint.save(path, {**weights, **batch})
    except UserError as error:
        # Only a warning: the caller goes on to report the step itself.
        warnings.warn(f"The batch could not be saved for a replay: {error}", stacklevel=2)


def _draws(config: dict[str, Any], step: int, ids: np.ndarray, shards: ShardSet) -> torch.Tensor:
    """Return the bytes of the batch's DRAW records (V, N), uint8; a sample that replaced a bad one has those of its own place."""
    import numpy as np
    import torch

    from fastssl.pretraining.run_config import from_tree
    from pipelines.augment.draws import draw
    from shards.dataset.order import steps_per_epoch

    cfg = from_tree(config).config
    epoch = (step - 1) // steps_per_epoch(len(shards), cfg.train.batch)
    drawn = draw(cfg.recipe, cfg.train.seed, epoch, ids, shards.widths[ids], shards.heights[ids])
    return torch.from_numpy(np.frombuffer(drawn.tobytes(), dtype=np.uint8).copy())


def same_draws(stored: np.ndarray, ours: np.ndarray) -> bool:
    """Return whether bytes of DRAW records, uint8, say the same; those of an earlier version lack what is new at a record's end.

    Args:
        stored: of a file.
        ours: of this version, for the same batch. What the file does not have must be 0: nothing happens.
    """
    import numpy as np

    from pipelines.augment.draws import DRAW

    records = ours.reshape(-1, DRAW.itemsize)
    width, rest = divmod(stored.size, max(1, len(records)))
    if rest or width > DRAW.itemsize:
        return False
    return np.array_equal(records[:, :width].reshape(-1), stored) and not records[:, width:].any()


def replay(args: Replay) -> list[str]:
    """Repeat the step and return the report, line by line.

    Raises:
        UserError: there is no such file, or the shards are not the run's.
    """
    import numpy as np
    import torch

    from fastssl.core import checkpoint
    from fastssl.core.distributed import choose_device
    from fastssl.core.schedules import Clock
    from fastssl.methods.method_weights import external_digests, load_own_weights
    from fastssl.models.stochastic_depth import step_keys
    from fastssl.pretraining.build import build_method, compute_dtype
    from fastssl.pretraining.run_config import from_tree
    from fastssl.pretraining.step import DDPWrapper, Step, StepOptions
    from fastssl.training.resume import data_set_of
    from pipelines.loading.loader import open_loader

    state = checkpoint.load(Path(args.file))
    if "bad_step" not in state:
        raise UserError(
            f"'{args.file}' is a checkpoint, not a step that was not finite: give a {PATTERN} of a run's folder."
        )
    resolved = from_tree(state["config"])
    cfg = resolved.config
    data = replace(cfg.data, shards=args.shards or cfg.data.shards)
    # Without recomputing: the hooks would see those activations twice.
    train = replace(cfg.train, checkpointing="none", precision=args.precision or cfg.train.precision)
    resolved = replace(resolved, config=replace(cfg, data=data, train=train))
    shards = data.open()
    if state["shards"] != data_set_of(shards):
        raise UserError(
            f"'{shards.folder}' holds other samples than the run's: give its shards with --shards."
        )
    place, step = choose_device(args.device), state["bad_step"]
    method, _ = build_method(resolved, place)
    load_own_weights(method, state, external_digests(method), args.file)

    chunk = args.micro_batch or (train.micro_batch if train.micro_batch != "auto" else 0)
    on_cpu = {"augment_on": "cpu", "decode": "cpu", "cache": "none"}
    options = data.options(**({} if place.type == "cuda" else on_cpu), device=place, reuse_memory=True)
    loader = open_loader(shards, cfg.recipe, batch=train.batch, seed=train.seed, options=options)
    # Views that are taken in chunks are valid only while the stream is open.
    batches = (loader.in_chunks() if chunk else loader).steps(step - 1, step)
    with closing(batches):
        batch = next(batches)
        ids = state["sample_ids"].numpy()
        what = "gradient was not finite" if np.isfinite(state["loss"]) else f"loss was {state['loss']}"
        lines = [
            f"step {step}: the {what}; {len(ids)} images, weights of step {min(state['step'], step - 1)}"
        ]
        if not np.array_equal(batch.sample_ids, ids):
            lines.append("note: other samples replace bad ones than in the run")
        if not same_draws(state["draws"].numpy(), _draws(state["config"], step, ids, shards).numpy()):
            lines.append("note: this version of fastssl draws other augmentations than the run did")
        if train.nonfinite == "skip" and state["step"] > step:
            lines[0] = lines[0].replace(f"step {step - 1}", f"step {state['step']}, which came later")

        # Not the buffers: BatchNorm's running statistics include the bad step already, and training does not use them.
        broken = [name for name, value in method.named_parameters() if _count(value)]
        lines.append(f"weights    {'finite' if not broken else f'not finite in {_some(broken)}'}")
        spoiled = _spoiled(batch.views, chunk)
        lines.append(f"views      {'finite' if not spoiled else f'not finite: view {_some(spoiled)}'}")
        dtype = compute_dtype(train.precision, place)
        optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.0)
        stepper = Step(
            method,
            DDPWrapper(method),
            optimizer,
            place,
            dtype,
            StepOptions(micro_batch=chunk, exact_heads=train.exact_heads, group=cfg.model.bn_block),
        )
        trace = Trace(method)
        clock = Clock(step - 1, loader.steps_per_epoch * train.epochs, loader.steps_per_epoch)
        stepper.gradients(batch.views, clock, step_keys(train.seed, step - 1, ids))
        lines.append(f"forward    {trace.forward.tell() if trace.forward else 'finite'}")
        if trace.forward and len(trace.forward.rows) and not chunk:
            named = [
                f"{i} '{shards.name(int(i))}'" for i in dict.fromkeys(ids[trace.forward.rows % len(ids)])
            ]
            lines.append(f"images     {_some(named)}")
        lines.append(f"loss       {float(stepper.loss):g}")
        wrong = [name for name, p in method.named_parameters() if p.grad is not None and _count(p.grad)]
        first = (
            trace.backward.tell()
            if trace.backward
            else f"not finite in {_some(wrong)}"
            if wrong
            else "finite"
        )
        lines.append(f"gradient   {first}")
        if not (broken or spoiled or trace.forward or wrong or not np.isfinite(float(stepper.loss))):
            lines.append(
                "The step is finite when repeated: the run had another precision or device, or earlier weights."
            )
        elif dtype != torch.float32 and not broken:
            lines.append(
                f"Check whether it also fails in float32: fastssl replay {shlex.quote(args.file)} --precision fp32"
            )
        return lines


def _spoiled(views: Sequence[torch.Tensor], chunk: int) -> list[str]:
    """Return the numbers of the views with a value that is not finite, one chunk at a time."""
    from fastssl.pretraining.step import chunks
    from pipelines.streaming.lazy_views import count_samples, rows_of

    found: set[int] = set()
    for part in chunks(count_samples(views), chunk):
        found |= {i for i, view in enumerate(rows_of(views, part)) if _count(view)}
    return [str(i) for i in sorted(found)]


@dataclass(frozen=True)
class Spot:
    """The module at which a value was first not finite."""

    name: str
    """Name of the module whose output, or whose output's gradient, it was."""
    kind: str
    shape: tuple[int, ...]
    count: int
    """Values that are not finite."""
    before: str
    """Whether the module's input was finite."""
    rows: np.ndarray
    """Places in the first dimension, int64."""

    def tell(self) -> str:
        """Return a line for the report."""
        return (
            f"first not finite in {self.name} ({self.kind}): {self.count:,} of {math.prod(self.shape):,} values of "
            f"{self.shape}; {self.before}"
        )


class Trace:
    """Hooks on a method's innermost modules: record the first output and the first output gradient that is not finite."""

    def __init__(self, method: torch.nn.Module) -> None:
        self.forward: Spot | None = None
        self.backward: Spot | None = None
        self._last = "the views"
        for name, module in method.named_modules():
            if next(module.children(), None) is None:
                module.register_forward_hook(partial(self._after, name))

    def _after(self, name: str, module: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        for value in _tensors(output):
            if self.forward is None and (count := _count(value)):
                bad_input = any(_count(x) for x in _tensors(inputs))
                before = (
                    f"its input is not: between {self._last} and it" if bad_input else "its input is finite"
                )
                self.forward = Spot(
                    name, type(module).__name__, tuple(value.shape), count, before, _rows(value)
                )
            if value.requires_grad:
                value.register_hook(partial(self._back, name, type(module).__name__))
        self._last = name

    def _back(self, name: str, kind: str, gradient: torch.Tensor) -> None:
        if self.backward is None and (count := _count(gradient)):
            before = "the gradient of its output, on the way back"
            self.backward = Spot(name, kind, tuple(gradient.shape), count, before, _rows(gradient))


def _tensors(value: Any) -> list[torch.Tensor]:
    import torch

    values = value if isinstance(value, tuple | list) else (value,)
    return [v for v in values if isinstance(v, torch.Tensor)]


def _count(value: torch.Tensor) -> int:
    return int((~value.isfinite()).sum()) if value.is_floating_point() else 0


def _rows(value: torch.Tensor) -> np.ndarray:
    """Return the rows (first dimension) with a value that is not finite; none where more than half have one."""
    found = (~value.detach().isfinite()).reshape(len(value), -1).any(dim=1).nonzero().flatten().cpu().numpy()
    return found if len(found) <= len(value) // 2 else found[:0]


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
