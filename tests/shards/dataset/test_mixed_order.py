"""The order over several weighted sets: shares, passes and repetitions, as properties over random sizes and weights."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.dataset.order import mixed_order, mixed_shares

SETS = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9)), min_size=2, max_size=4)


def slow_shares(sizes: list[int], weights: list[int]) -> list[int]:
    """Hamilton's method in exact fractions."""
    exact = [Fraction(sum(sizes) * weight, sum(weights)) for weight in weights]
    shares = [share.numerator // share.denominator for share in exact]
    while sum(shares) < sum(sizes):
        rests = [one - share for one, share in zip(exact, shares, strict=True)]
        shares[rests.index(max(rests))] += 1
    return shares


@given(SETS)
def test_shares_are_those_of_the_largest_remainder(sets):
    sizes, weights = zip(*sets, strict=True)
    assert mixed_shares(sizes, weights) == slow_shares(sizes, weights)
    assert mixed_shares(sizes, sizes) == list(sizes)


def test_shares_by_hand():
    assert mixed_shares([100, 20], [1, 3]) == [30, 90]
    assert mixed_shares([5, 5], [1, 2]) == [3, 7]  # 3.33 and 6.67
    assert mixed_shares([1, 2], [1, 1]) == [2, 1]  # 1.5 each: the first
    # Rests of a third each, which differ in floats.
    assert mixed_shares([1, 1, 38, 40], [8, 8, 5, 9]) == [22, 21, 13, 24]


@settings(deadline=None, max_examples=50)
@given(SETS, st.integers(0, 2**40))
def test_every_epoch_has_its_shares_and_no_sample_comes_twice_before_all_came_once(sets, seed):
    sizes, weights = zip(*sets, strict=True)
    shares, total = mixed_shares(sizes, weights), sum(sizes)
    starts = np.cumsum([0, *sizes])
    seen = Counter()
    for epoch in range(7):
        order = mixed_order(sizes, shares, seed, epoch)
        assert len(order) == total
        times, positions = np.divmod(order, total)
        for k, share in enumerate(shares):
            inside = positions[(positions >= starts[k]) & (positions < starts[k + 1])]
            assert len(inside) == share
        for position in positions.tolist():
            seen[position] += 1
        for k, size in enumerate(sizes):
            counts = [seen[i] for i in range(starts[k], starts[k] + size)]
            assert max(counts) - min(counts) <= 1
            assert sum(counts) == (epoch + 1) * shares[k]
        # The occurrences of a sample within the epoch are numbered from 0.
        assert len(set(order.tolist())) == total
        for position, count in Counter(positions.tolist()).items():
            assert sorted(times[positions == position].tolist()) == list(range(count))


def test_the_order_is_a_function_of_its_arguments_and_of_each_of_them():
    sizes, shares = [30, 20], [20, 30]
    order = mixed_order(sizes, shares, 3, 5)
    assert order.tolist() == mixed_order(sizes, shares, 3, 5).tolist()
    others = [((sizes, shares), 4, 5), ((sizes, shares), 3, 6), ((sizes, [21, 29]), 3, 5)]
    assert all(order.tolist() != mixed_order(*sets, seed, epoch).tolist() for sets, seed, epoch in others)
    # Two sets of one size do not go through the same permutation.
    same = mixed_order([50, 50], [50, 50], 0, 0)
    assert same[same < 50].tolist() != (same[same >= 50] - 50).tolist()


@pytest.mark.parametrize("share", [1, 7, 10, 11, 35])
def test_samples_of_all_sets_lie_everywhere_in_an_epoch(share: int):
    order = mixed_order([10, 1000], [share, 1010 - share], 1, 3) % 1010
    where = np.flatnonzero(order < 10)
    assert len(where) == share
    if share > 30:
        assert abs(where.mean() / 1010 - 0.5) < 0.15
