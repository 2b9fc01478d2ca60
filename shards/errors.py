"""Mistakes that users can mend."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake the user can mend; the command line prints one line, no traceback, exit code 2.

    No ValueError: the parser of the settings would catch that and print a box of its own.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name: the closest known name, else all known names.

    Begins with a space, so that it can follow the sentence that names the mistake.
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f" Did you mean {close[0]!r}?"
    return f" Known: {', '.join(names) or 'none'}."
