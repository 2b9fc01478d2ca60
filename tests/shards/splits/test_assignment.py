"""Who goes to which side of a split: against slow references, and properties that must hold for any names and groups."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.counter_hash import uniform
from shards.splits.assignment import NONE, TEST, TRAIN, VAL, divide, join, label_fractions, strata_of_groups


def names(num: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, num, dtype=np.uint64)


def ones(num: int) -> np.ndarray:
    return np.ones(num, np.int64)


def zeros(num: int) -> np.ndarray:
    return np.zeros(num, np.int64)


def sides_of(num: int, val: float, test: float, *, seed: int = 0, exact: bool = True) -> np.ndarray:
    return divide(names(num), ones(num), zeros(num), seed=seed, val=val, test=test, exact=exact)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=30), st.data())
def test_joined_groups_are_connected_components(groups: list[int], data: st.DataObject) -> None:
    pixels = data.draw(st.lists(st.integers(0, 12), min_size=len(groups), max_size=len(groups)))
    own = np.array(groups, np.uint64) * np.uint64(7) + np.uint64(3)
    first = np.array([pixels.index(p) if pixels.index(p) < i else -1 for i, p in enumerate(pixels)])
    least, found = join(own, first)
    # Slow: merge sets until nothing changes.
    sets = [{i} for i in range(len(groups))]
    changed = True
    while changed:
        changed = False
        for a, b in itertools.combinations(sets, 2):
            if any(groups[i] == groups[j] or pixels[i] == pixels[j] for i in a for j in b):
                sets.remove(a)
                sets.remove(b)
                sets.append(a | b)
                changed = True
                break
    assert sorted(sorted(s) for s in sets) == sorted(
        np.flatnonzero(found == g).tolist() for g in range(len(least))
    )
    for g, key in enumerate(least):
        assert key == own[found == g].min()


@pytest.mark.parametrize(
    ("num", "val", "test"), [(1000, 0.1, 0.1), (997, 0.13, 0.29), (10, 0.3, 0.3), (7, 0.5, 0)]
)
def test_counts_are_as_near_as_can_be(num: int, val: float, test: float) -> None:
    counts = Counter(sides_of(num, val, test).tolist())
    assert abs(counts[VAL] - val * num) <= 0.5
    assert abs(counts[TEST] - test * num) <= 0.5
    assert counts[TRAIN] == num - counts[VAL] - counts[TEST]


def test_the_order_of_the_samples_has_no_part_in_it_and_the_seed_has() -> None:
    keys, mixed = names(500), np.random.default_rng(1).permutation(500)
    here = divide(keys, ones(500), zeros(500), seed=4, val=0.2, test=0.2, exact=True)
    there = divide(keys[mixed], ones(500), zeros(500), seed=4, val=0.2, test=0.2, exact=True)
    assert here[mixed].tolist() == there.tolist()
    assert (here != sides_of(500, 0.2, 0.2, seed=5)).sum() > 100


def test_few_move_when_images_are_added_and_none_with_stable() -> None:
    many = names(11_000)
    for exact, most in ((True, 100), (False, 0)):
        small, large = (
            divide(many[:n], ones(n), zeros(n), seed=0, val=0.1, test=0.1, exact=exact)
            for n in (10_000, 11_000)
        )
        moved = large[:10_000] != small
        assert moved.sum() <= most
        # Never from val to test or back.
        assert not (moved & (small != TRAIN) & (large[:10_000] != TRAIN)).any()


def test_stable_shares_hold_in_the_mean_and_nest() -> None:
    small, large = (sides_of(20_000, val, 0.2, exact=False) for val in (0.1, 0.3))
    assert abs((small == VAL).mean() - 0.1) < 0.01
    assert abs((small == TEST).mean() - 0.2) < 0.01
    assert ((large == VAL) | (small != VAL)).all()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=2, max_size=60), st.floats(0.05, 0.45))
def test_groups_of_any_size_come_within_half_of_the_next(sizes: list[int], share: float) -> None:
    num = len(sizes)
    sides = divide(names(num), np.array(sizes), zeros(num), seed=0, val=share, test=0, exact=True)
    got, want = sum(s for s, side in zip(sizes, sides, strict=True) if side == VAL), share * sum(sizes)
    left = [s for s, side in zip(sizes, sides, strict=True) if side == TRAIN]
    assert left
    # Whatever is left outside brings it no nearer (the last group of all is kept for train).
    if len(left) > 1 and got < want:
        assert min(left) >= (want - got) * (2 - 1e-9)


def test_a_huge_group_does_not_keep_val_empty() -> None:
    num = 300
    sizes = ones(num)
    keys = names(num)
    sizes[np.argsort(uniform(keys))] = 1
    for big in range(0, num, 37):
        sizes[:] = 1
        sizes[big] = 700
        sides = divide(keys, sizes, zeros(num), seed=0, val=0.1, test=0.1, exact=True)
        assert sizes[sides == VAL].sum() == 100
        assert sizes[sides == TEST].sum() == 100
        assert sides[big] == TRAIN


def test_strata_get_their_share_and_rounding_is_paid_back() -> None:
    strata = np.repeat(np.arange(50), 13)  # 1.3 of each class are wanted
    num = len(strata)
    sides = divide(names(num), ones(num), strata, seed=0, val=0.1, test=0.1, exact=True)
    for side in (VAL, TEST):
        counts = np.bincount(strata[sides == side], minlength=50)
        assert set(counts.tolist()) <= {1, 2}
        assert abs(counts.sum() - 65) <= 1
    single = divide(names(20), ones(20), np.arange(20), seed=0, val=0.4, test=0.4, exact=True)
    assert (single == TRAIN).all()  # the last of a class stays


def test_a_group_counts_by_its_most_frequent_value() -> None:
    groups = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2])
    strata = np.array([5, 5, 1, 3, 2, 0, 4, 4, 0])
    assert strata_of_groups(groups, strata, 3).tolist() == [5, 2, 0]


def test_label_fractions_nest_and_leave_no_class_out() -> None:
    sizes = [100, 3, 250, 1, 40]
    labels = np.repeat(np.arange(5), sizes)
    least = label_fractions(names(len(labels)), labels, (0.01, 0.1, 0.5), seed=0)
    inside = {share: np.bincount(labels[least <= share], minlength=5).tolist() for share in (0.01, 0.1, 0.5)}
    # Of 10 %: 10; 0.3, so the one there must be, which pays 0.7 too much; 25 - 0.7; 0.1 + 0.3, so the one; 4 - 0.6.
    assert inside[0.01] == [1, 1, 2, 1, 1]
    assert inside[0.1] == [10, 1, 24, 1, 3]
    assert inside[0.5] == [50, 1, 125, 1, 20]
    assert np.isnan(least).sum() == len(labels) - sum(inside[0.5])
    other = label_fractions(names(len(labels)), labels, (0.01, 0.1, 0.5), seed=1)
    assert (np.isnan(other) != np.isnan(least)).any()


def test_all_of_the_labels() -> None:
    labels = np.repeat([0, 1], [3, 4])
    assert label_fractions(names(7), labels, (1.0,), seed=0).tolist() == [1.0] * 7


def test_a_split_is_the_same_in_every_version() -> None:
    keys = np.arange(1, 13, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    exact = divide(keys, ones(12), zeros(12), seed=0, val=0.25, test=0.25, exact=True)
    stable = divide(keys, ones(12), zeros(12), seed=0, val=0.25, test=0.25, exact=False)
    assert exact.tolist() == [0, 2, 2, 1, 2, 0, 1, 0, 0, 0, 0, 1]
    assert stable.tolist() == [0, 2, 2, 0, 2, 0, 1, 0, 0, 0, 0, 0]
    least = label_fractions(keys, np.repeat([0, 1], 6), (0.2, 0.5), seed=0)
    assert np.nan_to_num(least, nan=1).tolist() == [
        0.5,
        1.0,
        0.5,
        1.0,
        0.2,
        1.0,
        0.5,
        0.5,
        1.0,
        1.0,
        1.0,
        0.2,
    ]


def test_none_is_no_side() -> None:
    assert NONE not in (TRAIN, VAL, TEST)
