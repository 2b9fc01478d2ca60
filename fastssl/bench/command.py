"""`fastssl bench loader` and `fastssl bench step`: finds the sub-command and only then imports what it needs."""

from __future__ import annotations

from importlib import import_module

SUBCOMMANDS = {"loader": "fastssl.bench.loader", "step": "fastssl.bench.step"}
USAGE = """usage: fastssl bench loader SHARDS [options]     images per second from shards to views, beside other loaders
       fastssl bench step CONFIG [options]       images per second of a training step, part by part

`fastssl bench loader --help` and `fastssl bench step --help` explain the options."""


def run(argv: list[str]) -> int:
    """Run the sub-command that `argv` begins with."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    from shards.errors import UserError, nearest

    if argv[0] not in SUBCOMMANDS:
        raise UserError(f"There is no 'fastssl bench {argv[0]}'.{nearest(argv[0], SUBCOMMANDS)}")
    return import_module(SUBCOMMANDS[argv[0]]).run(argv[1:]) or 0
