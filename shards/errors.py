"""Mistakes that users can mend."""

import difflib
from collections.abc import Iterable
from typing import Any


class UserError(Exception):
    """A mistake the user can mend; the command line prints one line, no traceback, exit code 2.

    No ValueError: the parser of the settings would catch that and print a box of its own.
    """


def check_least(settings: Any, prefix: str = "--", **least: float) -> None:
    """UserError where an attribute of `settings` is below its least value; one that is None is not set.

    `prefix`: what a user writes before the name: "--" of a command's flags, "train." of a section.
    """
    for name, low in least.items():
        value = getattr(settings, name)
        # `not`, so that nan is refused too.
        if value is not None and not value >= low:
            written = name.replace("_", "-") if prefix == "--" else name
            raise UserError(f"{prefix}{written} is {value}, but it must be at least {low}.")


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name: the closest known name, else all known names.

    Begins with a space, so that it can follow the sentence that names the mistake.
    """
    names = sorted(known)
    return did_you_mean(name, names) or f" Known: {', '.join(names) or 'none'}."


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """As `nearest`, but empty where no known name is close. The case of letters does not count."""
    lowered = {one.lower(): one for one in sorted(known, reverse=True)}
    close = difflib.get_close_matches(name.lower(), lowered, n=1)
    return f" Did you mean {lowered[close[0]]!r}?" if close else ""
