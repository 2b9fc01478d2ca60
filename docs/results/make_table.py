"""Fill the tables of Markdown pages from the JSON of benchmarks: python docs/results/make_table.py README.md docs/engines.md.

A table stands between `<!-- table docs/benchmarks/FILE.json -->` and `<!-- end -->`; its form is that of the benchmark which wrote the
file.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PLACE = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(report: list[dict] | dict) -> str:
    """The table of one benchmark's results."""
    if isinstance(report, dict):
        return _shard(report["rows"])
    return _fidelity(report) if "mean_levels" in report[0] else _loader(report)


def fill(text: str, root: Path = ROOT) -> str:
    """A page with all its tables made again."""
    return PLACE.sub(
        lambda found: found[1] + table(json.loads((root / found[2]).read_text())) + "\n" + found[3], text
    )


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


def _shard(rows: list[dict]) -> str:
    cells = [
        [*_rate(row), _number(row.get("ratio"), ".0%"), _number(row.get("core_ms_per_image"), ".2f")]
        for row in rows
    ]
    return _lines(["", "images/s", "spread", "of its base", "core-ms per image"], "lrrrr", cells)


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
