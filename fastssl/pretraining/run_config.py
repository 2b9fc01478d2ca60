"""A run's configuration: frozen sections, read from YAML and flags by one parser.

`load_config` is for Python: it takes a file, a configuration or nothing, overrides in a mapping, and raises UserError. `load` is for
commands: it takes a file and flags, and prints `--help` and what tyro says of a wrong value, then exits.

YAML is just flags: the file is flattened to `--section.key value` and parsed by tyro, then the user's own flags are parsed with that
result as their default. So a value means the same in both places, and there is one kind of error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import math
import os
import re
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from fastssl.core.config_tree import leaves, plain, to_yaml
from fastssl.core.former_names import present_names
from fastssl.core.loggers import LogConfig
from fastssl.core.optimizers import OptimConfig
from fastssl.evaluation.knn import KNNConfig
from fastssl.methods import METHODS, Method, MoCoV3, get_method
from fastssl.methods.method_defaults import family_of
from fastssl.models.model_config import ModelConfig
from fastssl.pretraining.config_file import PRESET, RECIPE, ConfigFile, read_config
from fastssl.pretraining.packaged_configs import find_config, is_config
from fastssl.pretraining.train_config import TrainConfig
from pipelines.augment.recipe import RECIPES, Recipe, get_recipe
from pipelines.loading.data_config import DataConfig
from shards.errors import UserError, nearest

# Read before the rest, because they decide which other keys exist and what their defaults are.
METHOD_NAME, BACKBONE = "method.name", "model.backbone"
# `--recipe NAME` and `--method NAME`, and `recipe: NAME` and `method: NAME` in a file, are short for preset and name.
METHOD = "method"


@dataclass(frozen=True)
class RunConfig:
    """All settings of one pretraining run; `config_of` returns the form whose section `method` is that of a method."""

    data: DataConfig = field(default_factory=DataConfig)
    recipe: Recipe = field(default_factory=Recipe)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: Any = field(default_factory=MoCoV3.Config)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    knn: KNNConfig = field(default_factory=KNNConfig)
    log: LogConfig = field(default_factory=LogConfig)


@functools.cache
def config_of(method: type[Method]) -> type[RunConfig]:
    """Return `RunConfig` with the settings of this method in the section `method`."""
    section = (METHOD, method.Config, field(default_factory=method.Config))
    return dataclasses.make_dataclass(
        "RunConfig", [section], bases=(RunConfig,), frozen=True, namespace={"__doc__": RunConfig.__doc__}
    )


def start_of(method: type[Method], backbone: str | None = None, recipe: Recipe | None = None) -> RunConfig:
    """Return a method's default configuration, for a backbone and a recipe where these are named."""
    defaults = method.defaults(family_of(backbone or ModelConfig.backbone))
    return config_of(method)(
        recipe=recipe or get_recipe(defaults.recipe),
        model=ModelConfig(**defaults.model),
        optim=defaults.optim,
    )


@dataclass(frozen=True)
class Resolved:
    """A configuration and the name of its method."""

    config: RunConfig
    method_name: str

    def tree(self) -> dict[str, Any]:
        """Return the whole configuration as plain nested values; `from_tree` reads it, and `load` its YAML."""
        tree = plain(dataclasses.asdict(self.config))
        tree["method"] = {"name": self.method_name, **tree["method"]}
        return tree

    def to_yaml(self) -> str:
        """Return `tree` as YAML."""
        return to_yaml(self.tree())


def load_config(
    config: str | Path | Resolved | None = None, overrides: Mapping[str, Any] | Sequence[str] = ()
) -> Resolved:
    """Return the configuration of a YAML file, with some settings overridden: the way for Python code.

        load_config("configs/moco_v3_vit_small.yaml", {"data.shards": "photo-shards", "train.batch": 256})
        load_config(overrides={"recipe": "satellite", "train.batch": 128})

    Args:
        config: a YAML file, or the name of a packaged one (`fastssl configs`); None for the defaults; or a configuration, to which
            `overrides` are then applied.
        overrides: settings by full name or by section, `recipe` (a preset's name) and `method.name` included; or flags as on the
            command line, such as ["--train.batch", "256"].

    Raises:
        UserError: the file is missing or no YAML, or a setting, method or recipe is unknown (the nearest known name is given), or a
            value is of the wrong type or out of range.
    """
    tokens = list(_flags(dict(leaves(overrides)))) if isinstance(overrides, Mapping) else list(overrides)
    written = io.StringIO()
    try:
        with contextlib.redirect_stderr(written):
            resolved = _override(config, tokens) if isinstance(config, Resolved) else load(config, tokens)
    except SystemExit as stop:
        words = re.sub(r"[\u2500-\u257f]", " ", written.getvalue())
        raise UserError(f"The settings cannot be read: {' '.join(words.split())}") from stop
    sys.stderr.write(written.getvalue())
    return resolved


