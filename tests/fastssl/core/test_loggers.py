"""Where metrics go besides metrics.jsonl: TensorBoard itself, and stand-ins that take what the other services' modules take."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from fastssl.core.loggers import LogConfig, Loggers
from fastssl.pretraining.run import train
from tests.fastssl.runs import STEPS, resolve, rows

CONFIG = {"train.lr": 0.1, "recipe.mean": [0.5, 0.5]}


def events(run: Path) -> dict[str, list[tuple[int, float]]]:
    """The scalars that TensorBoard shows for a run, by name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run / "tensorboard"))
    found.Reload()
    return {name: [(e.step, e.value) for e in found.Scalars(name)] for name in found.Tags()["scalars"]}


@pytest.mark.filterwarnings("default::DeprecationWarning")  # TensorBoard's own
def test_tensorboard_shows_the_rows_of_a_run_and_of_its_continuation(shards: Path, tmp_path: Path) -> None:
    on = {"log": {"tensorboard": True}, "train": {"epochs": 1, "log_every": 1}}
    run = tmp_path / "run"
    train(resolve(shards, run, on))
    first = events(run)
    assert [step for step, _ in first["loss"]] == list(range(1, STEPS + 1))
    # A continuation from step 3 replaces what came after it.
    for path in sorted((run / "checkpoints").glob("step-*.pt"))[1:]:
        path.unlink()
    [path] = (run / "checkpoints").glob("step-*.pt")
    start = int(path.stem.split("-")[1])
    assert 0 < start < STEPS
    train(resolve(shards, run, on), resume=True)
    again = events(run)
    assert again.keys() == first.keys()
    for name in ("loss", "grad_norm", "teacher_distance", "rank_me", "knn_accuracy", "linear_accuracy"):
        expected = [(row["step"], row[name]) for row in rows(run) if name in row]
        assert [step for step, _ in again[name]] == [step for step, _ in expected]
        assert [v for _, v in again[name]] == pytest.approx([v for _, v in expected], rel=1e-5)


class Calls:
    """A module of which every function may be called, and which remembers the calls."""

    def __init__(self, module: str, monkeypatch: pytest.MonkeyPatch, **functions: Any) -> None:
        self.made: list[tuple[str, tuple, dict]] = []
        fake = types.ModuleType(module)
        for name, result in functions.items():
            setattr(fake, name, self.noting(name, result))
        monkeypatch.setitem(sys.modules, module, fake)

    def noting(self, name: str, result: Any = None):
        def call(*args, **kwargs):
            self.made.append((name, args, kwargs))
            if isinstance(result, Exception):
                raise result
            return result

        return call

    def of(self, name: str) -> list[tuple[tuple, dict]]:
        return [(args, kwargs) for called, args, kwargs in self.made if called == name]


def test_wandb_gets_the_settings_and_goes_on_in_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = types.SimpleNamespace()
    calls = Calls("wandb", monkeypatch, init=run)
    for name in ("define_metric", "log", "finish"):
        setattr(run, name, calls.noting(name))
    for start in (0, 4):
        loggers = Loggers(LogConfig(wandb="moon"), tmp_path, CONFIG, start)
        loggers.write({"step": start + 1, "loss": 2.0, "acc": float("nan")})
        loggers.close()
    (_, first), (_, second) = calls.of("init")
    assert first == second  # the id too
    assert first["id"]
    assert (first["project"], first["name"], first["resume"]) == ("moon", tmp_path.name, "allow")
    assert first["config"] == CONFIG
    assert calls.of("define_metric") == [(("step",), {}), (("*",), {"step_metric": "step"})] * 2
    assert [args for args, _ in calls.of("log")] == [({"step": 1, "loss": 2.0},), ({"step": 5, "loss": 2.0},)]
    assert len(calls.of("finish")) == 2


