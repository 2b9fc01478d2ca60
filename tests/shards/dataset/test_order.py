import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.counter_hash import hash_key
from shards.dataset.order import (
    EPOCH_TAG,
    PLAN_TAG,
    _stable_argsort,
    block_order,
    epoch_order,
    rank_positions,
    steps_per_epoch,
)
from shards.errors import UserError

seeds = st.integers(0, 2**63 - 1)


def test_epoch_order_golden_values():
    assert epoch_order(10, seed=0, epoch=0).tolist() == [4, 0, 1, 8, 9, 7, 3, 6, 2, 5]


def test_epoch_order_equals_the_slow_formula():
    slow = sorted(range(50), key=lambda i: int(hash_key(7, 3, EPOCH_TAG, i)))
    assert epoch_order(50, seed=7, epoch=3).tolist() == slow


@given(st.integers(0, 300), seeds, st.integers(0, 1000))
def test_epoch_order_is_a_permutation(num_samples: int, seed: int, epoch: int):
    order = epoch_order(num_samples, seed, epoch)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(num_samples))


@given(seeds, st.integers(0, 1000))
def test_another_seed_epoch_or_tag_is_another_order(seed: int, epoch: int):
    order = epoch_order(100, seed, epoch)
    assert not np.array_equal(order, epoch_order(100, seed + 1, epoch))
    assert not np.array_equal(order, epoch_order(100, seed, epoch + 1))
    assert not np.array_equal(order, epoch_order(100, seed, epoch, PLAN_TAG))


@given(st.data())
def test_every_world_size_reads_the_same_global_batches(data: st.DataObject):
    world = data.draw(st.integers(1, 8))
    batch = world * data.draw(st.integers(1, 6))
    num_samples = data.draw(st.integers(batch, 200))
    order = epoch_order(num_samples, seed=1, epoch=2)
    for step in range(steps_per_epoch(num_samples, batch)):
        parts = [order[rank_positions(step, batch, rank, world)] for rank in range(world)]
        assert {len(part) for part in parts} == {batch // world}
        assert np.array_equal(np.concatenate(parts), order[step * batch : (step + 1) * batch])


def test_steps_drop_the_last_part_of_a_batch():
    assert [steps_per_epoch(n, 8) for n in (0, 7, 8, 15, 16)] == [0, 0, 1, 1, 2]


def test_a_batch_that_does_not_divide_names_both_numbers_and_the_next_multiples():
    with pytest.raises(UserError, match=r"100 does not divide among 8 ranks.*96 or 104"):
        rank_positions(0, 100, 0, 8)
    with pytest.raises(UserError, match=r"3 does not divide among 8 ranks.*such as 8"):
        rank_positions(0, 3, 0, 8)


def test_impossible_numbers_are_refused():
    with pytest.raises(UserError, match=r"-1"):
        epoch_order(-1, 0, 0)
    with pytest.raises(UserError, match=r"at least 1, got 0"):
        steps_per_epoch(10, 0)
    with pytest.raises(UserError, match=r"0\.\.1 for 2 ranks, got 2"):
        rank_positions(0, 4, 2, 2)


@given(st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 3), max_size=200))
def test_the_fast_sort_is_the_stable_one(values: list[int]):
    """Small values tie in the high bits, and many of them altogether."""
    keys = np.array(values, dtype=np.uint64)
    assert np.array_equal(_stable_argsort(keys), np.argsort(keys, kind="stable"))


def test_many_keys_that_tie_in_the_high_bits_are_sorted_whole():
    keys = np.random.default_rng(0).integers(0, 2**14, 5000, dtype=np.uint64)  # 5,000 indices fill 13 bits
    assert np.array_equal(_stable_argsort(keys), np.argsort(keys, kind="stable"))


@given(st.lists(st.integers(0, 12), max_size=20), seeds, st.integers(0, 50), st.integers(1, 25))
def test_block_order_visits_each_sample_once_window_by_window(
    sizes: list[int], seed: int, epoch: int, window: int
):
    order = block_order(np.array(sizes, dtype=np.int64), seed, epoch, window)
    assert np.array_equal(np.sort(order), np.arange(sum(sizes)))
    shard_of = np.repeat(np.arange(len(sizes)), sizes)[order]
    # Within a window samples mix, and no shard is in two windows: at most `window` shards lie between first and last use.
    for shard in set(shard_of.tolist()):
        at = np.flatnonzero(shard_of == shard)
        assert len(set(shard_of[at[0] : at[-1] + 1].tolist())) <= window


def test_block_order_is_another_each_epoch_and_mixes_within_a_window():
    sizes = np.full(8, 50)
    order = block_order(sizes, 1, 0, 4)
    assert np.array_equal(order, block_order(sizes, 1, 0, 4))
    assert not np.array_equal(order, block_order(sizes, 1, 1, 4))
    first = order[:200] // 50
    assert len(set(first.tolist())) == 4
    assert np.count_nonzero(np.diff(first)) > 100  # sorted by shard it would change 3 times


def test_a_window_over_all_shards_is_the_global_order():
    assert np.array_equal(block_order(np.array([5, 9, 1, 20]), 3, 2, 4), epoch_order(35, 3, 2))


def test_an_empty_window_is_refused():
    with pytest.raises(UserError, match=r"at least 1, got 0"):
        block_order(np.array([4]), 0, 0, 0)
