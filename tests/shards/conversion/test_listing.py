"""The plan's order and the listing's digest: functions of the entries, not of the order in which they were found."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.conversion import listing
from shards.conversion.listing import Survey
from shards.errors import UserError
from shards.sources.source import Source, entry_batch


class Given(Source):
    """Entries given as (name, label) pairs, in batches of `size`."""

    kind = "given"
    name = "given"

    def __init__(self, entries: list[tuple[str, str | None]], size: int = 3, extra: str = ""):
        self._entries = entries
        self._size = size
        self.extra_schema = pa.schema([(extra, pa.int64())] if extra else [])

    def entries(self) -> Iterator[pa.RecordBatch]:
        for start in range(0, len(self._entries), self._size):
            part = self._entries[start : start + self._size]
            columns = {"source": [name for name, _ in part], "label": [label for _, label in part]}
            columns["bytes"] = np.arange(start, start + len(part))
            if self.extra_schema.names:
                columns[self.extra_schema.names[0]] = list(range(start, start + len(part)))
            yield entry_batch(columns, self.extra_schema)


def names(survey: Survey) -> list[str]:
    return [name for table in survey.ordered() for name in table["source"].to_pylist()]


ENTRIES = [(f"{i}.jpg", f"c{i % 3}" if i % 4 else None) for i in range(40)]


def survey(
    entries: list[tuple[str, str | None]], seed: int = 0, **options
) -> tuple[listing.Listing, list[str]]:
    with Survey(Given(entries, **options), seed) as one:
        return one.listing, names(one)


@given(st.permutations(ENTRIES), st.integers(1, 50))
@settings(max_examples=20, deadline=None)
def test_the_order_found_does_not_matter(entries: list, size: int):
    wanted, order = survey([(name, label) for name, label in ENTRIES])
    assert sorted(order) == sorted(name for name, _ in ENTRIES)
    assert survey(entries, size=size)[1] == order
    assert wanted.classes == ["c0", "c1", "c2"]


def test_the_digest_sees_every_change():
    same, _ = survey(ENTRIES)
    # Of one entry some batches hold nothing but nulls.
    assert all(survey(ENTRIES, size=size)[0] == same for size in (1, 2, 7, 40))
    relabelled = [("0.jpg", "c9"), *ENTRIES[1:]]
    renamed = [("z.jpg", None), *ENTRIES[1:]]
    swapped = [(ENTRIES[1][0], ENTRIES[1][1]), ENTRIES[0], *ENTRIES[2:]]  # each then has the other's size
    digests = {survey(entries)[0].digest for entries in (ENTRIES, relabelled, renamed, swapped, ENTRIES[1:])}
    assert len(digests) == 5


def test_what_is_sorted_on_disk_comes_in_the_same_order(monkeypatch: pytest.MonkeyPatch, tmp_path):
    wanted = survey(ENTRIES, seed=3)
    monkeypatch.setattr(listing, "IN_MEMORY", 10)
    with Survey(Given(ENTRIES), 3, tmp_path) as one:
        assert list(tmp_path.iterdir())
        assert (one.listing, names(one)) == wanted
    assert list(tmp_path.iterdir()) == []


def test_classes_that_are_numbers_are_sorted_as_numbers():
    assert survey([("a", "10"), ("b", "9"), ("c", "-1"), ("d", None)])[0].classes == ["-1", "9", "10"]
    assert survey([("a", "10"), ("b", "9"), ("c", "x")])[0].classes == ["10", "9", "x"]
    assert survey([("a", "1"), ("b", "01")])[0].classes == ["01", "1"]


def test_long_columns_are_sorted_on_disk_early(monkeypatch: pytest.MonkeyPatch, tmp_path):
    wanted = survey(ENTRIES, seed=3)
    monkeypatch.setattr(listing, "IN_MEMORY_BYTES", 300)
    with Survey(Given(ENTRIES), 3, tmp_path) as one:
        assert list(tmp_path.iterdir())
        assert (one.listing, names(one)) == wanted


def test_a_hash_does_not_hang_on_its_neighbours():
    alone = [listing.hash_values(pa.array([value], pa.int64()))[0] for value in (1, None, -5)]
    assert listing.hash_values(pa.array([1, None, -5])).tolist() == alone


def test_a_name_listed_twice_is_refused():
    with pytest.raises(UserError, match=r"'5\.jpg' is listed twice"):
        survey([*ENTRIES, ("5.jpg", None)])


def test_a_column_of_the_tables_own_is_refused():
    assert survey(ENTRIES, extra="cloud")[0].num_images == 40
    with pytest.raises(UserError, match="a column 'width', a name that the sample table uses"):
        survey(ENTRIES, extra="width")


def test_names_as_labels_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(listing, "MAX_CLASSES", 2)
    with pytest.raises(UserError, match="more than 2 different labels"):
        survey(ENTRIES)
