"""How a split is asked for, and what it says about a shard folder's samples."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from shards.errors import UserError, nearest
from shards.format import layout
from shards.format.columns import hash_values
from shards.format.equal_hashes import first_of_equal
from shards.format.label_table import read_labels
from shards.format.layout import Manifest
from shards.format.sample_table import given_columns, table_batches
from shards.splits import assignment
from shards.splits.assignment import NONE, SIDES, Hashes, Ids
from shards.splits.split_lists import read_lists, sides_of_lists
from shards.storage.place import Place
from shards.units import plural

NO_GROUPS = "none"
MAX_STRATA = 100_000
_GROUP = np.uint64(0x67726F7570)  # keeps a group's name apart from a sample's of the same letters
_SHOWN = 3
_MANY = 128  # more than there are sides


@dataclass(frozen=True)
class SplitRule:
    """What decides a split; with the samples' names, groups and pixels it is all that does."""

    val: float = 0.0
    test: float = 0.0
    labelled: tuple[float, ...] = ()  # of train's labelled samples, ascending
    group_by: str = ""  # a column, a regular expression on the name, "none", or "" for the column `group` where it has values
    stratify: str = ""  # a column, or ""
    exact: bool = True
    seed: int = 0
    lists: tuple[
        str, ...
    ] = ()  # files of names; then `val`, `test` and the rules of groups have no part in it

    def __post_init__(self) -> None:
        for name, share in (("val", self.val), ("test", self.test)):
            if not 0 <= share < 1:
                raise UserError(f"--{name} is {share:g}, but it must be a share from 0 up to, but not, 1.")
        if self.val + self.test >= 1:
            raise UserError(
                f"--val {self.val:g} and --test {self.test:g} sum to {self.val + self.test:g}, which leaves no train: they must "
                "sum to less than 1."
            )
        if list(self.labelled) != sorted(set(self.labelled)):
            raise UserError("--labelled: give each fraction once, in ascending order.")
        for share in self.labelled:
            if not 0 < share <= 1:
                raise UserError(f"--labelled has {share:g}, but a fraction lies above 0 and up to 1.")
        if self.lists and (self.val or self.test or self.group_by or self.stratify):
            raise UserError(
                "--by-list says where each image goes: leave out --val, --test, --group-by and --stratify."
            )
        if not (self.lists or self.val or self.test or self.labelled):
            raise UserError("Nothing to split: give --val, --test, --labelled or --by-list.")
        if self.stratify and not self.exact:
            raise UserError("--stratify needs --method exact: with 'stable' each name alone decides.")


@dataclass(frozen=True)
class Division:
    """A split of N samples. `names`: its splits; `sides` (N,) int8, indices into them, NONE for samples in none of them; `fractions`
    (N,): the least label fraction that holds the sample, nan where none does; `groups` (N,): samples with the same number hang
    together; `notes`: what the user should know, a sentence each."""

    names: tuple[str, ...]
    sides: npt.NDArray[np.int8]
    fractions: npt.NDArray[np.float64]
    groups: Ids
    labels: Ids
    notes: list[str] = field(default_factory=list)


def apply(place: Place, rule: SplitRule) -> Division:
    """The split that a rule makes of a finished shard folder. Raise UserError for what the user can mend."""
    names, groups, pixels, labels = [], [], [], []
    group_of = _grouping(place, rule)
    columns = ["source", "label", "pixels_hash", *([group_of.column] if group_of.column else [])]
    for batch in read_batches(place, columns):
        own = hash_values(batch["source"])
        names.append(own)
        groups.append(group_of(batch, own))
        pixels.append(batch["pixels_hash"])
        labels.append(batch["label"].fill_null(-1).to_numpy().astype(np.int64))
    group_of.check()
    own, label = np.concatenate(names), np.concatenate(labels)
    least, group = assignment.join(np.concatenate(groups), first_of_equal(pixels))
    del names, groups, pixels, labels
    notes = [group_of.note] if group_of.note else []
    if rule.lists:
        lists = read_lists(rule.lists)
        sides, more = sides_of_lists(lists, lambda: read_batches(place, ["source"]), len(own))
        splits = tuple(lists)
        notes += more + _torn(sides, group)
    else:
        strata = _strata(place, rule, least, group)
        sizes = np.bincount(group, minlength=len(least))
        shares = {"val": rule.val, "test": rule.test}
        sides = assignment.divide(least, sizes, strata, seed=rule.seed, exact=rule.exact, **shares)[group]
        splits = SIDES
        _check_none_is_empty(rule, sides, strata)
    fractions = np.full(len(own), np.nan)
    if rule.labelled:
        inside = np.flatnonzero((sides == _train(splits)) & (label >= 0))
        fractions[inside] = assignment.label_fractions(own[inside], label[inside], rule.labelled, rule.seed)
        notes += _about_labels(place, rule, splits, sides, label, fractions)
    notes += _without_classes(place, rule, splits, sides, label)
    return Division(splits, sides, fractions, group, label, notes)


