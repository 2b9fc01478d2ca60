"""Loggers besides metrics.jsonl: TensorBoard, Weights & Biases, MLflow, trackio. A logger that fails never stops a run."""

from __future__ import annotations

import json
import math
import uuid
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from shards.storage.atomic_files import atomic_write


@dataclass(frozen=True)
class LogConfig:
    """Loggers besides metrics.jsonl, which is always written; each needs its package. A resumed run continues its rows."""

    tensorboard: bool = False
    """Write TensorBoard events to the folder `tensorboard` of the run."""
    wandb: str = ""
    """Weights & Biases project; empty: none. WANDB_MODE=offline and its other variables work as usual."""
    mlflow: str = ""
    """MLflow experiment; empty: none. MLFLOW_TRACKING_URI names the server."""
    trackio: str = ""
    """trackio project; empty: none."""
    name: str = ""
    """Name of the run in these services; empty: the name of the run's folder."""


class Logger(Protocol):
    """A service that takes metrics."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values of a step. After a resume, the steps after the checkpoint come again."""

    def close(self) -> None:
        """End the run."""


class Loggers:
    """All loggers of a configuration. One that raises is disabled from then on, with one warning."""

    def __init__(self, cfg: LogConfig, run: Path, config: dict[str, Any], start: int) -> None:
        """Open the loggers.

        Args:
            run: the run's folder, where the ids of the services are kept.
            config: the run's settings by full name.
            start: the step before the first row. 0: a new run, with ids of its own, also where the folder holds those of a dead one.
        """
        if not start:
            _ids_path(run).unlink(missing_ok=True)
        self._sinks: dict[str, Logger] = {}
        name = cfg.name or run.resolve().name
        for kind, make in LOGGERS.items():
            project = getattr(cfg, kind)
            if project:
                self._try(
                    kind, lambda make=make, project=project: make(str(project), name, run, config, start)
                )

    def write(self, row: dict[str, Any]) -> None:
        """Log a row of metrics, which must hold `step`; values that are no finite numbers are left out."""
        values = {
            k: v for k, v in row.items() if k != "step" and isinstance(v, int | float) and math.isfinite(v)
        }
        for kind, logger in list(self._sinks.items()):
            self._try(kind, lambda logger=logger: logger.write(row["step"], values))

    def close(self) -> None:
        """Close each logger."""
        for kind, logger in list(self._sinks.items()):
            self._try(kind, logger.close)
        self._sinks = {}

    def _try(self, kind: str, act: Callable[[], Any]) -> None:
        try:
            made = act()
            if made is not None:
                self._sinks[kind] = made
        # Training continues whatever a logger does.
        except (Exception, SystemExit) as error:
            self._sinks.pop(kind, None)
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            missing = isinstance(error, ImportError)
            way_out = f" (pip install {kind})" if missing else ""
            warnings.warn(
                f"log.{kind} disabled: {reason}{way_out}. metrics.jsonl is still written.", stacklevel=4
            )


class TensorBoard:
    """TensorBoard events in a folder of the run; a resume hides those after the checkpoint, a new start all earlier ones."""

    def __init__(self, run: Path, config: dict[str, Any], start: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=start + 1 if start else 0)
        if not start:
            text = json.dumps(config, indent=1).replace("\n", "\n    ")
            self._writer.add_text("config", f"    {text}", 0)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A Weights & Biases run; a resume finds it by its id."""

    def __init__(self, project: str, name: str, run: Path, config: dict[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project=project,
            name=name,
            id=_run_id(run, "wandb", project),
            resume="allow",
            config=config,
            allow_val_change=True,
            dir=str(run),
        )
        # With an axis of its own: W&B refuses rows below its internal step, and a resumed run repeats some.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of an MLflow experiment; a resume finds it by its id."""

    def __init__(self, experiment: str, name: str, run: Path, config: dict[str, Any]) -> None:
        import mlflow

        self._mlflow = mlflow
        mlflow.set_experiment(experiment)
        ids = _read_ids(run)
        known = ids.get("mlflow", {}).get(experiment)
        active = mlflow.start_run(run_id=known) if known else mlflow.start_run(run_name=name)
        if not known:
            _keep_id(run, "mlflow", experiment, active.info.run_id)
            # MLflow takes the parameters of a run once only.
            mlflow.log_params(config)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


class Trackio:
    """A trackio run; a resume finds it by its name, which ends in an id, so that two runs of one name stay apart."""

    def __init__(self, project: str, name: str, run: Path, config: dict[str, Any]) -> None:
        import trackio

        self._trackio = trackio
        own = f"{name}-{_run_id(run, 'trackio', project)[:6]}"
        trackio.init(project=project, name=own, config=config, resume="allow")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._trackio.log(dict(values), step=step)

    def close(self) -> None:
        self._trackio.finish()


LOGGERS: dict[str, Callable[[str, str, Path, dict[str, Any], int], Logger]] = {
    "tensorboard": lambda _project, _name, run, config, start: TensorBoard(run, config, start),
    "wandb": lambda project, name, run, config, _start: WandB(project, name, run, config),
    "mlflow": lambda project, name, run, config, _start: MLflow(project, name, run, config),
    "trackio": lambda project, name, run, config, _start: Trackio(project, name, run, config),
}


def _ids_path(run: Path) -> Path:
    return run / "sinks.json"


def _read_ids(run: Path) -> dict[str, dict[str, str]]:
    path = _ids_path(run)
    return json.loads(path.read_text()) if path.exists() else {}


def _keep_id(run: Path, kind: str, project: str, run_id: str) -> None:
    ids = _read_ids(run)
    ids.setdefault(kind, {})[project] = run_id
    atomic_write(_ids_path(run), (json.dumps(ids, indent=1) + "\n").encode())


def _run_id(run: Path, kind: str, project: str) -> str:
    """Return this run's id at a service that lets us choose it: the one stored in the run's folder, or a new one, which is stored."""
    known = _read_ids(run).get(kind, {}).get(project)
    if known is None:
        known = uuid.uuid4().hex[:12]
        _keep_id(run, kind, project, known)
    return known
