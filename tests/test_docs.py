"""The pages are in step with what they tell of: tables with their benchmarks' files, links and commands with the tree."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.needs import HANGS_S

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

_spec = importlib.util.spec_from_file_location("make_table", ROOT / "docs" / "results" / "make_table.py")
assert _spec is not None
assert _spec.loader is not None
make_table = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make_table)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_benchmarks(page: Path) -> None:
    text = page.read_text()
    assert make_table.fill(text) == text
    assert text.count("<!-- table ") == len(make_table.PLACE.findall(text)) == text.count("<!-- end -->")


def test_a_stale_table_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(
        '[{"name": "ours", "images_per_s": 1234.5, "spread": [1000, 2000], "ratio": 1.5, "core_ms_per_image": 1.25,'
        ' "fidelity": "exact"}, {"name": "theirs", "images_per_s": null, "error": "not installed", "fidelity": null}]'
    )
    made = make_table.fill("a\n<!-- table a.json -->\nold\n<!-- end -->\nb", tmp_path)
    assert made.splitlines()[4:6] == [
        "| ours | 1,234 | 1,000 to 2,000 | 1.50 | 1.25 | exact |",
        "| theirs | not run: not installed |  |  |  |  |",
    ]
    assert made.startswith("a\n<!-- table")
    assert made.endswith("<!-- end -->\nb")


def test_a_pattern_takes_the_latest_file_of_a_gpu_and_waits_for_one(tmp_path: Path) -> None:
    page = "<!-- table b/*-memory.json | Peaks on `--device cuda`: -->\n<!-- end -->"
    (tmp_path / "b").mkdir()
    row = '{"images_per_s": 1234.5, "mfu": 0.25, "peak_memory_bytes": %d, "ratio_to_base": null}'
    for name, peak in (
        ("2026-12-09-cpu-memory", 1),
        ("2026-12-01-h100-memory", 2e9),
        ("2026-12-02-h100-memory", 3e9),
    ):
        assert make_table.fill(page, tmp_path) == page or name.endswith("02-h100-memory")
        text = '{"part": "memory", "rows": {"card": %s}}' % (row % peak)
        (tmp_path / "b" / f"{name}.json").write_text(text)
    filled = make_table.fill(page, tmp_path)
    assert filled.splitlines()[1:4] == ["", "Peaks on `--device cuda`:", ""]
    assert filled.splitlines()[6] == "| card | 1,234 |  | 25.0% | 3.0 |"
    # Made again from its own file, and emptied where that has gone.
    assert make_table.fill(filled, tmp_path) == filled
    assert make_table.fill(filled, tmp_path / "nothing") == page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_page_shows_tables_of_what_was_not_measured(page: Path) -> None:
    """A row may say why it alone has no figure, such as a package that is not installed."""
    rows = [line for line in page.read_text().splitlines() if line.startswith("|")]
    assert [row for row in rows if re.search(r"\| not run \|", row)] == []
    assert "\nnot run\n" not in page.read_text()


def test_forms_of_what_a_gpu_check_writes() -> None:
    part = {"name": "crop", "ms": 0.4531, "spread": [0.4, 0.5], "share": 0.131}
    assert make_table.table({"kind": "parts", "parts": [part]}).splitlines()[2:] == [
        "| crop | 0.453 | 0.400 to 0.500 | 13.1% |"
    ]
    ladder = {
        "kind": "ladder",
        "rows": [
            {"name": "read", "images_per_s": 5e4, "spread": [1, 2], "ms_p50": 1.234, "memory_bytes": 2.5e9},
            {"name": "to device", "images_per_s": None, "error": "no"},
        ],
        "verdict": {"contention": 1.0123},
    }
    assert make_table.table(ladder).splitlines()[2:] == [
        "| read | 50,000 | 1.23 |  | 2.5 |  |",
        "| to device | not run: no |  |  |  |  |",
        "| a step beside the loader / alone | 1.012 |  |  |  |  |",
    ]
    augment = {"name": "triton", "images_per_s": 6e4, "spread": [5e4, 7e4], "ms_p50": 4.2, "device_ms": 3.1}
    augment |= {
        "ours_over_this": 1.0,
        "least_bytes": 1,
        "gb_per_s": 97.6,
        "peak_memory_bytes": 1.5e9,
        "fidelity": "exact",
    }
    missing = {
        "name": "dali-graph",
        "images_per_s": None,
        "error": "not installed",
        "fidelity": "approximate",
    }
    assert make_table.table([augment, missing]).splitlines()[2:] == [
        "| triton | 4.20 | 3.10 | 60,000 | 50,000 to 70,000 | 1.00 x | 97.6 | 1.50 | exact |",
        "| dali-graph | not run: not installed |  |  |  |  |  |  |  |",
    ]
    goal = {"goal": "a", "wanted": ">= 3 x", "figure": 2.5, "unit": "x", "met": False, "why": None}
    assert make_table.table([goal]).splitlines()[2] == "| a | >= 3 x | 2.5 x | **missed** |"


# Sentences that people had to read twice, and words of their kind.
TWICE = re.compile(
    r"very (bits|values|samples)|one a CPU|two a CPU|rounding owes|[Hh]angs together through|in the midst|at no further|\banew\b|"
    r"\baloud\b|torn apart|tear apart|what of it|gone away|in silence|is told of"
)


@pytest.mark.parametrize(
    "path", [*PAGES, *sorted((ROOT / "shards" / "commands").glob("*.py"))], ids=lambda path: path.name
)
def test_plain_english(path: Path) -> None:
    assert [found[0] for found in TWICE.finditer(path.read_text())] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)\)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_the_pages_exist(page: Path) -> None:
    from fastssl.bench.bench_command import SUBCOMMANDS
    from fastssl.cli import COMMANDS

    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)
    named = re.findall(r"(?:^|-m )fastssl ([a-z]+)(?: ([a-z]+))?", "\n".join(blocks), re.MULTILINE)
    assert {command for command, _ in named} <= set(COMMANDS)
    assert {sub for command, sub in named if command == "bench" and sub and sub != "configs"} <= {
        *SUBCOMMANDS,
        *(path.stem.partition("_")[0] for path in (ROOT / "configs").glob("*.yaml")),
    }
    configs = re.findall(r"configs/[a-z0-9_]+\.yaml", page.read_text())
    assert [name for name in configs if not (ROOT / name).exists()] == []
    by_name = re.findall(r"fastssl pretrain ([a-z]\w*)(?= )", "\n".join(blocks))
    assert [name for name in by_name if not (ROOT / "configs" / f"{name}.yaml").exists()] == []


def test_the_index_has_a_line_for_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")} - {"README.md"}
    lines = re.findall(r"^- \[(.+)\]\(\1\): .+$", index, re.MULTILINE)
    assert sorted(lines) == sorted(pages - {page for page in pages if page.startswith("benchmarks/")})


def test_hints_name_packages_that_pip_finds() -> None:
    """The distribution is not on the index, so its extras cannot be installed by name."""
    files = [
        path for folder in ("fastssl", "pipelines", "shards", "docs") for path in (ROOT / folder).rglob("*")
    ]
    found = {
        str(path.relative_to(ROOT))
        for path in (*files, ROOT / "README.md")
        if path.suffix in (".py", ".md")
        and re.search(r"fastssl(-pretrain)?\[|pip install fastssl", path.read_text())
    }
    assert found == set()


def test_the_completion_of_the_page_completes_commands_and_options(tmp_path: Path) -> None:
    from fastssl.cli import COMMANDS

    [script] = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "command_line.md").read_text(), re.DOTALL)
    [names] = re.findall(r'-W "(.+?)"', script)
    assert names.split() == list(COMMANDS)
    (tmp_path / "fastssl").write_text(f'#!/bin/sh\nexec {sys.executable} -m fastssl "$@"\n')
    (tmp_path / "fastssl").chmod(0o755)
    script += """
complete_words() {
  COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMPREPLY=()
  _fastssl
  echo "${COMPREPLY[*]}"
}
complete_words fastssl pre
complete_words fastssl pretrain laptop --train.ep
complete_words fastssl verify --shards x
complete_words fastssl eval knn --sh
"""
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=HANGS_S
    )
    assert done.stdout.splitlines()[:2] == ["preview pretrain", "--train.epochs"]
    assert (done.stderr, done.returncode) == ("", 0)
