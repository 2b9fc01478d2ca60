"""The ladder's table on the screen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastssl.bench.report import Row, brief, busy
from fastssl.bench.screen import make_table, say, show_failures
from shards.terminal import print_wrapped

if TYPE_CHECKING:
    from rich.console import Console

    from fastssl.bench.ladder.ladder_rows import Ladder
    from fastssl.bench.ladder.verdict import Verdict


def show(
    console: Console, ladder: Ladder, verdict: Verdict, where: dict[str, Any], facts: dict[str, Any]
) -> None:
    """Print the table, how it was measured, and the verdict.

    Args:
        where: the machine, see `report.machine`.
        facts: dtype, chunk and compiled of the step.
    """
    from fastssl.bench.ladder.kernel_times import told as kinds_told
    from fastssl.bench.ladder.verdict import RUNGS

    resolved, timer, top = ladder.resolved, ladder.timer, ladder.top
    cfg = resolved.config
    chunks = f" in chunks of {facts['chunk']}" if facts["chunk"] < cfg.train.batch else ""
    kind = f"{facts['dtype']}{', compiled' if facts['compiled'] else ', eager'}"
    title = f"{resolved.method_name} {cfg.model.backbone}, {cfg.recipe.size} px, batch {cfg.train.batch}{chunks}, {kind}"
    table = make_table(title, "rung", ("images/s", "ms p50", "p95", "MFU", "TB/s", "GB"))
    below = False
    for name, row in ladder.rows.items():
        if name not in RUNGS and not below:
            table.add_section()
            below = True
        table.add_row(name, *_cells(row))
    console.print(table)
    show_failures(console, ladder.rows.values())
    say(
        console,
        f"{where['gpu'] or where['cpu']}, {where['cores']} cores{busy(where)}; median of {timer.repeats} x {timer.steps} steps "
        f"after warm-up. MFU: of {top.tflops:,.3g} TFLOP/s ({top.source}), a backward pass counted as two forwards, "
        f"without what is recomputed. TB/s: bytes that operations read and write, each by itself, of {top.tb_per_s:.3g} "
        f"({top.source}); fused ones move less. GB: {'GPU peak' if where['gpu'] else 'process'}.",
    )
    for row in ladder.rows.values():
        if row.ratio is not None:
            say(console, f"{row.name}: {row.ratio:.2f} times {row.ratio_to}.")
        if "ours_over_this" in row.more:
            say(console, f"Ours is {row.more['ours_over_this']:.2f} times {row.name}: {row.note}.")
        if "kinds_ms" in row.more:
            say(console, kinds_told(row))
    if verdict.overlap is not None:
        told = f"Overlap: end to end is {verdict.overlap:.0%} of what loader and step allow."
        if verdict.contention is not None:
            told += f" Contention: a step takes {verdict.contention:.2f} times as long beside the loader."
        say(console, told)
    print_wrapped(console, verdict.sentence)


def _cells(row: Row) -> list[str]:
    if row.images_per_s is None:
        return ["-"] * 6
    more = row.more

    def number(key: str, form: str, scale: float = 1) -> str:
        return format(more[key] * scale, form) if more.get(key) is not None else ""

    return [
        brief(row.images_per_s),
        *(number(key, ",.3f" if more.get(key, 0) < 10 else ",.0f") for key in ("ms_p50", "ms_p95")),
        number("mfu", ".1%"),
        number("tb_per_s", ".3g"),
        number("memory_bytes", ".1f", 1e-9),
    ]
