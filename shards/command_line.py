"""Parse a sub-command's options into a dataclass, with help that fits the terminal and never breaks a word."""

from __future__ import annotations

import contextlib
import inspect
import io
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, TextIO

import tyro

from shards.errors import UserError

# Kinds of value, named by the word that stands for them in the help; numbers are N, or X where they need not be whole.
Name = Annotated[str, tyro.conf.arg(metavar="NAME")]
Names = Annotated[str, tyro.conf.arg(metavar="NAMES")]
File = Annotated[str, tyro.conf.arg(metavar="FILE")]
Folder = Annotated[str, tyro.conf.arg(metavar="FOLDER")]
Shards = Annotated[str, tyro.conf.arg(metavar="SHARDS")]
SeveralShards = Annotated[tuple[str, ...], tyro.conf.arg(metavar="SHARDS ...")]

# Lines break after any comma, also inside "4,3,2", and at any space, also inside "[--size N]". These stand for such a comma
# and such a space until the lines are made.
_COMMA, _SPACE = "\ue000", "\ue001"


def parse(cls: type, prog: str, argv: Sequence[str] | None, **options: Any) -> Any:
    """Return the options in `argv` as an instance of `cls`; for --help print the help and exit.

    Args:
        options: those of `tyro.cli`, such as config. With return_unknown_args the result is a pair, as tyro's.
    """
    words = sys.argv[1:] if argv is None else argv
    if not {"-h", "--help"} & set(words):
        try:
            with _silence():
                return tyro.cli(cls, prog=prog, args=words, **options)
        except SystemExit:
            _check_surplus(cls, prog, words, options)
            # tyro tells all other mistakes.
            return tyro.cli(cls, prog=prog, args=words, **options)
    options["description"] = _paragraphs(options.get("description") or inspect.getdoc(cls) or "")
    shown = _Screen(sys.stdout)
    # tyro prints the help and exits.
    with (
        contextlib.suppress(SystemExit),
        _docstrings_in_paragraphs(),
        _short_metavars(),
        contextlib.redirect_stdout(shown),
    ):
        tyro.cli(cls, prog=prog, args=words, **options)
    _print_help(shown.getvalue())
    raise SystemExit(0)


def _check_surplus(cls: type, prog: str, words: Sequence[str], options: dict[str, Any]) -> None:
    """Raise UserError for a word that belongs to no option, such as the second of two folders."""
    try:
        with _silence():
            _, unknown = tyro.cli(cls, prog=prog, args=words, **{**options, "return_unknown_args": True})
    except SystemExit:
        return
    if not unknown or any(word.startswith("-") for word in unknown):
        return
    before = words[: words.index(unknown[0])]
    flag = next((word for word in reversed(before) if word.startswith("--")), "")
    several = ""
    if ("shards" in flag) if flag else "shards" in inspect.signature(cls).parameters:
        several = (
            " One folder of shards is read here; `fastssl pretrain --data.shards`, `fastssl preview` and `fastssl eval knn --shards` "
            "take several."
        )
    after = f", after {flag}" if flag else ""
    raise UserError(
        f"'{unknown[0]}' is one word too many for `{prog}`{after}.{several} `{prog} --help` explains the options."
    )


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    # tyro's own switch for this lets some of its messages pass.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


class _Screen(io.StringIO):
    """Collect what is printed, with the colors and characters that `screen` can show."""

    def __init__(self, screen: TextIO) -> None:
        super().__init__()
        self._screen = screen

    @property
    def encoding(self) -> str:
        return self._screen.encoding

    def isatty(self) -> bool:
        return self._screen.isatty()


def _print_help(text: str) -> None:
    """Print tyro's help: usage and description, which tyro does not wrap, then its boxes, which it does."""
    from rich.console import Console
    from rich.text import Text

    top = re.search(r"^(\x1b\[[0-9;]*m)*╭", text, re.MULTILINE)
    # Without such characters there are no boxes, and the lines are short already.
    head, boxes = (text[: top.start()], text[top.start() :]) if top else (text, "")
    usage, _, description = re.sub(r"\n{3,}", "\n\n", head.rstrip()).partition("\n")
    usage = re.sub(r"\[(?=-)[^]]*\]", lambda option: option[0].replace(" ", _SPACE), usage)
    console = Console(highlight=False)
    with console.capture() as wrapped:
        console.print(Text.from_ansi(f"{usage}\n{description}"))
    told = f"{wrapped.get()}\n{boxes}".rstrip() + "\n"
    sys.stdout.write(told.replace(_COMMA, ",").replace(_SPACE, " "))


def _paragraphs(text: str) -> str:
    """Join the lines of each paragraph, so that lines break where the terminal ends and not where the source's did."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def _unbroken(text: str) -> str:
    return re.sub(r",(?=\S)", _COMMA, text)


def _short_metavars() -> tyro.constructors.ConstructorRegistry:
    """Call numbers and text N, X and TEXT where nothing better is given, instead of INT, FLOAT and STR."""
    registry = tyro.constructors.ConstructorRegistry()
    metavars = {int: "N", float: "X", str: "TEXT"}

    @registry.primitive_rule
    def _(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
        kind = info.type
        if kind not in metavars:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar=metavars[kind],
            instance_from_str=lambda words: kind(words[0]),
            is_instance=lambda value: isinstance(value, kind),
            str_from_instance=lambda value: [_unbroken(str(value))],
        )

    return registry


@contextlib.contextmanager
def _docstrings_in_paragraphs() -> Iterator[None]:
    """Let tyro see docstrings of fields without the line breaks of the source, of which it keeps the indented ones."""
    import docstring_parser

    parse_from_object = docstring_parser.parse_from_object

    def joined(*args: Any, **kwargs: Any) -> Any:
        found = parse_from_object(*args, **kwargs)
        for field in found.params:
            if field.description:
                field.description = _unbroken(_paragraphs(field.description))
        return found

    docstring_parser.parse_from_object = joined
    try:
        yield
    finally:
        docstring_parser.parse_from_object = parse_from_object
