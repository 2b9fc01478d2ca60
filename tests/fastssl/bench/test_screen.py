"""What every benchmark shows: each figure when it is known, tables of 80 columns, and what there is when Ctrl-C stops it."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from fastssl.bench.conversion import bench_shard
from fastssl.bench.guard import exit_code
from fastssl.bench.loaders import bench_augment, bench_fidelity, bench_loader
from fastssl.bench.report import Row, write_measured, write_report
from fastssl.bench.screen import Stoppable, say_row
from fastssl.bench.turns import take_turns
from pipelines.augment.recipe import get_recipe
from tests.needs import HANGS_S
from tests.pictures import photo

WHERE = {"cpu": "AMD EPYC 9R14 96-Core Processor", "gpu": None, "cores": 128, "load_average": 12.3}


def printed(capsys) -> str:
    return capsys.readouterr().out


@pytest.fixture
def console(monkeypatch) -> Console:
    monkeypatch.setenv("COLUMNS", "80")
    return Console(highlight=False, force_terminal=True, color_system=None)


def test_each_figure_is_printed_when_it_is_measured(console, capsys) -> None:
    rows, seen = [Row("decode"), Row("lightly"), Row("fused")], []

    def measure(turn: int, item: float, row: Row) -> None:
        # What has been printed before this one is measured.
        seen.append(capsys.readouterr().out)
        if row.name == "lightly":
            row.fail("not installed: No module named 'lightly'")
        # Turn 0 warms up.
        elif turn:
            row.add(item * turn, 1.0)

    take_turns(range(3), [1000.0, 0.0, 500.0], rows, measure, console)
    seen.append(printed(capsys))
    assert seen == [
        "",
        "",
        "lightly is not installed: No module named 'lightly'\n",
        "",
        "1 of 2  decode: 1,000 images/s\n",
        "1 of 2  fused: 500 images/s\n",
        "2 of 2  decode: 2,000 images/s\n",
        "2 of 2  fused: 1,000 images/s\n",
    ]


def test_why_a_row_has_no_figure(console, capsys) -> None:
    rows = [Row("a"), Row("b"), Row("c"), Row("d"), Row("e", rates=[5.0])]
    rows[0].fail("MemoryError: no more", failure=True)
    rows[1].fail("not installed: No module named 'b'")
    rows[2].fail("c does not run on a cpu device")
    assert [row.why_not for row in rows] == ["failed", "not installed", "cannot run", "not reached", ""]
    for row in rows:
        say_row(console, row)
    assert printed(capsys).splitlines() == [
        "a failed: MemoryError: no more",
        "b is not installed: No module named 'b'",
        "c was not measured: c does not run on a cpu device",
        "e: 5 images/s",
    ]


def test_ctrl_c_keeps_what_was_measured(console, capsys, tmp_path) -> None:
    rows = [Row("decode"), Row("fused")]

    def measure(turn: int, item: None, row: Row) -> None:
        if row.name == "fused":
            raise KeyboardInterrupt
        row.add(1000.0, 1.0)

    with Stoppable(console) as measuring:
        take_turns(range(1, 3), [None, None], rows, measure, console)
    assert measuring.stopped
    assert "Stopped." in printed(capsys)
    assert [row.images_per_s for row in rows] == [1000.0, None]
    assert exit_code(rows, stopped=measuring.stopped) == 130
    for complete in (True, False):
        write_measured(str(tmp_path / "rows"), WHERE, {}, rows, complete=complete)
        write_report(str(tmp_path / "report"), "x", WHERE, {}, rows, complete=complete)
        report = json.loads((tmp_path / "report").read_text())
        for each in (report, *json.loads((tmp_path / "rows").read_text())):
            assert each.get("incomplete", False) is not complete


def test_other_errors_are_not_taken_for_ctrl_c(console) -> None:
    with pytest.raises(ArithmeticError), Stoppable(console):
        raise ArithmeticError


def measured(name: str) -> Row:
    """A row with the widest figures."""
    row = Row(name, "approximate", note="what it is", ratio=123.45, ratio_to="decode")
    row.add(327_886.0, 128.0)
    row.add(402_887.0, 127.99)
    row.more = {
        **{
            "peak_memory_bytes": 123_456_789_012,
            "ms_p50": 12_345.6,
            "ms_p95": 23_456.7,
            "ours_over_this": 123.45,
        },
        **{
            "gb_per_s": 1234.56,
            "cpu_ratio": 5.19,
            "mfu": 0.5,
            "tb_per_s": 1.234,
            "memory_bytes": 123_456_789_012,
        },
    }
    return row


def absent(name: str) -> Row:
    row = Row(name, note="what it is")
    row.fail("not installed: No module named 'x'")
    return row


@pytest.mark.parametrize("kind", ["loader", "augment", "shard", "ladder", "fidelity"])
def test_tables_fit_80_columns(kind: str, console, capsys) -> None:
    args: Any = None
    work: Any = None
    ladder: Any = None
    sides = [500, 500]
    if kind == "loader":
        import numpy as np

        shards = SimpleNamespace(widths=np.array(sides), heights=np.array(sides))
        work = SimpleNamespace(
            recipe=get_recipe("moco_v3"), sample_ids=np.array([0, 1]), shards=shards, threads=128, batch=256
        )
        args = SimpleNamespace(recipe="moco_v3", repeats=3, seconds=4.0)
        rows = [measured("fused all on GPU"), absent("kornia-modules")]
        bench_loader._show(console, rows, work, WHERE, args)
    elif kind == "augment":
        import numpy as np
        import torch

        from fastssl.bench.loaders.augmenters import Decoded

        work = Decoded([np.zeros((60, 70, 3), "u1")] * 2, get_recipe("moco_v3"), 2, torch.device("cpu"), 1)
        args = SimpleNamespace(recipe="moco_v3", repeats=3, seconds=4.0)
        bench_augment._show(
            console, [measured("torchvision-v2"), absent("kornia-modules")], work, WHERE, args
        )
    elif kind == "shard":
        args = SimpleNamespace(images=10_000, repeats=3)
        bench_shard._show(
            console, [measured("webdataset re-encode"), absent("litdata")], WHERE, args, 128, 1e5
        )
    elif kind == "fidelity":
        engines, sets = ["fused", "dali", "kornia"], ["1024 images", "edge cases"]
        cells = [
            {"engine": e, "pictures": p, "operation": "flips and turns", "mean_levels": 12.345}
            for e in engines
            for p in sets
        ]
        bench_fidelity._show(console, cells, engines, sets, SimpleNamespace(recipe="moco_v3", size=224))
    else:
        from fastssl.bench.ladder.ladder_table import show
        from fastssl.bench.ladder.verdict import Verdict

        names = ("student forward + backward", "end to end, decoded on the GPU", "full step, compiled")
        told = Verdict("loader", 0.5, 1.0, "The loader is the bottleneck.")
        config = SimpleNamespace(
            model=SimpleNamespace(backbone="vit_base_patch16_224"),
            recipe=SimpleNamespace(size=224),
            train=SimpleNamespace(batch=4096),
        )
        ladder = SimpleNamespace(
            resolved=SimpleNamespace(method_name="moco_v3", config=config),
            timer=SimpleNamespace(repeats=3, steps=20),
            top=SimpleNamespace(tflops=989.0, tb_per_s=3.35, source="data sheet"),
            rows={name: measured(name) for name in names} | {"augment": absent("augment")},
        )
        facts = {"chunk": 256, "dtype": "bfloat16", "compiled": True}
        show(console, ladder, told, WHERE, facts)
    out = printed(capsys)
    assert max(map(len, out.splitlines())) <= 80
    assert "…" not in out
    assert kind == "fidelity" or "not installed" in out
    assert "failed" not in out
    # Notes go by the rows' names: a number after a name would look like its number of threads.
    assert not re.search(r"(fused all on GPU|torchvision-v2|webdataset re-encode) \d+$", out, re.MULTILINE)
    if kind in ("loader", "augment", "shard"):
        assert re.search(
            r"^(fused all on GPU|torchvision-v2|webdataset re-encode): what it is\.$", out, re.MULTILINE
        )


# Of each benchmark: its words, the line after which it is stopped, and the names of its figures.
ENDLESS = ("--repeats", "100000")
SMALL = ("--batch", "4", "--size", "16", "--threads", "1")
STOPPED = {
    "loader": (
        ("loader", "SHARDS", *SMALL, "--seconds", "0.05", "--engines", "fused", "--peers", "none"),
        "1 of 100000  fused: ",
        ["read", "decode", "fused"],
    ),
    "augment": (
        ("augment", "--device", "cpu", *SMALL, "--seconds", "0.01", "--engines", "fused,torch"),
        "1 of 100000  torch: ",
        ["fused", "torch"],
    ),
    "shard": (
        ("shard", "JPEGS", "--images", "6", "--workers", "1", "--peers", "False"),
        "1 of 100000  fastssl re-encode: ",
        ["decode", "fastssl keep", "decode + encode", "fastssl re-encode"],
    ),
    "start": (("start", "SHARDS", "--samples", "2000", *SMALL), "turn 1 of 100000: ", []),
}


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("name", STOPPED)
def test_ctrl_c_ends_a_benchmark_with_its_table_and_file(name: str, shards: Path, tmp_path: Path) -> None:
    """The whole command in a terminal, where a Ctrl-C goes to its other processes too, stopped after its first figures."""
    words, line, names = STOPPED[name]
    (tmp_path / "jpegs").mkdir()
    photo(320, 280, seed=0).save(tmp_path / "jpegs" / "a.jpg")
    places = {"SHARDS": str(shards), "JPEGS": str(tmp_path / "jpegs")}
    json_file = tmp_path / "found.json"
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "fastssl",
            "bench",
            *(places.get(word, word) for word in words),
            *ENDLESS,
            "--json",
            json_file,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "COLUMNS": "80"},
        start_new_session=True,
        # Where the tests run in the background, it would be ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    try:
        lines = [process.stdout.readline()]
        while lines[-1] and not lines[-1].startswith(line):
            lines.append(process.stdout.readline())
        os.killpg(process.pid, signal.SIGINT)
        rest, errors = process.communicate(timeout=HANGS_S)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    before, after = rest.split("Stopped. This was measured until then:")
    assert "Traceback" not in before + after
    assert all(name in after for name in names)
    assert f"Written to {json_file}" in after
    found = json.loads(json_file.read_text())
    rows = found["rows"] if isinstance(found, dict) else found
    assert [row["name"] for row in rows] == names
    assert all(row["images_per_s"] for row in rows)
    for marked in [found] if isinstance(found, dict) else rows:
        assert marked["incomplete"] is True
    if name == "start":
        assert found["start"]["all"]["seconds"] > 0
