"""A configuration file: YAML in which what would be read otherwise than meant is an error that names the line."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

from fastssl.pretraining.packaged_configs import packaged
from shards.errors import UserError

# `recipe: NAME` is short for the preset.
RECIPE, PRESET = "recipe", "recipe.preset"
_VARIABLE = re.compile(r"\$(\w+|\{\w+\})")


@dataclass(frozen=True)
class ConfigFile:
    """What stands in a file: nested values, each a string or a list of strings, and the line of each full name, counted from 1."""

    tree: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)

    def line(self, name: str) -> str:
        """Return where a setting stands, as an error says it; empty for one that does not stand there."""
        return f", line {self.lines[name]}" if name in self.lines else ""


def read_config(path: Traversable) -> ConfigFile:
    """Read a configuration file.

    Raises:
        UserError: it is missing, no YAML, or not made of sections; a setting stands there twice, or has a value that means something
            else than it seems to: a merge key, a variable of the shell, nothing.
    """
    try:
        # BaseLoader keeps every scalar a string, so that `lr: 3e-4` stays a number and `name: no` a name.
        text = path.read_text()
        lines: dict[str, int] = {}
        _check(yaml.compose(text, Loader=yaml.BaseLoader), str(path), "", lines)
        tree = yaml.load(text, Loader=yaml.BaseLoader) or {}
    except FileNotFoundError:
        missing = Path(str(path))
        here = [p.name for p in sorted(missing.parent.glob("*.yaml"))] if missing.parent.is_dir() else []
        there = f" '{missing.parent}' holds {', '.join(here)}." if here else ""
        if missing.stem in packaged():
            there = f" A packaged configuration has this name: give '{missing.stem}'."
        raise UserError(f"There is no configuration file '{path}'.{there}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"'{path}' cannot be read as a configuration file: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        raise UserError(f"'{path}'{line} is not valid YAML: {problem}.") from error
    if not isinstance(tree, dict):
        raise UserError(f"'{path}' must hold sections such as 'train:', but holds one value: {tree!r}")
    return ConfigFile(tree, lines)


def _check(node: yaml.Node | None, path: str, prefix: str, lines: dict[str, int]) -> None:
    """Raise UserError where a section, or a setting in either of its spellings, is written twice: the parser would take the last.

    Args:
        node: what stands in section `prefix` of the file `path`.
        lines: where each name was met first, to which this adds.
    """
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if not isinstance(key, yaml.ScalarNode):
            continue
        name, line, is_section = (
            f"{prefix}{key.value}",
            key.start_mark.line + 1,
            isinstance(value, yaml.MappingNode),
        )
        if key.value == "<<":
            raise UserError(
                f"'{path}', line {line}: '<<' would take in the settings of another section, which is not done here: write them out."
            )
        names = {name, PRESET} if name == RECIPE and not is_section else {name}
        if first := min((lines[one] for one in names & lines.keys()), default=0):
            way_out = "put both into one" if is_section else "remove one of the two"
            raise UserError(
                f"'{path}', line {line}: '{name}' stands there again, after line {first}: {way_out}."
            )
        lines |= dict.fromkeys(names, line)
        _check_value(value, f"'{path}', line {line}: {name}")
        _check(value, path, f"{name}.", lines)


def _check_value(node: yaml.Node, where: str) -> None:
    for one in node.value if isinstance(node, yaml.SequenceNode) else (node,):
        if not isinstance(one, yaml.ScalarNode):
            if isinstance(node, yaml.SequenceNode):
                raise UserError(f"{where} is a list, whose values must be words or numbers.")
            continue
        if found := _VARIABLE.search(one.value):
            raise UserError(
                f"{where} is '{one.value}', but a file has no shell that fills in {found[0]}: write it out, or give the setting as a "
                "flag."
            )
        if one.style is None and one.value in ("~", "null", "Null", "NULL"):
            raise UserError(
                f"{where} is {one.value}, which is YAML's word for nothing: leave the setting out, or write its value."
            )
