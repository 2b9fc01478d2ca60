"""The pages are in step with what they tell of: tables with their benchmarks' files, links and commands with the tree."""

import importlib.util
import re
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)\)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_the_pages_exist(page: Path) -> None:
    from fastssl.bench.command import SUBCOMMANDS
    from fastssl.cli import COMMANDS

    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)
    named = re.findall(r"(?:^|-m )fastssl ([a-z]+)(?: ([a-z]+))?", "\n".join(blocks), re.MULTILINE)
    assert {command for command, _ in named} <= set(COMMANDS)
    assert {sub for command, sub in named if command == "bench" and sub and sub != "configs"} <= set(
        SUBCOMMANDS
    )
    configs = re.findall(r"configs/[a-z0-9_]+\.yaml", page.read_text())
    assert [name for name in configs if not (ROOT / name).exists()] == []
