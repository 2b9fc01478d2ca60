"""The goals for a GPU, the figure of each in the files of `gpu_check`, and the verdict: met, missed, or why it is not known."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GB = 1e9
OURS = ("triton", "torch")
END_TO_END, FULL, PLAIN = "end to end", "full step, synthetic", "plain eager step"


class Unknown(Exception):
    """A file is there, but has no figure; the message says why."""


@dataclass(frozen=True)
class Goal:
    """What is to be reached."""

    text: str
    part: str
    """The part of `gpu_check` that measures it."""
    file: str
    """End of the name of the file that it writes."""
    find: Callable[[Any], float]
    """The figure, from that file's content. Raises Unknown, KeyError or LookupError where there is none."""
    wanted: float
    unit: str
    least: bool = True
    """Whether `wanted` is the least that is good enough; else it is the most."""

    def row(self, files: dict[str, Path]) -> dict[str, Any]:
        """The goal beside what was measured: `figure` and `met` are None where nothing was, and `why` says so."""
        sign = ">=" if self.least else "<="
        row: dict[str, Any] = {
            "goal": self.text,
            "wanted": f"{sign} {self.wanted:,g} {self.unit}".strip(),
            "figure": None,
            "unit": self.unit,
            "met": None,
            "part": self.part,
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
        except (LookupError, TypeError, ValueError) as fault:
            return row | {"why": f"no figure in the file ({type(fault).__name__}: {fault})"}
        met = figure >= self.wanted if self.least else figure <= self.wanted
        return row | {"figure": figure, "met": met, "why": None}


# ------------------------------------------------------------------------------------------ figures in the files


def _row(report: Any, name: str) -> dict[str, Any]:
    """The row of that name, of a report or a list of rows; Unknown where it was not measured."""
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
    """Of the engine `fused`, with its views left on the GPU, wherever they are made."""
    rates = [
        row["images_per_s"]
        for row in rows
        if row["name"].startswith("fused ") and row["name"].endswith("GPU") and row["images_per_s"]
    ]
    if not rates:
        raise Unknown("no loader to the GPU was measured")
    return max(rates)


def _end_to_end(report: Any) -> float:
    return _row(report, END_TO_END)["images_per_s"]


def _of_synthetic(report: Any) -> float:
    return _end_to_end(report) / _row(report, FULL)["images_per_s"]


def _contention(report: Any) -> float:
    beside = report["verdict"]["contention"]
    if beside is None:
        raise Unknown("the step was not measured beside the loader")
    return 100 * (beside - 1)


def _over_plain(report: Any) -> float:
    return _row(report, FULL)["images_per_s"] / _row(report, PLAIN)["images_per_s"]


def _peak_gb(card: str) -> Callable[[Any], float]:
    def peak(report: Any) -> float:
        if card not in report["rows"]:
            raise Unknown(f"{card} was not measured")
        return report["rows"][card]["peak_memory_bytes"] / GB

    return peak


def _failed_tests(report: Any) -> float:
    if not report["passed"]:
        raise Unknown("no test ran")
    return len(report["failed"])


def _model_goals(model: str, name: str, own: Goal) -> list[Goal]:
    file = f"ladder-{model}"
    return [
        own,
        Goal(f"{name}: end to end of the step on synthetic views", model, file, _of_synthetic, 0.97, ""),
        Goal(
            f"{name}: a step beside the loader takes longer by", model, file, _contention, 3, "%", least=False
        ),
        Goal(f"{name}: step over moco-v3's plain fp16 step", model, file, _over_plain, 2, "x"),
    ]


VIEWS = "two views of 256 images of 500 x 375 at 224 px"
GOALS: tuple[Goal, ...] = (
    Goal("tests that want a GPU: failed", "tests", "tests", _failed_tests, 0, "", least=False),
    Goal(VIEWS, "augment", "augment", lambda rows: _best_augmenter(rows)["ms_p50"], 6, "ms", least=False),
    Goal(f"{VIEWS}, over Kornia's modules", "augment", "augment", _over("kornia-modules"), 5, "x"),
    Goal(f"{VIEWS}, over DALI", "augment", "augment", _over("dali-graph"), 1.5, "x"),
    Goal("loader alone, JPEGs of 500 x 375", "loader", "loader", _fastest_loader, 10_000, "images/s"),
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
            lambda report: 100 * _row(report, END_TO_END)["mfu"],
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
    Goal("ViT-B/16 in chunks", "memory", "memory", _peak_gb("card_16gb_vit_base"), 16, "GB", least=False),
)


def newest(out: Path, device: str) -> dict[str, Path]:
    """The latest file of each kind that `gpu_check` has written to a folder for a device, by the end of its name."""
    found: dict[str, Path] = {}
    for path in sorted(out.glob(f"????-??-??-{device}-*.json")):
        found[path.stem[len("0000-00-00-") + len(device) + 1 :]] = path
    return found


def judge(out: Path, device: str) -> list[dict[str, Any]]:
    """A row for each goal, from the latest files for a device."""
    files = newest(out, device)
    return [goal.row(files) for goal in GOALS]


def told(rows: list[dict[str, Any]]) -> str:
    """The verdict as a table of text."""
    lines = []
    for row in rows:
        figure = "-" if row["figure"] is None else f"{row['figure']:,.4g} {row['unit']}".strip()
        end = {True: "met", False: "MISSED", None: f"not known: {row['why']}"}[row["met"]]
        lines.append(f"{row['goal']:64} {row['wanted']:>20} {figure:>16}  {end}")
    counts = {end: sum(row["met"] is end for row in rows) for end in (True, False, None)}
    lines.append(f"{counts[True]} met, {counts[False]} missed, {counts[None]} not known")
    return "\n".join(lines)
