"""Sentences on a terminal, whose lines break between words; in files and pipes they stay one line each, so that `grep` finds them.

What is to be pasted, such as the next command, is printed as it is: no line break of ours is in it.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
from typing import Any


def note(message: object) -> str:
    """Return a warning as a user reads it: the sentence, without its place in the source."""
    return wrapped(f"fastssl: note: {shown_lines(message)}", sys.stderr)


def shown(name: object) -> str:
    """Return a name out of a file or a folder as it may reach a terminal: control characters, which could clear the screen or set its
    title, and what is no text become escapes such as \\x1b."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(name))


def print_wrapped(console: Any, text: str, style: str = "") -> None:
    """Print sentences on a Console of rich, which by itself breaks them at 80 columns in a file, also within a path."""
    console.print(wrapped(shown_lines(text), console), style=style, markup=False, soft_wrap=True)


def shown_lines(text: object) -> str:
    """Return sentences with the control characters of names in them shown, but for our own line breaks."""
    return "\n".join(shown(line) for line in str(text).split("\n"))


def wrapped(text: str, stream: Any) -> str:
    """Break the lines of a text between words where `stream` is a terminal; a longer word, such as a path, stays whole.

    Args:
        stream: an open text file, or a Console of rich.
    """
    is_terminal = stream.is_terminal if hasattr(stream, "is_terminal") else stream.isatty()
    if not is_terminal:
        return text
    columns = getattr(stream, "width", None) or shutil.get_terminal_size().columns
    return "\n".join(
        textwrap.fill(line, columns, break_long_words=False, break_on_hyphens=False)
        for line in text.split("\n")
    )
