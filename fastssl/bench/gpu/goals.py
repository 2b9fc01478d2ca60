"""The goals for a GPU, their figures in the files of `bench gpu`, and the verdict: met, missed, or why it is not known."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastssl.bench.ladder.verdict import END_TO_END, FULL, MOCO_V3

GB = 1e9
OURS = ("triton", "torch")


class Unknown(Exception):
    """A file has no figure; the message gives the reason."""


@dataclass(frozen=True)
class Goal:
    """A figure that a GPU has to reach."""

    text: str
    stage: str
    """The stage that measures it."""
    file: str
    """End of the name of the stage's file."""
    find: Callable[[Any], float]
    """Returns the figure in the file's content; raises Unknown, or LookupError, if there is none."""
    wanted: float
    unit: str
    least: bool = True
    """Whether `wanted` is a minimum; else it is a maximum."""

    def row(self, files: dict[str, Path]) -> dict[str, Any]:
        """Return the goal beside its figure; if there is none, `figure` and `met` are None and `why` gives the reason."""
        sign = ">=" if self.least else "<="
        row: dict[str, Any] = {
            "goal": self.text,
            "wanted": f"{sign} {self.wanted:,g} {self.unit}".strip(),
            "figure": None,
            "unit": self.unit,
            "met": None,
            "stage": self.stage,
            "file": None,
            "why": "not run",
        }
        path = files.get(self.file)
        if path is None:
            return row
        row["file"] = path.name
        try:
            figure = self.find(json.loads(path.read_text()))
        except Unknown as reason:
            return row | {"why": str(reason)}
        except (LookupError, TypeError, ValueError) as error:
            return row | {"why": f"no figure in the file ({type(error).__name__}: {error})"}
        met = figure >= self.wanted if self.least else figure <= self.wanted
        return row | {"figure": figure, "met": met, "why": None}


# ------------------------------------------------------------------------------------------ figures in the files


def _row(report: Any, name: str) -> dict[str, Any]:
    """Return the row of that name of a report or a list of rows; raise Unknown if it was not measured."""
    rows = report["rows"] if isinstance(report, dict) else report
    found = next((row for row in rows if row["name"] == name), None)
    if found is None:
        raise Unknown(f"'{name}' was not measured")
    if found["images_per_s"] is None:
        raise Unknown(f"{name}: {found['error']}")
    return found


def _best_augmenter(rows: Any) -> dict[str, Any]:
    measured = [row for row in rows if row["name"] in OURS and row["images_per_s"]]
    if not measured:
        raise Unknown("; ".join(f"{row['name']}: {row['error']}" for row in rows if row["name"] in OURS))
    return max(measured, key=lambda row: row["images_per_s"])


def _over(peer: str) -> Callable[[Any], float]:
    return lambda rows: _best_augmenter(rows)["images_per_s"] / _row(rows, peer)["images_per_s"]


def _fastest_loader(rows: Any) -> float:
    """Return the best rate of the engine `fused` to the GPU, wherever the views are made."""
    rates = [
        row["images_per_s"]
        for row in rows
        if row["name"].startswith("fused ") and row["name"].endswith("GPU") and row["images_per_s"]
    ]
    if not rates:
        raise Unknown("no loader to the GPU was measured")
    return max(rates)


def _end_to_end_row(report: Any) -> dict[str, Any]:
    """Return the fastest of the rows end to end, wherever the images are decoded and the views made."""
    measured = [row for row in report["rows"] if row["name"].startswith(END_TO_END) and row["images_per_s"]]
    return max(measured, key=lambda row: row["images_per_s"]) if measured else _row(report, END_TO_END)


def _end_to_end(report: Any) -> float:
    return _end_to_end_row(report)["images_per_s"]


def _of_synthetic(report: Any) -> float:
    return _end_to_end(report) / _row(report, FULL)["images_per_s"]


def _contention(report: Any) -> float:
    beside = _end_to_end_row(report).get("contention")
    if beside is None:
        # Raises Unknown with the reason, if the full step has none.
        _row(report, FULL)
        raise Unknown("the step was not measured beside the loader")
    return 100 * (beside - 1)


def _over_moco_v3(report: Any) -> float:
    return _row(report, FULL)["images_per_s"] / _row(report, MOCO_V3)["images_per_s"]


def _peak_gb(card: str) -> Callable[[Any], float]:
    def peak(report: Any) -> float:
        if card not in report["rows"]:
            raise Unknown(report.get("failed", {}).get(card) or f"{card} was not measured")
        if report.get("extra"):
            raise Unknown(f"measured with {' '.join(report['extra'])}")
        return report["rows"][card]["peak_memory_bytes"] / GB

    return peak


def _failed_tests(report: Any) -> float:
    if report["failed"]:
        return len(report["failed"])
    if not report["passed"]:
        reasons = f": {'; '.join(report['reasons'])}" if report["reasons"] else ""
        raise Unknown(f"no test ran, {report['skipped']} were skipped{reasons}")
    return 0


