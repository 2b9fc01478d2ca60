"""Splits that somebody else has made: files with the names of images, a line each."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from shards.errors import UserError

MAX_LISTS = 100  # a split's number is one byte
_SHOWN = 3
_COMPARED = 20_000  # names among which the nearest to an unknown one is looked for
Batches = Callable[[], Iterator[pa.RecordBatch]]


def read_lists(files: Sequence[str]) -> dict[str, list[str]]:
    """The names in each file, by the split it stands for: `val=lists/v1.txt`, or the file's own name without its ending.

    Empty lines and a leading `./` do not count. Raise UserError for a file that cannot be read, and for a name that stands twice.
    """
    lists: dict[str, list[str]] = {}
    where: dict[str, str] = {}
    for text in files:
        name, given, path = text.partition("=")
        if not given:
            name, path = Path(text).stem, text
        if not name or not all(c.isalnum() or c in "-_." for c in name):
            raise UserError(
                f"--by-list '{text}': '{name}' is no name for a split; use letters, digits, - _ and ., as in val={path}."
            )
        if name in lists:
            raise UserError(f"--by-list names the split '{name}' twice: name one NAME=FILE.")
        try:
            lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise UserError(f"--by-list '{path}' cannot be read ({reason}).") from None
        names = [line.strip().removeprefix("./") for line in lines if line.strip()]
        if not names:
            raise UserError(f"--by-list '{path}' holds no names: a line each is wanted.")
        for image in names:
            if image in where:
                raise UserError(
                    f"'{image}' is listed twice, for '{where[image]}' and for '{name}': leave it in one of them."
                )
            where[image] = name
        lists[name] = names
    if len(lists) > MAX_LISTS:
        raise UserError(f"--by-list has {len(lists)} files, more than {MAX_LISTS}.")
    return lists


def sides_of_lists(
    lists: dict[str, list[str]], batches: Batches, num_samples: int
) -> tuple[npt.NDArray[np.int8], list[str]]:
    """The list that each sample stands in, (num_samples,) int8, -1 where in none; and what the user should know.

    A name is an image's whole name, or, where no image is called so, its last part, if only one image has that. `batches` gives the
    samples' names in the column `source`. Raise UserError for names that are not found or mean several images.
    """
    wanted = pa.array([name for names in lists.values() for name in names])
    side_of = np.repeat(np.arange(len(lists), dtype=np.int8), [len(names) for names in lists.values()])
    sides = np.full(num_samples, -1, np.int8)
    found = np.zeros(len(wanted), np.int64)
    _match(wanted, side_of, (batch["source"] for batch in batches()), sides, found)
    short = np.flatnonzero(found == 0)
    if len(short):
        last_parts = (_last_part(batch["source"]) for batch in batches())
        again = np.zeros(len(short), np.int64)
        _match(wanted.take(pa.array(short)), side_of[short], last_parts, sides, again)
        found[short] = again
    missing, several = np.flatnonzero(found == 0), np.flatnonzero(found > 1)
    if len(missing):
        names = wanted.take(pa.array(missing[:_SHOWN])).to_pylist()
        raise UserError(_not_found(names, len(missing), len(wanted), batches))
    if len(several):
        name = wanted[int(several[0])].as_py()
        raise UserError(
            f"--by-list: '{name}' means {found[several[0]]} images, which differ in their folders: give whole names, as in the column "
            "'source' of samples.parquet."
        )
    left = int((sides < 0).sum())
    if num_samples - left < len(wanted):
        raise UserError("--by-list: an image is listed twice, by its whole name and by its last part.")
    return sides, [f"{left:,} images stand in none of the lists and belong to no split."] if left else []


def _match(
    wanted: pa.Array,
    side_of: npt.NDArray[np.int8],
    names: Iterable[pa.Array],
    sides: npt.NDArray[np.int8],
    found: npt.NDArray[np.int64],
) -> None:
    """Enter the sides of the samples whose names are wanted, and count how often each wanted name was found."""
    start = 0
    for batch in names:
        at = pc.index_in(batch, wanted)  # pyright: ignore[reportAttributeAccessIssue] (made at run time)
        here = np.flatnonzero(np.asarray(at.is_valid()))
        which = at.drop_null().to_numpy()
        sides[start + here] = side_of[which]
        np.add.at(found, which, 1)
        start += len(batch)


def _last_part(names: pa.Array) -> pa.Array:
    return pc.replace_substring_regex(names, "^.*/", "")  # pyright: ignore[reportAttributeAccessIssue]


def _not_found(names: list[str], num_missing: int, num_wanted: int, batches: Batches) -> str:
    known = itertools.chain.from_iterable(batch["source"].to_pylist() for batch in batches())
    close = difflib.get_close_matches(names[0], itertools.islice(known, _COMPARED), n=1)
    hint = f" The nearest name to the first is '{close[0]}'." if close else ""
    shown = ", ".join(f"'{name}'" for name in names) + (" ..." if num_missing > len(names) else "")
    return (
        f"--by-list: {num_missing:,} of {num_wanted:,} names are not among the images: {shown}.{hint} Names are those of the column "
        "'source' of samples.parquet; refused images (quarantine.jsonl) are not among them."
    )