def _override(resolved: Resolved, tokens: list[str]) -> Resolved:
    """Return a configuration with flags applied. Its method and the values from a recipe's preset stay."""
    for key in (METHOD_NAME, METHOD, PRESET, RECIPE):
        if _take_flag(list(tokens), key) is not None:
            raise UserError(
                f"The setting {key} decides which other settings there are: give it where the configuration is made."
            )
    _check_names(tokens, dict(leaves(plain(dataclasses.asdict(resolved.config)))))
    own = config_of(get_method(resolved.method_name))
    config = own(**{f.name: getattr(resolved.config, f.name) for f in dataclasses.fields(RunConfig)})
    return dataclasses.replace(resolved, config=_parse(config, tokens, prog="overrides"))


def load(path: str | Path | None, overrides: list[str] | None = None) -> Resolved:
    """Read a YAML file or packaged configuration (None: all defaults) and flags that override it, as commands do.

    From Python, call `load_config`.

    Raises:
        UserError: the file is missing or no YAML, or a key, method or recipe is unknown (the nearest known name is given); or the file
            itself sets all that a preset given by flag would change.
        SystemExit: `--help` was given, or a value has the wrong type; tyro has printed the help or the reason.
    """
    file = read_config(find_config(path)) if path is not None else ConfigFile()
    where = f"'{path}'" if path is not None else "the defaults"
    named = dict(leaves(file.tree))
    tokens = list(overrides or [])
    sections = {field.name for field in dataclasses.fields(RunConfig)}
    # A section may be empty: `train:` with nothing below it.
    named = {k: v for k, v in named.items() if v != "" or k not in sections}
    theirs = named.get(METHOD, named.get(METHOD_NAME))
    method_name = _take_flag(tokens, METHOD, METHOD_NAME) or theirs or next(iter(METHODS))
    method = get_method(method_name)
    if theirs and theirs != method_name:
        named = _without_method(named, theirs, method_name, where)
    backbone = _take_flag(list(tokens), BACKBONE) or named.get(BACKBONE)
    in_file, by_flag = named.get(RECIPE, named.get(PRESET)), _take_flag(tokens, RECIPE, PRESET)
    usual = start_of(method, backbone)
    own = get_recipe(in_file) if in_file else usual.recipe
    recipe = _named_recipe(by_flag) if by_flag else own
    for key in (METHOD_NAME, METHOD, PRESET, RECIPE):
        named.pop(key, None)
    named = present_names(named)
    start = dataclasses.replace(usual, recipe=recipe)

    known = dict(leaves(plain(dataclasses.asdict(start)))).keys()
    names = [*known, METHOD_NAME, PRESET]
    for key, value in named.items():
        if key not in known:
            raise UserError(f"{where}{file.line(key)} has an unknown key '{key}'.{_suggest(key, names)}")
        if isinstance(value, list) and not _takes_several(start, key):
            raise UserError(
                f"{where}{file.line(key)}: {key} is one value, but a list of {len(value)} stands there: [{', '.join(value)}]."
            )
    _check_names(tokens, known)
    try:
        base = _parse(start, list(_flags(named)), prog=str(path))
    except UserError as error:
        place = next((file.line(word.strip(":,.")) for word in str(error).split() if file.line(word)), "")
        raise UserError(f"{where}{place}: {error}" if place else str(error)) from error
    changed = [f.name for f in dataclasses.fields(Recipe) if getattr(recipe, f.name) != getattr(own, f.name)]
    if changed and base.recipe != recipe and all(f"{RECIPE}.{name}" in named for name in changed):
        raise UserError(
            f"{where} itself sets all that --{RECIPE} {by_flag} would change ({', '.join(f'{RECIPE}.{name}' for name in changed[:3])}"
            f"{', ...' if len(changed) > 3 else ''}): leave the flag out, or give another configuration."
        )
    return Resolved(_parse(base, tokens, prog="fastssl pretrain"), method_name)


def _without_method(named: dict[str, Any], theirs: str, other: str, where: str) -> dict[str, Any]:
    """Return those settings of a file for the method `theirs` that hold for another one as well, and warn of the rest.

    A file's sections `method` and `optim` are chosen for its method, and so is a preset that is named after it (moco_v3_resnet).
    """
    preset = named.get(RECIPE, named.get(PRESET, ""))
    names = {METHOD, METHOD_NAME, *((RECIPE, PRESET) if preset.startswith(theirs) else ())}
    left = [key for key in named if key in names or key.split(".")[0] in (METHOD, "optim")]
    what = [
        f"section {section}"
        for section in dict.fromkeys(key.split(".")[0] for key in left if key not in names)
    ]
    if names & {RECIPE, PRESET}:
        what.insert(0, f"recipe {preset}")
    if what:
        warnings.warn(
            f"{where} is made for {theirs}: {other} has its own defaults in place of the file's {', '.join(what)}.",
            stacklevel=3,
        )
    return {key: value for key, value in named.items() if key not in left}