def _as_asked(find: Callable[[Any], float], **asked: Any) -> Callable[[Any], float]:
    """Let `find` raise Unknown unless the measurement ran on a GPU, at the sizes that the goal names."""

    def found(report: Any) -> float:
        first = report if isinstance(report, dict) else report[0]
        settings = first.get("settings", {})
        config = settings.get("config")
        of_run = config and {
            "backbone": config["model"]["backbone"],
            "size": config["recipe"]["size"],
            "batch": config["train"]["batch"],
        }
        for name, value in (of_run or settings).items():
            if name in asked and value != asked[name]:
                raise Unknown(f"measured with {name} {value}, not {asked[name]}")
        if "machine" in first and not first["machine"]["gpu"]:
            raise Unknown("measured on a CPU")
        return find(report)

    return found


def _model_goals(model: str, name: str, own: Goal) -> list[Goal]:
    file = f"ladder-{model}"
    goals = [
        own,
        Goal(f"{name}: end to end of the step on synthetic views", model, file, _of_synthetic, 0.97, ""),
        Goal(
            f"{name}: a step beside the loader takes longer by", model, file, _contention, 3, "%", least=False
        ),
        Goal(f"{name}: step over moco-v3's own kind of step, fp16", model, file, _over_moco_v3, 2, "x"),
    ]
    batch = 512 if model == "vit_small" else 256
    asked = {"backbone": model if model == "resnet50" else f"moco_{model}", "size": 224, "batch": batch}
    return [replace(goal, find=_as_asked(goal.find, **asked)) for goal in goals]


def _views(find: Callable[[Any], float]) -> Callable[[Any], float]:
    return _as_asked(find, size=224, batch=256)


VIEWS = "two views of 256 images of ImageNet's sizes at 224 px"
GOALS: tuple[Goal, ...] = (
    Goal("tests that want a GPU: failed", "tests", "tests", _failed_tests, 0, "", least=False),
    Goal(
        VIEWS,
        "augment",
        "augment",
        _views(lambda rows: _best_augmenter(rows)["ms_p50"]),
        6,
        "ms",
        least=False,
    ),
    Goal(f"{VIEWS}, over Kornia's modules", "augment", "augment", _views(_over("kornia-modules")), 5, "x"),
    Goal(f"{VIEWS}, over DALI", "augment", "augment", _views(_over("dali-graph")), 1.5, "x"),
    Goal(
        "loader alone, JPEGs of ImageNet's sizes",
        "loader",
        "loader",
        _as_asked(_fastest_loader, size=224),
        10_000,
        "images/s",
    ),
    *_model_goals(
        "vit_small",
        "ViT-S/16",
        Goal("ViT-S/16 end to end", "vit_small", "ladder-vit_small", _end_to_end, 3000, "images/s"),
    ),
    *_model_goals(
        "vit_base",
        "ViT-B/16",
        Goal(
            "ViT-B/16 end to end, MFU of 8 forwards",
            "vit_base",
            "ladder-vit_base",
            lambda report: 100 * _end_to_end_row(report)["mfu"],
            45,
            "%",
        ),
    ),
    *_model_goals(
        "resnet50",
        "ResNet-50",
        Goal("ResNet-50 end to end", "resnet50", "ladder-resnet50", _end_to_end, 2000, "images/s"),
    ),
    Goal("ResNet-50, 64 a step", "memory", "memory", _peak_gb("card_8gb_resnet50"), 8, "GB", least=False),
    Goal(
        "ResNet-50 with a queue, one of two GPUs' share",
        "memory",
        "memory",
        _peak_gb("card_2x8gb_resnet50"),
        8,
        "GB",
        least=False,
    ),
    Goal("ViT-B/16 in chunks", "memory", "memory", _peak_gb("card_16gb_vit_base"), 16, "GB", least=False),
)


def newest(out: Path, device: str) -> dict[str, Path]:
    """Return the latest file of each kind that `bench gpu` has written to a folder for a device, by the end of its name."""
    found: dict[str, Path] = {}
    for path in sorted(out.glob(f"????-??-??-{device}-*.json")):
        found[path.stem[len("0000-00-00-") + len(device) + 1 :]] = path
    return found


def judge(out: Path, device: str) -> list[dict[str, Any]]:
    """Return a row for each goal, from the latest files of a device."""
    files = newest(out, device)
    return [goal.row(files) for goal in GOALS]


def told(rows: list[dict[str, Any]]) -> str:
    """Return the verdict as a table of text."""
    lines = []
    for row in rows:
        figure = "-" if row["figure"] is None else f"{row['figure']:,.4g} {row['unit']}".strip()
        end = {True: "met", False: "MISSED", None: f"not known: {row['why']}"}[row["met"]]
        lines.append(f"{row['goal']:64} {row['wanted']:>20} {figure:>16}  {end}")
    counts = {end: sum(row["met"] is end for row in rows) for end in (True, False, None)}
    lines.append(f"{counts[True]} met, {counts[False]} missed, {counts[None]} not known")
    return "\n".join(lines)
