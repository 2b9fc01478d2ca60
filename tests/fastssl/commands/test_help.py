"""The help of every command: it fits the terminal, breaks no word, and names what a value is."""

import re
from itertools import takewhile

import pytest

from fastssl.bench.bench_command import SUBCOMMANDS
from fastssl.cli import COMMANDS, main

EVERY = [
    [],
    *([name] for name in COMMANDS),
    ["launch", "slurm"],
    ["eval", "knn"],
    *(["bench", name] for name in SUBCOMMANDS),
    ["pretrain", "laptop", "--settings"],
]
METAVARS = {
    *(
        "SHARDS",
        "RUN",
        "CHECKPOINT",
        "CONFIG",
        "SOURCE",
        "DEST",
        "FILE",
        "FILE.png",
        "FOLDER",
        "NAME",
        "NAMES",
        "SETTINGS",
        "TABLE",
    ),
    *(
        "N",
        "X",
        "S",
        "H",
        "TEXT",
        "SHARE",
        "SHARES",
        "COLUMN",
        "COLUMN|REGEX",
        "LINE",
        "STAGE",
        "IDS",
        "IDS|SPLIT",
        "ID,ID,...",
        "I/N",
        "all",
    ),
    *("auto|HOST:PORT", "auto|sample|folder[:N]|tar|none", "N,N,..|NAME,.."),
}
# The frames around groups of options, and what stands for them where the terminal has no such characters.
FRAMES = re.compile("[╭╮╰╯─│]|-{5,}")


def help_of(words: list[str], columns: int, monkeypatch, capsys) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(columns))
    try:
        code = main([*words, "--help"])
    except SystemExit as stop:  # the way of tyro and argparse
        code = stop.code
    out, err = capsys.readouterr()
    assert (code or 0, err) == (0, "")
    assert all(len(line) <= columns for line in out.splitlines())
    return [FRAMES.sub(" ", line) for line in out.splitlines()]


@pytest.mark.parametrize("words", EVERY, ids=" ".join)
def test_help_fits_and_breaks_no_word(words: list[str], monkeypatch, capsys) -> None:
    narrow, wide = (help_of(words, columns, monkeypatch, capsys) for columns in (80, 120))
    # The same words in the same order, wherever the lines break.
    assert " ".join(narrow).split() == " ".join(wide).split()


@pytest.mark.parametrize("words", EVERY, ids=" ".join)
def test_metavars_say_what_a_value_is(words: list[str], monkeypatch, capsys) -> None:
    for line in help_of(words, 120, monkeypatch, capsys):
        for option in re.findall(r"(?:^ *|\[)--[a-z0-9_.-]+ ([^ ].*)", line):
            # Up to two spaces, where the explanation begins, or to the bracket that closes an option of the usage.
            value = re.split(r"  |\] |\]$", option)[0]
            if value.startswith("{"):
                continue
            named = takewhile(
                lambda word: not word.islower(),
                re.sub(r"\{None\}\||\|(?={)|[\[\]{}]| \.\.\.", " ", value).split(),
            )
            assert set(named) <= METAVARS, line


def test_a_field_of_the_shards_is_called_so(monkeypatch, capsys) -> None:
    told = {
        " ".join(words): " ".join(help_of(words, 80, monkeypatch, capsys))
        for words in (["eval", "knn"], ["report"], ["preview"], ["bench", "loader"])
    }
    assert "eval knn [-h] [OPTIONS] CHECKPOINT" in told["eval knn"]
    assert "--test-shards SHARDS" in told["eval knn"]
    assert "report [-h] RUN [RUN ...]" in told["report"]
    assert "preview [-h] [OPTIONS] SHARDS" in told["preview"]
    assert "bench loader [-h] [OPTIONS] SHARDS" in told["bench loader"]