def _named_recipe(name: str) -> Recipe:
    """Return the preset of this name, or the recipe of the configuration of this name or path."""
    return load(name).config.recipe if is_config(name) else get_recipe(name)


def _check_names(tokens: list[str], known: Collection[str]) -> None:
    for token in tokens:
        name = token.split("=", 1)[0].removeprefix("--").replace("-", "_")
        # tyro's own: --help, --tyro-print-completion.
        if token.startswith("--") and name != "help" and not name.startswith("tyro_") and name not in known:
            hint = _suggest(name, [*known, METHOD_NAME, METHOD, PRESET, RECIPE])
            raise UserError(f"There is no setting '{token.split('=', 1)[0]}'.{hint}")


def from_tree(tree: dict[str, Any]) -> Resolved:
    """Return the configuration stored in a checkpoint (`Resolved.tree`)."""
    tree = {section: dict(values) for section, values in tree.items()}
    method_name = tree["method"].pop("name")
    start = start_of(get_method(method_name), tree.get("model", {}).get("backbone"))
    return Resolved(
        _parse(start, list(_flags(present_names(dict(leaves(tree))))), prog="checkpoint"), method_name
    )


def _parse(default: RunConfig, tokens: list[str], prog: str) -> RunConfig:
    import tyro

    from shards.command_line import parse

    description = (
        f"All settings, with the values of the file. Besides these: --{RECIPE} NAME ({', '.join(RECIPES)}) and "
        f"--{METHOD} NAME ({', '.join(METHODS)}, or my_module:MyMethod)."
    )
    found = parse(
        type(default),
        prog,
        _spell_booleans(tokens, default),
        description=description,
        default=default,
        config=(tyro.conf.FlagConversionOff,),
    )
    for name, value in leaves(dataclasses.asdict(found)):
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, float) and not math.isfinite(one):
                raise UserError(f"{name} is {one}, but it must be a finite number.")
    # A shell expands it in `--train.out ~/run`, and not in `--train.out=~/run` or in a file.
    out = os.path.expanduser(found.train.out)
    return dataclasses.replace(found, train=dataclasses.replace(found.train, out=out))


def _takes_several(config: RunConfig, key: str) -> bool:
    section, name = key.split(".", 1)
    return "tuple" in str(get_type_hints(type(getattr(config, section)))[name])


def _flags(named: dict[str, Any]) -> Iterator[str]:
    for key, value in named.items():
        yield f"--{key}"
        yield from (map(str, value) if isinstance(value, list | tuple) else (str(value),))


def _spell_booleans(tokens: list[str], default: RunConfig) -> list[str]:
    """Spell `true` and `false` as tyro does, where they set a switch; a folder called `true` keeps its name."""
    switches = {f"--{key}" for key, value in leaves(dataclasses.asdict(default)) if isinstance(value, bool)}
    spelled, before = [], ""
    for token in tokens:
        name, equals, value = token.partition("=")
        flag = "--" + name.removeprefix("--").replace("-", "_")
        if value.lower() in ("true", "false") and flag in switches:
            token = name + equals + value.capitalize()
        elif token.lower() in ("true", "false") and before in switches:
            token = token.capitalize()
        spelled.append(token)
        before = flag
    return spelled


def _take_flag(tokens: list[str], *names: str) -> str | None:
    """Remove each `--name value` and `--name=value` of these names from the tokens and return the last value."""
    value, kept, waiting = None, [], iter(tokens)
    for token in waiting:
        flag, equals, given = token.partition("=")
        if not flag.startswith("--") or flag[2:] not in names:
            kept.append(token)
            continue
        value = given if equals else next(waiting, None)
        if value is None:
            raise UserError(f"{flag} needs a value.")
    tokens[:] = kept
    return value


def _suggest(key: str, known: Any) -> str:
    """Return a hint: the nearest full key, or the only key with this last part, where the section was forgotten."""
    last = [k for k in known if k.split(".")[-1] == key.split(".")[-1]]
    if len(last) == 1:
        return f" Did you mean '{last[0]}'?"
    hint = nearest(key, known)
    # A sentence with sixty names would not help.
    return hint if "Did you mean" in hint else " `fastssl pretrain CONFIG --settings` lists them all."