def group_names(place: Place, group_by: str = "") -> tuple[Hashes, npt.NDArray[np.bool_]]:
    """Return the hash of the name of each sample's group, (N,), and whether it has a group, (N,); see `SplitRule.group_by`."""
    group_of = _grouping(place, SplitRule(val=0.5, group_by=group_by))
    groups, known = [], []
    for batch in read_batches(place, ["source", *([group_of.column] if group_of.column else [])]):
        own = hash_values(batch["source"])
        groups.append(group_of(batch, own))
        known.append(groups[-1] != own)
    return np.concatenate(groups), np.concatenate(known)


def read_batches(place: Place, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Columns of the sample table, piece by piece; `label` with the labels that were given later."""
    manifest = Manifest.load(place)
    batches = table_batches(place, manifest, columns)
    return read_labels(place, manifest).on(batches) if "label" in columns else batches


def _strata(place: Place, rule: SplitRule, least: Hashes, group: Ids) -> Ids:
    """The stratum of each group, (G,)."""
    strata = np.zeros(len(least), np.int64)
    if rule.stratify:
        column = _column(place, rule.stratify, "--stratify")
        values = [hash_values(_text(batch[column])) for batch in read_batches(place, [column])]
        known, of_sample = np.unique(np.concatenate(values), return_inverse=True)
        if len(known) > MAX_STRATA:
            raise UserError(
                f"--stratify {rule.stratify}: the column has {len(known):,} values, more than {MAX_STRATA:,}; choose another."
            )
        strata = assignment.strata_of_groups(group, of_sample, len(least))
    return strata


def _without_classes(
    place: Place, rule: SplitRule, splits: tuple[str, ...], sides: npt.NDArray[np.int8], labels: Ids
) -> list[str]:
    """A sentence for each part that has no image of some class: its figures are those of the other classes."""
    if not (rule.lists or rule.val or rule.test) or not (labels >= 0).any():
        return []
    classes = read_labels(place, Manifest.load(place)).classes
    known = np.bincount(labels[labels >= 0], minlength=len(classes)) > 0
    notes = []
    for number, name in enumerate(splits):
        inside = labels[(sides == number) & (labels >= 0)]
        lacking = np.flatnonzero(known & (np.bincount(inside, minlength=len(classes)) == 0))
        if len(lacking) and (sides == number).any():
            shown = ", ".join(classes[i] for i in lacking[:_SHOWN]) + (
                " ..." if len(lacking) > _SHOWN else ""
            )
            notes.append(
                f"{name} has no image of {len(lacking):,} of {plural(int(known.sum()), 'class', 'classes')}: {shown}."
            )
    return notes


def _check_none_is_empty(rule: SplitRule, sides: npt.NDArray[np.int8], strata: Ids) -> None:
    num_groups = len(strata)
    for side, share in enumerate((1.0, rule.val, rule.test)):
        if share and not (sides == side).any():
            if rule.stratify and num_groups and np.bincount(strata).max() == 1:
                raise UserError(
                    f"{SIDES[side]} would be empty: each value of --stratify {rule.stratify} has one image, or one group of images "
                    "that stay together, and one of each value stays in train. Leave --stratify out, or choose a column of fewer "
                    "values."
                )
            raise UserError(
                f"{SIDES[side]} would be empty: {len(sides):,} images in {num_groups:,} groups that stay together do not "
                f"give a share of {share:g}. Give a larger one, or finer groups (--group-by)."
            )


def _train(names: tuple[str, ...]) -> int:
    """The split that label fractions are taken of."""
    if "train" not in names:
        raise UserError(
            f"--labelled takes its samples from train, and the lists are named {', '.join(names)}: name one 'train' (train=FILE)."
        )
    return names.index("train")


def _torn(sides: npt.NDArray[np.int8], group: Ids) -> list[str]:
    placed = sides != NONE
    pairs = np.unique(group[placed] * _MANY + sides[placed])
    split = np.unique(pairs // _MANY, return_counts=True)[1] > 1
    if not split.any():
        return []
    return [
        f"The lists put images of {plural(int(split.sum()), 'group')} (the same pixels, or the same group) into different splits."
    ]


def _about_labels(
    place: Place,
    rule: SplitRule,
    splits: tuple[str, ...],
    sides: npt.NDArray[np.int8],
    labels: Ids,
    fractions: npt.NDArray[np.float64],
) -> list[str]:
    inside = (sides == _train(splits)) & (labels >= 0)
    total = int(inside.sum())
    classes = read_labels(place, Manifest.load(place)).classes
    if not total:
        raise UserError(f"--labelled: none of the images in train of '{place.url}' has a label.")
    notes = []
    without = np.flatnonzero(np.bincount(labels[inside], minlength=len(classes)) == 0)
    if len(without):
        shown = ", ".join(classes[i] for i in without[:_SHOWN]) + (" ..." if len(without) > _SHOWN else "")
        notes.append(
            f"{len(without):,} of {len(classes):,} classes have no labelled image in train, so no label fraction has one: {shown}."
        )
    for share in rule.labelled:
        num = int((fractions <= share).sum())
        if abs(num - share * total) >= 1:
            notes.append(
                f"{fraction_name(share)} has {num:,} of {total:,} labelled images, {num / total:.2%}: at least one of each class."
            )
    return notes


def fraction_name(share: float) -> str:
    """What the subset of a label fraction is called: labelled-0.01."""
    return f"labelled-{share:g}"


class _Grouping:
    """The name hashes that hold groups together: (batch, hashes of the samples' names) -> hashes."""

    column = ""
    note = ""

    def __call__(self, batch: pa.RecordBatch, own: Hashes) -> Hashes:
        return own

    def check(self) -> None:
        """After the last batch: UserError where the rule did not fit."""


class _ByColumn(_Grouping):
    def __init__(self, column: str, note: str = ""):
        self.column, self.note = column, note

    def __call__(self, batch: pa.RecordBatch, own: Hashes) -> Hashes:
        return _groups_or_alone(_text(batch[self.column]), own)


class _ByPattern(_Grouping):
    def __init__(self, pattern: re.Pattern[str]):
        self._pattern = pattern
        self._missed: list[str] = []
        self._num_missed = 0

    def __call__(self, batch: pa.RecordBatch, own: Hashes) -> Hashes:
        keys: list[str | None] = []
        for name in batch["source"].to_pylist():
            found = self._pattern.search(name)
            parts = found.groups() if found else ()
            keys.append(
                "\0".join(part or "" for part in parts) if any(p is not None for p in parts) else None
            )
            if found is None:
                self._num_missed += 1
                if len(self._missed) < _SHOWN:
                    self._missed.append(name)
        return _groups_or_alone(pa.array(keys, pa.string()), own)

    def check(self) -> None:
        if self._num_missed:
            shown = ", ".join(f"'{name}'" for name in self._missed)
            pattern = self._pattern.pattern
            raise UserError(
                f"--group-by '{pattern}' does not match {self._num_missed:,} of the names, such as {shown}. Mend it; or leave it out, "
                "where the shards have a column 'group' (tiles have that of their scene); or let each of these be a group of its own, "
                f"which may tear scenes apart: '{pattern}|$'."
            )


def _grouping(place: Place, rule: SplitRule) -> _Grouping:
    if rule.lists or not rule.group_by:
        if any(batch["group"].null_count < batch.num_rows for batch in read_batches(place, ["group"])):
            note = "Groups are those of the column 'group' (--group-by none turns that off)."
            return _ByColumn("group", "" if rule.lists else note)
        return _Grouping()
    if rule.group_by == NO_GROUPS:
        return _Grouping()
    with place.open(layout.TABLE) as file:
        names = pq.read_schema(file).names
    known = {**given_columns(place, Manifest.load(place)), **{name: name for name in names}}
    if rule.group_by in known or not set(rule.group_by) & set("([\\^$.*+?|"):
        return _ByColumn(_column(place, rule.group_by, "--group-by"))
    try:
        pattern = re.compile(rule.group_by)
    except re.error as error:
        raise UserError(
            f"--group-by '{rule.group_by}' is no column and no regular expression ({error})."
        ) from None
    if not pattern.groups:
        raise UserError(
            f"--group-by '{rule.group_by}' has no group: put the part of the name that a scene's images share in brackets, such as "
            r"'^(.+)_r\d+_c\d+'."
        )
    return _ByPattern(pattern)


def _column(place: Place, column: str, flag: str) -> str:
    """The column of the sample table that a user means: by its name there, or in the list that the images came from."""
    with place.open(layout.TABLE) as file:
        schema = pq.read_schema(file)
    usable = [field.name for field in schema if not pa.types.is_nested(field.type)]
    if column not in schema.names:
        column = given_columns(place, Manifest.load(place)).get(column, column)
    if column not in usable:
        hint = nearest(column, usable)
        more = "" if hint.startswith(" Known") else f" Columns: {', '.join(usable)}."
        brackets = " A regular expression needs round brackets." if flag == "--group-by" else ""
        raise UserError(
            f"{flag} '{column}': the sample table has no such column.{hint.replace('Known', 'Columns')}{more}{brackets}"
        )
    return column


def _groups_or_alone(groups: pa.Array, own: Hashes) -> Hashes:
    alone = np.asarray(groups.is_null())
    return np.where(alone, own, hash_values(groups) ^ _GROUP)


def _text(column: pa.Array) -> pa.Array:
    """A column's values as text, so that every batch hashes them alike."""
    return column.cast(pa.string())