def test_a_new_start_in_a_used_folder_is_a_run_of_its_own_in_each_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder of a run that died before its first checkpoint still holds its ids."""
    run = types.SimpleNamespace(define_metric=lambda *args, **kwargs: None)
    wandb = Calls("wandb", monkeypatch, init=run)
    trackio = Calls("trackio", monkeypatch, init=None)
    active = types.SimpleNamespace(info=types.SimpleNamespace(run_id="r1"))
    mlflow = Calls("mlflow", monkeypatch, set_experiment=None, start_run=active, log_params=None)
    for _ in range(2):
        Loggers(LogConfig(wandb="moon", mlflow="moon", trackio="moon"), tmp_path, CONFIG, 0)
    assert len({kwargs["id"] for _, kwargs in wandb.of("init")}) == 2
    assert len({kwargs["name"] for _, kwargs in trackio.of("init")}) == 2
    assert mlflow.of("start_run") == [((), {"run_name": tmp_path.name})] * 2


def test_mlflow_gives_the_id_and_gets_the_settings_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    active = types.SimpleNamespace(info=types.SimpleNamespace(run_id="r1"))
    calls = Calls(
        "mlflow",
        monkeypatch,
        set_experiment=None,
        start_run=active,
        log_params=None,
        log_metrics=None,
        end_run=None,
    )
    for start in (0, 4):
        loggers = Loggers(LogConfig(mlflow="moon", name="seven"), tmp_path, CONFIG, start)
        loggers.write({"step": start + 1, "loss": 2.0})
        loggers.close()
    assert calls.of("set_experiment") == [(("moon",), {})] * 2
    assert calls.of("start_run") == [((), {"run_name": "seven"}), ((), {"run_id": "r1"})]
    assert calls.of("log_params") == [((CONFIG,), {})]
    assert calls.of("log_metrics") == [(({"loss": 2.0},), {"step": 1}), (({"loss": 2.0},), {"step": 5})]
    assert len(calls.of("end_run")) == 2


def test_trackio_goes_on_in_the_run_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls("trackio", monkeypatch, init=None, log=None, finish=None)
    for start in (0, 4):
        loggers = Loggers(LogConfig(trackio="moon"), tmp_path, CONFIG, start)
        loggers.write({"step": start + 1, "loss": 2.0})
        loggers.close()
    (_, first), (_, second) = calls.of("init")
    assert first == second
    assert first["name"].startswith(f"{tmp_path.name}-")
    assert (first["project"], first["resume"], first["config"]) == ("moon", "allow", CONFIG)
    assert calls.of("log") == [(({"loss": 2.0},), {"step": 1}), (({"loss": 2.0},), {"step": 5})]


@pytest.mark.parametrize("moment", ["init", "log", "finish"])
def test_a_logger_that_fails_warns_once_and_the_run_goes_on(
    moment: str, shards: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    functions: dict[str, Any] = {"init": None, "log": None, "finish": None}
    functions[moment] = ConnectionError("the server\nis gone")
    calls = Calls("trackio", monkeypatch, **functions)
    with pytest.warns(
        UserWarning, match="trackio disabled: ConnectionError: the server\\. metrics.jsonl is still written"
    ) as told:
        train(resolve(shards, tmp_path / "run", {"log": {"trackio": "moon"}, "train": {"epochs": 1}}))
    assert len(told) == 1
    assert len(calls.of("log")) == (0 if moment == "init" else 1 if moment == "log" else 7)
    kept = [row for row in rows(finished) if row["step"] <= STEPS]
    assert (
        [row["step"] for row in rows(tmp_path / "run")][:3] == [row["step"] for row in kept][:3] == [0, 2, 4]
    )


def test_a_package_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("wandb", "mlflow", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.warns(
            UserWarning, match=rf"log.{name} disabled: .*\(pip install {name}\)\. metrics.jsonl"
        ):
            Loggers(LogConfig(**{name: "moon"}), tmp_path, CONFIG, 0).write({"step": 1, "loss": 1.0})
