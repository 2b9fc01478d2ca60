"""Files in a run's folder that are somebody's own: a run neither replaces nor empties what no run wrote."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fastssl.core.config_tree import leaves, to_yaml
from shards.errors import UserError
from shards.storage.atomic_files import atomic_write

CONFIG, LOG = "config.yaml", "metrics.jsonl"
# A run writes all of its settings, which nobody does by hand; an older version may have had a few less.
_SHARE = 0.8
# How each row of the log begins.
_ROW = '{"step":'


def check_files(run: Path, config: Mapping[str, Any]) -> None:
    """Raise UserError where a run that begins in this folder would replace a file that no run wrote.

    `config`: its configuration as nested values, section by section.
    """
    settings, log = run / CONFIG, run / LOG
    for path, is_own in ((settings, is_own_config(settings, config)), (log, _is_own_log(log))):
        if path.exists() and not is_own:
            raise UserError(
                f"'{path}' was not written by a run, and this one would replace it: choose another --train.out, such as "
                f"'{run / 'run'}'."
            )


def is_own_config(path: Path, config: Mapping[str, Any]) -> bool:
    """Return whether a run of this kind of configuration wrote a file: it has nearly all settings and, unlike one that somebody works
    on, no comment."""
    try:
        text = path.read_text()
        tree = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False
    commented = any(line.lstrip().startswith("#") or " #" in line for line in text.splitlines())
    if not isinstance(tree, dict) or commented:
        return False
    wanted = {name for name, _ in leaves(config)}
    return len(wanted & {name for name, _ in leaves(tree)}) >= _SHARE * len(wanted)


def write_config(path: Path, config: Mapping[str, Any]) -> None:
    """Write a run's configuration, nested values, as YAML; one that somebody has edited since stays, with a warning."""
    if path.exists() and not is_own_config(path, config):
        warnings.warn(
            f"'{path}' is not as the run wrote it, and stays as it is: the settings in use are in the checkpoints.",
            stacklevel=2,
        )
        return
    atomic_write(path, to_yaml(config).encode())


def keep_dead_log(run: Path) -> None:
    """Rename the log of a run that left no checkpoint, so that a new start does not empty it: metrics.jsonl.1, .2, ..."""
    path = run / LOG
    if not path.exists() or not path.stat().st_size:
        return
    number = next(n for n in range(1, 10**6) if not path.with_name(f"{LOG}.{n}").exists())
    path.rename(path.with_name(f"{LOG}.{number}"))


def _is_own_log(path: Path) -> bool:
    """Return whether the file begins with a row of metrics, or with as much of one as a crash has left."""
    try:
        with open(path, encoding="utf-8") as file:
            begin = file.read(len(_ROW)).strip("\0 \n")
    except (OSError, UnicodeDecodeError):
        return False
    return _ROW.startswith(begin)
