"""Print the loader benchmark of a JSON file as a Markdown table: python docs/results/make_table.py docs/benchmarks/FILE.json."""

import json
import sys
from pathlib import Path


def table(rows: list[dict]) -> str:
    """One row per loader: images/s, spread, ratio to the moco-v3 loader, CPU time an image, fidelity."""
    lines = [
        "| loader | images/s | spread | x moco-v3's | core-ms per image | fidelity |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        if row.get("images_per_s") is None:
            lines.append(f"| {row['name']} | failed: {row['error']} | | | | |")
            continue
        low, high = row["spread"]
        ratio = f"{row['ratio']:.2f}" if row.get("ratio") else ""
        core_ms = 1000 * row["cpu_cores"] / row["images_per_s"]
        cells = [
            row["name"],
            f"{row['images_per_s']:,.0f}",
            f"{low:,.0f} to {high:,.0f}",
            ratio,
            f"{core_ms:.2f}",
            row["fidelity"] or "part only",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text())))
