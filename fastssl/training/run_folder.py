"""The folder of a run: its lock, configuration, log and checkpoints."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from fastssl.core import checkpoint, distributed
from fastssl.core.config_tree import leaves
from fastssl.core.loggers import LogConfig, Loggers
from fastssl.core.meters import MetricsLog, six_digits
from fastssl.core.own_files import check_files, keep_dead_log, write_config
from fastssl.training.evaluation import BestBy
from fastssl.training.loop_config import LoopConfig
from shards.errors import UserError
from shards.storage.atomic_files import (
    atomic_write,
    lock_file,
    missing_folders,
    remove_empty,
    remove_unfinished,
)

BEST = "best.pt"
# Names the folder of the run that this one continues.
ORIGIN = "resumed_from.txt"


class RunFolder:
    """A context that locks a run's folder for one trainer. Every rank enters it, but only the first writes to the disk.

    config.yaml is the configuration, metrics.jsonl the log, checkpoints/step-*.pt are what `resume` continues from, and
    checkpoints/best.pt holds the weights that the evaluation found best. A second trainer in the same folder is refused. Of a run
    that ends before it has begun, such as one that is refused, nothing stays.
    """

    def __init__(
        self,
        settings: LoopConfig,
        config: Mapping[str, Any],
        ranks: distributed.Dist,
        log: LogConfig | None = None,
    ) -> None:
        """Prepare the context.

        Args:
            settings: where the folder is, and which checkpoints it keeps.
            config: the run's whole configuration as plain nested values, section by section.
            log: loggers besides metrics.jsonl; None: none.
        """
        self.path, self.settings, self.ranks = Path(settings.out), settings, ranks
        self._config, self._log_config = config, log or LogConfig()
        self._best: BestBy | None = None
        self._lock: IO[str] | None = None
        self._new: list[Path] = []
        self._origin: Path | None = None
        self.log: MetricsLog | None = None
        """metrics.jsonl, on the first rank, once the run has begun."""
        self.loggers: Loggers | None = None

    def __enter__(self) -> RunFolder:
        distributed.on_main(self._take)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.loggers is not None:
            self.loggers.close()
        if self._lock is not None:
            if self.log is None:
                # Held until it is gone, so that no other trainer relies on it.
                for path in self._new:
                    path.unlink() if path.is_file() else remove_empty([path])
            self._lock.close()

    def newest(self, resume: bool | Path) -> tuple[Path, dict[str, Any]] | None:
        """Return the newest readable checkpoint and its content; None for a new run.

        A damaged one is renamed to `*.damaged`, with a warning.

        Args:
            resume: a path means a checkpoint of another run, or the newest one of its folder, as long as this folder has none; after
                that this folder's own, as with True. So a command that was stopped continues when it is repeated.

        Raises:
            UserError: the folder holds a run and `resume` is false, or none of its checkpoints can be read; the given checkpoint is
                missing, damaged, without the optimizer's state, or not the newest of this folder.
        """
        found: list[dict[str, Any]] = []
        path = distributed.on_main(lambda: self._newest(resume, found))
        if path is None:
            return None
        return path, found[0] if found else checkpoint.load(path)

    def begin(self, step: int, total: int, best: BestBy | None = None) -> None:
        """Write the configuration, and cut the log back to `step`, from which the run continues.

        A run that continues from another folder's checkpoint begins with a copy of its log, and of its best weights if they are not
        of a later step. UserError where it has no steps left of its `total`.

        Args:
            best: the value by which `save_best` chooses; None for a run that is not evaluated.
        """
        self._best = best
        distributed.on_main(lambda: self._begin(step, total))

    def ends_evaluated(self) -> bool:
        """Return whether the log that the run continues ends with an evaluation, or the run has none. Every rank calls it."""
        return distributed.on_main(
            lambda: self._best is None or (self.log is not None and self._best.metric in self.log.last)
        )

    def write(self, row: dict[str, Any]) -> None:
        """Log a row of metrics, which must hold `step`, to metrics.jsonl and the other loggers; on the first rank only."""
        if self.log is not None and self.loggers is not None:
            row = {k: v for k, v in row.items() if not isinstance(v, float) or math.isfinite(v)}
            self.log.write(row)
            self.loggers.write(row)

    def save(self, state: dict[str, Any], steps_per_epoch: int) -> None:
        """Flush the log, write the checkpoint of `state["step"]`, and remove checkpoints that need not be kept."""
        if self.ranks.is_main:
            assert self.log is not None
            # A checkpoint that survives a power loss must find the rows before it.
            self.log.flush()
            path = checkpoint.checkpoint_path(self.path, state["step"])
            lasting = self.settings.keep_every * steps_per_epoch
            checkpoint.save(path, state, self.settings.keep_last, lasting)

    def save_best(self, weights: dict[str, Any], found: Mapping[str, float]) -> None:
        """Write best.pt if there is none, or the value in `found` is above all in the log; call it before `found` is logged."""
        if self.ranks.is_main:
            assert self.log is not None
            assert self._best is not None
            path, metric = self.path / "checkpoints" / BEST, self._best.metric
            if six_digits(found[metric]) > self.log.highest.get(metric, -math.inf) or not path.exists():
                checkpoint.save(path, {**weights, metric: found[metric]})

    def _take(self) -> None:
        try:
            if not checkpoint.list_checkpoints(self.path):
                check_files(self.path, self._config)
            lock, checkpoints = self.path / ".lock", self.path / "checkpoints"
            new = [path for path in (lock, checkpoints) if not path.exists()] + missing_folders(self.path)
            checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock = lock_file(lock)
            self._new = new
        except BlockingIOError:
            raise UserError(
                f"Another trainer uses '{self.path}': wait for it or stop it, or choose another --train.out."
            ) from None
        except OSError as error:
            raise self._unwritable(error) from error

    def _newest(self, resume: bool | Path, loaded: list[dict[str, Any]]) -> Path | None:
        found = checkpoint.list_checkpoints(self.path)
        if isinstance(resume, Path) and self._is_elsewhere(resume, found):
            self._origin = checkpoint.find_checkpoint(resume)
            loaded.append(checkpoint.load(self._origin))
            if "optimizer" not in loaded[0]:
                raise UserError(
                    f"'{self._origin}' holds weights only, and a run continues from the optimizer's state too: give a step-*.pt file."
                )
            return self._origin
        if found and not resume:
            raise UserError(
                f"'{self.path}' already holds a run ({found[-1].name}): add --resume to continue it, or choose another --train.out."
            )
        damaged: list[Path] = []
        for path in reversed(found):
            try:
                loaded.append(checkpoint.load(path))
            except checkpoint.DamagedError:
                if path == found[0]:
                    raise
                damaged.append(path)
                continue
            for bad in damaged:
                bad.rename(bad.with_name(f"{bad.name}.damaged"))
                warnings.warn(
                    f"The checkpoint '{bad}' is damaged: it was renamed to '{bad.name}.damaged', and the run continues from "
                    f"'{path.name}', the one before it.",
                    stacklevel=2,
                )
            return path
        return None

    def _is_elsewhere(self, given: Path, found: list[Path]) -> bool:
        """Return whether the run starts from `given`, a checkpoint or folder, rather than from those `found` in its own folder."""
        own, place = (self.path / "checkpoints").resolve(), given.resolve()
        if own not in (place, place.parent, place / "checkpoints"):
            if not found:
                return True
            origin = self.path / ORIGIN
            if not origin.is_file() or origin.read_text() != str(_run_of(given)):
                raise UserError(
                    f"'{self.path}' holds a run of its own ({found[-1].name}), which did not begin with '{given}': give another "
                    "--train.out to continue from there, or --resume alone to continue this one."
                )
            warnings.warn(
                f"'{self.path}' continues from its own '{found[-1].name}', not from '{given}' again.",
                stacklevel=2,
            )
            return False
        path = checkpoint.find_checkpoint(given)
        if not found:
            raise UserError(
                f"'{path}' holds weights only, and '{self.path}' has no step-*.pt file to continue from: start the run anew."
            )
        if path.resolve() != found[-1].resolve():
            raise UserError(
                f"'{path}' is not where its run ended, which is '{found[-1].name}': give another --train.out to continue from it."
            )
        return False

    def _copy_history(self, origin: Path, step: int) -> None:
        rows, best = _run_of(origin) / "metrics.jsonl", origin.with_name(BEST)
        if rows.is_file():
            atomic_write(self.path / rows.name, rows.read_bytes())
        # Without them the next evaluation writes its own.
        with contextlib.suppress(UserError):
            if best.is_file() and checkpoint.load(best)["step"] <= step:
                atomic_write(self.path / "checkpoints" / BEST, best.read_bytes())

    def _forget_other_values(self, log: MetricsLog, by: BestBy) -> None:
        """Compare the values to come with each other only, where the run's evaluation has changed: best.pt is then replaced."""
        now, best = dict(leaves(self._config)), self.path / "checkpoints" / BEST
        with contextlib.suppress(UserError):
            before = dict(leaves(checkpoint.load(best).get("config", {}))) if best.is_file() else {}
            changed = [name for name in by.settings if name in before and before[name] != now[name]]
            if changed:
                log.highest.pop(by.metric, None)
                warnings.warn(
                    f"{' and '.join(changed)} changed: the next evaluation's {by.noun} is not compared with earlier ones, and "
                    f"{BEST} is written anew.",
                    stacklevel=2,
                )

    def _begin(self, step: int, total: int) -> None:
        if self._origin is not None and step >= total:
            raise UserError(
                f"'{self._origin}' is the end of its run ({step} of {total} steps): raise --train.epochs to train on."
            )
        try:
            for folder in (self.path, self.path / "checkpoints"):
                remove_unfinished(folder)
            if self._origin is not None:
                atomic_write(self.path / ORIGIN, str(_run_of(self._origin)).encode())
            write_config(self.path / "config.yaml", self._config)
            if not step or self._origin is not None:
                keep_dead_log(self.path)
            if self._origin is not None:
                self._copy_history(self._origin, step)
            self.log = MetricsLog(self.path / "metrics.jsonl", step)
            if self._best is not None:
                self._forget_other_values(self.log, self._best)
            self.loggers = Loggers(self._log_config, self.path, dict(leaves(self._config)), step)
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"The run folder '{self.path}' cannot be written ({error.strerror}): choose another --train.out."
        )


def _run_of(checkpoint_or_folder: Path) -> Path:
    """Return the resolved folder of the run that a path means: its folder, its `checkpoints` folder, or a file in that."""
    place = checkpoint_or_folder.resolve()
    place = place if place.is_dir() else place.parent
    return place.parent if place.name == "checkpoints" else place
