"""Named splits of a shard folder, in `splits.parquet` beside the manifest: written whole or not at all, read as sets of sample ids.

One row a sample. The column `NAME` says which split of the division NAME the sample belongs to (null: none); `NAME_labelled` is the
least label fraction that holds it, so that smaller fractions lie inside larger ones.
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shlex
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shards.dataset.mixed_set import MixedShardSet
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError, nearest
from shards.format import layout
from shards.format.columns import read_columns
from shards.format.layout import Manifest
from shards.format.sealed_parquet import check_seal, sealed
from shards.splits.split_rules import NO_GROUPS, Division, SplitRule, apply, fraction_name
from shards.storage.cache_settings import CacheSettings
from shards.storage.opening import Where, open_place
from shards.storage.place import Place

DEFAULT = "default"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_LABELLED = "_labelled"
_ABOUT = b"splits"
WAY_OUT = "Delete it and run `fastssl split` again: the same flags make the same split."


def split(folder: Where, rule: SplitRule, name: str = DEFAULT, *, overwrite: bool = False) -> Division:
    """Divide a finished shard folder and note the division in `splits.parquet` under `name`; other names stay as they are.

    The same rule on the same folder writes the same bytes. `open_split(folder, "train")` then reads a part. Raise UserError where the
    name stands for another division, unless `overwrite`.
    """
    place = open_place(folder)
    if not _NAME.fullmatch(name) or name.endswith(_LABELLED) or name == "sample_id":
        raise UserError(
            f"--name '{name}' cannot name a split: use letters, digits, - _ and ., but not sample_id or an ending {_LABELLED}."
        )
    manifest = Manifest.load(place)
    if not place.exists(layout.TABLE):
        raise UserError(
            f"'{place / layout.TABLE}' is missing; run the same `fastssl shard` command again to mend it."
        )
    _about(place, manifest)  # a damaged or foreign file is told before the work
    made = apply(place, rule)
    with place.lock(f"{layout.LOCK}-splits"):
        about = _about(place, manifest)
        columns = {} if about is None else _columns(place)
        before = {key: columns.pop(key) for key in (name, name + _LABELLED) if key in columns}
        columns |= _as_columns(made, rule, name)
        same = before.keys() == {key for key in (name, name + _LABELLED) if key in columns} and all(
            before[key].equals(columns[key]) for key in before
        )
        if before and not same and not overwrite:
            was = (about or {}).get(name, {}).get("rule", {})
            how = f"made differently{_difference(was, rule)}"
            divided = len(before.get(name, ()))
            if divided < manifest.num_samples:
                how = f"of the first {divided:,} of its {manifest.num_samples:,} samples; the others were appended and are in no split"
            raise UserError(
                f"'{place.url}' has a split '{name}' already, {how}: give another --name, or --overwrite."
            )
        entry = {
            "rule": dataclasses.asdict(rule),
            "splits": list(made.names),
            "options_sha256": manifest.options_sha256,
        }
        _write(place, columns, (about or {}) | {name: entry})
    return made


def _difference(was: dict[str, Any], rule: SplitRule) -> str:
    now = json.loads(json.dumps(dataclasses.asdict(rule)))
    for key, value in now.items():
        if key in was and was[key] != value:
            return f" ({key.replace('_', ' ')} was {was[key]!r}, now {value!r})"
    return ""


def _as_columns(made: Division, rule: SplitRule, name: str) -> dict[str, pa.Array]:
    sides = pa.DictionaryArray.from_arrays(
        pa.array(made.sides, mask=made.sides < 0), pa.array(made.names, pa.string())
    )
    columns: dict[str, pa.Array] = {name: sides}
    if rule.labelled:
        columns[name + _LABELLED] = pa.array(made.fractions, mask=np.isnan(made.fractions))
    return columns


def _write(place: Place, columns: dict[str, Any], about: dict[str, Any]) -> None:
    num_samples = max(map(len, columns.values()))
    # Samples that were appended after a split was made are in none of its parts.
    ordered = {
        key: pa.concat_arrays([column, pa.nulls(num_samples - len(column), column.type)])
        for key, column in sorted(columns.items())
    }
    table = pa.table({"sample_id": pa.array(np.arange(num_samples)), **ordered})
    table = table.replace_schema_metadata({_ABOUT: json.dumps(about, sort_keys=True)})
    place.write(layout.SPLITS, sealed(table))


def _columns(place: Place) -> dict[str, pa.Array]:
    with place.open(layout.SPLITS) as file:
        table = read_columns(file)
    return {
        name: table[name].unify_dictionaries().combine_chunks()
        for name in table.column_names
        if name != "sample_id"
    }


def _about(place: Place, manifest: Manifest) -> dict[str, Any] | None:
    """What the file says of its splits, by name; None where there is no file.

    Raise UserError where it is damaged or of other shards.
    """
    try:
        return _told(place, manifest)
    except FileNotFoundError:
        return None
    except UserError as error:
        raise UserError(f"'{place / layout.SPLITS}' {error}. {WAY_OUT}") from error


def _told(place: Place, manifest: Manifest | None) -> dict[str, Any]:
    data = place.read(layout.SPLITS)
    check_seal(data)
    with pq.ParquetFile(io.BytesIO(data)) as parquet:
        num_samples = parquet.metadata.num_rows
        about = json.loads(parquet.schema_arrow.metadata[_ABOUT])
    if manifest is None:
        return about
    # A folder may have grown since: the samples that came later are in no split.
    known = [manifest.num_samples_at(entry["options_sha256"]) or 0 for entry in about.values()]
    if 0 in known or num_samples != max(known):
        raise UserError(
            f"divides {num_samples:,} samples of another conversion, '{place.url}' has {manifest.num_samples:,}"
        )
    return about


def splits_fault(place: Place, manifest: Manifest | None) -> str:
    """What is wrong with the file of splits, in a clause; empty where nothing is, and where there is no such file."""
    try:
        _told(place, manifest)
    except FileNotFoundError:
        pass
    except UserError as error:
        return str(error)
    return ""


def subsets(place: Place, manifest: Manifest) -> dict[str, tuple[str, str | float]]:
    """The subsets there are, by what they are called: (division, name of the split or label fraction). `train` is of `default`, others
    are called `NAME/train`."""
    known: dict[str, tuple[str, str | float]] = {}
    for name, entry in (_about(place, manifest) or {}).items():
        prefix = "" if name == DEFAULT else f"{name}/"
        known |= {prefix + split: (name, split) for split in entry["splits"]}
        known |= {prefix + fraction_name(share): (name, share) for share in entry["rule"]["labelled"]}
    return known


def group_rules(place: Place, manifest: Manifest) -> list[str]:
    """Return the rules (`--group-by`) that the splits of a folder were made with and that hold groups together, without repeats."""
    rules = [entry["rule"].get("group_by", "") for entry in (_about(place, manifest) or {}).values()]
    return [rule for rule in dict.fromkeys(rules) if rule not in ("", NO_GROUPS)]


def open_split(folder: Where, split: str = "", cache: CacheSettings | None = None) -> ShardSet:
    """Open a shard folder, all of it or the samples of one split: `val`, `labelled-0.01`, or `NAME/val` for a split of another name.

    Sample ids stay those of the folder. Raise UserError as `ShardSet.open` does, where there is no such split, and where it is empty.
    """
    shards = ShardSet.open(folder, cache)
    if not split:
        return shards
    place = open_place(folder)
    known = subsets(place, shards.manifest)
    if not known:
        raise UserError(
            f"'{place.url}' has no splits: `fastssl split {shlex.quote(place.url)} --val 0.1` makes some."
        )
    wanted = split.removeprefix(f"{DEFAULT}/")
    if wanted not in known:
        raise UserError(f"'{place.url}' has no split called '{split}'.{nearest(wanted, known)}")
    name, which = known[wanted]
    column = name if isinstance(which, str) else name + _LABELLED
    with place.open(layout.SPLITS) as file:
        values = read_columns(file, [column])[column]
    if isinstance(which, str):
        same = pc.equal(values.cast(pa.string()), which)  # pyright: ignore[reportAttributeAccessIssue] (made at run time)
        inside = same.fill_null(False).to_numpy()
    else:
        inside = values.fill_null(np.inf).to_numpy() <= which
    ids = np.flatnonzero(inside)
    if not len(ids):
        raise UserError(f"The split '{split}' of '{place.url}' is empty.")
    return shards.subset(ids, split)


def reopen(shards: ShardSet, split: str) -> ShardSet:
    """Another split of the same folder, or of each folder of a mix. Raise UserError as `open_split` does."""
    if isinstance(shards, MixedShardSet):
        return MixedShardSet([reopen(part, split) for part in shards.parts], shards.weights)
    return open_split(shards.folder, split, shards.near and shards.near.settings)


def open_mix(
    folders: Sequence[Where | ShardSet],
    split: str = "",
    weights: Sequence[float] = (),
    cache: CacheSettings | None = None,
) -> ShardSet:
    """Open several shard folders as one set, all of each or its samples of one split; a single folder as `open_split` does.

    `weights`: how much of an epoch each set gives, see `MixedShardSet`; nothing for each sample once. Raise UserError as `open_split`
    does, for sets that do not go together, and for weights that are not one number above 0 for each.
    """
    sets = [
        f if isinstance(f, ShardSet) and not split else open_split(_where(f), split, cache) for f in folders
    ]
    return sets[0] if len(sets) == 1 and not weights else MixedShardSet(sets, weights)


def _where(folder: Where | ShardSet) -> Where:
    return folder.folder if isinstance(folder, ShardSet) else folder
