"""No thread of Arrow reads from a Python file: at the end of a process one that still does aborts it, after all work is done."""

import ast
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.pictures import encoded, picture

ROOT = Path(__file__).parents[3]
READS = {"read_row_group", "read_row_groups", "iter_batches", "read_table", "to_table"}


def arrow_reads(path: Path) -> list[ast.Call]:
    """The calls in a file that read a Parquet file with threads where they are not told otherwise."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    named = [(call, call.func) for call in calls if isinstance(call.func, ast.Attribute)]
    return [
        call
        for call, func in named
        if (func.attr in READS)
        or (func.attr == "read" and isinstance(func.value, ast.Name) and func.value.id == "parquet")
    ]


def test_every_read_of_a_parquet_file_is_without_threads():
    found = {
        path: arrow_reads(path)
        for package in ("shards", "pipelines", "fastssl")
        for path in sorted((ROOT / package).rglob("*.py"))
    }
    assert sum(map(len, found.values())) > 10
    wrong = [
        f"{path.relative_to(ROOT)}:{call.lineno}"
        for path, calls in found.items()
        for call in calls
        if not any(
            word.arg == "use_threads" and ast.literal_eval(word.value) is False for word in call.keywords
        )
    ]
    assert wrong == []


@pytest.mark.parametrize("turn", range(3))
def test_a_conversion_of_a_small_table_ends_with_code_0(tmp_path: Path, turn: int):
    cells = pa.array([encoded(picture(i), "PNG") for i in range(20)], pa.binary())
    pq.write_table(pa.table({"image": cells, "label": [i % 3 for i in range(20)]}), tmp_path / "x.parquet")
    words = [sys.executable, "-m", "fastssl", "shard", str(tmp_path / "x.parquet"), str(tmp_path / "out")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
