"""Give labels to finished shards from a table: `labels.parquet` beside them, the tars and the sample table stay as they are."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute

from shards.conversion.listing import MAX_CLASSES, class_order
from shards.errors import UserError, did_you_mean
from shards.format import layout
from shards.format.label_table import LabelTable, read_labels, write_labels
from shards.format.layout import Manifest
from shards.format.sample_table import table_batches
from shards.sources.file_list import USUAL, choose
from shards.sources.file_set import names_file, split_url
from shards.sources.table_reader import TABLE_SUFFIXES, ListFile, class_text, has_point, open_list
from shards.storage.opening import Where, open_place
from shards.units import plural

SHOWN = 3  # names of each kind
_KEY_DIGITS = len(layout.sample_key(0))
_pc = pyarrow.compute
Names = Callable[[], Iterator[pa.Array]]


@dataclass(frozen=True)
class Labelling:
    """What a table of labels did to a shard folder.

    labelled: samples that it gave a label; changed: those of them that had another one, or none, before; new_classes: names that no
    sample had before; empty: rows without a label; repeated: rows that say again what an earlier row says; unknown: names that are
    no sample's; without: samples that have no label now. Of the last two there are the first few names, too.
    """

    labelled: int
    changed: int
    new_classes: list[str]
    empty: int
    repeated: int
    unknown: int
    unknown_names: list[str]
    without: int
    without_names: list[str]


def label(
    folder: Where,
    table: str | os.PathLike,
    *,
    key_column: str = "",
    source_column: str = "",
    label_column: str = "",
    dry_run: bool = False,
) -> Labelling:
    """Label the samples of a finished shard folder from a table (.csv, .tsv, .parquet), one row a sample; return what that did.

    A row names its sample by the key or by the source, as `samples.parquet` has them; the file name alone will do for a source where
    only one has it. Where a table has both, the key counts, and the source must not be another sample's. Samples that the table does
    not name keep the label that they have. Labels are class names: known ones keep their number, new ones follow.

    Args:
        key_column, source_column: the column that names the samples; without either a column `key`, `source`, or one that usually
            holds paths.
        label_column: the column of the class names; empty: a usual one, such as `label`.
        dry_run: write nothing.

    Raises:
        UserError: a sample is given two different labels, no row names a sample, a name means several samples, a row's key and
            source mean two, the columns are not there, or the folder or an append to it is unfinished or cannot be written.
    """
    place = open_place(folder)
    if not dry_run:
        place.check_writable("label the shards where they lie on a disk or in a store")
    Manifest.load(place)  # in a mistyped folder no lock is made
    with contextlib.nullcontext() if dry_run else place.lock(layout.LOCK):
        manifest = Manifest.load(place)
        if layout.is_appending(place, manifest):
            # Its plan has numbered its classes already: a class that came now would get the number of another.
            raise UserError(
                f"An append to '{place.url}' is unfinished: run its `fastssl shard ... --append` again to finish it, or delete "
                f"'{place / layout.plan_name(len(manifest.identities))}' to give it up, then label."
            )
        before = read_labels(place, manifest)
        rows = _read(os.fspath(table), key_column, source_column, label_column)
        if len(set(rows.labels)) > MAX_CLASSES:
            raise UserError(
                f"'{rows.where}' has more than {MAX_CLASSES:,} different labels: choose another --label-column."
            )

        def names_in(column: str) -> Names:
            return lambda: (batch[column] for batch in table_batches(place, manifest, [column]))

        names = names_in("key" if rows.by_key else "source")
        which, found = _match(names, rows, manifest.num_samples)
        _check_seconds(names_in("key"), names_in("source"), rows, which)
        new = class_order({rows.labels[i] for i in np.flatnonzero(found)} - set(before.classes))
        classes = [*before.classes, *new]
        number = {name: index for index, name in enumerate(classes)}
        ids = np.array([number.get(name, -1) for name in rows.labels], np.int64)
        own = [batch["label"].fill_null(-1).to_numpy() for batch in table_batches(place, manifest, ["label"])]
        had = before.over(np.concatenate(own))
        given = which >= 0
        labels = np.where(given, ids[which], had)
        if not dry_run:
            write_labels(place, manifest, LabelTable(classes, labels))
        missing = np.flatnonzero(labels < 0)
        unknown = np.flatnonzero(~found)
        return Labelling(
            labelled=int(given.sum()),
            changed=int((given & (labels != had)).sum()),
            new_classes=new,
            empty=rows.empty,
            repeated=rows.repeated,
            unknown=len(unknown),
            unknown_names=[rows.names[i] for i in unknown[:SHOWN]],
            without=len(missing),
            without_names=_at(names, missing[:SHOWN]),
        )


@dataclass(frozen=True)
class _Rows:
    """What a table says, each name once: `names` and `labels` go together, `lines` says where."""

    where: str
    row_word: str
    columns: tuple[str, ...]
    """Whose cells name the samples: the one that counts, and, of a table that has both, that of the sources."""
    by_key: bool
    names: list[str]
    labels: list[str]
    lines: list[int]
    seconds: list[tuple[int, str, int]]
    """Sources that stand beside keys, of repeated rows too: which of `names` each belongs to, the source, the line."""
    empty: int
    repeated: int

    def contradiction(self, one: int, other: int) -> UserError:
        """The message about two rows that mean one sample."""
        return UserError(
            f"'{self.where}': '{self.names[other]}' has the label '{self.labels[one]}' in {self.row_word} {self.lines[one]} and "
            f"'{self.labels[other]}' in {self.row_word} {self.lines[other]}: remove one of the two. Nothing was changed."
        )


def _read(where: str, key_column: str, source_column: str, label_column: str) -> _Rows:
    if not names_file(where, TABLE_SUFFIXES):
        raise UserError(
            f"'{where}' is no table of labels: a file that ends in {', '.join(TABLE_SUFFIXES)} is wanted."
        )
    folder, name = split_url(where)
    place = open_place(folder)
    if not place.exists(name):
        raise UserError(f"There is no file '{where}'.")
    listed = open_list(place, name, where)
    by_key, *columns = _id_columns(listed, key_column, source_column)
    names_in = columns[0]
    labels_in = choose(listed, "label", label_column)
    if labels_in is None or labels_in in columns:
        raise UserError(
            f"'{where}' has no column named {', '.join(USUAL['label'][:4])} or the like; give --label-column NAME. It has: "
            f"{', '.join(listed.columns)}."
        )
    seen: dict[str, int] = {}
    # Numbers with a point are read as numbers: 1.0 is the class 1. Others stay as they are written: 007.
    [kind] = listed.types([labels_in])
    as_text, typed = ([], {labels_in: kind}) if has_point(kind) else ([labels_in], {})
    names, labels, lines, seconds, empty, repeated = [], [], [], [], 0, 0
    rows = _Rows(where, listed.row_word, tuple(columns), by_key, names, labels, lines, seconds, 0, 0)
    for batch in listed.rows([*columns, *as_text], typed):
        given = class_text(batch.columns[labels_in], where, labels_in, listed.row_word, batch.first_lines)
        cells = zip(*(batch.columns[c].to_pylist() for c in columns), given.to_pylist(), strict=True)
        for line, (text, *second, label) in zip(batch.first_lines, cells, strict=True):
            if text is None:
                raise UserError(
                    f"'{where}', {listed.row_word} {line}: the cell of the column '{names_in}' is empty."
                )
            if label is None:
                empty += 1
                continue
            # A program that took the keys for numbers left out their zeros, and may have written 12.0.
            if by_key and (digits := text.removesuffix(".0")).isdecimal():
                text = digits.zfill(_KEY_DIGITS)
            first = seen.setdefault(text, len(names))
            if second and second[0] is not None:
                seconds.append((first, second[0], line))
            if first == len(names) or labels[first] != label:
                names.append(text)
                labels.append(label)
                lines.append(line)
                if first < len(names) - 1:
                    raise rows.contradiction(first, len(names) - 1)
            else:
                repeated += 1
    if not names:
        raise UserError(f"'{where}' gives no labels: {empty:,} rows, all of them without one.")
    return replace(rows, empty=empty, repeated=repeated)


def _id_columns(
    listed: ListFile, key_column: str, source_column: str
) -> tuple[bool, str] | tuple[bool, str, str]:
    """Whether a table names samples by their keys, the column that does, and that of the sources where it has both."""
    if key_column and source_column:
        raise UserError("--key-column and --source-column both say which sample a row means: give one.")
    wanted, flag = (key_column, "--key-column") if key_column else (source_column, "--source-column")
    if wanted:
        if wanted not in listed.columns:
            raise UserError(
                f"'{listed.where}' has no column '{wanted}' ({flag}). It has: {', '.join(listed.columns)}."
                + did_you_mean(wanted, listed.columns)
            )
        return bool(key_column), wanted
    lowered = {name.lower(): name for name in reversed(list(listed.columns))}
    source = next((lowered[usual] for usual in ("source", *USUAL["path"]) if usual in lowered), None)
    if "key" in lowered:
        return (True, lowered["key"], source) if source else (True, lowered["key"])
    if source:
        return False, source
    raise UserError(
        f"'{listed.where}' has no column named key, source, path or the like; give --key-column or --source-column. It has: "
        f"{', '.join(listed.columns)}."
    )


def _match(
    names: Names, rows: _Rows, num_samples: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """For each sample the row that means it, or -1, (num_samples,); and for each row whether it means any, (num_rows,)."""
    which = np.full(num_samples, -1, np.int64)
    wanted = pa.array(rows.names)
    several = np.zeros(len(rows.names), np.int64)
    for ids, at in _found(names(), wanted):
        np.add.at(several, at, 1)
        which[ids] = at
    _check_one(rows, several, "come from different sources: give their keys, as in the column 'key'")
    short = np.flatnonzero(several == 0)
    if len(short) and not rows.by_key:
        last_parts = (_last_part(batch) for batch in names())
        for ids, at in _found(last_parts, wanted.take(pa.array(short))):
            at = short[at]
            np.add.at(several, at, 1)
            for sample, row in zip(ids.tolist(), at.tolist(), strict=True):
                if which[sample] >= 0 and rows.labels[which[sample]] != rows.labels[row]:
                    raise rows.contradiction(int(which[sample]), row)
            which[ids] = at
        _check_one(rows, several, "differ in their folders: give whole names, as in the column 'source'")
    if not several.any():
        column = "key" if rows.by_key else "source"
        example = next(names())[0].as_py()
        raise UserError(
            f"Not one of the {len(rows.names):,} names in '{rows.where}' is a sample's {column}, such as '{rows.names[0]}'; one of "
            f"these is '{example}'. Choose the column with --key-column or --source-column."
        )
    return which, several > 0


def _check_one(rows: _Rows, several: npt.NDArray[np.int64], what: str) -> None:
    """Raise UserError for a row that means more samples than one; `what` says how they differ and the way out."""
    if (several > 1).any():
        row = int(np.flatnonzero(several > 1)[0])
        raise UserError(
            f"'{rows.where}', {rows.row_word} {rows.lines[row]}: '{rows.names[row]}' means {several[row]} samples, which {what} of "
            "samples.parquet. Nothing was changed."
        )


def _check_seconds(keys: Names, sources: Names, rows: _Rows, which: npt.NDArray[np.int64]) -> None:
    """Raise UserError where a row's key is one sample and its source, or the last part of one, another's.

    A source that is no sample's is let pass, as where files were moved: the key says which sample is meant. `which`: for each sample
    the row that means it, or -1, (num_samples,).
    """
    sample_of = np.full(len(rows.names), -1, np.int64)
    sample_of[which[which >= 0]] = np.flatnonzero(which >= 0)
    said = sorted(
        (int(sample_of[name]), text, line) for name, text, line in rows.seconds if sample_of[name] >= 0
    )
    own = pa.array(_at(sources, np.array([sample for sample, _, _ in said], np.int64)), pa.string())
    wrong = []
    for part_of in (_whole, _last_part):
        given = pa.array([text for _, text, _ in said], pa.string())
        differ = np.flatnonzero(np.asarray(_pc.not_equal(given, part_of(own))))  # pyright: ignore[reportAttributeAccessIssue]
        said, own = [said[i] for i in differ], own.take(pa.array(differ))
        wanted = given.take(pa.array(differ)).unique()
        meant: dict[str, int] = {}
        for ids, at in _found(map(part_of, sources()), wanted):
            meant |= zip(wanted.take(pa.array(at)).to_pylist(), ids.tolist(), strict=True)
        wrong += [(line, sample, text, meant[text]) for sample, text, line in said if text in meant]
        # What is no whole name may be the last part of one.
        unknown = [i for i, (_, text, _) in enumerate(said) if text not in meant]
        said, own = [said[i] for i in unknown], own.take(pa.array(unknown, pa.int64()))
    if wrong:
        line, sample, text, other = min(wrong)
        key, source = rows.columns
        names = dict(zip(sorted((sample, other)), _at(keys, np.sort([sample, other])), strict=True))
        more = f" So it is in {plural(len(wrong), 'row')}." if len(wrong) > 1 else ""
        raise UserError(
            f"'{rows.where}', {rows.row_word} {line}: the {key} '{names[sample]}' is the sample "
            f"'{_at(sources, np.array([sample]))[0]}', and the {source} '{text}' is that of the sample '{names[other]}'.{more} Mend "
            f"the table, or choose the column that counts: --key-column {key} or --source-column {source}. Nothing was changed."
        )


def _found(
    batches: Iterator[pa.Array], wanted: pa.Array
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Sample ids, and the places among `wanted` of their names, for the samples that are wanted."""
    start = 0
    for batch in batches:
        at = _pc.index_in(batch, wanted)  # pyright: ignore[reportAttributeAccessIssue] (made at run time)
        yield start + np.flatnonzero(np.asarray(at.is_valid())), at.drop_null().to_numpy().astype(np.int64)
        start += len(batch)


def _last_part(names: pa.Array) -> pa.Array:
    return _pc.replace_substring_regex(names, "^.*/", "")  # pyright: ignore[reportAttributeAccessIssue]


def _whole(names: pa.Array) -> pa.Array:
    return names


def _at(names: Names, ids: npt.NDArray[np.int64]) -> list[str]:
    """The names of some samples, by their ids in ascending order."""
    found, start = [], 0
    for batch in names() if len(ids) else ():
        first, end = np.searchsorted(ids, (start, start + len(batch)))
        found += batch.take(pa.array(ids[first:end] - start)).to_pylist()
        start += len(batch)
    return found
