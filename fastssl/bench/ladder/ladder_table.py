"""The ladder as people see it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastssl.bench.report import Row, brief, busy, tell_failures

if TYPE_CHECKING:
    from rich.console import Console

    from fastssl.bench.hardware import Peak
    from fastssl.bench.ladder.ladder_rows import Ladder
    from fastssl.bench.ladder.verdict import Verdict
    from fastssl.pretraining.run_config import Resolved


def show(
    console: Console,
    resolved: Resolved,
    ladder: Ladder,
    verdict: Verdict,
    where: dict[str, Any],
    facts: dict[str, Any],
    top: Peak,
    steps: int,
    repeats: int,
) -> None:
    """Print the table, what it rests on, and the verdict."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from fastssl.bench.ladder.verdict import RUNGS

    cfg = resolved.config
    chunks = f" in chunks of {facts['chunk']}" if facts["chunk"] < cfg.train.batch else ""
    kind = f"{facts['dtype']}{', compiled' if facts['compiled'] else ', eager'}"
    title = f"{resolved.method_name} {cfg.model.backbone}, {cfg.recipe.size} px, batch {cfg.train.batch}{chunks}, {kind}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("rung", no_wrap=True)
    for name in ("images/s", "ms p50", "p95", "MFU", "TB/s", "GB"):
        table.add_column(name, justify="right", no_wrap=True)
    below = False
    for name, row in ladder.rows.items():
        if name not in RUNGS and not below:
            table.add_section()
            below = True
        table.add_row(name, *_cells(row))
    console.print(table)
    tell_failures(console, ladder.rows.values())

    def dim(text: str) -> None:
        console.print(text, style="dim", markup=False)

    dim(
        f"{where['gpu'] or where['cpu']}, {where['cores']} cores{busy(where)}; median of {repeats} x {steps} steps after warm-up. "
        f"MFU: 8 forwards an image, of {top.tflops:,.3g} TFLOP/s ({top.source}). TB/s: what the operations read and write, each by "
        f"itself, of {top.tb_per_s:.3g} ({top.source}); fused ones move less. GB: {'GPU peak' if where['gpu'] else 'process'}."
    )
    for row in ladder.rows.values():
        if row.ratio is not None:
            dim(f"{row.name}: {row.ratio:.2f} times {row.ratio_to}.")
        if "ours_over_this" in row.more:
            dim(f"Ours is {row.more['ours_over_this']:.2f} times {row.name}: {row.note}.")
    if verdict.overlap is not None:
        told = f"Overlap: end to end is {verdict.overlap:.0%} of what loader and step allow."
        if verdict.contention is not None:
            told += f" Contention: a step takes {verdict.contention:.2f} times as long beside the loader."
        dim(told)
    console.print(verdict.sentence, markup=False)


def _cells(row: Row) -> list[str]:
    if row.images_per_s is None:
        return ["-"] * 6
    more = row.more

    def number(key: str, form: str, scale: float = 1) -> str:
        return format(more[key] * scale, form) if more.get(key) is not None else ""

    return [
        brief(row.images_per_s),
        *(number(key, ",.3f" if more[key] < 10 else ",.0f") for key in ("ms_p50", "ms_p95")),
        number("mfu", ".1%"),
        number("tb_per_s", ".3g"),
        number("memory_bytes", ".1f", 1e-9),
    ]
