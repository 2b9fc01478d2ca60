"""`fastssl configs [NAME [FILE]]`: list the packaged configurations, or copy one to change it."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from shards.command_line import parse

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable


@dataclass(frozen=True)
class Configs:
    """List the packaged configurations, or copy one into a file to change it.

    `fastssl pretrain NAME` runs one as it is. The first comment of each says what it needs and what comes out.
    """

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[NAME]")] = ""
    """Configuration to copy; without: list all."""
    file: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[FILE]")] = ""
    """Where to copy it, a file or a folder; without: NAME.yaml here. An existing file is never overwritten."""


def run(argv: list[str]) -> int:
    """Run the command."""
    args = parse(Configs, "fastssl configs", argv)
    from fastssl.pretraining.packaged_configs import packaged
    from shards.errors import UserError, nearest
    from shards.storage.atomic_files import atomic_write, check_output

    known = packaged()
    if not args.name:
        _show({name: summary(file) for name, file in known.items()})
        return 0
    name = args.name.removesuffix(".yaml")
    if name not in known:
        raise UserError(f"There is no configuration called '{name}'.{nearest(name, known)}")
    out = Path(args.file or ".")
    out = out / f"{name}.yaml" if out.is_dir() else out
    if out.exists():
        raise UserError(f"'{out}' exists and is not overwritten: name another file.")
    check_output(out, "FILE")
    atomic_write(out, known[name].read_bytes())
    print(f"{out}\nnext: fastssl pretrain {shlex.quote(str(out))} --data.shards SHARDS")
    return 0


def summary(file: Traversable) -> tuple[str, str, str, str]:
    """Return model, recipe, batch and machine of a configuration, as its text states them; nothing slow is imported."""
    import yaml

    text = file.read_text()
    tree = yaml.load(text, Loader=yaml.BaseLoader)
    recipe = tree["recipe"] if isinstance(tree["recipe"], str) else tree["recipe"]["preset"]
    machine = re.search(r"^# Hardware: +([^;\n]+)", text, re.MULTILINE)
    return tree["model"]["backbone"], recipe, tree["train"]["batch"], machine[1] if machine else ""


def short_name(model: str) -> str:
    """Return a backbone's name as the list shows it: timm's vit_small_patch16_224 is vit_small/16, which leaves room for the rest."""
    return re.sub(r"_patch(\d+)_\d+$", r"/\1", model)


def _show(rows: dict[str, tuple[str, str, str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("name", "model", "recipe", "batch", "machine"):
        table.add_column(title, no_wrap=title != "machine", justify="right" if title == "batch" else "left")
    for name, (model, *rest) in rows.items():
        table.add_row(name, short_name(model), *rest)
    console = Console(highlight=False)
    console.print(table)
    console.print("\nRun one:  fastssl pretrain NAME --data.shards SHARDS")
    console.print("Copy one: fastssl configs NAME [FILE]")
