"""Fill the tables of Markdown pages from the JSON of benchmarks: python docs/results/make_table.py README.md docs/engines.md.

A table stands between `<!-- table docs/benchmarks/FILE.json -->` and `<!-- end -->`; its form is that of the benchmark which wrote the
file. FILE may be a pattern with `*`: the latest such file of a GPU. As long as there is none, the place is empty; a caption after
FILE, `<!-- table FILE | CAPTION -->`, appears with the table.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PLACE = re.compile(r"(<!-- table (\S+)(?: \| ([^\n]+))? -->\n).*?(<!-- end -->)", re.DOTALL)


def table(report: list[dict] | dict) -> str:
    """The table of one benchmark's results."""
    if isinstance(report, dict):
        if "part" in report:
            return _switches(report["rows"])
        if "parts" in report:
            return _parts(report["parts"])
        return _ladder(report) if report["kind"] == "ladder" else _shard(report["rows"])
    first = report[0]
    for key, form in (("wanted", _verdict), ("engine", _fidelity)):
        if key in first:
            return form(report)
    return (
        _augment(report)
        if any("device_ms" in row or "least_bytes" in row for row in report)
        else _loader(report)
    )


def fill(text: str, root: Path = ROOT) -> str:
    """A page with all its tables made again."""

    def made(found: re.Match[str]) -> str:
        path = _latest(root, found[2])
        if path is None:
            return found[1] + found[4]
        caption = f"\n{found[3]}\n\n" if found[3] else ""
        return found[1] + caption + table(json.loads(path.read_text())) + "\n" + found[4]

    return PLACE.sub(made, text)


def _latest(root: Path, name: str) -> Path | None:
    if "*" not in name:
        return root / name
    files = sorted(path for path in root.glob(name) if "-cpu-" not in path.name)  # names begin with the date
    return files[-1] if files else None


def _lines(header: list[str], right: str, rows: list[list[str]]) -> str:
    """`right`: a letter a column, r for numbers, l for text."""
    rule = ["---:" if side == "r" else "---" for side in right]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, rule, *rows])


def _rate(row: dict) -> list[str]:
    """Name, median and spread; why there is none where it failed."""
    if row.get("images_per_s") is None:
        return [row["name"], f"not run: {row['error']}", ""]
    low, high = row["spread"]
    return [row["name"], f"{row['images_per_s']:,.0f}", f"{low:,.0f} to {high:,.0f}"]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _loader(rows: list[dict]) -> str:
    cells = [
        [
            *_rate(row),
            _number(row.get("ratio"), ".2f"),
            _number(row.get("core_ms_per_image"), ".2f"),
            row["fidelity"] or ("" if row.get("images_per_s") is None else "part only"),
        ]
        for row in rows
    ]
    head = ["loader", "images/s", "spread", "x moco-v3's", "core-ms per image", "fidelity"]
    return _lines(head, "lrrrrl", cells)


def _augment(rows: list[dict]) -> str:
    head = [
        "engine",
        "ms a batch",
        "of it the GPU's",
        "images/s",
        "spread",
        "best of ours is",
        "GB/s",
        "peak GB",
        "fidelity",
    ]
    cells = []
    for row in rows:
        name, rate, spread = _rate(row)
        if row["images_per_s"] is None:
            cells.append([name, rate, *[""] * 7])
            continue
        figures = [_number(row.get("ms_p50"), ".2f"), _number(row.get("device_ms"), ".2f"), rate, spread]
        more = [_number(row.get("ours_over_this"), ".2f") + " x", _number(row.get("gb_per_s"), ",.1f")]
        cells.append([name, *figures, *more, f"{row['peak_memory_bytes'] / 1e9:.2f}", row["fidelity"]])
    return _lines(head, "lrrrrrrrl", cells)


def _ladder(report: dict) -> str:
    cells = [
        [
            *_rate(row)[:2],
            _number(row.get("ms_p50"), ",.2f"),
            _number(row.get("mfu"), ".1%"),
            _number(row["memory_bytes"] / 1e9 if row.get("memory_bytes") else None, ".1f"),
            _number(row.get("ours_over_this"), ".2f"),
        ]
        for row in report["rows"]
    ]
    contention = report["verdict"]["contention"]
    if contention is not None:
        cells.append(["a step beside the loader / alone", f"{contention:.3f}", "", "", "", ""])
    return _lines(["rung", "images/s", "ms", "MFU", "GB", "our full step over it"], "lrrrrr", cells)


def _switches(rows: dict[str, dict]) -> str:
    cells = [
        [
            name,
            f"{row['images_per_s']:,.0f}",
            _number(row["ratio_to_base"], ".2f"),
            _number(row["mfu"], ".1%"),
            f"{row['peak_memory_bytes'] / 1e9:.1f}",
        ]
        for name, row in rows.items()
    ]
    return _lines(["", "images/s", "x its base", "MFU", "peak GB"], "lrrrr", cells)


def _verdict(rows: list[dict]) -> str:
    cells = []
    for row in rows:
        figure = "" if row["figure"] is None else f"{row['figure']:,.4g} {row['unit']}".strip()
        why = f"stage `{row['stage']}` was not run" if row["why"] == "not run" else row["why"]
        end = {True: "met", False: "**missed**", None: f"not known: {why}"}[row["met"]]
        cells.append([row["goal"], row["wanted"], figure, end])
    return _lines(["goal", "wanted", "measured", ""], "lrrl", cells)


def _shard(rows: list[dict]) -> str:
    cells = [
        [*_rate(row), _number(row.get("ratio"), ".0%"), _number(row.get("core_ms_per_image"), ".2f")]
        for row in rows
    ]
    return _lines(["", "images/s", "spread", "of its base", "core-ms per image"], "lrrrr", cells)


def _parts(rows: list[dict]) -> str:
    cells = [
        [row["name"], f"{row['ms']:.3f}", "{:.3f} to {:.3f}".format(*row["spread"]), f"{row['share']:.1%}"]
        for row in rows
    ]
    return _lines(["", "ms", "spread", "of the loader"], "lrrr", cells)


def _fidelity(rows: list[dict]) -> str:
    """On photographs; the edge cases stand in the file only."""
    pictures = next(row["pictures"] for row in rows if row["pictures"] != "edge cases")
    engines = list(dict.fromkeys(row["engine"] for row in rows))
    operations = list(dict.fromkeys(row["operation"] for row in rows))
    found = {
        (row["engine"], row["operation"]): row["mean_levels"] for row in rows if row["pictures"] == pictures
    }
    cells = [
        [operation, *(_number(found.get((engine, operation)), ".3f") for engine in engines)]
        for operation in operations
    ]
    return _lines([f"mean levels, {pictures}", *engines], "l" + "r" * len(engines), cells)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        page = Path(name)
        page.write_text(fill(page.read_text()))
