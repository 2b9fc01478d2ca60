"""Sentences on a terminal break between words, and nowhere else."""

import io
import itertools
import random

import pytest
from rich.console import Console

from shards.terminal import note, print_wrapped, shown, wrapped


class Screen(io.StringIO):
    width = 40

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [Screen(), Console(file=io.StringIO(), width=40, force_terminal=True)])
def test_lines_break_between_words(terminal) -> None:
    draw = random.Random(0)
    for _ in range(50):
        words = ["w" * draw.choice([1, 4, 9]) + draw.choice(["", ".", "-x", "/y"]) for _ in range(60)]
        lines = wrapped(" ".join(words), terminal).split("\n")
        assert " ".join(lines).split(" ") == words
        assert max(map(len, lines)) <= 40
        # No line is shorter than it must be: the next word did not fit.
        for line, after in itertools.pairwise(lines):
            assert len(line) + 1 + len(after.split(" ")[0]) > 40


def test_paths_stay_whole_and_lines_apart() -> None:
    path = "/a/very/long/path-of-a-folder/that/no/line/of/this/terminal/holds"
    assert wrapped(f"The file {path} is damaged.\n\nMend it.", Screen()).split("\n") == [
        "The file",
        path,
        "is damaged.",
        "",
        "Mend it.",
    ]


def test_files_and_pipes_get_whole_lines() -> None:
    text = "a word " * 40
    assert wrapped(text, io.StringIO()) == text
    assert wrapped(text, Console(file=io.StringIO(), width=40)) == text


def test_what_is_told_is_one_line_in_a_file_and_keeps_its_words_on_a_terminal() -> None:
    path = "/a/very/long/path-of-a-folder/that/no/line/of/this/terminal/holds"
    text = f"[bold] The file {path} is damaged and was not read: mend it."
    file, screen = io.StringIO(), io.StringIO()
    print_wrapped(Console(file=file, width=40), text, "red")
    assert file.getvalue() == f"{text}\n"
    print_wrapped(Console(file=screen, width=40, force_terminal=True, color_system=None), text)
    lines = screen.getvalue().splitlines()
    assert " ".join(lines) == text
    assert path in lines


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("Straße 3, ü", "Straße 3, ü"),
        ("\x1b[2Jx\x07", "\\x1b[2Jx\\x07"),
        ("a\tb\nc\r", "a\\tb\\nc\\r"),
        ("\x9b2J", "\\x9b2J"),
        ("\udcff", "\\udcff"),
        ("left\u202eright", "left\\u202eright"),
    ],
)
def test_names_cannot_act_on_the_terminal(name: str, wanted: str):
    assert shown(name) == wanted


def test_sentences_show_names_and_keep_their_own_lines():
    file = io.StringIO()
    print_wrapped(Console(file=file, width=80), "first \x1b[2Jname\nsecond [/line]")
    assert file.getvalue() == "first \\x1b[2Jname\nsecond [/line]\n"
    assert note("\x1b]0;title\x07") == "fastssl: note: \\x1b]0;title\\x07"
